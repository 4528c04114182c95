"""Which features get pages: named ones, those of a graph or a circuit, or the first by a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId

if TYPE_CHECKING:
    from vlmscope.features.labels import Label
    from vlmscope.features.study_files import LayerTable, StudyFolder
    from vlmscope.tasks.pages import Config

_KINDS = {"text": 0, "image": 1, "answer": 2}
_MOSTLY = 0.6  # of a feature's firings are at positions of the kind
_WORDS = {
    "frequency": "most often",
    "activation": "strongest activation",
    "image": "on pictures, most often",
    "text": "on prompts, most often",
    "answer": "on answers, most often",
    "random": "drawn at random",
    "score": "label score",
}


@dataclass(frozen=True)
class Chosen:
    """Features in the order of the gallery, what that order is called, a title, and what each belongs to."""

    features: list[FeatureId]
    order: str
    title: str
    tags: dict[FeatureId, tuple[str, ...]] = field(default_factory=dict)

    def by_layer(self) -> dict[int, list[int]]:
        """Indices by layer, each layer's file to be read once."""
        table: dict[int, list[int]] = {}
        for feature in sorted(self.features):
            table.setdefault(feature.layer, []).append(feature.index)
        return table


def choose(study: StudyFolder, task: Config, labels: Mapping[FeatureId, Label], seed: int) -> Chosen:
    """The features that the task asks for.

    Raises:
        UserError: two ways to choose were given, or what was given is not in the study.
    """
    given = {
        "features": bool(task.features),
        "from_graph": task.from_graph is not None,
        "from_circuit": task.from_circuit is not None,
        "rule": task.rule is not None,
    }
    if sum(given.values()) > 1:
        named = " and ".join(f"task.{key}=" for key, used in given.items() if used)
        raise UserError(f"{named} were given: these are ways to choose features; give one of them")
    if task.layers and any(given[key] for key in ("features", "from_graph", "from_circuit")):
        raise UserError("task.layers= goes with task.rule=; leave it out, features are chosen already")
    if task.features:
        chosen = Chosen([FeatureId.parse(text) for text in task.features], "as named", "Features")
    elif task.from_graph is not None:
        chosen = _of_graph(task.from_graph, task.top)
    elif task.from_circuit is not None:
        chosen = _of_circuit(Path(task.from_circuit), task.top)
    else:
        chosen = _by_rule(study, task, labels, seed)
    for feature in chosen.features:
        study.check(feature)
    return Chosen(list(dict.fromkeys(chosen.features)), chosen.order, chosen.title, chosen.tags)


def _of_graph(place: str, top: int) -> Chosen:
    from vlmscope.attribution.compare import graph_file
    from vlmscope.attribution.export import load_graph
    from vlmscope.attribution.influence import top_features

    graph = load_graph(graph_file(place)).graph
    return Chosen(list(top_features(graph, top)), "influence in the graph", f"Features behind “{graph.prompt}”")


def _of_circuit(place: Path, top: int) -> Chosen:
    """The `top` first features of each supernode."""
    from vlmscope.circuits.circuit import load_circuit

    found = [
        file.parent
        for file in (place / "circuit.yaml", *sorted(place.glob("circuits/*/circuit.yaml")))
        if file.is_file()
    ]
    if len(found) != 1:
        what = "no circuit.yaml" if not found else f"{len(found)} circuits"
        raise UserError(f"{place} holds {what}; give the folder of one circuit, as in .../circuits/mars_earth")
    circuit = load_circuit(found[0])
    tags: dict[FeatureId, tuple[str, ...]] = {}
    for name, node in circuit.supernodes.items():
        for member in sorted(node.features, key=lambda m: -m.influence)[:top]:
            tags[member.feature] = (*tags.get(member.feature, ()), f"circuit {found[0].name}: {name}")
    return Chosen(list(tags), "influence in the circuit", f"Features of the circuit {found[0].name}", tags)


def _by_rule(study: StudyFolder, task: Config, labels: Mapping[FeatureId, Label], seed: int) -> Chosen:
    rule = task.rule or "frequency"
    layers = task.layers or study.layers
    if rule == "score" and not labels:
        raise UserError(f"task.rule=score: the study has no labels {task.labels!r}; label it, or choose another rule")
    found: list[FeatureId] = []
    for number, layer in enumerate(layers):
        table = study.layer(layer)
        count = task.top // len(layers) + (number < task.top % len(layers))
        grades = _grades(table, rule, labels, seed)
        # Of equal grades the lower index stands first.
        ranked = np.argsort(-grades, kind="stable")
        found += [FeatureId(layer, int(index)) for index in ranked[:count] if grades[index] > 0]
    if not found:
        raise UserError(f"task.rule={rule}: no feature of these layers is like that; choose another rule")
    return Chosen(found, _WORDS[rule], f"Features: {_WORDS[rule]}, of each layer")


def _grades(table: LayerTable, rule: str, labels: Mapping[FeatureId, Label], seed: int) -> np.ndarray:
    """`[F]`, the larger the earlier; 0 for features that are out."""
    from vlmscope.core.records import generator

    fires = table.items_fired > 0
    if rule == "activation":
        return table.activation_max.astype(np.float64)
    if rule == "random":
        return fires * (1.0 + generator(seed, "pages", table.layer).permutation(len(fires)))
    if rule == "score":
        grades = np.zeros(len(fires))
        for index in range(len(fires)):
            label = labels.get(FeatureId(table.layer, index))
            if label is not None and label.score is not None and label.beats_chance:
                grades[index] = label.score
        return grades
    grades = table.items_fired.astype(np.float64)
    if rule in _KINDS:
        share = table.fired[:, _KINDS[rule]] / np.maximum(table.fired.sum(1), 1)
        grades[share < _MOSTLY] = 0.0
    return grades
