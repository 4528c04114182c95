"""Settings of circuit discovery: a plain record, free of torch, so that Hydra can register it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError

METHODS = ("graph", "eap_ig", "greedy", "activation", "random")
MODES = ("free", "frozen_attention")


@dataclass
class DiscoveryConfig:
    """How a circuit is searched on training pairs and judged on test pairs (docs/circuits.md).

    Attributes:
        question: which question of the pairs; every question whose answer differs when None.
        keep: the share of the logit difference that the circuit must keep.
        methods: rankings whose curves are drawn: graph, eap_ig, greedy, activation, random.
        by: the ranking that the circuit is cut from; the one that needs fewest nodes on training pairs when None.
        modes: free, frozen_attention.
        graphs: training pairs whose two sides are traced.
        steps: inputs between the two sides at which gradients are taken.
        edge_nodes: features that get their incoming edges, those of most effect.
        edge_pairs: pairs, of training and of test ones, on which circuits of edges are run; 0 leaves edges out.
        draws: of matched random circuits.
        minimality: members that are dropped one by one; 0 leaves that out.
        threshold: members whose loss of faithfulness is below this are pruned.
        resamples: bootstrap resamples of the pairs for stability.
        seed: of everything random.
    """

    question: str | None = None
    keep: float = 0.8
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    by: str | None = None
    modes: list[str] = field(default_factory=lambda: list(MODES))
    graphs: int = 10
    steps: int = 5
    edge_nodes: int = 200
    edge_pairs: int = 20
    draws: int = 3
    minimality: int = 40
    threshold: float = 0.001
    resamples: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise UserError(f"discovery.keep={self.keep}: it is a share; choose a number above 0 and up to 1")
        for key, values, known in (("methods", self.methods, METHODS), ("modes", self.modes, MODES)):
            if not values or any(value not in known for value in values):
                raise UserError(f"discovery.{key}={list(values)}: choose some of {', '.join(known)}")
        if self.by is not None and self.by not in self.methods:
            raise UserError(f"discovery.by={self.by}: it must be one of discovery.methods, {', '.join(self.methods)}")
        least = {"graphs": 1, "steps": 1, "edge_nodes": 1, "edge_pairs": 0, "draws": 1, "minimality": 0, "resamples": 2}
        for key, smallest in least.items():
            if getattr(self, key) < smallest:
                raise UserError(f"discovery.{key}={getattr(self, key)}: it must be at least {smallest}")
