"""Pages to look at features: a gallery, a page and a JSON a feature, from the folder of a study (docs/pages.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

RULES = ("frequency", "activation", "image", "text", "answer", "random", "score")

USES = ("data", "study")


@dataclass
class Config:
    """Which features of which study, and what is shown of them.

    `study.path=` names the study, the run folder of a task=study. Features are named (`features=[L5/709,L4/1802]`), or
    the `top` most influential ones of a trace (`from_graph`), or the `top` of each supernode of a circuit
    (`from_circuit`, the run of an experiment or the circuit's folder), or the `top` first by a `rule` over `layers`
    (all by default): frequency (most inputs), activation (largest), image, text or answer (most inputs, of features
    that mostly fire there), random, score (of labels). `graphs` are traces to which pages link, `labels` the set of
    labels in the study. A page shows `examples` of the strongest inputs and `samples` of each weaker group.
    """

    features: list[str] = field(default_factory=list)
    from_graph: str | None = None
    from_circuit: str | None = None
    rule: str | None = None
    layers: list[int] = field(default_factory=list)
    top: int = 200
    graphs: list[str] = field(default_factory=list)
    labels: str = "auto"
    examples: int = 12
    samples: int = 4
    title: str | None = None

    def __post_init__(self) -> None:
        from vlmscope.core.errors import UserError, check_choice

        if self.rule is not None:
            check_choice("task.rule", self.rule, RULES)
        for key, least in (("top", 1), ("examples", 1), ("samples", 0)):
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)}: it must be at least {least}")


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write `pages/`: index.html, a page a feature, and features/*.json."""
    from time import perf_counter

    from tqdm import tqdm

    from vlmscope.core.artifacts import write_json
    from vlmscope.tasks.study import needed_study

    start, task, place = perf_counter(), cfg.task, needed_study(cfg)

    from vlmscope.features.study_files import StudyFolder
    from vlmscope.report.gallery import Gallery, feature_json
    from vlmscope.tasks.gallery.choice import choose
    from vlmscope.tasks.gallery.graphs import graph_uses
    from vlmscope.tasks.gallery.parts import PageMaker, study_labels

    study, folder = StudyFolder(place), context.run_dir / "pages"
    labels = study_labels(study, task.labels)
    chosen = choose(study, task, labels, cfg.seed)
    places = [*([task.from_graph] if task.from_graph else []), *task.graphs]
    maker = PageMaker(study, task, labels, graph_uses(places, study.info, folder), chosen.tags)
    gallery = Gallery(task.title or chosen.title, maker.summary(len(chosen.features)), maker.facts, chosen.order)
    neighbours = dict(
        zip(chosen.features, zip([None, *chosen.features], [*chosen.features[1:], None], strict=False), strict=True)
    )
    with tqdm(total=len(chosen.features), desc="pages", unit="page", delay=1.0) as bar:
        for layer, indices in chosen.by_layer().items():
            for record in study.features(layer, indices):
                page, views = maker.page(record)
                page.write(folder, *neighbours[record.feature])
                write_json(
                    folder / page.json_file, feature_json(record, views, study.info, maker.extra(page)), indent=None
                )
                gallery.add(page)
                bar.update()
    gallery.arrange(chosen.features)
    index = gallery.write(folder)
    print(
        f"{index}: {len(chosen.features)} features"
        + (f"; pictures are missing: {gallery.missing}" if gallery.missing else "")
    )
    sizes = [path.stat().st_size for path in folder.glob("L*.html")]
    return {
        "pages/features": float(len(chosen.features)),
        "pages/labelled": float(sum("labelled" in tile.label_class.split() for tile in gallery.tiles)),
        "pages/pictures_missing": float(maker.gone),
        "pages/index_mb": index.stat().st_size / 1e6,
        "pages/page_mb": sum(sizes) / len(sizes) / 1e6,
        "perf/pages_seconds": perf_counter() - start,
    }
