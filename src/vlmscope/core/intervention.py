"""Records of interventions: what was done, what the model then said, and how sure that is. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vlmscope.core.records import FeatureId, PatchBox, Positions

MODES = ("direct", "frozen_attention", "free")


@dataclass(frozen=True)
class Rate:
    """A share of cases, or a mean over them, with its bootstrap 95 % interval.

    `control` is the same measure under the matched controls.
    """

    value: float
    ci_low: float
    ci_high: float
    cases: int
    control: float | None = None

    def metrics(self, name: str) -> dict[str, float]:
        """Metrics: its value as `name`, with `_ci_low`, `_ci_high` and, where there is one, `_control`."""
        found = {name: self.value, f"{name}_ci_low": self.ci_low, f"{name}_ci_high": self.ci_high}
        return found if self.control is None else found | {f"{name}_control": self.control}


@dataclass(frozen=True)
class FlipRow:
    """One row of the table of results."""

    method: str  # 'steer', 'patch' or 'ablate'
    mode: str  # one of MODES, or 'generate' (token by token, with a KV cache)
    question: str  # 'name', 'colour', 'cover' or 'worst' (of the questions)
    scope: str  # where it acted: 'all', 'no_last_layer', 'no_last_position', 'role_image', 'role_question', ...
    rate: Rate
    n_features: int
    changed: Rate | None = None  # how often the answer was another than before, where that was counted
    p: float | None = None  # that no more cases than under the control flip (change, for 'ablate')
    q: float | None = None  # p corrected for all rows of the table (false discovery rate)


@dataclass(frozen=True)
class AnswerExample:
    """One picture before and after: top words with probabilities, greedy answer texts."""

    image_png: bytes
    question: str
    intervention: str
    before: str
    after: str
    probs_before: tuple[tuple[str, float], ...]
    probs_after: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Curve:
    """A dose-response curve: `y[i]` with interval at `x[i]`, for one named series."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, name: str, x: Iterable[float], rates: Sequence[Rate]) -> Curve:
        """Rates at `x` with their intervals."""
        columns = (x, *([getattr(rate, key) for rate in rates] for key in ("value", "ci_low", "ci_high")))
        return cls(name, *(tuple(map(float, column)) for column in columns))


@dataclass(frozen=True)
class FeatureExample:
    """A top activating example of a feature: where it fired and how strongly.

    image_png is None for text alone; patch_boxes with activations cover the soft tokens (activation grid);
    tokens with token_activations is the text window; peak is the index of the strongest position among all tokens.
    """

    activation: float
    caption: str
    image_png: bytes | None
    patch_boxes: tuple[PatchBox, ...] = ()
    patch_activations: tuple[float, ...] = ()
    tokens: tuple[str, ...] = ()
    token_activations: tuple[float, ...] = ()


@dataclass(frozen=True)
class CircuitFeature:
    """A member of a supernode with the evidence for it."""

    feature: FeatureId
    role: str
    contrast: float  # mean activation on the supernode's concept minus on the other one, at `role`
    influence: float  # mean over traced graphs of its total influence on the logit difference; 0 when it was in none
    examples: tuple[FeatureExample, ...] = ()
    top_logits: tuple[tuple[str, float], ...] = ()
    bottom_logits: tuple[tuple[str, float], ...] = ()
    label: str = ""  # what it is called, where that is known


@dataclass(frozen=True)
class Supernode:
    """A named group of features, for example 'mars'."""

    name: str
    features: tuple[CircuitFeature, ...] = field(default=())  # best first
    positions: Positions | None = None  # where in a prompt it is meant; everywhere when None
    chosen: str = ""  # how its members were chosen, in words


@dataclass(frozen=True)
class CircuitEdge:
    """A direct effect between two parts of a circuit, mean over `graphs` attribution graphs."""

    source: str  # a supernode, or what is around it ("picture", "answer: mars")
    target: str
    # Sum of the graph's edges from all members of the source to all of the target, at their positions: in units of the
    # target's pre-activations, of an answer in logits.
    weight: float
    # Weight over the sum of the absolute edges from all sources into the target, -1 to 1, so that edges into different
    # targets can be compared.
    share: float
    graphs: int = 1  # in how many of the graphs the target is active
