"""General analyses of an experiment, named under `analyses:` in its YAML (docs/experiments.md).

Each is a dataclass of its settings. `check(cfg)` refuses a configuration before anything is loaded, `trials(bench,
declared)` adds trials to the declared ones, and `analyse(bench)` writes tables and figures and returns metrics. They
know no concept, question or data set by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vlmscope.circuits.circuit import save_circuit
from vlmscope.circuits.discovery.discover import circuit_subject, discover, moving_questions
from vlmscope.circuits.discovery.report import write_discoveries
from vlmscope.core.artifacts import atomic_path
from vlmscope.data.pairs import check_choosing
from vlmscope.features.structure import modality_metrics, modality_parts, modality_tables
from vlmscope.report.marks import write_rows
from vlmscope.report.study_figures import modality_by_layer

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.bench import Bench


@dataclass
class Modality:
    """Which features of a study belong to pictures, to words or to both, layer by layer.

    Needs `task: {study: true}`. Writes modality.parquet (a row a feature), layers.parquet (a row a layer) and
    figures/modality_by_layer.png; metrics `layers/modality_<group>/layer_03`.
    """

    def analyse(self, bench: Bench) -> dict[str, float]:
        """Tables, figure and metrics."""
        info, tables = bench.study.info, modality_tables(bench.study)
        parts = [
            pd.DataFrame(
                {
                    "layer": np.int32(one.layer),
                    "feature": np.arange(len(one.found.index), dtype=np.int32),
                    **vars(one.found),
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
        firing = {f"firing of both {place} (%)": np.multiply(100, of) for place, of in shared.items()}
        write_rows(
            bench.run_dir / "layers.parquet", pd.DataFrame({"layer": layers, **groups, **firing}).to_dict("records")
        )
        modality_by_layer(layers, groups, index, shared, bench.run_dir / "figures" / "modality_by_layer.png")
        positions = {f"study/positions_{kind}": float(count) for kind, count in info.positions.items()}
        return {"study/items": float(info.items)} | positions | modality_metrics(tables)


@dataclass
class Discover:
    """The analysis `discovery` of an experiment: the circuit of every question of `pairs=` whose answer differs within
    pairs, or of `discovery.question`; what is done is in the group `discovery`.
    """

    def check(self, cfg: AppConfig) -> None:
        """Refuse pairs that cannot choose a circuit."""
        if cfg.pairs is not None:
            check_choosing(cfg.pairs)

    def analyse(self, bench: Bench) -> dict[str, float]:
        """Discover and write; metrics `discovery/<question>/...`."""
        cfg, scope, found = bench.cfg, bench.scope, []
        train, test = (bench.pairs(split) for split in ("train", "test"))
        for question in moving_questions(train, test, cfg.discovery.question):
            sides = (
                circuit_subject(scope, question, pairs[question], cfg.interchange.least, cfg.discovery.modes)
                for pairs in (train, test)
            )
            found.append(discover(scope, *sides, cfg.discovery, cfg.attribution))
            circuit = found[-1].to_circuit(scope.vlm.name, scope.transcoders.widths)
            save_circuit(circuit, bench.run_dir / "circuits" / question)
        return write_discoveries(found, bench.run_dir)
