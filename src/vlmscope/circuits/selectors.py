"""Choosing the features of supernodes: by id, label, influence in graphs, or contrast of inputs.

*Contrast.* For each feature the difference of mean activations (one set of inputs minus another) is taken by position
role and weighted by the norm of what it writes, since that is how far the feature moves the residual stream; a feature
counts at its role of largest difference. Candidates may need influence on the answer in attribution graphs, too.

A circuit of two concepts (`contrast_circuit`) contrasts them by question and position role: each gives its own best
features of each layer (a feature that writes `red` fires at the last position of one question only; activations there
are so large that without a number for each role no feature of the soft tokens would be taken), and a supernode is their
union. Declared supernodes (`by_contrast`) rank all layers together.

The `by_` functions return members best first; what they were chosen by is in `contrast` and `influence`.
Legend: N nodes of a graph, B prompts, T positions, P those of one role, F features of a layer, n chosen ones, R roles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import zip_longest
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.influence import influence
from vlmscope.attribution.trace import Trace, trace
from vlmscope.circuits.cases import concept_questions
from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.config import CircuitConfig, LabelConfig, SupernodeConfig
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.records import FeatureId, Places, Positions
from vlmscope.core.results import CircuitFeature, Supernode
from vlmscope.features.item_facts import stems
from vlmscope.features.labels import Labels
from vlmscope.features.readouts import RoleMeans, role_means
from vlmscope.interventions.edits import donor_activations
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import TranscoderSet

Influence = Mapping[FeatureId, float]  # a feature's share of influence, mean over graphs
Key = TypeVar("Key")
RoleInfluence = Mapping[tuple[str, FeatureId], float]  # the same at a position role
CONFIRMING = 0.98  # share of influence whose nodes confirm a feature of two concepts
CONFIRMABLE = 4  # times the features of a layer and role: below these the contrast of two concepts says nothing
CANDIDATES = 8  # times `count`, of the largest differences of declared inputs
ROUNDING = 1e-4  # a smaller difference, relative to the mean, is that of sums in another order


def feature_influence(
    graph: AttributionGraph, target: str | None = None, positions: Positions | None = None
) -> dict[FeatureId, tuple[float, str]]:
    """Each feature's share of all features' influence on an answer (the most probable one when None), summed over the
    positions that count, and the role where most of it is.
    """
    words = [word.strip() for word in graph.logit_tokens]
    if target is not None and target.strip() not in words:
        known = ", ".join(words)
        raise UserError(
            f"influence target {target!r}: the graph of {graph.prompt!r} explains {known}; choose one of them"
        )
    chosen = int(np.argmax(graph.end_weights)) if target is None else words.index(target.strip())
    weights = np.zeros(graph.n_nodes)
    weights[graph.nodes.ends()[chosen]] = 1.0
    flow = influence(graph, weights).nodes
    nodes = graph.nodes.of(NodeKind.FEATURE)
    total = float(flow[nodes].sum()) or 1.0
    there = np.ones(len(graph.roles), dtype=bool)
    if positions is not None:
        there = positions.mask(Places(graph.roles, graph.patch_boxes))
    parts: dict[FeatureId, dict[str, float]] = {}
    for node in nodes[there[graph.nodes.position[nodes]]].tolist():
        role = str(graph.roles[graph.nodes.position[node]])
        by_role = parts.setdefault(graph.nodes.feature_id(node), {})
        by_role[role] = by_role.get(role, 0.0) + float(flow[node]) / total
    return {f: (sum(by_role.values()), max(by_role, key=lambda role: by_role[role])) for f, by_role in parts.items()}


def mean_shares(tables: Sequence[Mapping[Key, float]]) -> dict[Key, float]:
    """Mean share over graphs; absent counts as zero."""
    sums: dict[Key, float] = {}
    for table in tables:
        for feature, share in table.items():
            sums[feature] = sums.get(feature, 0.0) + share / len(tables)
    return sums


def mean_influence(graphs: Sequence[AttributionGraph], positions: Positions | None = None) -> dict[FeatureId, float]:
    """Mean share of influence of features on the most probable answer, at some positions."""
    tables = [feature_influence(graph, None, positions) for graph in graphs]
    return mean_shares([{feature: share for feature, (share, _) in table.items()} for table in tables])


def check_graph(graph: AttributionGraph, where: str, model: str, n_features: Mapping[int, int]) -> None:
    """Refuse a graph, called `where`, of another model or of other transcoders than those of these widths."""
    traced = str(graph.meta.get("model", ""))
    if traced and traced != model:
        raise UserError(f"{where} is a graph of the model {traced}, not of {model}; give one of {model}")
    nodes = graph.nodes.of(NodeKind.FEATURE)
    for layer in np.unique(graph.nodes.layer[nodes]).tolist():
        largest = int(graph.nodes.index[nodes][graph.nodes.layer[nodes] == layer].max())
        if largest >= n_features.get(layer, 0):
            raise UserError(
                f"{where} has feature L{layer}/{largest}, which the transcoders do not have; trace with them"
            )


def by_label(config: LabelConfig, labels: Labels, node: SupernodeConfig, known: Influence) -> list[CircuitFeature]:
    """Features whose label has all words of a query; those of most influence first, then by the label's score.

    Labels that are no better than chance do not count.
    """
    query = stems(config.query)
    texts = labels.trusted()
    score = {
        feature: 1.0 if label.low is None else label.low
        for feature, label in texts.items()
        if query and query <= stems(label.text)
    }
    if not score:
        words = sorted(set().union(*(stems(label.text) for label in texts.values())))
        near = [hit for word in sorted(query) for hit in get_close_matches(word, words, n=2)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"words that occur: {', '.join(words[:12])}"
        raise UserError(f"label query {config.query!r}: no label of {config.study} has these words; {hint}")
    ranked = sorted(score, key=lambda f: (-known.get(f, 0.0), -score[f], f))
    members = (CircuitFeature(feature, "", 0.0, known.get(feature, 0.0)) for feature in ranked)
    return [member for member in members if node.layer_range([member.feature.layer])][: node.count]


def by_influence(
    shares: Sequence[Mapping[FeatureId, tuple[float, str]]], node: SupernodeConfig
) -> list[CircuitFeature]:
    """The features of most influence, mean over what `feature_influence` gave of each graph; as many as the supernode
    counts, or up to the share that it names.
    """
    means = mean_shares([{feature: share for feature, (share, _) in table.items()} for table in shares])
    roles = {feature: role for table in reversed(shares) for feature, (_, role) in table.items()}
    ranked = sorted((f for f in means if means[f] > 0 and node.layer_range([f.layer])), key=lambda f: (-means[f], f))
    part = None if node.influence is None else node.influence.share
    if part is None:
        ranked = ranked[: node.count]
    elif ranked:
        sums = np.cumsum([means[f] for f in ranked])
        ranked = ranked[: int(np.searchsorted(sums, part * sums[-1] * (1 - 1e-12))) + 1]
    return [CircuitFeature(f, roles[f], 0.0, means[f]) for f in ranked]


def by_contrast(
    transcoders: TranscoderSet,
    of: RoleMeans,
    against: RoleMeans,
    node: SupernodeConfig,
    known: Influence,
    confirmed: bool = False,
) -> list[CircuitFeature]:
    """Features that are more active on one set of inputs, each at the role of largest difference.

    They are ranked over all layers by difference times write norm, relative to the mean norm of the layer's features,
    as layers write on different scales.

    If `confirmed`, `CANDIDATES` times as many of the largest differences are ranked anew, by influence on the answer at
    the supernode's positions, and those without any are left out: what differs and matters to the answer.
    """
    roles = [role for role in of if role in against]
    if not roles:
        raise UserError("the two sets of inputs have no position role in common; give both pictures, or neither")
    ranked: list[tuple[float, CircuitFeature]] = []
    for layer in node.layer_range(transcoders.layers):
        gaps = torch.stack([of[role][layer] - against[role][layer] for role in roles])
        norms = transcoders[layer].write_norms()
        score, best = (gaps * norms / norms.mean()).max(0)
        for index in score.topk(min(CANDIDATES * node.count, len(score))).indices.tolist():
            feature, role = FeatureId(layer, index), int(best[index])
            member = CircuitFeature(feature, roles[role], float(gaps[role, index]), known.get(feature, 0.0))
            if score[index] > 0 and member.contrast > ROUNDING * float(of[member.role][layer][index]):
                ranked.append((float(score[index]), member))
    ranked.sort(key=lambda row: (-row[0], row[1].feature))
    members = [member for _, member in ranked]
    if confirmed:
        likely = [member for member in members[: CANDIDATES * node.count] if member.influence > 0]
        members = sorted(likely, key=lambda member: (-member.influence, member.feature))
    return members[: node.count]


def contrast_circuit(
    transcoders: TranscoderSet,
    means: Mapping[str, Mapping[str, RoleMeans]],
    influence: Mapping[str, RoleInfluence],
    per_layer: Mapping[str, int],
    model: str,
    confirmed: bool = True,
) -> tuple[Circuit, dict[str, float]]:
    """A circuit of two supernodes, which act at the roles of `per_layer`, without levels, and metrics: its sizes, and
    the share of the candidates that the graphs confirmed, `circuit/<concept>/confirmed_frac`.

    `means` are role means of two concepts on their training pictures by question, of which those asked of one alone do
    not count; `influence` is that in graphs of each concept's pictures; `per_layer` has the features per layer, concept
    and question by role. Without `confirmed` as many features are taken, those of the largest differences.
    """
    first, second = means
    means = {
        c: {name: means[c][name] for name in means[c] if name in means[first] and name in means[second]} for c in means
    }
    counts = {role: count for role, count in per_layer.items() if count}
    # Not at tokens of the answer: with what the prompt's last position has, a caption would repeat its first word.
    where = Positions(tuple(counts))
    supernodes: dict[str, Supernode] = {}
    metrics: dict[str, float] = {}
    for concept, other in ((first, second), (second, first)):
        members: dict[FeatureId, CircuitFeature] = {}
        taken = candidates = 0
        for layer in transcoders.layers:
            picks: list[list[CircuitFeature]] = []
            norms = transcoders[layer].write_norms()
            for question, active in means[concept].items():
                against = means[other][question]
                for role in [role for role in counts if role in active and role in against]:
                    gap = active[role][layer] - against[role][layer]
                    best = (gap * norms).argsort(descending=True)[: CONFIRMABLE * counts[role]]
                    ranked = [FeatureId(layer, index) for index in best[gap[best] > 0].tolist()]
                    members_of = [
                        CircuitFeature(f, role, float(gap[f.index]), influence[concept].get((role, f), 0.0))
                        for f in ranked
                    ]
                    chosen, seen = _confirmed(members_of, counts[role])
                    picks.append(chosen if confirmed else members_of[: len(chosen)])
                    taken, candidates = taken + len(chosen), candidates + seen
            # Rank by rank over questions and roles, so that the first n of a layer serve all of them alike.
            for member in (member for rank in zip_longest(*picks) for member in rank if member is not None):
                members.setdefault(member.feature, member)
        supernodes[concept] = Supernode(concept, tuple(members.values()), where)
        metrics[f"circuit/{concept}/features"] = float(len(members))
        metrics[f"circuit/{concept}/confirmed_frac"] = taken / max(candidates, 1)
    return Circuit(supernodes, {}, model=model, n_features=transcoders.widths), metrics


def _confirmed(ranked: Sequence[CircuitFeature], count: int) -> tuple[list[CircuitFeature], int]:
    """The first features with influence, and how many were looked at to find them."""
    chosen: list[CircuitFeature] = []
    for seen, member in enumerate(ranked):
        if len(chosen) == count:
            return chosen, seen
        if member.influence > 0:
            chosen.append(member)
    return chosen, len(ranked)


@torch.no_grad()
def place_levels(scope: Scope, circuit: Circuit, train: Mapping[str, Mapping[str, InputBatch]]) -> Circuit:
    """The circuit with levels place by place: what its features have, on average over a concept's pictures in the
    training prompts `train`, at the first, second, .. position of each role: [P, n] instead of [n].
    """
    levels: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name in circuit.supernodes:
        levels[name] = {}
        for question, batch in train[name].items():
            active = donor_activations(scope, batch, circuit.indices(name))
            means = {layer: values.float().mean(0).cpu() for layer, (_, values) in active.items()}  # [T, n]
            for role in dict.fromkeys(batch.roles.tolist()):
                there = torch.from_numpy(batch.roles == role)
                levels[name][f"{question}:{role}"] = {layer: mean[there] for layer, mean in means.items()}
    return replace(circuit, levels=levels)


def mean_levels(members: Sequence[CircuitFeature], means: RoleMeans, question: str) -> dict[str, dict[int, Tensor]]:
    """Mean activations of members by role and layer, as `Circuit.levels` has them."""
    table: dict[int, list[int]] = {}
    for member in members:
        table.setdefault(member.feature.layer, []).append(member.feature.index)
    return {
        f"{question}:{role}": {layer: values[layer][table[layer]].cpu() for layer in sorted(table)}
        for role, values in means.items()
    }


@dataclass(frozen=True)
class Contrasts:
    """What circuits of concepts are chosen by, once for all pairs of them; tables are by concept, then question."""

    scope: Scope
    config: CircuitConfig
    batches: Mapping[str, Mapping[str, InputBatch]]  # each question asked of the concept's training pictures
    means: Mapping[str, Mapping[str, RoleMeans]]
    influence: Mapping[str, RoleInfluence]  # by concept: mean over its traced pictures and all questions
    first: Trace  # the first graph alone, since each trace is large
    graphs: Sequence[Mapping[str, float]]  # the metrics of each graph, `graph/seconds` being those of the whole trace

    @classmethod
    def measure(
        cls,
        scope: Scope,
        config: CircuitConfig,
        train: Mapping[str, Sequence[Image.Image]],
        attribution: AttributionConfig,
        keep: Callable[[str, str, Trace], None],
    ) -> Contrasts:
        """Run the training pictures of each concept, and trace the first `config.graphs` of them under each of its
        questions; `keep` gets the first trace of each concept and question.
        """
        asked, first, metrics = concept_questions(scope, config), [], []
        batches, means, influence = {}, {}, {}
        for concept, images in train.items():
            mine = {name: question for name, question in asked.items() if concept in question.answers}
            prompts = {name: [question.inputs(scope, [image]) for image in images] for name, question in mine.items()}
            batches[concept] = {name: scope.batch(inputs) for name, inputs in prompts.items()}
            means[concept] = {name: role_means(scope, [batch]) for name, batch in batches[concept].items()}
            tables = []
            for name, inputs in prompts.items():
                for number, prompt in enumerate(inputs[: config.graphs]):
                    start = time.perf_counter()
                    traced = trace(scope, prompt, attribution)
                    metrics.append(traced.metrics() | {"graph/seconds": time.perf_counter() - start})
                    tables.append(_confirming(traced))
                    first = first or [traced]
                    if number == 0:
                        keep(concept, name, traced)
            influence[concept] = mean_shares(tables)
        return cls(scope, config, batches, means, influence, first[0], metrics)

    def circuit(self, pair: Sequence[str], confirmed: bool = True) -> tuple[Circuit, dict[str, float]]:
        """The circuit of two concepts, with levels place by place, and its metrics (`contrast_circuit`)."""
        means, per_layer = {concept: self.means[concept] for concept in pair}, self.config.per_layer
        transcoders, model = self.scope.transcoders, self.scope.vlm.name
        circuit, metrics = contrast_circuit(transcoders, means, self.influence, per_layer, model, confirmed)
        return place_levels(self.scope, circuit, self.batches), metrics


def _confirming(traced: Trace) -> dict[tuple[str, FeatureId], float]:
    """Share of all influence of each feature that belongs to the most influential nodes, summed over positions of a
    role.

    The nodes that reach `CONFIRMING` of the influence count, more than the pruned graph keeps: that one is for reading.
    """
    nodes, pruned = traced.graph.nodes, traced.pruned
    total = float(pruned.influence.sum()) or 1.0
    shares: dict[tuple[str, FeatureId], float] = {}
    for node in nodes.of(NodeKind.FEATURE).tolist():
        if pruned.influence[node] > 0 and pruned.cumulative[node] <= CONFIRMING:
            key = str(traced.graph.roles[nodes.position[node]]), nodes.feature_id(node)
            shares[key] = shares.get(key, 0.0) + float(pruned.influence[node]) / total
    return shares
