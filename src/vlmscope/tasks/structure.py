"""Structure of a dictionary from a study: modality, monosemanticity, duplicates, and clusters with names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmscope.core.errors import UserError, check_least

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlmscope.config import AppConfig
    from vlmscope.features.structure import StructurePass
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.scope import Scope
    from vlmscope.tasks.registry import RunContext

Row = dict[str, Any]  # of the table of clusters

USES = ("data", "study")
MEMORY = "study.forward_tokens or study.batch_size"
LISTED, PICTURED, EXAMPLES = 12, 8, 6  # clusters in the table and with pictures; pictures of each


@dataclass
class Config:
    """`study.path` names the study (docs/structure.md), by default the one shipped with model and transcoders.

    The model runs again over the first `items` rows of the study's data; features that fire together are counted at
    `per_item` positions of each. The graph that is divided into clusters has `neighbours` edges per feature. Two
    directions count as one from the cosine `twin` on. `seed` draws positions and the order of clustering.
    """

    items: int = 1000
    per_item: int = 16
    neighbours: int = 5
    twin: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        check_least("task", self, items=1, per_item=1, neighbours=1)
        if not 0 < self.twin < 1:
            raise UserError(f"task.twin={self.twin}: choose a number between 0 and 1")


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write structure.parquet, clusters.parquet and the figures, and print the largest clusters."""
    from vlmscope.config.wiring import needed_study

    folder = needed_study(cfg, shipped=True)

    import pyarrow as pa

    from vlmscope.config.wiring import load_model, load_scope
    from vlmscope.core.results import Curve, text_table
    from vlmscope.features import structure
    from vlmscope.features.study_files import StudyFolder, write_table
    from vlmscope.report.figures import dose_response, modality_by_layer, score_by_layer

    study, figures = StudyFolder(folder), context.run_dir / "figures"
    modality = structure.modality_table(study)
    scope = load_scope(cfg, load_model(cfg), context.overrides)
    if scope.transcoders.widths != study.info.n_features:
        raise UserError(f"{study.path} is of other transcoders: layers or widths differ; give those with transcoder=")
    features = structure.feature_table(
        scope, collected(cfg, scope, study), modality, cfg.task.neighbours, cfg.task.seed
    )
    clusters = structure.cluster_rows(study, features)
    write_table(context.run_dir / "structure.parquet", pa.Table.from_pandas(features, preserve_index=False))
    write_table(context.run_dir / "clusters.parquet", pa.Table.from_pylist(clusters, structure.CLUSTER_TABLE))
    shares = structure.duplicate_shares(features, cfg.task.twin)
    layer, score, group = (features[name].to_numpy() for name in ("layer", "monosemanticity", "modality_group"))
    modality_by_layer(*structure.modality_parts(modality), figures / "modality_by_layer.png")
    score_by_layer(layer, score, group, figures / "monosemanticity.png")
    lines = [Curve.line(name.replace("_", " "), study.layers, values) for name, values in shares.items()]
    ylabel = f"share of live features with a partner\nat cosine {cfg.task.twin:g} or more"
    dose_response(lines, figures / "duplicates.png", "layer", ylabel, percent=False)
    metrics = structure.modality_metrics(modality) | structure.structure_metrics(features, clusters, shares)
    draw_clusters(figures / "clusters.png", study, clusters[:PICTURED])
    rows = [["cluster", "features", "layers", "of pictures", "named"]]
    for row in clusters[:LISTED]:
        index = "" if row["modality_index"] is None else f"{row['modality_index']:.0%}"
        where = f"{row['first_layer']} to {row['last_layer']}"
        rows.append([str(row["cluster"]), str(row["size"]), where, index, row["name"] or "-"])
    print(f"{text_table(rows)}\n{len(clusters)} clusters of features that fire together; clusters.parquet has all")
    return metrics


def collected(cfg: AppConfig, scope: Scope, study: StudyFolder) -> StructurePass:
    """Run the model over the first rows of the study's data and collect what fires together."""
    from tqdm import tqdm

    from vlmscope.data.mixing import NumberedRows
    from vlmscope.features.structure import StructurePass
    from vlmscope.features.study import InputMaker
    from vlmscope.features.study_files import open_sources

    limit = min(cfg.task.items, study.info.rows)
    rows = NumberedRows(open_sources(study.info.data), cfg.study.batch_size, limit=limit)
    make = InputMaker(scope.vlm, study.info.settings["max_tokens"], cfg.study.max_skipped)
    passed = StructurePass(scope, cfg.task.per_item, cfg.task.seed)
    with tqdm(desc="structure", unit="row", total=limit) as bar:
        for batch in rows:
            passed.add(make(batch), cfg.study.forward_tokens)
            bar.update(rows.done - bar.n)
    return passed


def draw_clusters(path: Path, study: StudyFolder, clusters: Sequence[Row]) -> None:
    """Draw the strongest examples of some members of each cluster; nothing where no member has one."""
    from vlmscope.core.records import FeatureId
    from vlmscope.features.study import study_examples
    from vlmscope.report.pictures import FeatureRow, feature_sheet

    sheet = []
    for row in clusters:
        examples = []
        for name in spread(row["features"]):
            examples += study_examples(study, FeatureId.parse(name), 1)
            if len(examples) == EXAMPLES:
                break
        if examples:
            where = f"{row['size']} features, layers {row['first_layer']} to {row['last_layer']}"
            sheet.append(FeatureRow(row["name"] or f"cluster {row['cluster']}", where, tuple(examples)))
    if sheet:
        feature_sheet(sheet, path, columns=EXAMPLES)


def spread(features: list[str]) -> list[str]:
    """All features, reordered so that the first ones come from all over the cluster, and so from its layers."""
    step = max(1, len(features) // EXAMPLES)
    return [feature for first in range(step) for feature in features[first::step]]
