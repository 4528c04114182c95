"""Structure of a dictionary from a study: modality, monosemanticity and duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError, check_least

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

USES = ("data", "study")
MEMORY = "study.forward_tokens or study.batch_size"


@dataclass
class Config:
    """`study.path` names the study (docs/structure.md), by default the one shipped with model and transcoders.

    The model runs again over the first `items` rows of the study's data. Two directions count as one from the cosine
    `twin` on. `seed` shuffles pictures.
    """

    items: int = 1000
    twin: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        check_least("task", self, items=1)
        if not 0 < self.twin < 1:
            raise UserError(f"task.twin={self.twin}: choose a number between 0 and 1")


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write structure.parquet and the figures, and print the numbers of each layer."""
    from vlmscope.config.wiring import needed_study

    folder = needed_study(cfg, shipped=True)

    import numpy as np
    import pyarrow as pa
    from scipy import sparse
    from tqdm import tqdm

    from vlmscope.config.wiring import load_model, load_scope
    from vlmscope.core.results import Curve, text_table
    from vlmscope.data.mixing import NumberedRows
    from vlmscope.features import structure
    from vlmscope.features.study import InputMaker
    from vlmscope.features.study_files import StudyFolder, open_sources, write_table
    from vlmscope.report.figures import dose_response, modality_by_layer, score_by_layer

    study, figures = StudyFolder(folder), context.run_dir / "figures"
    modality = structure.modality_table(study)
    scope = load_scope(cfg, load_model(cfg), context.overrides)
    if scope.transcoders.site == "tower":
        raise UserError("task=structure compares features of the decoder; choose its transcoders and their study")
    if scope.widths != study.info.n_features:
        raise UserError(f"{study.path} is of other transcoders: layers or widths differ; give those with transcoder=")
    limit = min(cfg.task.items, study.info.rows)
    rows = NumberedRows(open_sources(study.info.data), cfg.study.batch_size, limit=limit)
    make = InputMaker(scope.vlm, study.info.settings["max_tokens"], cfg.study.max_skipped)
    seen = []
    with tqdm(desc="structure", unit="row", total=limit) as bar:
        for batch in rows:
            seen.append(structure.pictures_seen(scope, make(batch), cfg.study.forward_tokens))
            bar.update(rows.done - bar.n)
    peaks, embeddings = sparse.vstack([part for part, _ in seen]), np.concatenate([part for _, part in seen])
    features = structure.feature_table(scope, peaks, embeddings, modality, cfg.task.seed)
    write_table(context.run_dir / "structure.parquet", pa.Table.from_pandas(features, preserve_index=False))
    layers = structure.by_layer(features, cfg.task.twin)
    layer, score, group = (features[name].to_numpy() for name in ("layer", "monosemanticity", "modality_group"))
    modality_by_layer(*structure.modality_parts(modality), figures / "modality_by_layer.png")
    score_by_layer(layer, score, group, figures / "monosemanticity.png")
    lines = [Curve.line(way.replace("_", " "), study.layers, layers[f"duplicates_{way}"]) for way in structure.WAYS]
    ylabel = f"share of live features with a partner\nat cosine {cfg.task.twin:g} or more"
    dose_response(lines, figures / "duplicates.png", "layer", ylabel, percent=False)
    head = ["layer", *(str(name).replace("_", " ") for name in layers)]
    print(
        text_table([head, *([str(layer), *(f"{value:.3f}" for value in row)] for layer, *row in layers.itertuples())])
    )
    return structure.modality_metrics(modality) | structure.structure_metrics(features, layers)
