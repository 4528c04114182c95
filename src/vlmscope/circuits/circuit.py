"""A circuit: named supernodes, its file, the edges between its supernodes, and plans of edits made from it.

A supernode is a set of features with the activations that they have when it is on. A circuit is stored as YAML (ids,
evidence, positions, edges) next to a safetensors file (activations by role), so that it can be drawn, steered, patched
and shared. Layout: `docs/formats.md`.

Edges are direct effects, sums of the edges A of attribution graphs, which are not pruned:

    W[s, t] = sum over members i of s and j of t, at their positions, of A[j, i]

Scaling all members of s by 1 + x in the frozen model moves the sum of the pre-activations of t's members by x W[s, t],
directly. Edges into features have units of their pre-activations and edges into answers are in logits, so for
comparison each is also given as its share of |edges| into the target:

    share[s, t] = W[s, t] / sum over j of t and all sources i of |A[j, i]|

Legend: N nodes of a graph, T positions of a prompt, n features of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from vlmscope.attribution.influence import SubgraphScores, influence, subgraph_scores
from vlmscope.circuits.config import ANSWER_PREFIX, BELOW, BIASES, ERRORS, OTHER, PATCHES, SOFT, TEXT
from vlmscope.core.artifacts import built_from, load_tensors, read_yaml, save_tensors, write_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.records import FeatureId, PatchBox, Places, Positions
from vlmscope.core.results import CircuitEdge, CircuitFeature, Supernode
from vlmscope.interventions.edits import LayerEdit, Plan, ablation, features_at, merge, position_mask, set_features

VERSION = 2
CIRCUIT, LEVELS = "circuit.yaml", "levels.safetensors"
FEEDS = 5  # features of the vision tower with an edge of their own into a target


@dataclass(frozen=True)
class Circuit:
    """Supernodes by name, and for each of them the mean activation of its features on its own concept.

    `levels[name]["<question>:<role>"][layer]`, [n] or [P, n] (place by place), goes with `indices(name)[layer]` [n];
    names may be missing.
    """

    supernodes: dict[str, Supernode]
    levels: dict[str, dict[str, dict[int, Tensor]]]
    edges: tuple[CircuitEdge, ...] = ()  # also from inputs and to answers, as far as they were computed
    model: str = ""  # that it was found in; "" when that is not known
    n_features: Mapping[int, int] | None = None  # width of each layer's transcoder there, if known

    def node(self, name: str) -> Supernode:
        """A supernode, which must be there."""
        if name not in self.supernodes:
            raise UserError(f"the circuit has no supernode {name!r}: it has {', '.join(self.supernodes)}")
        return self.supernodes[name]

    def indices(self, name: str, limit: int | None = None) -> dict[int, Tensor]:
        """Feature indices of a supernode by layer, best first; at most `limit` per layer."""
        table: dict[int, list[int]] = {}
        for member in self.node(name).features:
            table.setdefault(member.feature.layer, []).append(member.feature.index)
        return {layer: torch.tensor(indices[:limit]) for layer, indices in sorted(table.items())}

    def union(self, limit: int | None = None) -> dict[int, Tensor]:
        """The distinct features of all supernodes by layer."""
        tables = [self.indices(name, limit) for name in self.supernodes]
        layers = sorted({layer for table in tables for layer in table})
        return {layer: torch.cat([table[layer] for table in tables if layer in table]).unique() for layer in layers}

    def levels_at(self, name: str, roles: Sequence[str], layer: int, question: str | None = None) -> Tensor:
        """Mean activations [T, n] of a supernode's features of a layer at positions of T roles in reading order: under
        one question, or over all of them.

        The i-th position of a role has the level of the i-th one in training, or the role's mean where that had fewer.
        A role that the training prompts did not have gives zeros; levels without a question hold under every one.
        """
        tables, asked = self.levels[name], (f"{question}:", ":")
        rows, seen = [], Counter[str]()
        for role in roles:
            keys = [k for k in tables if k.endswith(f":{role}") and (question is None or k.startswith(asked))]
            each = [tables[key][layer] for key in keys]
            place, seen[role] = seen[role], seen[role] + 1
            here = [x if x.ndim == 1 else x[place] if place < len(x) else x.mean(0) for x in each]
            rows.append(torch.stack(here).mean(0) if here else torch.zeros(len(self.indices(name)[layer])))
        return torch.stack(rows)

    def size(self, *names: str) -> int:
        """Number of distinct features in these supernodes."""
        return len({member.feature for name in names for member in self.node(name).features})

    def check_fits(self, model: str, n_features: Mapping[int, int], where: str | Path = "the circuit") -> None:
        """Refuse a circuit, called `where`, of another model or of other transcoders than those of these widths."""
        if self.model and self.model != model:
            raise UserError(f"{where} is a circuit of the model {self.model}, not of {model}; give one of {model}")
        if self.n_features and dict(self.n_features) != dict(n_features):
            raise UserError(f"{where} is a circuit of other transcoders than these; give those with transcoder=")
        for node in self.supernodes.values():
            for layer, index in (member.feature for member in node.features):
                if index >= n_features.get(layer, 0):
                    raise UserError(f"{where}: {node.name} has L{layer}/{index}, which the transcoders do not have")


def labelled(circuit: Circuit, labels: Mapping[FeatureId, str]) -> Circuit:
    """The circuit with its features' labels; a feature that has none in `labels` keeps the one it has."""
    return replace(circuit, supernodes={name: with_labels(node, labels) for name, node in circuit.supernodes.items()})


def with_labels(node: Supernode, labels: Mapping[FeatureId, str]) -> Supernode:
    """One supernode, as `labelled`."""
    return replace(node, features=tuple(replace(m, label=labels.get(m.feature, m.label)) for m in node.features))


def save_circuit(circuit: Circuit, folder: Path) -> None:
    """Write `circuit.yaml` and `levels.safetensors` into `folder`."""
    arrays: dict[str, np.ndarray] = {
        f"{name}.{role}.{layer}": (values.float() if values.dtype.itemsize < 4 else values).numpy(force=True)
        for name, roles in circuit.levels.items()
        for role, layers in roles.items()
        for layer, values in layers.items()
    }
    body: dict[str, Any] = {"version": VERSION}
    if circuit.model:
        body["model"] = circuit.model
    if circuit.n_features:
        body["n_features"] = {int(layer): int(width) for layer, width in circuit.n_features.items()}
    body["supernodes"] = {name: _node_body(node) for name, node in circuit.supernodes.items()}
    if circuit.edges:
        body["edges"] = [vars(edge) for edge in circuit.edges]
    write_yaml(folder / CIRCUIT, body)
    save_tensors(folder / LEVELS, arrays, {"version": "1"})


def _node_body(node: Supernode) -> dict[str, Any]:
    body: dict[str, Any] = {"chosen": node.chosen} if node.chosen else {}
    if node.positions is not None:
        box = node.positions.box
        body["positions"] = {"roles": list(node.positions.roles)} | ({} if box is None else {"box": [*map(float, box)]})
    kept = ("role", "contrast", "influence")
    body["features"] = [
        {"feature": str(m.feature)} | {key: getattr(m, key) for key in kept} | ({"label": m.label} if m.label else {})
        for m in node.features
    ]
    return body


def _node(name: str, body: dict[str, Any]) -> Supernode:
    members = [CircuitFeature(**m | {"feature": FeatureId.parse(m["feature"])}) for m in body["features"]]
    positions = None
    if (places := body.get("positions")) is not None:
        box = places.get("box")
        positions = Positions(tuple(places["roles"]), None if box is None else PatchBox(*map(float, box)))
    return Supernode(name, tuple(members), positions, body.get("chosen", ""))


def load_circuit(folder: Path) -> Circuit:
    """Read what `save_circuit` wrote.

    Raises:
        UserError: a file is missing or is not a circuit, or of another version.
    """
    path = folder / CIRCUIT
    body = read_yaml(path)
    if not isinstance(body, dict) or not isinstance(body.get("supernodes"), dict):
        raise UserError(f"{path} is not a circuit: it has no supernodes")
    if body.get("version") != VERSION:
        raise UserError(f"{path} has version {body.get('version')}, this program reads {VERSION}; find it again")
    with built_from(path, "circuit", "find it again"):
        supernodes = {str(name): _node(str(name), stored) for name, stored in body["supernodes"].items()}
        edges = tuple(CircuitEdge(**edge) for edge in body.get("edges", ()))
    levels: dict[str, dict[str, dict[int, Tensor]]] = {}
    tensors = folder / LEVELS
    arrays, _ = load_tensors(tensors)
    with built_from(tensors, "circuit", "find it again"):
        for key, values in arrays.items():
            name, role, layer = key.rsplit(".", 2)
            levels.setdefault(name, {}).setdefault(role, {})[int(layer)] = torch.from_numpy(values)
    return Circuit(supernodes, levels, edges, str(body.get("model", "")), body.get("n_features"))


def steer_plan(
    circuit: Circuit,
    suppress: str,
    raised: str,
    places: Places,
    strength: float,
    question: str | None = None,
    limit: int | None = None,
) -> dict[int, LayerEdit]:
    """Set one supernode's features to zero and the other's to `strength` times their level on their own concept, at
    most `limit` per layer and supernode, in a prompt with these places. A feature of both is raised.

    Levels are those under a `question`; the mean over all questions when None.
    """
    roles = [*places.roles.tolist(), "last"]  # generated tokens continue the last position
    everywhere = position_mask(places.roles, "all")
    off = {n: ablation(features, everywhere) for n, features in circuit.indices(suppress, limit).items()}
    on: dict[int, LayerEdit] = {}
    for layer, features in circuit.indices(raised, limit).items():
        value = strength * circuit.levels_at(raised, roles, layer, question)[:, : len(features)]
        on[layer] = set_features(features, value[:-1], everywhere, value[-1])
    parts = ((off, circuit.node(suppress)), (on, circuit.node(raised)))
    return merge(*(at_supernodes(plan, [node], places) for plan, node in parts))


def at_supernodes(plan: Plan, nodes: Iterable[Supernode], places: Places) -> dict[int, LayerEdit]:
    """The plan, with every feature edited only at the positions of the supernodes that it belongs to.

    Supernodes without positions are meant everywhere. A feature of several is edited at the positions of any of them;
    features of none are left as they are. Generated tokens are touched where a supernode has the role "answer".

    Raises:
        UserError: no position of the prompt is one of a supernode's.
    """
    nodes = list(nodes)
    free = {member.feature for node in nodes if node.positions is None for member in node.features}
    masks: dict[tuple[int, int], tuple[Tensor, bool]] = {}
    for node in nodes:
        if node.positions is None:
            continue
        where = torch.from_numpy(node.positions.mask(places))
        if not bool(where.any()) and not node.positions.generated:
            raise UserError(f"supernode {node.name}: the prompt has no position in {node.positions}")
        for member in node.features:
            if member.feature not in free:
                before, generated = masks.get(member.feature, (torch.zeros_like(where), False))
                masks[member.feature] = (before | where, generated or node.positions.generated)
    edited = dict(plan)
    alike: dict[tuple[int, bytes, bool], list[int]] = {}  # features of a layer that are edited at the same positions
    for (layer, index), (where, generated) in masks.items():
        alike.setdefault((layer, where.numpy().tobytes(), generated), []).append(index)
    for (layer, _, generated), indices in alike.items():
        if layer in edited:
            edited[layer] = features_at(edited[layer], torch.tensor(indices), masks[layer, indices[0]][0], generated)
    return edited


def supernode_mask(graph: AttributionGraph, node: Supernode) -> np.ndarray:
    """[N] bool, the graph's nodes that are members of a supernode at its positions."""
    nodes = graph.nodes
    mask = np.zeros(graph.n_nodes, dtype=bool)
    members = {member.feature for member in node.features}
    for place in nodes.of(NodeKind.FEATURE).tolist():
        mask[place] = nodes.feature_id(place) in members
    if node.positions is not None:
        there = node.positions.mask(Places(graph.roles, graph.patch_boxes))
        mask[mask] = there[nodes.position[mask]]
    return mask


Groups = dict[str, np.ndarray]  # name -> [N] bool, nodes of a graph


def groups_of(graph: AttributionGraph, supernodes: Sequence[Supernode], answers: int) -> tuple[Groups, Groups, Groups]:
    """Nodes by supernode (these may share nodes), by what is around them, and by answer (all of these disjoint), with
    at most `answers` of the answers that the graph explains, the most probable first.
    """
    kind = graph.nodes.kind
    inside = {node.name: supernode_mask(graph, node) for node in supernodes}
    claimed = np.any([*inside.values(), np.zeros(graph.n_nodes, dtype=bool)], axis=0)
    token = kind == NodeKind.TOKEN
    soft = token.copy()
    soft[token] = graph.is_image[graph.nodes.position[token]]
    tower = graph.nodes.layer < -1
    features = ((kind == NodeKind.FEATURE) | (kind == NodeKind.LEFT_OUT)) & ~claimed
    around = {
        SOFT: soft & ~tower,
        PATCHES: token & tower,
        TEXT: token & ~soft,
        BELOW: features & tower,
        OTHER: features & ~tower,
        ERRORS: kind == NodeKind.ERROR,
        BIASES: kind == NodeKind.BIAS,
    }
    ends = graph.nodes.ends()
    words: dict[str, np.ndarray] = {}
    for number in np.argsort(-graph.end_weights, kind="stable")[:answers].tolist():
        word = graph.logit_tokens[number].strip()
        name = f"{ANSWER_PREFIX}{word}" if kind[ends[number]] == NodeKind.LOGIT else word
        if name in words:  # tokens that read alike are answers of their own
            name += f" (token {graph.nodes.index[ends[number]]})"
        words[name] = np.arange(graph.n_nodes) == ends[number]
    return inside, around, words


def direct_edges(
    graphs: Iterable[AttributionGraph], supernodes: Sequence[Supernode], answers: int = 1
) -> tuple[CircuitEdge, ...]:
    """All edges into supernodes and answers, also from what is around the circuit; means over graphs, at least one.

    A graph in which a target is not active adds nothing to its sums but counts for the mean. A feature of several
    supernodes counts for each. Edges of no weight are left out; edges among a supernode's own members run from its name
    to itself. Of graphs that begin at the patches, each target also has edges from the `FEEDS` features of the vision
    tower with the largest |weight|, by their ids (`T0/1380`); they are part of the edge from `BELOW`.
    """
    weights: dict[tuple[str, str], float] = {}
    totals: dict[str, float] = {}
    seen: dict[str, int] = {}
    below: dict[tuple[str, str], float] = {}
    count = 0
    for graph in graphs:
        count += 1
        inside, around, ends = groups_of(graph, supernodes, answers)
        sources, targets = inside | around, inside | ends
        edges = sparse.csr_matrix(
            (graph.weights.astype(np.float64), graph.indices, graph.indptr), shape=(graph.n_nodes, graph.n_nodes)
        )
        incoming = graph.absolute_sums()
        features = (graph.nodes.kind == NodeKind.FEATURE) & (graph.nodes.layer < -1)
        for target, mask in targets.items():
            totals[target] = totals.get(target, 0.0) + float(incoming[mask].sum())
            seen[target] = seen.get(target, 0) + int(mask.any())
            into = edges[np.flatnonzero(mask)].sum(0).A1  # [N]
            for node in np.flatnonzero((into != 0) & features).tolist():
                key = str(graph.nodes.feature_id(node)), target
                below[key] = below.get(key, 0.0) + float(into[node])
            for source, members in sources.items():
                if (weight := float(into[members].sum())) != 0:
                    weights[source, target] = weights.get((source, target), 0.0) + weight
    assert count, "edges need a graph"
    strongest = sorted(below.items(), key=lambda edge: -abs(edge[1]))
    for target in totals:
        weights |= dict([edge for edge in strongest if edge[0][1] == target][:FEEDS])
    return tuple(
        CircuitEdge(source, target, weight / count, weight / (totals[target] or 1.0), seen[target])
        for (source, target), weight in weights.items()
    )


def passed_on(graph: AttributionGraph, nodes: Sequence[Supernode], asked: str) -> list[tuple[str, str, float]]:
    """From, to, and the share in per cent of the influence on the target that comes from there, directly or through
    features of no supernode. Biases do not count, nor do the question's words, which reach everything, but for `asked`.
    """
    inside, around, answers = groups_of(graph, nodes, 1)
    (end,), counted = answers.values(), ~around[BIASES]
    whole = influence(graph, end.astype(float), counted).nodes + end
    boxed = np.any([*inside.values(), np.zeros_like(end)], axis=0)
    row = np.repeat(np.arange(graph.n_nodes), np.diff(graph.indptr))
    shares = []
    for target, mask in (inside | answers).items():
        open_rows = replace(graph, weights=graph.weights * (~boxed | mask)[row])  # the other supernodes pass on nothing
        flow = influence(open_rows, whole * mask, counted).nodes
        ends = {name: around[name] for name in (SOFT, ERRORS, *[TEXT] * (target == asked))}
        found = {name: float(flow[there].sum()) for name, there in (inside | ends).items() if name != target}
        shares += [(name, target, 100 * part / (sum(found.values()) or 1.0)) for name, part in found.items()]
    return shares


def circuit_metrics(circuit: Circuit, graphs: Sequence[AttributionGraph]) -> dict[str, float]:
    """Sizes, edges, and how much of the graphs the circuit holds.

    `circuit/influence_share` is the members' part of all features' influence on the most probable answer, mean over
    the graphs; `circuit/replacement_score` and `circuit/completeness_score` are the means of `subgraph_scores` with its
    members pinned; `circuit/<name>/active_frac` is the share of a supernode's features that are active in some graph.
    """
    nodes = circuit.supernodes
    metrics = {
        "circuit/supernodes": float(len(nodes)),
        "circuit/features": float(circuit.size(*nodes)),
        "circuit/graphs": float(len(graphs)),
        "circuit/edges": float(sum(edge.source in nodes and edge.source != edge.target for edge in circuit.edges)),
    }
    shares: list[float] = []
    subgraphs: list[SubgraphScores] = []
    active: dict[str, set[FeatureId]] = {name: set() for name in nodes}
    for graph in graphs:
        weights = np.zeros(graph.n_nodes)
        weights[graph.nodes.ends()[int(np.argmax(graph.end_weights))]] = 1.0
        flow = influence(graph, weights).nodes
        masks = {name: supernode_mask(graph, node) for name, node in nodes.items()}
        total = float(flow[graph.nodes.of(NodeKind.FEATURE)].sum()) or 1.0
        pinned = np.any(list(masks.values()), axis=0)
        shares.append(float(flow[pinned].sum()) / total)
        subgraphs.append(subgraph_scores(graph, pinned))
        for name, mask in masks.items():
            active[name] |= {graph.nodes.feature_id(place) for place in np.flatnonzero(mask).tolist()}
    for name, node in nodes.items():
        key = f"circuit/{name.replace(' ', '_')}"
        metrics[f"{key}/features"] = float(len(node.features))
        if graphs:
            metrics[f"{key}/active_frac"] = len(active[name]) / max(len(node.features), 1)
    if not shares:
        return metrics
    means = SubgraphScores(*np.mean(subgraphs, axis=0).tolist())._asdict()
    scores = {f"circuit/{name}_score": value for name, value in means.items()}
    return metrics | scores | {"circuit/influence_share": float(np.mean(shares))}
