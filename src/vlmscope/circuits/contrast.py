"""Finding a circuit by contrast: features whose mean activation differs between two concepts, confirmed in graphs.

For each feature the difference of means (concept minus other) is taken by question and position role and weighted by
the norm of what it writes, since that is how far the feature moves the residual stream. Each question gives its own
best features (a feature that writes `red` fires at the last position of one question only), each counted at its role
of largest difference; the supernode is their union. Candidates then need influence on the answer in at least one
attribution graph of their concept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import Trace, trace
from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.selectors import mean_shares
from vlmscope.core.graph import NodeKind
from vlmscope.core.intervention import CircuitFeature, Supernode
from vlmscope.core.records import FeatureId
from vlmscope.features.readouts import RoleMeans, role_means, top_and_bottom_logits
from vlmscope.features.top_examples import StudyItem, top_examples
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import TranscoderSet

CONFIRMING = 0.98  # share of influence whose nodes confirm a feature
CANDIDATES = 4  # times `per_layer`: below these the contrast says nothing, whatever the influence
Influence = Mapping[FeatureId, float]  # a feature's share of influence on the answer, mean over graphs


def contrast_circuit(
    transcoders: TranscoderSet,
    means: Mapping[str, Mapping[str, RoleMeans]],
    influence: Mapping[str, Influence],
    per_layer: int,
    model: str,
) -> tuple[Circuit, dict[str, float]]:
    """Build a circuit of two supernodes from the means of two concepts.

    Args:
        transcoders: whose features are compared.
        means: concept -> question -> role means on its training pictures; exactly two concepts, the same questions.
        influence: concept -> influence of features in graphs of its pictures; a feature that is missing has none.
        per_layer: how many features a layer, concept and question; questions may share them.
        model: the model's name, by which a circuit of another one is refused.

    Returns:
        The circuit, and the share of the candidates that the graphs confirmed, as `circuit/<concept>/confirmed_frac`.
        Its levels are keyed by `<question>:<role>`.
    """
    first, second = means
    supernodes: dict[str, Supernode] = {}
    levels: dict[str, dict[str, dict[int, Tensor]]] = {}
    metrics: dict[str, float] = {}
    for concept, other in ((first, second), (second, first)):
        members: dict[FeatureId, CircuitFeature] = {}
        confirmed = candidates = 0
        for layer in transcoders.layers:
            picks = [
                _choose(transcoders, layer, found, means[other][question], influence[concept], per_layer)
                for question, found in means[concept].items()
            ]
            confirmed += sum(len(chosen) for chosen, _ in picks)
            candidates += sum(seen for _, seen in picks)
            # Rank by rank over the questions, so that the first n of a layer serve all of them alike.
            for rank in range(per_layer):
                for chosen, _ in picks:
                    if rank < len(chosen):
                        members.setdefault(chosen[rank].feature, chosen[rank])
        supernodes[concept] = Supernode(concept, tuple(members.values()))
        metrics[f"circuit/{concept}/features"] = float(len(members))
        metrics[f"circuit/{concept}/confirmed_frac"] = confirmed / max(candidates, 1)
    circuit = Circuit(supernodes, levels, model=model, n_features=transcoders.widths)
    for concept, by_question in means.items():
        chosen_by_layer = circuit.indices(concept)
        levels[concept] = {
            f"{question}:{role}": {layer: table[layer][chosen].cpu() for layer, chosen in chosen_by_layer.items()}
            for question, found in by_question.items()
            for role, table in found.by_role.items()
        }
    return circuit, metrics


def _choose(
    transcoders: TranscoderSet,
    layer: int,
    concept: RoleMeans,
    other: RoleMeans,
    influence: Influence,
    per_layer: int,
) -> tuple[list[CircuitFeature], int]:
    """The best confirmed features of a layer, and how many candidates were looked at to find them."""
    roles = [role for role in concept.by_role if role in other.by_role]
    gaps = torch.stack([concept.by_role[role][layer] - other.by_role[role][layer] for role in roles])
    best, role_index = (gaps * transcoders[layer].write_norms()).max(0)
    chosen: list[CircuitFeature] = []
    seen = 0
    for index in best.argsort(descending=True).tolist():
        if best[index] <= 0 or len(chosen) == per_layer or seen == CANDIDATES * per_layer:
            break
        seen += 1
        feature = FeatureId(layer, index)
        share = influence.get(feature, 0.0)
        if share > 0:
            row = int(role_index[index])
            chosen.append(CircuitFeature(feature, roles[row], float(gaps[row, index]), share))
    return chosen, seen


def concept_means(
    scope: Scope, train: Mapping[str, Sequence[Image.Image]], prompts: Mapping[str, str]
) -> dict[str, dict[str, RoleMeans]]:
    """Concept -> question -> mean activations on the concept's pictures."""
    return {
        concept: {
            name: role_means(scope, [scope.batch([scope.inputs(prompt, [image]) for image in images])])
            for name, prompt in prompts.items()
        }
        for concept, images in train.items()
    }


def concept_influence(
    scope: Scope,
    train: Mapping[str, Sequence[Image.Image]],
    prompts: Mapping[str, str],
    graphs: int,
    attribution: AttributionConfig,
) -> tuple[dict[str, dict[FeatureId, float]], list[Trace], list[float]]:
    """Each concept's influence of features, mean over `graphs` pictures and all questions.

    Returns:
        Concept -> feature -> share of influence; the first trace alone, since each holds a whole graph; the seconds of
        each trace.
    """
    influence: dict[str, dict[FeatureId, float]] = {}
    first: list[Trace] = []
    seconds: list[float] = []
    for concept, images in train.items():
        tables = []
        for prompt in prompts.values():
            for image in images[:graphs]:
                start = time.perf_counter()
                traced = trace(scope, scope.inputs(prompt, [image]), attribution)
                seconds.append(time.perf_counter() - start)
                tables.append(feature_influence(traced))
                first = first or [traced]
        influence[concept] = mean_shares(tables)
    return influence, first, seconds


def feature_influence(traced: Trace) -> dict[FeatureId, float]:
    """Share of all influence of each feature that belongs to the most influential nodes, summed over positions.

    The nodes that reach `CONFIRMING` of the influence count, more than the pruned graph keeps: that one is for reading.
    """
    nodes, pruned = traced.graph.nodes, traced.pruned
    total = float(pruned.influence.sum()) or 1.0
    shares: dict[FeatureId, float] = {}
    for node in nodes.of(NodeKind.FEATURE).tolist():
        if pruned.influence[node] > 0 and pruned.cumulative[node] <= CONFIRMING:
            feature = nodes.feature_id(node)
            shares[feature] = shares.get(feature, 0.0) + float(pruned.influence[node]) / total
    return shares


def control_means(means: Mapping[str, Mapping[str, RoleMeans]]) -> dict[int, Tensor]:
    """Layer -> [F], the mean activation of every feature over concepts and questions, by which controls are matched."""
    tables = [table for by_question in means.values() for table in by_question.values()]
    return {layer: torch.stack([table.overall[layer] for table in tables]).mean(0) for layer in tables[0].overall}


def described(scope: Scope, circuit: Circuit, items: Sequence[StudyItem], shown: int = 8) -> tuple[Supernode, ...]:
    """The supernodes, most influential members first; the `shown` first with top examples among items and logits."""
    nodes = []
    ranked = {name: sorted(node.features, key=lambda m: -m.influence) for name, node in circuit.supernodes.items()}
    wanted = dict.fromkeys(member.feature for members in ranked.values() for member in members[:shown])
    examples = top_examples(scope, list(wanted), items)
    for name, members in ranked.items():
        first = []
        for member in members[:shown]:
            top, bottom = top_and_bottom_logits(scope, member.feature)
            first.append(replace(member, examples=examples[member.feature], top_logits=top, bottom_logits=bottom))
        nodes.append(Supernode(name, (*first, *members[shown:])))
    return tuple(nodes)
