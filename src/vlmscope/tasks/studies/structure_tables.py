"""The tables, metrics and figures of task=structure.

Legend: F features of all layers together, by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vlmscope.core.artifacts import atomic_path
from vlmscope.core.records import FeatureId, generator
from vlmscope.features.labels.label import short_label
from vlmscope.features.labels.propose import Labels
from vlmscope.features.structure.cluster_names import cluster_names, words_of
from vlmscope.features.structure.directions import read_directions, write_directions
from vlmscope.features.structure.modality_tables import LayerModality
from vlmscope.features.structure.structure_pass import StructurePass
from vlmscope.features.study.records import StudyFolder
from vlmscope.metrics.clusters import Neighbours, coactive, louvain, nearest_of
from vlmscope.metrics.dictionary import Twin, monosemanticity, nearest_twins, unit_embeddings
from vlmscope.report.study_figures import score_by_layer, twins_by_layer

if TYPE_CHECKING:
    from vlmscope.scope import Scope
    from vlmscope.tasks.structure import Config

SPACES = ("write", "read", "both")  # directions by which features are compared


@dataclass(frozen=True)
class Structure:
    """All that is known of F features.

    Attributes:
        ids: F.
        modality: by layer.
        score: [F] monosemanticity on pictures.
        shuffled: [F], the same when pictures have each other's embeddings.
        pictures: [F] int64, pictures on which each fires.
        twins: (space, own layer) -> layer -> the nearest partner.
        together: neighbours by firing, [F, m].
        clusters: "firing" and "direction" -> [F].
        names: "firing" and "direction" -> cluster -> name, of clusters of two or more.
        twin: cosine from which two directions count as one.
    """

    ids: tuple[FeatureId, ...]
    modality: Sequence[LayerModality]
    score: np.ndarray
    shuffled: np.ndarray
    pictures: np.ndarray
    twins: Mapping[tuple[str, bool], Mapping[int, Twin]]
    together: Neighbours
    clusters: Mapping[str, np.ndarray]
    names: Mapping[str, Mapping[int, str]]
    twin: float

    @classmethod
    def of(
        cls,
        scope: Scope,
        study: StudyFolder,
        seen: StructurePass,
        modality: Sequence[LayerModality],
        config: Config,
    ) -> Structure:
        """Put it together from the study, the pass and the transcoders."""
        alive = {one.layer: torch.from_numpy(one.found.kind != "dead") for one in modality}
        write, read = write_directions(scope), read_directions(scope)
        spaces = {
            "write": {layer: [write[layer]] for layer in write},
            "read": {layer: [read[layer]] for layer in read},
            "both": {layer: [write[layer], read[layer]] for layer in write},
        }
        twins = {
            (space, own): nearest_twins(of, alive, own, device=scope.adapter.device)
            for space, of in spaces.items()
            for own in (True, False)
        }
        together = coactive(seen.active(), config.neighbours)
        living = np.concatenate([one.numpy() for one in alive.values()])
        parallel = near_directions(torch.cat(list(write.values())), living, config.neighbours)
        clusters = {
            "firing": louvain(together.graph(config.phi), config.seed, config.resolution),
            "direction": louvain(parallel.graph(config.cosine), config.seed, config.resolution),
        }
        peaks, units = seen.peaks(), unit_embeddings(seen.embeddings())
        order = generator(config.seed, "shuffled pictures").permutation(len(units))
        widths = {one.layer: len(one.found.index) for one in modality}
        return cls(
            tuple(FeatureId(layer, index) for layer, width in widths.items() for index in range(width)),
            modality,
            monosemanticity(units, peaks),
            monosemanticity(units[order], peaks),
            np.bincount(peaks.indices, minlength=peaks.shape[1]),
            twins,
            together,
            clusters,
            named(study, clusters, seen.offsets, config.top),
            config.twin,
        )

    def by_layer(self) -> dict[int, slice]:
        """Where each layer's features stand among all."""
        found, start = {}, 0
        for one in self.modality:
            found[one.layer] = slice(start, start + len(one.found.index))
            start = found[one.layer].stop
        return found


def near_directions(directions: torch.Tensor, alive: np.ndarray, neighbours: int) -> Neighbours:
    """The features with the largest cosines beside each, from directions [F, d] of all layers."""
    units = torch.nn.functional.normalize(directions.float(), dim=1)

    def scores(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cosines = (units[torch.from_numpy(features)] @ units.T).numpy(force=True)
        return cosines, np.zeros(cosines.shape, np.int64)

    return nearest_of(scores, len(units), neighbours, alive)


def named(
    study: StudyFolder, clusters: Mapping[str, np.ndarray], offsets: Mapping[int, int], top: int
) -> dict[str, dict[int, str]]:
    """Names of all clusters of two or more: labels of their members where the study has some that hold, else the words
    of their members' `top` strongest examples.
    """
    table = study.items.table
    said = zip(table["users"].to_pylist(), table["assistants"].to_pylist(), table["text"].to_pylist(), strict=True)
    words = {
        int(item): words_of(" ".join([*users, *assistants, text]))
        for item, (users, assistants, text) in zip(study.items.ids, said, strict=True)
    }
    examples: dict[int, list[int]] = {}
    for layer in study.layers:
        for feature, item in zip(*study.example_items(layer, top=True), strict=True):
            of = examples.setdefault(offsets[layer] + int(feature), [])
            if len(of) < top:
                of.append(int(item))
    labels = {
        offsets[feature.layer] + feature.index: short_label(label.text)
        for feature, label in Labels(study).trusted().items()
    }
    return {kind: cluster_names(members_of(of), examples, words, labels) for kind, of in clusters.items()}


def members_of(clusters: np.ndarray) -> dict[int, list[int]]:
    """Cluster -> its features, for clusters of two or more."""
    order = np.argsort(clusters, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1) if len(order) else []
    return {int(clusters[part[0]]): part.tolist() for part in parts if len(part) > 1}


def write_structure(folder: Path, found: Structure) -> dict[str, float]:
    """Write structure.parquet, clusters.parquet and two figures.

    Returns:
        `monosemanticity/median`, `layers/monosemanticity/layer_03` (medians over features that fire on two pictures or
        more), `duplicates/<space>/own_layer` and `other_layers` with `layers/duplicates_..`, and `clusters/..`.
    """
    metrics = {
        "monosemanticity/median": _median(found.score),
        "monosemanticity/shuffled_median": _median(found.shuffled),
    }
    shares: dict[str, list[float]] = {}
    kinds = np.concatenate([one.found.kind for one in found.modality])
    for layer, where in found.by_layer().items():
        metrics[f"layers/monosemanticity/layer_{layer:02d}"] = _median(found.score[where])
        living = max(int((kinds[where] != "dead").sum()), 1)
        for (space, own), twins in found.twins.items():
            name = f"{space}_{'own_layer' if own else 'other_layers'}"
            share = float((twins[layer].cosine >= found.twin).sum()) / living
            shares.setdefault(name, []).append(share)
            metrics[f"layers/duplicates_{name}/layer_{layer:02d}"] = share
    metrics |= {f"duplicates/{name}": float(np.mean(of)) for name, of in shares.items()}
    for kind, clusters in found.clusters.items():
        members = members_of(clusters)
        metrics[f"clusters/{kind}/count"] = float(len(members))
        metrics[f"clusters/{kind}/features_frac"] = sum(map(len, members.values())) / max(len(clusters), 1)
        metrics[f"clusters/{kind}/largest"] = float(max(map(len, members.values()), default=0))
    _write(folder / "structure.parquet", feature_table(found))
    _write(folder / "clusters.parquet", cluster_table(found))
    layers = list(found.by_layer())
    by_group = np.concatenate([one.group for one in found.modality])
    of_layer = np.array([feature.layer for feature in found.ids])
    score_by_layer(of_layer, found.score, by_group, folder / "figures" / "monosemanticity.png")
    twins_by_layer(layers, shares, folder / "figures" / "duplicates.png", found.twin)
    return metrics


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _write(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def feature_table(found: Structure) -> pa.Table:
    """A row a feature, by layer."""
    columns: dict[str, object] = {
        "layer": np.array([feature.layer for feature in found.ids], np.int32),
        "feature": np.array([feature.index for feature in found.ids], np.int32),
        "monosemanticity": found.score,
        "pictures": found.pictures,
    }
    for name in ("index", "low", "high", "kind"):
        columns[f"modality_{name}"] = np.concatenate([getattr(one.found, name) for one in found.modality])
    columns["modality_group"] = np.concatenate([one.group for one in found.modality])
    for (space, own), twins in found.twins.items():
        name = f"{space}_{'own_layer' if own else 'other_layers'}"
        columns[f"cosine_{name}"] = torch.cat([one.cosine for one in twins.values()]).numpy()
        partner = zip(
            *(torch.cat([getattr(one, key) for one in twins.values()]).tolist() for key in ("layer", "index")),
            strict=True,
        )
        columns[f"twin_{name}"] = [str(FeatureId(*pair)) if pair[0] >= 0 else None for pair in partner]
    columns["fires_with"] = [
        [str(found.ids[i]) for i in row if i >= 0] for row in found.together.index.tolist()
    ]  # strongest first
    columns["phi"] = [[score for score in row if score > 0] for row in found.together.score.tolist()]
    for kind, clusters in found.clusters.items():
        columns[f"cluster_{kind}"] = clusters
    return pa.table(columns)


def cluster_table(found: Structure) -> pa.Table:
    """A row a cluster of two or more features, the largest first."""
    index = np.concatenate([one.found.index for one in found.modality])
    rows = []
    for kind, clusters in found.clusters.items():
        for cluster, members in sorted(members_of(clusters).items()):
            layers = [found.ids[i].layer for i in members]
            known = index[members][~np.isnan(index[members])]
            rows.append(
                {
                    "kind": kind,
                    "cluster": cluster,
                    "name": found.names[kind].get(cluster, ""),
                    "size": len(members),
                    "first_layer": min(layers),
                    "last_layer": max(layers),
                    "modality_index": float(known.mean()) if len(known) else None,
                    "features": [str(found.ids[i]) for i in members],
                }
            )
    schema = pa.schema(
        [("kind", pa.string()), ("cluster", pa.int64()), ("name", pa.string()), ("size", pa.int64())]
        + [("first_layer", pa.int32()), ("last_layer", pa.int32()), ("modality_index", pa.float64())]
        + [("features", pa.list_(pa.string()))]
    )
    return pa.Table.from_pylist(rows, schema)
