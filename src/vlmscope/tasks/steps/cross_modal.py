"""Features that a concept's pictures and its word share: found, counted against shuffled pictures, and tested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmscope.core.artifacts import atomic_path
from vlmscope.core.records import FeatureId
from vlmscope.features.cross_modal import PLACES, Shared, find_shared, picture_peaks, text_candidates
from vlmscope.metrics.causal import benjamini_hochberg, permutation_p
from vlmscope.metrics.decoding import Rule, matching_p
from vlmscope.report.experiment_figures import coincidence_maps, effect_bars, shared_by_layer
from vlmscope.tasks.steps.cross_modal_effects import Effects, measure_effects, rates

if TYPE_CHECKING:
    from vlmscope.features.cross_modal_config import CrossModalConfig
    from vlmscope.tasks.steps.bench import Bench


@dataclass(frozen=True)
class Association:
    """One set of concepts: what is shared under each question, under all of them, and what it does.

    `metrics` are this set's, `figures` its pictures by name.
    """

    config: CrossModalConfig
    found: dict[str, Shared]
    every: list[set[FeatureId]]
    effects: Effects
    metrics: dict[str, float]
    figures: dict[str, Path]


def run(bench: Bench) -> None:
    """Leaves the one set of concepts in `bench.records`; writes shared.parquet and figures."""
    found = associate(bench, bench.cross_modal, bench.run_dir)
    bench.metrics |= found.metrics
    bench.records["cross_modal"] = {"": found}


def associate(bench: Bench, config: CrossModalConfig, folder: Path) -> Association:
    """Find, count and test what the pictures and words of some concepts share; files go into a folder."""
    found = {name: find(bench, config, name) for name in config.questions}
    every = in_every_question(found)
    metrics: dict[str, float] = {}
    for name, shared in found.items():
        metrics |= count_metrics(bench, config, name, shared)
    metrics |= every_metrics(config.concepts, found, every)
    write_shared(folder / "shared.parquet", config.concepts, found, every)
    effects, measured = measure_effects(bench, config, found, every)
    layers, to = bench.transcoders.layers, folder / "figures"
    tables = {name: shared.coincidences for name, shared in found.items()}
    figures = {
        "coincidences": coincidence_maps(tables, config.concepts, to / "coincidences.png"),
        "shared_by_layer": shared_by_layer(layers, *layer_counts(found, layers), to / "shared_by_layer.png"),
        "effects": effect_bars(rates(effects), to / "effects.png"),
    }
    return Association(config, found, every, effects, metrics | measured, figures)


def find(bench: Bench, config: CrossModalConfig, question: str) -> Shared:
    """What is shared under one question, from training pictures."""
    asked = config.questions[question]
    texts = [bench.vlm.prepare(asked.asked_in_text(concept)) for concept in config.concepts]
    candidates = text_candidates(bench.scope, texts, config.ratio)
    images = [bench.cross_pictures(config, question, one, "train") for one in config.concepts]
    wording = asked.picture
    parts = [
        picture_peaks(bench.scope, bench.scope.batch(bench.inputs(of, wording)), candidates.by_layer()) for of in images
    ]
    labels = np.repeat(np.arange(len(images)), [len(of) for of in images])
    rule = Rule(config.ratio, config.fires)
    return find_shared(
        candidates, np.concatenate(parts), labels, bench.transcoders.layers, rule, config.q, config.permutations,
        config.seed,
    )  # fmt: skip


def in_every_question(found: dict[str, Shared]) -> list[set[FeatureId]]:
    """For each concept the features that are shared whatever is asked: of the concept, not of one answer."""
    sets = [[shared.features(c) for c in range(len(shared.coincidences))] for shared in found.values()]
    return [set.intersection(*of) for of in zip(*sets, strict=True)]


def count_metrics(bench: Bench, config: CrossModalConfig, question: str, shared: Shared) -> dict[str, float]:
    """Counts by concept, place and layer beside those under shuffled pictures, and how the names match."""
    key = f"cross_modal/{question}"
    observed, null = shared.by_rule(), shared.null
    p = permutation_p(observed[:, -1], null[..., -1])
    q = benjamini_hochberg(p)
    metrics = {
        f"{key}/candidates": float(len(shared.candidates.features)),
        f"{key}/shared": float(sum(len(shared.features(c)) for c in range(len(config.concepts)))),
        f"{key}/by_rule": float(observed[:, -1].sum()),
        f"{key}/by_rule_null": float(null[..., -1].sum(1).mean()),
        f"{key}/by_rule_null_max": float(null[..., -1].sum(1).max()),
        f"{key}/by_rule_p": float(permutation_p(observed[:, -1].sum(), null[..., -1].sum(1))),
    }
    for c, concept in enumerate(config.concepts):
        metrics[f"{key}/{concept}/shared"] = float(len(shared.features(c)))
        metrics[f"{key}/{concept}/by_rule"] = float(observed[c, -1])
        metrics[f"{key}/{concept}/by_rule_null"] = float(null[:, c, -1].mean())
        metrics[f"{key}/{concept}/by_rule_q"] = float(q[c])
    for at, place in enumerate(PLACES):
        metrics[f"{key}/{place}/shared"] = float(shared.shared[:, at].sum())
        metrics[f"{key}/{place}/by_rule_null"] = float(null[:, :, at].sum(1).mean())
    expected, p_names = matching_p(shared.coincidences, config.seed)
    metrics[f"{key}/matching/diagonal"] = float(shared.coincidences.trace())
    metrics |= {f"{key}/matching/expected": expected, f"{key}/matching/p": p_names}
    layers = bench.transcoders.layers
    for layer, count, drawn in zip(layers, by_layer(shared, layers), shared.null_layers.mean(0), strict=True):
        metrics[f"layers/cross_modal_{question}/layer_{layer:02d}"] = float(count)
        metrics[f"layers/cross_modal_{question}_null/layer_{layer:02d}"] = float(drawn)
    return metrics


def by_layer(shared: Shared, layers: list[int]) -> np.ndarray:
    """[L], shared features, one counted once for each concept."""
    of = [feature.layer for c in range(len(shared.coincidences)) for feature in shared.features(c)]
    return np.array([of.count(layer) for layer in layers])


def every_metrics(concepts: list[str], found: dict[str, Shared], every: list[set[FeatureId]]) -> dict[str, float]:
    """Features of a concept under every question, beside those that one question's share with another concept's."""
    metrics = {
        f"cross_modal/every_question/{concept}/shared": float(len(of))
        for concept, of in zip(concepts, every, strict=True)
    }
    first, *rest = found.values()
    crossed = [
        len(set.intersection(first.features(c), *(one.features(d) for one in rest)))
        for c in range(len(concepts))
        for d in range(len(concepts))
        if c != d
    ]
    metrics["cross_modal/every_question/mean"] = float(np.mean([len(of) for of in every]))
    return metrics | {"cross_modal/every_question/other_concepts_mean": float(np.mean(crossed))}


def layer_counts(found: dict[str, Shared], layers: list[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """[L] counts by place of all questions (a feature once for each place), and [draws, L] those under shuffling."""
    counts = {place: np.zeros(len(layers), np.int64) for place in PLACES}
    for shared in found.values():
        of = np.searchsorted(layers, [feature.layer for feature in shared.candidates.features])
        for at, place in enumerate(PLACES):
            counts[place] += np.bincount(of, shared.shared[:, at].sum(0), len(layers)).astype(np.int64)
    return counts, sum((shared.null_layers for shared in found.values()), np.zeros(1, np.int64))


def write_shared(path: Path, concepts: list[str], found: dict[str, Shared], every: list[set[FeatureId]]) -> None:
    """A row for each question, concept, feature and place at which it is shared."""
    rows = []
    for question, shared in found.items():
        shape = shared.shared.shape
        mean, rest, rate = (getattr(shared.contrast, name).reshape(shape) for name in ("mean", "rest", "rate"))
        for c, place, m in np.argwhere(shared.shared).tolist():
            feature = shared.candidates.features[m]
            rows.append(
                {
                    "question": question,
                    "concept": concepts[c],
                    "feature": str(feature),
                    "layer": feature.layer,
                    "place": PLACES[place],
                    "text_place": str(shared.candidates.place[c, m]),
                    "text_peak": float(shared.candidates.peaks[c, m]),
                    "picture_mean": float(mean[c, place, m]),
                    "other_pictures_mean": float(rest[c, place, m]),
                    "fires_on": float(rate[c, place, m]),
                    "q": float(shared.q[c, place, m]),
                    "every_question": feature in every[c],
                }
            )
    schema = pa.schema(
        [(name, pa.string()) for name in ("question", "concept", "feature")]
        + [("layer", pa.int32()), ("place", pa.string()), ("text_place", pa.string())]
        + [(name, pa.float64()) for name in ("text_peak", "picture_mean", "other_pictures_mean", "fires_on", "q")]
        + [("every_question", pa.bool_())]
    )
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")
