"""Pages to look at features: a gallery, a page and a JSON a feature, from the folder of a study (docs/pages.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlmscope.core.errors import UserError, check_choice, check_least
from vlmscope.core.records import FeatureId, generator
from vlmscope.core.study import KINDS

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.features.labels import Label
    from vlmscope.features.study_files import LayerTable, StudyFolder
    from vlmscope.tasks.registry import RunContext

USES = ("data", "study")
RULES = {
    "frequency": "most often",
    "activation": "strongest activation",
    "image": "on pictures, most often",
    "text": "on prompts, most often",
    "answer": "on answers, most often",
    "random": "drawn at random",
    "score": "label score",
}
_MOSTLY = 0.6  # share of firings at positions of a kind from which a feature counts as of that kind
_AUTOMATIC = "auto"  # the only set of labels that may be missing


@dataclass
class Config:
    """Which features of which study, and what is shown of them.

    `study.path=` names the study, the run folder of a task=study. Features are named (`features=[L3/1242,L5/586]`), or
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
    labels: str = _AUTOMATIC
    examples: int = 12
    samples: int = 4
    title: str | None = None

    def __post_init__(self) -> None:
        if self.rule is not None:
            check_choice("task.rule", self.rule, RULES)
        check_least("task", self, top=1, examples=1, samples=0)


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write `pages/`: index.html, a page a feature, and features/*.json."""
    from time import perf_counter

    from tqdm import tqdm

    from vlmscope.config.wiring import needed_study
    from vlmscope.core.artifacts import write_json

    start, task, place = perf_counter(), cfg.task, needed_study(cfg, shipped=True)

    from vlmscope.features.labels import read_labels, set_path
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.report.feature_page import PageMaker
    from vlmscope.report.gallery import feature_json, graph_uses, write_gallery

    study, folder = StudyFolder(place), context.run_dir / "pages"
    labels_path = set_path(study.path, task.labels)
    labels = {} if task.labels == _AUTOMATIC and not labels_path.is_file() else read_labels(labels_path)
    chosen = _choose(study, task, labels, cfg.seed)
    uses = graph_uses([*([task.from_graph] if task.from_graph else []), *task.graphs], study.info, folder)
    maker = PageMaker(study, labels, uses, chosen.tags, task.examples, task.samples)
    order = list(dict.fromkeys(chosen.features))
    position_of = {feature: position for position, feature in enumerate(order)}
    by_layer: dict[int, list[int]] = {}
    for feature in sorted(order):
        study.check(feature)
        by_layer.setdefault(feature.layer, []).append(feature.index)
    pages = []
    with tqdm(total=len(order), desc="pages", unit="page", delay=1.0) as bar:
        for layer, indices in by_layer.items():  # each layer's file is read once
            for record in study.features(layer, indices):
                page, views = maker.page(record)
                i = position_of[record.feature]
                page.write(folder, order[i - 1] if i else None, order[i + 1] if i + 1 < len(order) else None)
                write_json(folder / page.json_file, feature_json(page, views), indent=None)
                # The gallery shows one group; keeping all would fill the memory.
                pages.append(replace(page, groups=page.groups[:1]))
                bar.update()
    pages.sort(key=lambda page: position_of[page.feature])
    info = study.info
    summary = (
        f"A feature is a direction that the model uses for something. Here are {len(order):,} of "
        f"{sum(info.n_features.values()):,}, each with inputs on which it is strongest, out of {info.items:,} that "
        "were studied. Open one to see where it fires and what it does to the answer."
    )
    index = write_gallery(folder, pages, task.title or chosen.title, summary, chosen.order)
    print(f"{index}: {len(order)} features" + (f"; pictures are missing: {maker.missing}" if maker.missing else ""))
    sizes = [path.stat().st_size for path in folder.glob("L*.html")]
    return {
        "pages/features": float(len(order)),
        "pages/labelled": float(sum(page.labelled for page in pages)),
        "pages/pictures_missing": float(maker.gone),
        "pages/index_mb": index.stat().st_size / 1e6,
        "pages/page_mb": sum(sizes) / len(sizes) / 1e6,
        "perf/pages_seconds": perf_counter() - start,
    }


class _Chosen(NamedTuple):
    """Features in the order of the gallery, the name of that order, a title, and each feature's tags."""

    features: list[FeatureId]
    order: str
    title: str
    tags: Mapping[FeatureId, tuple[str, ...]] = {}


def _choose(study: StudyFolder, task: Config, labels: Mapping[FeatureId, Label], seed: int) -> _Chosen:
    """The features to show, by the one way of choosing them that the settings give."""
    named = [f"task.{key}=" for key in ("features", "from_graph", "from_circuit", "rule") if getattr(task, key)]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} were given: these are ways to choose features; give one of them")
    if task.layers and named and not task.rule:
        raise UserError("task.layers= goes with task.rule=; leave it out, features are chosen already")
    if task.features:
        return _Chosen([FeatureId.parse(text) for text in task.features], "as named", "Features")
    if task.from_graph is not None:
        from vlmscope.attribution.compare import graph_file
        from vlmscope.attribution.export import load_graph
        from vlmscope.attribution.influence import top_features

        graph = load_graph(graph_file(task.from_graph)).graph
        features = list(top_features(graph, task.top))
        return _Chosen(features, "influence in the graph", f"Features behind “{graph.prompt}”")
    if task.from_circuit is not None:
        return _of_circuit(Path(task.from_circuit), task.top)
    return _by_rule(study, task, labels, seed)


def _of_circuit(place: Path, top: int) -> _Chosen:
    """The `top` first features of each supernode."""
    from vlmscope.circuits.circuit import load_circuit

    files = (place / "circuit.yaml", *sorted(place.glob("circuits/*/circuit.yaml")))
    folders = [file.parent for file in files if file.is_file()]
    if len(folders) != 1:
        content = f"{len(folders)} circuits" if folders else "no circuit.yaml"
        raise UserError(f"{place} holds {content}; give the folder of one circuit, as in .../circuits/mars_earth")
    tags: dict[FeatureId, tuple[str, ...]] = {}
    for name, node in load_circuit(folders[0]).supernodes.items():
        for member in sorted(node.features, key=lambda m: -m.influence)[:top]:
            tags[member.feature] = (*tags.get(member.feature, ()), f"circuit {folders[0].name}: {name}")
    return _Chosen(list(tags), "influence in the circuit", f"Features of the circuit {folders[0].name}", tags)


def _by_rule(study: StudyFolder, task: Config, labels: Mapping[FeatureId, Label], seed: int) -> _Chosen:
    """The first features of each layer by a rule, layers sharing `top` evenly."""
    rule, layers = task.rule or "frequency", task.layers or study.layers
    if rule == "score" and not labels:
        raise UserError(f"task.rule=score: the study has no labels {task.labels!r}; label it, or choose another rule")
    features: list[FeatureId] = []
    for number, layer in enumerate(layers):
        count = task.top // len(layers) + (number < task.top % len(layers))
        grades = _grades(study.layer(layer), rule, labels, seed)
        # Of equal grades the lower index stands first.
        ranked = np.argsort(-grades, kind="stable")
        features += [FeatureId(layer, int(index)) for index in ranked[:count] if grades[index] > 0]
    if not features:
        raise UserError(f"task.rule={rule}: no feature of these layers is like that; choose another rule")
    return _Chosen(features, RULES[rule], f"Features: {RULES[rule]}, of each layer")


def _grades(table: LayerTable, rule: str, labels: Mapping[FeatureId, Label], seed: int) -> np.ndarray:
    """`[F]` float64, the sort key of a rule, largest first; 0 leaves a feature out."""
    if rule == "activation":
        return table.activation_max.astype(np.float64)
    fires = table.items_fired > 0
    if rule == "random":
        return fires * (1.0 + generator(seed, "pages", table.layer).permutation(len(fires)))
    if rule == "score":
        grades = np.zeros(len(fires))
        for feature, label in labels.items():
            if feature.layer == table.layer and label.beats_chance:
                grades[feature.index] = label.score or 0.0
        return grades
    grades = table.items_fired.astype(np.float64)
    if rule in KINDS:
        share = table.fired[:, KINDS.index(rule)] / np.maximum(table.fired.sum(1), 1)
        grades[share < _MOSTLY] = 0.0
    return grades
