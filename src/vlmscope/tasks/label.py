"""Label the features of a study by contrast, or ask an outside explainer; every label is scored (docs/labels.md)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

_LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlmscope.config import AppConfig
    from vlmscope.core.records import FeatureId
    from vlmscope.features.labels.explainers import Explainer
    from vlmscope.features.labels.label import Label
    from vlmscope.features.study.records import StudyFolder
    from vlmscope.tasks.context import RunContext


FEW, ADVISED = 20, 60  # held-out items below which a score is unsure, and the samples that are then advised

USES = ("data", "study")


@dataclass
class Config:
    """`study.path=` names the study, the run folder of a task=study; labels go into `labels/` in it, one file a set.

    Without `explainer` all features are labelled by contrast, offline, as the set "auto"; the same is done to
    `shuffled` features a layer with their activations shuffled, to show what chance scores. `explainer` "endpoint" asks
    an OpenAI-compatible service at `url` for its model `name` (its key is read from the environment variable
    `key_variable`, when that is set); "local" asks the model that `model=` names. Both label the `features` given, and
    `set_name` is what the set is called.
    """

    explainer: str | None = None
    features: list[str] = field(default_factory=list)
    set_name: str | None = None
    shuffled: int = 256
    words: int = 2000
    url: str | None = None
    name_at_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 2
    shown: int = 8
    judged: int = 10


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write the set, and print some of it."""
    from vlmscope.tasks.studies.data import needed_study

    task: Config = cfg.task
    folder = needed_study(cfg)
    if task.explainer not in (None, "endpoint", "local"):
        raise UserError(f"task.explainer={task.explainer}: choose endpoint or local, or leave it out")
    for key in ("shown", "judged", "words"):
        if getattr(task, key) < 1:
            raise UserError(f"task.{key}={getattr(task, key)}: it must be at least 1")
    if task.shuffled < 0:
        raise UserError(f"task.shuffled={task.shuffled}: it must be 0 or more")

    from vlmscope.features.study.records import StudyFolder

    study = StudyFolder(folder)
    if not len(study.items):
        raise UserError(
            f"{study.path} has no items, so nothing can be said of its features; run task=study on more data"
        )
    if task.explainer is None:
        return _automatic(cfg, study)
    return _explained(cfg, study)


def _automatic(cfg: AppConfig, study: StudyFolder) -> dict[str, float]:
    from tqdm import tqdm

    from vlmscope.core.records import FeatureId
    from vlmscope.features.labels.facts import study_facts
    from vlmscope.features.labels.label import set_path, write_labels
    from vlmscope.features.labels.propose import judged, label_layer, places

    task: Config = cfg.task
    if not int(str(study.info.settings["samples"])):
        raise UserError(
            f"{study.path} has no samples, on which labels are scored; run task=study with study.samples=60"
        )
    facts = study_facts(study, task.words)
    at = places(study.items, facts)
    layers = [
        label_layer(study, layer, facts, at, cfg.seed, task.shuffled)
        for layer in tqdm(study.layers, desc="labels", unit="layer")
    ]
    found = judged([(FeatureId(one.layer, n), label) for one in layers for n, label in enumerate(one.labels)])
    write_labels(set_path(study.path, task.set_name or "auto"), found)
    _print(found)
    labels = [label for _, label in found]
    shuffled = [label for one in layers for label in one.shuffled]
    metrics = _metrics(labels, "label") | _metrics(shuffled, "label_shuffled") | _chance(labels, shuffled)
    print(basis(labels, int(str(study.info.settings["samples"]))))
    return metrics


def basis(labels: Sequence[Label], samples: int) -> str:
    """On how many items scores rest, in a line, and how to have more where these are few."""
    import numpy as np

    held_out = [one.positives for one in labels if one.level == "items"]
    if not held_out:
        return "no label is about items"
    middle = float(np.median(held_out))
    said = f"scores rest on {middle:.0f} held-out items that fire the feature (median)"
    if middle < FEW and samples < ADVISED:
        said += f": few; a study with study.samples={ADVISED} has about {ADVISED / samples:.1f} times as many"
    return said


def _chance(labels: Sequence[Label], shuffled: Sequence[Label]) -> dict[str, float]:
    """How many shuffled labels the test lets pass, and the false discovery rate that this makes of the real ones."""
    import numpy as np

    from vlmscope.features.labels.label import would_pass

    if not shuffled:
        return {}
    p, chance = (np.array([np.nan if one.p is None else one.p for one in of]) for of in (labels, shuffled))
    passed = np.array([one.beats_chance for one in labels])
    false = would_pass(p, passed, chance)
    share = float(false.mean())
    found = {"label_shuffled/beats_chance": float(false.sum()), "label_shuffled/beats_chance_frac": share}
    if passed.any():
        found["label/false_discovery_rate"] = share * len(labels) / int(passed.sum())
    return found


def _explained(cfg: AppConfig, study: StudyFolder) -> dict[str, float]:
    from tqdm import tqdm

    from vlmscope.core.records import FeatureId
    from vlmscope.features.labels.explainers import Material, explain
    from vlmscope.features.labels.label import set_path, write_labels
    from vlmscope.features.labels.propose import judged

    task: Config = cfg.task
    if not task.features:
        raise UserError("an explainer labels the features you name: add 'task.features=[L5/123,L6/7]'")
    features = [FeatureId.parse(text) for text in task.features]
    for feature in features:
        study.check(feature)
    explainer = _explainer(cfg)
    material = Material(study, task.shown, task.judged, cfg.seed)
    path = set_path(study.path, task.set_name or explainer.name)
    found = _asked_before(cfg, study, path, explainer.name)
    for feature in tqdm(features, desc="labels", unit="feature"):
        found[feature] = explain(explainer, material, feature)
        found = dict(judged(sorted(found.items())))
        write_labels(path, list(found.items()))  # an answer costs money: none is lost
    _print([(feature, found[feature]) for feature in features])
    return _metrics([found[feature] for feature in features], "label")


def _asked_before(cfg: AppConfig, study: StudyFolder, path: Path, name: str) -> dict[FeatureId, Label]:
    """The labels of the set so far; what it is made of is recorded next to it.

    Raises:
        UserError: it was made by another explainer, or of another study.
    """
    from vlmscope.core.artifacts import read_json, write_json
    from vlmscope.core.origin import files_digest, refuse_other
    from vlmscope.core.study import MANIFEST
    from vlmscope.features.labels.label import read_labels
    from vlmscope.tasks.origin import model_origin

    task: Config = cfg.task
    origin = {"task.explainer": task.explainer, "explainer": name, "study": files_digest([study.path / MANIFEST])}
    origin |= {f"task.{key}": getattr(task, key) for key in ("url", "shown", "judged")} | {"seed": cfg.seed}
    origin |= model_origin(cfg) if task.explainer == "local" else {}
    record = path.with_suffix(".json")
    if path.is_file():
        if record.is_file():
            refuse_other(str(path), read_json(record), origin, "choose another task.set_name")
            return read_labels(path)
        _LOG.warning("%s does not record its explainer: whether it is the same is not checked", path)
    write_json(record, origin)
    return read_labels(path) if path.is_file() else {}


def _explainer(cfg: AppConfig) -> Explainer:
    task: Config = cfg.task
    if task.explainer == "endpoint":
        from vlmscope.features.labels.explainers import Endpoint

        if not task.url or not task.name_at_url:
            raise UserError("add task.url=http://host/v1 and task.name_at_url=MODEL, the service and its model")
        return Endpoint(task.url, task.name_at_url, task.key_variable, task.timeout, task.retries)
    from vlmscope.features.labels.explainers import LocalExplainer
    from vlmscope.tasks.wiring import load_model

    return LocalExplainer(load_model(cfg))


def _print(found: Sequence[tuple[FeatureId, Label]], most: int = 12) -> None:
    from vlmscope.core.runs import text_table

    scored = [(feature, label) for feature, label in found if label.text]
    best = sorted(scored, key=lambda one: -(one[1].low or 0.0))[:most]
    rows = [["feature", "label", "AUROC", "95 %", "about", "firing items"]]
    for feature, label in best:
        score, span = (
            ("", "") if label.score is None else (f"{label.score:.2f}", f"{label.low:.2f} to {label.high:.2f}")
        )
        rows.append([str(feature), label.text, score, span, label.level, str(label.positives)])
    print(text_table(rows))


def _metrics(labels: Sequence[Label], name: str) -> dict[str, float]:
    """How many features have a label, how many are better than chance, and mean scores by what they are about."""
    import numpy as np

    found = {f"{name}/features": float(len(labels)), f"{name}/labelled": float(sum(bool(one.text) for one in labels))}
    if name == "label":
        found[f"{name}/beats_chance"] = float(sum(one.beats_chance for one in labels))
    for level in ("items", "positions"):
        scores = [one.score for one in labels if one.level == level and one.score is not None]
        if scores:
            found[f"{name}/{level}"] = float(len(scores))
            found[f"{name}/auroc_{level}"] = float(np.mean(scores))
            found[f"{name}/auroc_{level}_p05"] = float(np.quantile(scores, 0.05))
            found[f"{name}/auroc_{level}_p95"] = float(np.quantile(scores, 0.95))
    return found
