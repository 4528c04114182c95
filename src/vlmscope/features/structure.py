"""Structure of a dictionary of features: modality, monosemanticity, duplicates and clusters (docs/structure.md).

*Modality* comes from a study alone. At which positions a feature fires is in its counts: soft tokens or words. In which
prompts it fires at words is in its random examples: with a picture, without one, or either; a feature of words that
never fires without a picture may carry what was seen.

The rest needs `StructurePass`, a pass over part of the study's data: who fires with whom at drawn positions, and how
alike the pictures are on which a feature fires. Its memory is bounded by the settings.

Legend: N drawn positions, I items, F features of a layer, or of all layers together, by layer; d model width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import product
from math import sqrt
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from scipy import sparse
from torch import Tensor

from vlmscope.activations import norm_weight_after, watching_mlp_inputs
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, generator
from vlmscope.core.study import ANSWER, IMAGE, TEXT
from vlmscope.features.item_facts import words_of
from vlmscope.features.labels import Labels, short_label
from vlmscope.features.study import StudyInput, grouped
from vlmscope.features.study_files import StudyFolder
from vlmscope.metrics.dictionary import (
    coactive,
    louvain,
    modality,
    monosemanticity,
    nearest_cosines,
    unit_embeddings,
)
from vlmscope.metrics.rates import wilson_interval
from vlmscope.models.batching import joined
from vlmscope.scope import Scope

LEAST_PHI, RESOLUTION = 0.3, 4.0  # of the graph that is divided into clusters, and how finely
NAMED_BY = 3  # strongest examples of each member
SPACES, WHERE = ("write", "read", "both"), ("own_layer", "other_layers")  # in which partners are looked for
CLUSTER_TABLE = pa.schema(
    {"cluster": pa.int64(), "name": pa.string(), "size": pa.int64(), "first_layer": pa.int32()}
    | {"last_layer": pa.int32(), "modality_index": pa.float64(), "features": pa.list_(pa.string())}
)
GROUPS = ("image", "both", "words beside a picture", "words in either", "words alone", "unsettled", "rare", "dead")


def modality_table(study: StudyFolder) -> pd.DataFrame:
    """A row per feature of a study, whose data must have both pictures and words, by layer.

    Columns: `layer`, `feature`; `index`, `low`, `high` and `kind` of `metrics.dictionary.modality`; `group` (`GROUPS`),
    the kind with features of words divided by the prompts in which they fire; `with_picture`, the share of the sampled
    items that have a picture (nan where there is no item); `fired_image` and `fired_text`, active positions, the
    answer's counted as text.
    """
    positions = study.info.positions
    n_image, n_text = positions["image"], positions["text"] + positions["answer"]
    if not n_image or not n_text:
        raise UserError(
            f"{study.path} went through {n_image} soft tokens and {n_text} words; study data that have both"
        )
    ids, pictures = study.items.ids, study.items.table["n_pictures"].to_numpy()
    parts = []
    for layer in study.layers:
        table = study.layer(layer)
        image, text = table.fired[:, IMAGE], table.fired[:, TEXT] + table.fired[:, ANSWER]
        features, items = study.example_items(layer, top=False)
        seen = pictures[np.searchsorted(ids, items)] > 0
        total = np.bincount(features, minlength=len(image))
        share = np.full(len(image), np.nan)
        np.divide(np.bincount(features, seen, len(image)), total, out=share, where=total > 0)
        estimate = modality(image, text, table.items_fired, n_image, n_text)
        words = np.select([share == 1, share == 0], ["words beside a picture", "words alone"], "words in either")
        columns = {"layer": np.int32(layer), "feature": np.arange(len(image), dtype=np.int32), **vars(estimate)}
        columns |= {"group": np.where(estimate.kind == "text", words, estimate.kind), "with_picture": share}
        parts.append(pd.DataFrame(columns | {"fired_image": image, "fired_text": text}))
    return pd.concat(parts, ignore_index=True)


def modality_parts(
    table: pd.DataFrame,
) -> tuple[list[int], dict[str, list[int]], list[np.ndarray], dict[str, list[float]]]:
    """Columns by layer of a `modality_table`, as `report.figures.modality_by_layer` draws them.

    Numbers of layers, counts by group, modality indices of the features that fire often enough, and the share of all
    firing at soft tokens and at words that is by features of both modalities; nan where nothing fires.
    """
    layers = table.layer.unique().tolist()
    columns = {str(name): column.to_numpy() for name, column in table.items()}
    parts = [{name: column[columns["layer"] == layer] for name, column in columns.items()} for layer in layers]
    groups = {group: [int((part["group"] == group).sum()) for part in parts] for group in GROUPS}
    index = [part["index"][~np.isin(part["kind"], ("rare", "dead"))] for part in parts]
    shared = {}
    for place, name in (("at soft tokens", "fired_image"), ("at words", "fired_text")):
        sums = [(part[name][part["kind"] == "both"].sum(), part[name].sum()) for part in parts]
        shared[place] = [float(part / whole) if whole else float("nan") for part, whole in sums]
    return layers, groups, index, shared


def modality_metrics(table: pd.DataFrame) -> dict[str, float]:
    """Metrics of a `modality_table`: `layers/modality_<group>/layer_03`, shares of all features of the layer.

    Of features of both modalities the 95 % interval too, and their share of the firing at soft tokens and at words;
    `modality/meeting_layer` is the layer that has most of them.
    """
    layers, groups, _, shared = modality_parts(table)
    widths = np.sum(list(groups.values()), axis=0)
    low, high = wilson_interval(np.array(groups["both"]) / widths, widths)
    columns = {group.replace(" ", "_"): np.array(counts) / widths for group, counts in groups.items()}
    columns |= {"both_ci_low": low, "both_ci_high": high}
    columns |= dict(zip(("both_firing_image", "both_firing_text"), map(np.array, shared.values()), strict=True))
    metrics = {
        f"layers/modality_{name}/layer_{layer:02d}": float(column[number])
        for number, layer in enumerate(layers)
        for name, column in columns.items()
    }
    metrics |= {f"modality/{group.replace(' ', '_')}": sum(counts) / len(table) for group, counts in groups.items()}
    return metrics | {"modality/meeting_layer": float(layers[int(columns["both"].argmax())])}


class StructurePass:
    """Active features at drawn positions, and peaks and embeddings of the items that have pictures.

    An embedding is the mean of the soft tokens as they enter the decoder: the output of the model's vision tower and
    projector, before any feature reads it.
    """

    def __init__(self, scope: Scope, per_item: int, seed: int = 0) -> None:
        """Start empty; `add` draws at most `per_item` positions of an item, by its id and the seed."""
        self.scope, self.per_item, self.seed = scope, per_item, seed
        n_features = sum(scope.transcoders.widths.values())
        self._active, self._peaks = [_empty(n_features)], [_empty(n_features)]
        self._embeddings = [np.zeros((0, scope.adapter.d_model), np.float32)]

    @torch.no_grad()
    def add(self, inputs: Sequence[StudyInput], forward_tokens: int) -> None:
        """Run the model on inputs, with at most `forward_tokens` tokens in one forward."""
        for group in grouped(inputs, forward_tokens):
            self._forward(group)

    def active(self) -> Any:
        """[N, F] sparse float32, 1 where a feature fires."""
        return sparse.vstack(self._active, format="csr")

    def peaks(self) -> Any:
        """[I', F] sparse float32, the largest activation of each feature in each item that has pictures."""
        return sparse.vstack(self._peaks, format="csr")

    def embeddings(self) -> np.ndarray:
        """[I', d] float32, of the items that have pictures."""
        return np.concatenate(self._embeddings)

    def _forward(self, group: Sequence[StudyInput]) -> None:
        soft = np.flatnonzero(group[0].kinds == IMAGE)
        rows = [self._drawn(item) for item in group]
        row, position = np.repeat(np.arange(len(group)), list(map(len, rows))), np.concatenate(rows)
        active, peaks = [], []

        def take(layer: int, x: Tensor) -> None:
            code = self.scope.transcoders[layer].encode(x)
            width, values = self.scope.transcoders[layer].config.n_features, code.values.float()
            fires = (values[row, position] > 0).float()
            active.append(_largest(code.indices[row, position], fires, width))
            peaks.append(_largest(code.indices.flatten(1), values.flatten(1), width))

        def embeddings(_module: object, args: tuple, kwargs: dict) -> None:
            entering = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
            if len(soft):
                self._embeddings.append(entering[:, torch.from_numpy(soft)].mean(1).float().numpy(force=True))

        handle = self.scope.adapter.decoder().register_forward_pre_hook(embeddings, with_kwargs=True)
        try:
            with watching_mlp_inputs(self.scope.adapter, self.scope.transcoders.layers, take):
                self.scope.adapter.next_logits(joined([item.tensors for item in group]))
        finally:
            handle.remove()
        self._active.append(sparse.hstack(active, format="csr"))
        if len(soft):
            self._peaks.append(sparse.hstack(peaks, format="csr"))

    def _drawn(self, item: StudyInput) -> np.ndarray:
        """Positions of an item, ascending; the first is left out, where every item begins alike."""
        mask = item.tensors.get("attention_mask")
        valid = np.ones(len(item.kinds), bool) if mask is None else mask[0].bool().numpy(force=True)
        candidates = np.flatnonzero(valid)[1:]
        count = min(self.per_item, len(candidates))
        return np.sort(generator(self.seed, "positions", item.id).choice(candidates, count, replace=False))


def _empty(width: int) -> Any:
    return sparse.csr_array((0, width), dtype=np.float32)


def _largest(indices: Tensor, values: Tensor, width: int) -> Any:
    """[n, F] sparse, the largest of the values above 0 that each row [n, m] has of a feature."""
    table = values.new_zeros(len(values), width).scatter_reduce_(1, indices, values, "amax")
    return sparse.csr_array(table.numpy(force=True))


@torch.no_grad()
def write_directions(scope: Scope) -> dict[int, Tensor]:
    """Layer -> [F, d]: decoder rows, over all layers that they write to, through the norm after each MLP."""
    directions, hook = {}, scope.transcoders.config.output_hook
    for layer in scope.transcoders.layers:
        transcoder = scope.transcoders[layer]
        reached = range(layer, layer + transcoder.config.writes)
        norms = [norm_weight_after(scope.adapter, target, hook, transcoder.b_dec) for target in reached]
        directions[layer] = transcoder.directions(norms)
    return directions


@torch.no_grad()
def read_directions(scope: Scope) -> dict[int, Tensor]:
    """Layer -> [F, d]: encoder rows, through the weights of the norm before each MLP."""
    ones = torch.ones(scope.adapter.d_model, dtype=scope.adapter.dtype, device=scope.adapter.device)
    return {
        layer: scope.transcoders[layer].W_enc
        * scope.adapter.norm_scale(scope.adapter.norms(layer).mlp_in, ones).to(scope.transcoders[layer].W_enc)
        for layer in scope.transcoders.layers
    }


def feature_table(
    scope: Scope, seen: StructurePass, modality_of: pd.DataFrame, neighbours: int, seed: int
) -> pd.DataFrame:
    """A row per feature, by layer: scores, modality, how near its nearest parallel is, neighbours by firing, cluster.

    Columns: `layer`, `feature`, `monosemanticity` and `shuffled` (the same when pictures have each other's embeddings),
    `pictures` on which it fires; `modality_index`, `_low`, `_high`, `_kind`, `_group`; `cosine_<space>_<where>`, of the
    partner most nearly parallel in what features write, read, or both, in the `own_layer` or in `other_layers`;
    `fires_with` and `phi` of the nearest `neighbours`, strongest first; `cluster`, of the graph of these.
    """
    peaks, units = seen.peaks(), unit_embeddings(seen.embeddings())
    order = generator(seed, "shuffled pictures").permutation(len(units))
    columns: dict[str, Any] = dict(modality_of[["layer", "feature"]])
    columns |= {"monosemanticity": monosemanticity(units, peaks), "shuffled": monosemanticity(units[order], peaks)}
    columns["pictures"] = np.bincount(peaks.indices, minlength=peaks.shape[1])
    columns |= dict(modality_of[["index", "low", "high", "kind", "group"]].add_prefix("modality_"))
    ids = [FeatureId(*key) for key in zip(modality_of.layer, modality_of.feature, strict=True)]
    living = (modality_of.kind != "dead").to_numpy()
    alive = {layer: torch.from_numpy(living[modality_of.layer == layer]) for layer in scope.transcoders.layers}
    write, read = write_directions(scope), read_directions(scope)
    directions = {"write": (write,), "read": (read,), "both": (write, read)}
    for space, where in product(SPACES, WHERE):
        by_layer = {layer: [vectors[layer] for vectors in directions[space]] for layer in write}
        nearest = nearest_cosines(by_layer, alive, where == "own_layer", device=scope.adapter.device)
        columns[f"cosine_{space}_{where}"] = torch.cat([*nearest.values()]).numpy()
    together = coactive(seen.active(), neighbours)
    columns["fires_with"] = [[str(ids[i]) for i in row if i >= 0] for row in together.index.tolist()]
    columns["phi"] = [[score for score in row if score > 0] for row in together.score.tolist()]
    columns["cluster"] = louvain(together.graph(LEAST_PHI), seed, RESOLUTION)
    return pd.DataFrame(columns)


def cluster_rows(study: StudyFolder, features: pd.DataFrame) -> list[dict[str, Any]]:
    """A row of `CLUSTER_TABLE` per cluster of two or more features of `feature_table`, the largest first.

    Its name is made of the labels of its members where the study has trusted ones, else of the words of their
    strongest examples.
    """
    ids = [FeatureId(*key) for key in zip(features.layer.tolist(), features.feature.tolist(), strict=True)]
    place = {feature: i for i, feature in enumerate(ids)}
    table = study.items.table.select(["users", "assistants", "text"]).to_pylist()
    words = {
        item: frozenset(words_of(" ".join([*row["users"], *row["assistants"], row["text"]])))
        for item, row in zip(study.items.ids.tolist(), table, strict=True)
    }
    examples: dict[int, list[int]] = {}
    for layer in study.layers:
        for index, item in zip(*(column.tolist() for column in study.example_items(layer, top=True)), strict=True):
            strongest = examples.setdefault(place[FeatureId(layer, index)], [])
            if len(strongest) < NAMED_BY:
                strongest.append(item)
    labels = {place[feature]: short_label(label.text) for feature, label in Labels(study).trusted().items()}
    index = features.modality_index.to_numpy()
    members: dict[int, list[int]] = {}
    for i, cluster in enumerate(features.cluster.tolist()):
        members.setdefault(cluster, []).append(i)
    members = {cluster: places for cluster, places in sorted(members.items()) if len(places) > 1}
    names = cluster_names(members, examples, words, labels)
    rows: list[dict[str, Any]] = []
    for cluster, places in members.items():
        known = index[places][~np.isnan(index[places])]
        row = {"cluster": cluster, "name": names[cluster], "size": len(places)}
        row |= {"first_layer": ids[places[0]].layer, "last_layer": ids[places[-1]].layer}  # features are by layer
        row |= {"modality_index": float(known.mean()) if len(known) else None}
        rows.append(row | {"features": [str(ids[i]) for i in places]})
    return rows


def cluster_names(
    members: Mapping[int, Sequence[int]],
    items: Mapping[int, Sequence[int]],
    words: Mapping[int, Collection[str]],
    labels: Mapping[int, str] | None = None,
    count: int = 3,
) -> dict[int, str]:
    """A name for each cluster of features: the most frequent labels of its members, else words of their examples.

    Words are ranked by how far their share p of the examples exceeds their share q of all items, in standard deviations
    (p - q) / sqrt(q (1 - q)); "" without an example or such a word.

    Args:
        members: cluster -> its features.
        items: feature -> the items of its strongest examples.
        words: item -> its different words, of all items.
        labels: feature -> what it is called.
        count: words or labels of a name at most.
    """
    usual = Counter(word for item_words in words.values() for word in item_words)
    names = {}
    for cluster, features in members.items():
        label_counts = Counter(labels[feature] for feature in features if labels and feature in labels)
        if label_counts:
            names[cluster] = "; ".join(label for label, _ in label_counts.most_common(count))
            continue
        examples = [item for feature in features for item in items.get(feature, ())]
        excess = {}
        for word, n in Counter(word for item in examples for word in words[item]).items():
            p, q = n / len(examples), usual[word] / len(words)
            excess[word] = (p - q) / sqrt(q * (1 - q)) if q < 1 else 0.0
        best = sorted((word for word in excess if excess[word] > 0), key=lambda word: (-excess[word], word))
        names[cluster] = " ".join(best[:count])
    return names


def duplicate_shares(features: pd.DataFrame, twin: float) -> dict[str, list[float]]:
    """Share of each layer's live features with a partner of at least the cosine `twin`, in each way of comparing."""
    ways = [f"{space}_{where}" for space in SPACES for where in WHERE]
    shares: dict[str, list[float]] = {way: [] for way in ways}
    for _, rows in features.groupby("layer"):
        living = max(int((rows.modality_kind != "dead").sum()), 1)
        for way in ways:
            shares[way].append(int(np.sum(rows[f"cosine_{way}"] >= twin)) / living)
    return shares


def structure_metrics(
    features: pd.DataFrame, clusters: Sequence[Mapping[str, Any]], shares: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Metrics of a `feature_table`, its `cluster_rows` and its `duplicate_shares`.

    Monosemanticity (over features that fire on two pictures or more) and duplicates also by layer.
    """
    layers = features.layer.unique().tolist()
    metrics = {
        "monosemanticity/median": features.monosemanticity.quantile(),  # nan is left out
        "monosemanticity/shuffled_median": features.shuffled.quantile(),
    }
    for number, layer in enumerate(layers):
        score = features.monosemanticity[features.layer == layer]
        metrics[f"layers/monosemanticity/layer_{layer:02d}"] = score.quantile()
        metrics |= {f"layers/duplicates_{way}/layer_{layer:02d}": values[number] for way, values in shares.items()}
    metrics |= {f"duplicates/{way}": float(np.mean(values)) for way, values in shares.items()}
    sizes = [row["size"] for row in clusters]
    metrics["clusters/count"] = float(len(sizes))
    metrics["clusters/features_frac"] = sum(sizes) / max(len(features), 1)
    metrics["clusters/largest"] = float(max(sizes, default=0))
    return metrics
