"""Settings of attribution graphs: a plain record, free of torch, so that Hydra can register it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vlmscope.core.errors import UserError, check_choice, check_least

# What a graph can explain instead of the top logits.
_QUESTIONS = ("tokens", "difference", "answer", "answer_tokens", "feature", "attention")
_CHOICES = {
    "dtype": ("float32", "float64", "model"),
    "weights": ("uniform", "probability", "surprise"),
    "choice": ("influence", "total_effect"),
    "bias": ("node", "fold"),
    "patch_effect": ("total", "direct"),
    "patch_baseline": ("grey", "mean"),
    "patch_rule": ("frozen", "gradient"),
}
_IN_CACHE = 1 << 18  # numbers of a gradient that fit into a core's cache
_FEATURE = re.compile(r"([LT]\d+/\d+)(?:@(\w+))?", re.ASCII)
_HEAD = re.compile(r"L(\d+)H(\d+)(?:@(\w+)(?::(\w+))?)?", re.ASCII)


def parse_feature(text: str) -> tuple[str, str]:
    """Read `L5/123@17` as the feature's id and its position, "max" by default."""
    match = _FEATURE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"attribution.feature={text!r}: write L<layer>/<index>@<max, last or a position>: L5/123@max")
    return match[1], match[2] or "max"


def parse_head(text: str) -> tuple[int, int, str, str]:
    """Read `L5H2@17:4` as layer, head, query and key; by default "last" and "max" (the key with most attention)."""
    match = _HEAD.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"attribution.attention={text!r}: write auto, or L<layer>H<head>@<query>:<key> with query = last or a "
            "position and key = max, last or a position, such as L5H2@last:max"
        )
    return int(match[1]), int(match[2]), match[3] or "last", match[4] or "max"


@dataclass
class AttributionConfig:
    """Settings of `vlmscope.attribution.trace` (docs/attribution.md).

    What is explained is the top logits (`logit_mass`, `max_logits`, and `token_ids` besides) or one of: `tokens`,
    `difference`, `answer` or `answer_tokens`, `feature`, `attention`.
    """

    # at most this many features get a row of their own; the rest is summed into one source a layer
    max_nodes: int = 7500
    logit_mass: float = 0.95  # the targets are the smallest set of logits whose probabilities reach this,
    max_logits: int = 10  # but at most this many
    token_ids: list[int] = field(default_factory=list)  # more logit targets, whatever their probability
    # explain the logits of exactly these tokens, each a word or `id:NUMBER`
    tokens: list[str] = field(default_factory=list)
    # two tokens; explain the first one's logit minus the second one's
    difference: list[str] = field(default_factory=list)
    answer: str | None = None  # explain every token of this answer after the prompt
    answer_tokens: int = 0  # explain the model's own answer, at most this many tokens of it
    # what the logits of `tokens` and of an answer are worth: "uniform", "probability", or "surprise" (in proportion to
    # -log p)
    weights: str = "uniform"
    # explain why a feature is active: `L5/123@max` (where it is strongest), `@last` or `@17`; with `tower` a feature of
    # the vision tower too, `T0/123@max` or at a position of the graph
    feature: str | None = None
    # explain a head's score before the softmax: `L5H2@query:key`, or "auto" for the head that carries most of the flow
    # in the graph of the top logits
    attention: str | None = None
    # the strongest kept edges that are split by attention heads, at most; 0: no heads and no scores of attention
    heads: int = 5000
    n_heads: int = 4  # heads, those that carry most, whose score is split into pairs of sources
    n_pairs: int = 10  # pairs, queries and keys that are listed for a score
    node_threshold: float = 0.8  # share of influence that the pruned graph's nodes reach
    edge_threshold: float = 0.98  # share of edge influence that its edges reach
    # how biases count for influence, pruning and scores: "node", as sources of their own, or "fold", not at all
    # (circuit-tracer's convention, with which numbers compare); the edges are the same
    bias: str = "node"
    # which features get a row when not all do: those with the most "influence" through the rows so far, or the largest
    # "total_effect" on the targets, which is known before any row
    choice: str = "influence"
    # targets swept at once, at most (None: see `targets_at_once`); up to rounding it does not change the graph
    batch_size: int | None = None
    # devices among which the rows of a graph are divided, such as [cuda:0,cuda:1]: each holds the model and its
    # transcoders. None: the model's own. Processes that torchrun starts divide them too
    devices: list[str] = field(default_factory=list)
    update_every: int = 256  # rows between two rankings by influence
    # memory for making and pruning the graph next to the frozen model, in 10^9 bytes: the batches get smaller, and
    # edges that do not fit go to a file. No bound when None
    memory_gb: float | None = None
    # "float32" or "float64", of the sweep and of the stored weights; "model" takes the model's, which must be one of
    # these
    dtype: str = "float32"
    # whether the answer's targets are followed below the soft tokens, to the patches of each picture
    patches: bool = False
    # whether the graph goes on below the soft tokens, through features of the vision tower to the patches; it needs
    # transcoders of the tower (transcoder.tower)
    tower: bool = False
    tower_nodes: int = 4000  # with `tower`, at most so many features get a row, those of the tower and the decoder
    # what is followed: "total" (active features respond) or "direct" (the graph's own edges)
    patch_effect: str = "total"
    # what a patch counts against: "grey" (pixels 0 after normalisation) or "mean" (of its picture)
    patch_baseline: str = "grey"
    patch_rule: str = "frozen"  # "frozen" (complete; docs/maths.md) or "gradient" (the plain gradient, for comparison)
    # the run folder of a study whose labels (docs/labels.md) name the features in graphs, figures, tables and reports;
    # by default the study that is shipped with model and transcoders, "none": no labels
    labels: str | None = None
    tower_labels: str | None = None  # the same for features of the vision tower

    def check(self) -> None:
        """Raise a `UserError` that names the first setting that makes no sense."""
        check_least("attribution", self, max_nodes=1, max_logits=1, batch_size=1, update_every=1, n_heads=1, n_pairs=1)
        check_least("attribution", self, answer_tokens=0, heads=0, tower_nodes=1)
        for name in ("logit_mass", "node_threshold", "edge_threshold"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UserError(f"attribution.{name} = {getattr(self, name)} must lie in (0, 1]; correct it")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise UserError(f"attribution.memory_gb = {self.memory_gb} must be above 0; correct it or leave it out")
        for name, choices in _CHOICES.items():
            check_choice(f"attribution.{name}", getattr(self, name), choices)
        if self.asked != "logits" and self.token_ids:
            raise UserError(
                f"attribution.token_ids adds to the top logits, which attribution.{self.asked} replaces; leave one out"
                " (a token by its number is id:NUMBER in attribution.tokens)"
            )
        if self.difference and len(self.difference) != 2:
            raise UserError(
                f"attribution.difference has {len(self.difference)} tokens, and takes two: [mars,earth] is mars - earth"
            )
        if self.feature:
            name, _ = parse_feature(self.feature)
            if name.startswith("T") and (not self.tower or self.patches):
                raise UserError(
                    f"attribution.feature={name} is explained in graphs that begin at the patches: add "
                    "attribution.tower=true, and leave out patches=true"
                )
        if self.attention and self.attention != "auto":
            parse_head(self.attention)

    @property
    def asked(self) -> str:
        """What is explained: "logits" for the top logits, else the name of the setting that asks for something else."""
        questions = [name for name in _QUESTIONS if getattr(self, name)]
        if len(questions) > 1:
            first, second = questions[:2]
            raise UserError(f"attribution.{first} and attribution.{second}: a graph explains one; leave one out")
        return questions[0] if questions else "logits"

    def targets_at_once(self, n_positions: int, width: int) -> int:
        """`batch_size`, or as many targets as keep their gradient in a core's cache, between 64 and 512.

        The gradient is `[positions, targets, width]`. Small prompts are bound by the number of calls, wide ones
        by memory: of 64, 256 and 512 targets the best on one thread was 512 (21 ms, 64: 36 ms) at 8 positions of width
        64, and 64 at 16 positions of width 256.
        """
        return self.batch_size or min(max(_IN_CACHE // (n_positions * width), 64), 512)


@dataclass
class WhereConfig:
    """Settings of attention rollout (docs/where.md); those of the vision path are in `attribution`."""

    last_layers: int = 4  # tower layers, counted back from the last one whose output reaches the decoder
    head_share: float = 0.3  # share of a layer's heads that count, those of lowest entropy
    identity: bool = True  # whether the residual stream counts as much as the attention
    # how rows of patches become those of soft tokens: "max" (the paper's code) or "mean" (as the model pools)
    pool: str = "max"
    side: int = 8  # cells down and across the picture, to delete and to insert
    # numbers of cells at which a curve is measured, besides none and all
    counts: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32])
    draws: int = 3  # random orders a scene

    def check(self) -> None:
        """Raise a `UserError` that names the first setting that makes no sense."""
        check_least("where", self, last_layers=1, side=1, draws=1)
        check_choice("where.pool", self.pool, ("max", "mean"))
        if not 0.0 < self.head_share <= 1.0:
            raise UserError(f"where.head_share={self.head_share}: it must be above 0 and at most 1; the paper uses 0.3")
        if not all(0 < count < self.side**2 for count in self.counts):
            raise UserError(f"where.counts={self.counts}: choose numbers of cells from 1 to {self.side**2 - 1}")
