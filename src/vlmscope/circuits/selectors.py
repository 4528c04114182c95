"""Choosing the features of a supernode: by id, label, contrast of inputs, influence in graphs, or cluster.

Every function returns members best first; what it found them by is in `contrast` and `influence`.
Legend: N nodes of a graph, F features of a layer, R roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vlmscope.attribution.influence import influence
from vlmscope.circuits.spec_config import ClusterConfig, LabelConfig, SupernodeConfig
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.intervention import CircuitFeature
from vlmscope.core.records import FeatureId, Places, Positions
from vlmscope.features.labels import Labels
from vlmscope.features.readouts import RoleMeans
from vlmscope.features.search import stems
from vlmscope.transcoders.transcoder import TranscoderSet

Influence = Mapping[FeatureId, float]  # a feature's share of influence, mean over graphs
CLUSTERS = "clusters.parquet"
CANDIDATES = 8
ROUNDING = 1e-4  # a smaller difference, relative to the mean, is that of sums in another order


def by_ids(ids: Iterable[str], known: Influence) -> list[CircuitFeature]:
    """Features that are named, in that order."""
    return [_member(FeatureId.parse(text), known) for text in dict.fromkeys(ids)]


def by_label(config: LabelConfig, labels: Labels, node: SupernodeConfig, known: Influence) -> list[CircuitFeature]:
    """Features whose label has all words of a query; those of most influence first, then by the label's score.

    Labels that are no better than chance do not count.

    Raises:
        UserError: no label has these words.
    """
    asked = stems(config.query)
    texts = labels.trusted()
    found = [(feature, label) for feature, label in texts.items() if asked and asked <= stems(label.text)]
    if not found:
        words = sorted(set().union(*(stems(label.text) for label in texts.values())))
        near = [hit for word in sorted(asked) for hit in get_close_matches(word, words, n=2)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"words that occur: {', '.join(words[:12])}"
        raise UserError(f"label query {config.query!r}: no label of {config.study} has these words; {hint}")
    score = {feature: 1.0 if label.low is None else label.low for feature, label in found}
    ranked = sorted(score, key=lambda f: (-known.get(f, 0.0), -score[f], f))
    return _first([_member(feature, known) for feature in ranked], node)


def by_cluster(
    table: pa.Table, config: ClusterConfig, node: SupernodeConfig, known: Influence
) -> tuple[list[CircuitFeature], str]:
    """Members of a cluster, those of most influence first, and the cluster's name.

    Raises:
        UserError: there is no such cluster, or several have the name.
    """
    rows = [row for row in table.to_pylist() if row["kind"] == config.kind]
    said = str(config.cluster).strip()
    hits = [row for row in rows if said in (str(row["cluster"]), row["name"])]
    if len(hits) != 1:
        names = [row["name"] for row in rows if row["name"]]
        if hits:
            numbers = ", ".join(str(row["cluster"]) for row in hits[:5])
            raise UserError(
                f"cluster {said!r}: {len(hits)} clusters of {config.run} are called so; give one of {numbers}"
            )
        near = get_close_matches(said, names, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {len(rows)}: 0 is {names[:1]}"
        raise UserError(f"cluster {said!r}: {config.run} has no such cluster by {config.kind}; {hint}")
    features = sorted(map(FeatureId.parse, hits[0]["features"]), key=lambda f: (-known.get(f, 0.0), f))
    return _first([_member(feature, known) for feature in features], node), hits[0]["name"]


def read_clusters(run: str | Path) -> pa.Table:
    """The clusters of a run of task=structure.

    Raises:
        UserError: there are none.
    """
    path = Path(run) / CLUSTERS
    if not path.is_file():
        raise UserError(f"{run} holds no {CLUSTERS}; give the run folder of a task=structure")
    try:
        return pq.read_table(path, columns=["kind", "cluster", "name", "features"])
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); run task=structure again") from error


def by_contrast(
    transcoders: TranscoderSet, of: RoleMeans, against: RoleMeans, node: SupernodeConfig, known: Influence | None
) -> list[CircuitFeature]:
    """Features that are more active on one set of inputs, each at the role of largest difference.

    They are ranked over all layers by difference times the norm of what the feature writes, relative to the mean norm
    of the layer's features: by how far the difference moves the stream, where the layers write on different scales.

    With `known` the `CANDIDATES` times as many of the largest differences are ranked anew, by influence, and those
    without any are left out: what differs and matters to the answer.

    Args:
        transcoders: whose features.
        of: means of the inputs on which they are active.
        against: means of the others.
        node: how many, of which layers.
        known: influence of features on the answer at the supernode's positions; None does not ask for it.

    Raises:
        UserError: no feature is like that.
    """
    roles = [role for role in of.by_role if role in against.by_role]
    if not roles:
        raise UserError("the two sets of inputs have no position role in common; give both pictures, or neither")
    ranked: list[tuple[float, CircuitFeature]] = []
    for layer in node.layer_range(transcoders.layers):
        gaps = torch.stack([of.by_role[role][layer] - against.by_role[role][layer] for role in roles])
        norms = transcoders[layer].write_norms()
        best, at = (gaps * norms / norms.mean()).max(0)
        for index in best.topk(min(CANDIDATES * node.count, len(best))).indices.tolist():
            feature, row = FeatureId(layer, index), int(at[index])
            share = 0.0 if known is None else known.get(feature, 0.0)
            if best[index] > 0 and gaps[row, index] > ROUNDING * of.by_role[roles[row]][layer][index]:
                ranked.append((float(best[index]), CircuitFeature(feature, roles[row], float(gaps[row, index]), share)))
    ranked.sort(key=lambda one: (-one[0], one[1].feature))
    found = [member for _, member in ranked]
    if known is not None:
        likely = [member for member in found[: CANDIDATES * node.count] if member.influence > 0]
        found = sorted(likely, key=lambda member: (-member.influence, member.feature))
    return found[: node.count]


def by_influence(
    shares: Sequence[Mapping[FeatureId, tuple[float, str]]], node: SupernodeConfig
) -> list[CircuitFeature]:
    """The features of most influence, mean over graphs.

    Args:
        shares: of each graph, what `feature_influence` found.
        node: how many, of which layers, or up to which share.
    """
    means = mean_shares([{f: share for f, (share, _) in table.items()} for table in shares])
    roles = {feature: role for table in reversed(shares) for feature, (_, role) in table.items()}
    kept = [f for f in means if means[f] > 0 and node.layer_range([f.layer])]
    ranked = sorted(kept, key=lambda f: (-means[f], f))
    wanted = None if node.influence is None else node.influence.share
    if wanted is None:
        ranked = ranked[: node.count]
    elif ranked:
        sums = np.cumsum([means[f] for f in ranked])
        ranked = ranked[: int(np.searchsorted(sums, wanted * sums[-1] * (1 - 1e-12))) + 1]
    return [CircuitFeature(f, roles[f], 0.0, means[f]) for f in ranked]


def feature_influence(
    graph: AttributionGraph, target: str | None = None, positions: Positions | None = None
) -> dict[FeatureId, tuple[float, str]]:
    """Each feature's share of all features' influence on an answer, over its positions, and the role where most is.

    Args:
        graph: the whole graph.
        target: the answer, as the graph names it; the most probable one when None.
        positions: where features count; everywhere when None. Shares are of the influence at all positions.

    Raises:
        UserError: the graph does not explain that answer.
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
    for at in nodes[there[graph.nodes.position[nodes]]].tolist():
        role = str(graph.roles[graph.nodes.position[at]])
        by_role = parts.setdefault(graph.nodes.feature_id(at), {})
        by_role[role] = by_role.get(role, 0.0) + float(flow[at]) / total
    return {f: (sum(by_role.values()), max(by_role, key=lambda role: by_role[role])) for f, by_role in parts.items()}


def mean_shares(tables: Sequence[Influence]) -> dict[FeatureId, float]:
    """Mean share over graphs; absent counts as zero."""
    summed: dict[FeatureId, float] = {}
    for table in tables:
        for feature, share in table.items():
            summed[feature] = summed.get(feature, 0.0) + share / len(tables)
    return summed


def check_graph(graph: AttributionGraph, where: str, model: str, n_features: Mapping[int, int]) -> None:
    """Refuse a graph of another model or of other transcoders.

    Raises:
        UserError: it is.
    """
    of = str(graph.meta.get("model", ""))
    if of and of != model:
        raise UserError(f"{where} is a graph of the model {of}, not of {model}; give one of {model}")
    nodes = graph.nodes.of(NodeKind.FEATURE)
    for layer in np.unique(graph.nodes.layer[nodes]).tolist():
        largest = int(graph.nodes.index[nodes][graph.nodes.layer[nodes] == layer].max())
        if largest >= n_features.get(layer, 0):
            raise UserError(
                f"{where} has feature L{layer}/{largest}, which the transcoders do not have; trace with them"
            )


def with_influence(members: Sequence[CircuitFeature], known: Influence) -> list[CircuitFeature]:
    """Members with their influence in the run's own graphs filled in where nothing else is known."""
    return [m if m.influence else replace(m, influence=known.get(m.feature, 0.0)) for m in members]


def _member(feature: FeatureId, known: Influence) -> CircuitFeature:
    return CircuitFeature(feature, "", 0.0, known.get(feature, 0.0))


def _first(members: list[CircuitFeature], node: SupernodeConfig) -> list[CircuitFeature]:
    return [m for m in members if node.layer_range([m.feature.layer])][: node.count]
