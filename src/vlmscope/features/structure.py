"""Structure of a dictionary of features: modality, monosemanticity and duplicates (docs/structure.md).

*Modality* comes from a study alone. At which positions a feature fires is in its counts: soft tokens or words. In which
prompts it fires at words is in its random examples: with a picture, without one, or either; a feature of words that
never fires without a picture may carry what was seen. The rest needs the model (`pictures_seen`).

Legend: I items, F features of a layer, or of all layers together, by layer; d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from vlmscope.activations import norm_weight_after, watching_mlp_inputs
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.core.study import ANSWER, IMAGE, TEXT
from vlmscope.features.study import StudyInput, grouped
from vlmscope.features.study_files import StudyFolder
from vlmscope.metrics.dictionary import modality, monosemanticity, nearest_cosines, unit_embeddings
from vlmscope.metrics.rates import wilson_interval
from vlmscope.models.batching import joined
from vlmscope.scope import Scope

# What is compared of two features, and in which layers partners are looked for.
WAYS = [f"{space}_{where}" for space in ("write", "read", "both") for where in ("own_layer", "other_layers")]
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
    table: Any,
) -> tuple[list[int], dict[str, list[int]], list[np.ndarray], dict[str, list[float]]]:
    """Columns by layer of a `modality_table`, as `report.figures.modality_by_layer` draws them.

    Numbers of layers, counts by group, modality indices of the features that fire often enough, and the share of all
    firing at soft tokens and at words that is by features of both modalities; nan where nothing fires.
    """
    by_layer = table.groupby("layer", sort=False)
    counts = by_layer["group"].value_counts().unstack(fill_value=0).reindex(columns=GROUPS, fill_value=0)
    index = [part["index"][~part.kind.isin(("rare", "dead"))].to_numpy() for _, part in by_layer]
    fired = table[["fired_image", "fired_text"]]
    of_both, whole = (part.groupby(table.layer).sum() for part in (fired[table.kind == "both"], fired))
    shares = of_both.reindex(whole.index, fill_value=0) / whole  # nan where nothing fires
    layers = table.layer.unique().tolist()
    shared = {"at soft tokens": shares.fired_image, "at words": shares.fired_text}
    groups = {group: counts[group].loc[layers].tolist() for group in GROUPS}
    return layers, groups, index, {place: share.loc[layers].tolist() for place, share in shared.items()}


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


def pictures_seen(scope: Scope, inputs: Sequence[StudyInput], forward_tokens: int) -> tuple[Any, np.ndarray]:
    """Of the I inputs that have pictures: the largest activation of each feature, [I, F] sparse float32, and the
    picture's embedding, [I, d] float32.

    An embedding is the mean of the soft tokens as they enter the decoder: the output of the model's vision tower and
    projector, before any feature reads it. One forward has at most `forward_tokens` tokens.
    """
    adapter, transcoders = scope.adapter, scope.transcoders
    peaks: list[Any] = [sparse.csr_array((0, sum(transcoders.widths.values())), dtype=np.float32)]
    means = [np.zeros((0, adapter.d_model), np.float32)]
    shown = [item for item in inputs if (item.kinds == IMAGE).any()]
    for group in grouped(shown, forward_tokens):
        soft, by_layer = torch.from_numpy(group[0].kinds == IMAGE), []

        def take(layer: int, x: Tensor, by_layer: list[Any] = by_layer) -> None:
            code = transcoders[layer].encode(x)
            table = x.new_zeros(len(x), transcoders[layer].config.n_features, dtype=torch.float32)
            table.scatter_reduce_(1, code.indices.flatten(1), code.values.flatten(1).float(), "amax")
            by_layer.append(sparse.csr_array(table.numpy(force=True)))

        def embeddings(_module: object, args: tuple, kwargs: dict, soft: Tensor = soft) -> None:
            entering = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
            means.append(entering[:, soft].mean(1).float().numpy(force=True))

        with ExitStack() as stack, torch.no_grad():
            hook = adapter.decoder().register_forward_pre_hook(embeddings, with_kwargs=True)
            stack.callback(hook.remove)
            stack.enter_context(watching_mlp_inputs(adapter, transcoders.layers, take))
            adapter.next_logits(joined([item.tensors for item in group]))
        peaks.append(sparse.hstack(by_layer, format="csr"))
    return sparse.vstack(peaks, format="csr"), np.concatenate(means)


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
    scope: Scope, peaks: Any, embeddings: np.ndarray, modality_of: pd.DataFrame, seed: int
) -> pd.DataFrame:
    """A row per feature, by layer, from `pictures_seen` and a `modality_table`.

    Columns: `layer`, `feature`, `monosemanticity` and `shuffled` (the same when pictures have each other's embeddings),
    `pictures` on which it fires; `modality_index`, `_low`, `_high`, `_kind`, `_group`; `cosine_<way>` for each of
    `WAYS`, of the partner most nearly parallel (-1 without one).
    """
    units = unit_embeddings(embeddings)
    order = generator(seed, "shuffled pictures").permutation(len(units))
    columns: dict[str, Any] = dict(modality_of[["layer", "feature"]])
    columns |= {"monosemanticity": monosemanticity(units, peaks), "shuffled": monosemanticity(units[order], peaks)}
    columns["pictures"] = np.bincount(peaks.indices, minlength=peaks.shape[1])
    columns |= dict(modality_of[["index", "low", "high", "kind", "group"]].add_prefix("modality_"))
    living = (modality_of.kind != "dead").to_numpy()
    alive = {layer: torch.from_numpy(living[modality_of.layer == layer]) for layer in scope.transcoders.layers}
    write, read = write_directions(scope), read_directions(scope)
    directions = {"write": (write,), "read": (read,), "both": (write, read)}
    for way in WAYS:
        space, _, where = way.partition("_")
        by_layer = {layer: [vectors[layer] for vectors in directions[space]] for layer in write}
        nearest = nearest_cosines(by_layer, alive, where == "own_layer", scope.adapter.device)
        column = np.full(len(living), -1.0, np.float32)
        column[living] = torch.cat([*nearest.values()]).numpy()
        columns[f"cosine_{way}"] = column
    return pd.DataFrame(columns)


def by_layer(features: Any, twin: float) -> Any:
    """A row per layer of a `feature_table`: `monosemanticity`, the median over features that fire on two pictures or
    more, and `duplicates_<way>`, the share of live features with a partner of at least the cosine `twin`.
    """
    living = features[features.modality_kind != "dead"]
    twins = (living.filter(like="cosine_") >= twin).groupby(living.layer).mean()
    columns = twins.rename(columns=lambda name: name.replace("cosine_", "duplicates_"))
    columns.insert(0, "monosemanticity", features.groupby("layer").monosemanticity.median())
    return columns.reindex(features.layer.unique()).fillna(dict.fromkeys(columns.columns[1:], 0.0))


def structure_metrics(features: pd.DataFrame, layers: Any) -> dict[str, float]:
    """Metrics of a `feature_table` and of it `by_layer`: `layers/<column>/layer_03`, and the means of duplicates."""
    metrics = {
        "monosemanticity/median": features.monosemanticity.median(),  # nan is left out
        "monosemanticity/shuffled_median": features.shuffled.median(),
    }
    for name, column in layers.items():
        metrics |= {f"layers/{name}/layer_{layer:02d}": float(value) for layer, value in column.items()}
    return metrics | {f"duplicates/{way}": float(layers[f"duplicates_{way}"].mean()) for way in WAYS}
