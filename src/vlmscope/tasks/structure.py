"""Structure of a dictionary from a study: modality, monosemanticity, duplicates, and clusters with names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.features.study.records import StudyFolder
    from vlmscope.scope import Scope
    from vlmscope.tasks.context import RunContext

USES = ("attribution", "circuit", "data", "images", "intervention", "study")
MEMORY = "study.forward_tokens or study.batch_size"


@dataclass
class Config:
    """`study.path` names the study (docs/structure.md).

    The model runs again over the first `items` rows of the study's data; `per_item` positions of each are looked at
    for who fires with whom. `neighbours` of each feature make the graphs that are divided into clusters: by firing
    together (phi of at least `phi`) and by direction (cosine of what they write of at least `cosine`); a higher
    `resolution` makes more of them. From the cosine `twin` on, two directions count as one. A cluster's name comes from
    the `top` strongest examples of its members.
    """

    items: int = 1000
    per_item: int = 16
    neighbours: int = 5
    phi: float = 0.3
    cosine: float = 0.3
    resolution: float = 4.0
    twin: float = 0.8
    top: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        from vlmscope.core.errors import UserError

        for key in ("items", "per_item", "neighbours", "top"):
            if getattr(self, key) < 1:
                raise UserError(f"task.{key}={getattr(self, key)}: it must be at least 1")
        if not self.resolution > 0:
            raise UserError(f"task.resolution={self.resolution}: it must be above 0")
        for key in ("phi", "cosine", "twin"):
            if not 0 < getattr(self, key) < 1:
                raise UserError(f"task.{key}={getattr(self, key)}: choose a number between 0 and 1")


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write structure.parquet, clusters.parquet, the figures and report.html."""
    from vlmscope.core.errors import UserError
    from vlmscope.tasks.studies.data import needed_study

    folder = needed_study(cfg)

    from vlmscope.features.structure.modality_tables import modality_metrics, modality_parts, modality_tables
    from vlmscope.features.study.records import StudyFolder
    from vlmscope.report.study_figures import modality_by_layer
    from vlmscope.tasks.studies.structure_page import write_page
    from vlmscope.tasks.studies.structure_tables import Structure, write_structure
    from vlmscope.tasks.wiring import load_model, load_scope

    study = StudyFolder(folder)
    modality = modality_tables(study)
    vlm = load_model(cfg)
    scope = load_scope(cfg, vlm, context.overrides)
    if scope.transcoders.widths != study.info.n_features:
        raise UserError(f"{study.path} is of other transcoders: layers or widths differ; give those with transcoder=")
    structure = Structure.of(scope, study, seen(cfg, scope, study), modality, cfg.task)
    modality_by_layer(*modality_parts(modality), context.run_dir / "figures" / "modality_by_layer.png")
    metrics = modality_metrics(modality) | write_structure(context.run_dir, structure)
    write_page(context.run_dir, study, structure, metrics, vlm.name)
    return metrics


def seen(cfg: AppConfig, scope: Scope, study: StudyFolder) -> Any:
    """The pass over the first rows of the study's data."""
    from tqdm import tqdm

    from vlmscope.data.config import SourceConfig
    from vlmscope.data.folder import NumberedRows
    from vlmscope.data.mixing import open_source
    from vlmscope.features.structure.structure_pass import StructurePass
    from vlmscope.features.study.forwards import InputMaker

    task = cfg.task
    data: dict[str, Any] = study.info.data
    sources = {}
    for name, settings in data["sources"].items():
        one = SourceConfig(**settings)
        sources[name] = (one.weight, open_source(name, one, None, data["max_bad_shards"], False))
    limit = min(task.items, study.info.rows)
    rows = NumberedRows(sources, cfg.study.batch_size, limit=limit)
    make = InputMaker(scope.vlm, study.info.settings["max_tokens"], cfg.study.max_skipped)
    found = StructurePass(scope, task.per_item, task.seed)
    with tqdm(desc="structure", unit="row", total=limit) as bar:
        for batch in rows:
            found.add(make(batch), cfg.study.forward_tokens)
            bar.update(rows.done - bar.n)
    return found
