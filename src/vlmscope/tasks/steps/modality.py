"""Which features belong to pictures, to words or to both, by layer: metrics, a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmscope.core.artifacts import atomic_path
from vlmscope.features.structure.modality_tables import GROUPS, LayerModality, modality_tables
from vlmscope.metrics.dictionary import wilson_interval
from vlmscope.report.study_figures import modality_by_layer

if TYPE_CHECKING:
    from pathlib import Path

    from vlmscope.tasks.steps.bench import Bench

RARE = ("rare", "dead")


def run(bench: Bench) -> None:
    """Leaves the tables in `bench.records`; writes modality.parquet and figures/modality_by_layer.png."""
    tables = modality_tables(bench.record("study"))
    bench.metrics |= modality_metrics(tables)
    write_modality(bench.run_dir / "modality.parquet", tables)
    draw(tables, bench.run_dir / "figures" / "modality_by_layer.png")
    bench.records["modality"] = tables


def modality_metrics(tables: Sequence[LayerModality]) -> dict[str, float]:
    """`layers/modality_<group>/layer_03`, shares of all features of the layer; of features of both modalities the 95 %
    interval too, and their share of the firing at soft tokens and at words; `modality/meeting_layer` has most of them.
    """
    found: dict[str, float] = {}
    for one in tables:
        counts, width = one.counts(), len(one.found.index)

        def name(what: str, layer: int = one.layer) -> str:
            return f"layers/modality_{what.replace(' ', '_')}/layer_{layer:02d}"

        found |= {name(group): count / width for group, count in counts.items()}
        low, high = wilson_interval(np.array(counts["both"] / width), np.array(width))
        found |= {name("both_ci_low"): float(low), name("both_ci_high"): float(high)}
        found[name("both_firing_image")], found[name("both_firing_text")] = one.shared_firing()
    totals = {group: sum(one.counts()[group] for one in tables) for group in GROUPS}
    everything = sum(totals.values())
    found |= {f"modality/{group.replace(' ', '_')}": count / everything for group, count in totals.items()}
    most = max(tables, key=lambda one: one.counts()["both"] / len(one.found.index))
    return found | {"modality/meeting_layer": float(most.layer)}


def write_modality(path: Path, tables: Sequence[LayerModality]) -> None:
    """A row a feature: layer, feature, index with interval, class, group, share of its items that have a picture."""
    parts = [
        pa.table(
            {
                "layer": np.full(len(one.found.index), one.layer, np.int32),
                "feature": np.arange(len(one.found.index), dtype=np.int32),
                "index": one.found.index,
                "low": one.found.low,
                "high": one.found.high,
                "kind": one.found.kind,
                "group": one.group,
                "with_picture": one.with_picture,
                "fired_image": one.fired_image,
                "fired_text": one.fired_text,
            }
        )
        for one in tables
    ]
    with atomic_path(path) as temporary:
        pq.write_table(pa.concat_tables(parts), temporary, compression="zstd")


def draw(tables: Sequence[LayerModality], path: Path) -> None:
    """The figure."""
    counts = [one.counts() for one in tables]
    shared = [one.shared_firing() for one in tables]
    modality_by_layer(
        [one.layer for one in tables],
        {group: [of[group] for of in counts] for group in GROUPS},
        [one.found.index[~np.isin(one.found.kind, RARE)] for one in tables],
        {"at soft tokens": [image for image, _ in shared], "at words": [text for _, text in shared]},
        path,
    )
