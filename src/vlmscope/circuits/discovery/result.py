"""What discovery finds: typed records, and the circuit in the form in which circuits are saved.

Legend: N nodes, E edges, K sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.discovery.nodes import Kind, Nodes
from vlmscope.core.intervention import CircuitFeature, Rate, Supernode
from vlmscope.core.records import Positions
from vlmscope.metrics.prediction import FaithfulnessCurve


@dataclass(frozen=True)
class FoundCircuit:
    """The smallest circuit that was found, chosen on training pairs.

    Attributes:
        by: the ranking that it was cut from.
        members: node numbers, best first.
        cut: how many first nodes of the ranking reached the wanted share, before members were pruned.
        train: its f on the training pairs it was chosen on, free.
        test: mode -> its f on test pairs; `control`: the mean f of matched random circuits, None where the circuit has
            more than half of the features.
        ablated: mode -> f of the whole model without the circuit's features, which should be low; `control`: without
            as many matched features.
        losses: member -> loss of f when it alone is dropped, on training pairs, of those that were tried.
        groups: (layer, role) -> loss of f on test pairs when the circuit's nodes there are dropped.
    """

    by: str
    members: np.ndarray
    cut: int
    train: Rate
    test: dict[str, Rate]
    ablated: dict[str, Rate]
    losses: dict[int, float]
    groups: dict[tuple[int, str], float]


@dataclass(frozen=True)
class Stability:
    """How often the same features are chosen.

    Attributes:
        jaccard: method -> mean overlap |A and B| / |A or B| between the choices of bootstrap resamples of the pairs.
        other_pairs: the same between training and test pairs (EAP-IG).
        chance: the same between random choices of as many features.
        frequency: [N], share of resamples in which EAP-IG chooses a node.
    """

    jaccard: dict[str, float]
    other_pairs: float
    chance: float
    frequency: np.ndarray


@dataclass(frozen=True)
class EdgesFound:
    """Edges, in the frozen local replacement model.

    Attributes:
        source: [E] node numbers, or `REST` and `OTHER` groups (`edges.py`).
        target: [E] node numbers, or `ANSWER`.
        score: [E], EAP-IG's, mean over training pairs.
        influence: [E], mean over graphs.
        curves: method -> f over the share of edges kept, on test pairs.
        smallest: fewest edges by EAP-IG that reach the wanted share on training pairs.
        smallest_test: their f on test pairs.
        correlation: Spearman's between |score| and influence, over edges in which either is not 0.
        rest: the rest's share of the change of m between the sides, what frozen edges do not carry.
    """

    source: np.ndarray
    target: np.ndarray
    score: np.ndarray
    influence: np.ndarray
    curves: dict[str, FaithfulnessCurve]
    smallest: int
    smallest_test: Rate
    correlation: float
    rest: float


@dataclass(frozen=True)
class Discovery:
    """Everything about one question.

    Attributes:
        question: its name.
        nodes: the candidates.
        scores: method -> [N] scores; of `greedy`, minus the rank.
        curves: mode -> method -> f over the share of nodes kept, on test pairs.
        circuit: the smallest circuit.
        stability: of the choice of features.
        correlation: Spearman's between |EAP-IG| and influence in graphs, over nodes in which either is not 0.
        edges: None if they were left out.
        change: [N], mean change of a feature's activation from counterfactual to original, a mean over pairs summed
            over the positions of its role; 0 for other nodes.
        train_pairs: how many chose.
        test_pairs: how many judged.
    """

    question: str
    nodes: Nodes
    scores: dict[str, np.ndarray]
    curves: dict[str, dict[str, FaithfulnessCurve]]
    circuit: FoundCircuit
    stability: Stability
    correlation: float
    edges: EdgesFound | None
    change: np.ndarray
    train_pairs: int
    test_pairs: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def features(self) -> tuple[CircuitFeature, ...]:
        """The circuit's features, best first: `contrast` is the change of activation from counterfactual to original,
        `influence` the EAP-IG score in logits (0 where it was not asked for)."""
        score = self.scores.get("eap_ig", np.zeros(len(self.nodes)))
        return tuple(
            CircuitFeature(
                self.nodes.feature(row),
                self.nodes.roles[self.nodes.role[row]],
                float(self.change[row]),
                float(score[row]),
            )
            for row in self.circuit.members.tolist()
            if self.nodes.kind[row] == Kind.FEATURE
        )

    def to_circuit(self, model: str = "", n_features: Mapping[int, int] | None = None) -> Circuit:
        """One supernode a position role, `<question>_<role>`, which is meant at that role alone."""
        groups: dict[str, list[CircuitFeature]] = {}
        for member in self.features():
            groups.setdefault(f"{self.question}_{member.role}", []).append(member)
        nodes = {
            name: Supernode(name, tuple(found), Positions((found[0].role,)), f"discovery, cut from {self.circuit.by}")
            for name, found in groups.items()
        }
        return Circuit(nodes, {}, model=model, n_features=n_features)
