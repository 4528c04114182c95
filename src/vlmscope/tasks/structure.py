"""Structure of a dictionary from a study: modality, monosemanticity and duplicates."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from scipy import sparse
from tqdm import tqdm

from vlmscope.config import AppConfig
from vlmscope.config.wiring import load_model, load_scope, needed_study
from vlmscope.core.errors import UserError
from vlmscope.core.results import text_table
from vlmscope.data.mixing import NumberedRows
from vlmscope.features import structure
from vlmscope.features.study import InputMaker
from vlmscope.features.study_files import StudyFolder, open_sources, write_table
from vlmscope.report.figures import modality_by_layer
from vlmscope.tasks.settings import RunContext


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write structure.parquet and the figure of modality, and print the numbers of each layer."""
    folder = needed_study(cfg, shipped=True)

    study = StudyFolder(folder)
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
    modality_by_layer(*structure.modality_parts(modality), context.run_dir / "figures" / "modality_by_layer.png")
    head = ["layer", *(str(name).replace("_", " ") for name in layers)]
    print(
        text_table([head, *([str(layer), *(f"{value:.3f}" for value in row)] for layer, *row in layers.itertuples())])
    )
    return structure.modality_metrics(modality) | structure.structure_metrics(features, layers)
