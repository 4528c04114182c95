"""Which features belong to pictures, to words or to both, by layer: counts of a study, a table and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vlmscope.core.artifacts import atomic_path
from vlmscope.features.structure.modality_tables import modality_metrics, modality_parts, modality_tables
from vlmscope.report.marks import write_rows
from vlmscope.report.study_figures import modality_by_layer

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench


def analyse(bench: Bench) -> dict[str, float]:
    """Write modality.parquet (a row a feature), layers.parquet (a row a layer) and figures/modality_by_layer.png."""
    info, tables = bench.study.info, modality_tables(bench.study)
    parts = [
        pd.DataFrame(
            {
                "layer": np.int32(one.layer),
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
    with atomic_path(bench.run_dir / "modality.parquet") as temporary:
        pd.concat(parts).to_parquet(temporary, index=False, compression="zstd")
    layers, groups, index, shared = modality_parts(tables)
    columns = {"layer": layers, **groups} | {
        f"firing of both {place} (%)": np.multiply(100, of) for place, of in shared.items()
    }
    write_rows(bench.run_dir / "layers.parquet", pd.DataFrame(columns).to_dict("records"))
    modality_by_layer(layers, groups, index, shared, bench.run_dir / "figures" / "modality_by_layer.png")
    positions = {f"study/positions_{kind}": float(count) for kind, count in info.positions.items()}
    return {"study/items": float(info.items)} | positions | modality_metrics(tables)
