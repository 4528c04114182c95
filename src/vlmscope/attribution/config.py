"""How an attribution graph is made: a plain record, free of torch, so that Hydra can register it."""

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError

_CHOICES = {
    "patch_effect": ("total", "direct"),
    "patch_baseline": ("grey", "mean"),
    "patch_rule": ("frozen", "gradient"),
}


@dataclass
class AttributionConfig:
    """Settings of `vlmscope.attribution.trace`.

    Attributes:
        max_nodes: at most this many features get a row of their own; the rest is summed into one source a layer.
        logit_mass: the targets are the smallest set of logits whose probabilities reach this,
        max_logits: but at most this many.
        token_ids: more logit targets, whatever their probability.
        node_threshold: share of influence that the pruned graph's nodes reach.
        edge_threshold: share of edge influence that its edges reach.
        batch_size: targets swept at once; it bounds memory and does not change the graph.
        update_every: batches between two rankings of the features, when not all fit.
        dtype: "float32" or "float64", of the sweep and of the stored weights; "model" takes the model's,
            which must be one of these.
        patches: whether the answer's targets are followed below the soft tokens, to the patches of each picture.
        patch_effect: what is followed: "total" (active features respond) or "direct" (the graph's own edges).
        patch_baseline: what a patch counts against: "grey" (pixels 0 after normalisation) or "mean" (of its picture).
        patch_rule: "frozen" (complete; docs/maths.md) or "gradient" (the plain gradient, for comparison).
    """

    max_nodes: int = 7500
    logit_mass: float = 0.95
    max_logits: int = 10
    token_ids: list[int] = field(default_factory=list)
    node_threshold: float = 0.8
    edge_threshold: float = 0.98
    batch_size: int = 64
    update_every: int = 4
    dtype: str = "float32"
    patches: bool = False
    patch_effect: str = "total"
    patch_baseline: str = "grey"
    patch_rule: str = "frozen"

    def check(self) -> None:
        """Raise a `UserError` that names the first setting that makes no sense."""
        for name in ("max_nodes", "max_logits", "batch_size", "update_every"):
            if getattr(self, name) < 1:
                raise UserError(f"attribution.{name} = {getattr(self, name)} must be at least 1; correct it")
        for name in ("logit_mass", "node_threshold", "edge_threshold"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UserError(f"attribution.{name} = {getattr(self, name)} must lie in (0, 1]; correct it")
        if self.dtype not in ("float32", "float64", "model"):
            raise UserError(f"attribution.dtype = {self.dtype!r} must be float32, float64 or model; correct it")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                choices = " or ".join(known)
                raise UserError(f"attribution.{name} = {getattr(self, name)!r} must be {choices}; correct it")
