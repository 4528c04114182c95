"""Label the features of a study by contrast, or ask a chat service; every label is scored (docs/labels.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError, check_least

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlmscope.config import AppConfig
    from vlmscope.core.records import FeatureId
    from vlmscope.features.labels import Label
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.tasks.registry import RunContext

FEW = 20  # held-out items below which a score is unsure
USES = ("data", "study")


@dataclass
class Config:
    """`study.path=` names the study, the run folder of a task=study; each set of labels is a file in its `labels/`.

    Without `url` all features are labelled by contrast, offline, as the set "auto"; so are `shuffled` features per
    layer with shuffled activations, which show the scores of chance; `kind` is the fact whose values alone are scored
    next to each label (a study without it has no such score). With `url` the model `name_at_url` of that
    OpenAI-compatible service (its key is read from the environment variable `key_variable`, if set) labels the given
    `features` from `shown` examples and judges `judged` items of either kind; `set_name` names the set.
    """

    features: list[str] = field(default_factory=list)
    set_name: str | None = None
    shuffled: int = 256
    kind: str = "scene"
    url: str | None = None
    name_at_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    shown: int = 8
    judged: int = 10

    def __post_init__(self) -> None:
        check_least("task", self, shown=1, judged=1, shuffled=0)


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write the set of labels and print the surest ones."""
    from vlmscope.config.wiring import needed_study

    task: Config = cfg.task
    folder = needed_study(cfg)

    from vlmscope.features.study_files import StudyFolder

    study = StudyFolder(folder)
    if not len(study.items):
        raise UserError(
            f"{study.path} has no items, so nothing can be said of its features; run task=study on more data"
        )
    return label_by_contrast(cfg, study) if task.url is None else label_by_explainer(cfg, study)


def label_by_contrast(cfg: AppConfig, study: StudyFolder) -> dict[str, float]:
    """Label all features offline."""
    import numpy as np

    from vlmscope.features.labels import set_path, would_pass, write_labels
    from vlmscope.features.proposals import label_study

    task: Config = cfg.task
    labelled, shuffled = label_study(study, cfg.seed, task.shuffled, task.kind)
    write_labels(set_path(study.path, task.set_name or "auto"), labelled)
    print_labels(labelled)
    labels = [label for _, label in labelled]
    print(basis(labels, int(study.info.settings["samples"])))
    metrics = metrics_of(labels, "label") | metrics_of(shuffled, "label_shuffled")
    if "label/auroc_kind_alone" in metrics:
        print(
            f"AUROC of {metrics['label/auroc_items']:.2f} on average; of `{task.kind}` alone, on the same items, "
            f"{metrics['label/auroc_kind_alone']:.2f}, which is all that {metrics['label/kind_only']:,.0f} of "
            f"{metrics['label/items']:,.0f} labels about items name"
        )
    if shuffled:
        # Shuffled labels that pass the test, and the false discovery rate of the real ones that follows.
        p, chance_p = (
            np.array([np.nan if label.p is None else label.p for label in group]) for group in (labels, shuffled)
        )
        passed = np.array([label.beats_chance for label in labels])
        false = would_pass(p, passed, chance_p)
        metrics["label_shuffled/beats_chance"] = float(false.sum())
        metrics["label_shuffled/beats_chance_frac"] = float(false.mean())
        if passed.any():
            metrics["label/false_discovery_rate"] = float(false.mean()) * len(labels) / int(passed.sum())
    return metrics


def label_by_explainer(cfg: AppConfig, study: StudyFolder) -> dict[str, float]:
    """Label the features that the user names."""
    from tqdm import tqdm

    from vlmscope.core.records import FeatureId
    from vlmscope.features.explainers import Endpoint, explain
    from vlmscope.features.labels import set_path, write_labels
    from vlmscope.features.proposals import judged

    task: Config = cfg.task
    if not task.features:
        raise UserError("a service labels the features you name: add 'task.features=[L5/123,L6/7]'")
    if not task.name_at_url:
        raise UserError("add task.name_at_url=MODEL, the model of the service at task.url")
    features = [FeatureId.parse(text) for text in task.features]
    for feature in features:
        study.check(feature)
    explainer = Endpoint(str(task.url), task.name_at_url, task.key_variable)
    path = set_path(study.path, task.set_name or explainer.name)
    labels = labels_so_far(cfg, study, path, explainer.name)
    for feature in tqdm(features, desc="labels", unit="feature"):
        labels[feature] = explain(explainer, study, feature, task.shown, task.judged, cfg.seed)
        labels = dict(judged(sorted(labels.items())))
        write_labels(path, list(labels.items()))  # after each feature: an answer costs money
    print_labels([(feature, labels[feature]) for feature in features])
    return metrics_of([labels[feature] for feature in features], "label")


def labels_so_far(cfg: AppConfig, study: StudyFolder, path: Path, name: str) -> dict[FeatureId, Label]:
    """The labels that the set has; a `UserError` where its record names another explainer or study."""
    from vlmscope.core.artifacts import files_digest, read_json, refuse_other, write_json
    from vlmscope.core.study import MANIFEST
    from vlmscope.features.labels import read_labels

    task: Config = cfg.task
    origin = {"explainer": name, "study": files_digest([study.path / MANIFEST]), "seed": cfg.seed}
    origin |= {f"task.{key}": getattr(task, key) for key in ("url", "shown", "judged")}
    record = path.with_suffix(".json")
    if path.is_file():
        then = read_json(record) if record.is_file() else {}  # "auto" has none
        refuse_other(str(path), then, origin, "choose another task.set_name")
    write_json(record, origin)
    return read_labels(path) if path.is_file() else {}


def basis(labels: Sequence[Label], samples: int) -> str:
    """One line: on how many items the scores rest, and how to get more where these are few."""
    from statistics import median

    from vlmscope.features.proposals import ADVISED

    held_out = [label.positives for label in labels if label.level == "items"]
    if not held_out:
        return "no label is about items"
    line = f"scores rest on {median(held_out):.0f} held-out items that fire the feature (median)"
    if median(held_out) < FEW and samples < ADVISED:
        line += f": few; a study with study.samples={ADVISED} has about {ADVISED / samples:.1f} times as many"
    return line


def print_labels(labels: Sequence[tuple[FeatureId, Label]], most: int = 12) -> None:
    """A table of the surest labels."""
    from vlmscope.core.results import text_table

    best = sorted(((f, label) for f, label in labels if label.text), key=lambda pair: -(pair[1].low or 0.0))[:most]
    rows = [["feature", "label", "AUROC", "95 %", "about", "firing items"]]
    for feature, label in best:
        scores = ["", ""] if label.score is None else [f"{label.score:.2f}", f"{label.low:.2f} to {label.high:.2f}"]
        rows.append([str(feature), label.text, *scores, label.level, str(label.positives)])
    print(text_table(rows))


def metrics_of(labels: Sequence[Label], name: str) -> dict[str, float]:
    """Numbers of features with a label and better than chance, and mean scores of labels by level."""
    import numpy as np

    metrics = {
        f"{name}/features": float(len(labels)),
        f"{name}/labelled": float(sum(bool(label.text) for label in labels)),
    }
    if name == "label":
        metrics[f"{name}/beats_chance"] = float(sum(label.beats_chance for label in labels))
    for level in ("items", "positions"):
        scores = [label.score for label in labels if label.level == level and label.score is not None]
        if scores:
            metrics[f"{name}/{level}"] = float(len(scores))
            metrics[f"{name}/auroc_{level}"] = float(np.mean(scores))
            metrics[f"{name}/auroc_{level}_p05"] = float(np.quantile(scores, 0.05))
            metrics[f"{name}/auroc_{level}_p95"] = float(np.quantile(scores, 0.95))
    compared = [(label.score, label.kind_score, label.low) for label in labels if label.kind_score is not None]
    if compared:
        scores, of_kind, low = np.array(compared, float).T
        metrics[f"{name}/auroc_kind_alone"] = float(of_kind.mean())
        metrics[f"{name}/auroc_over_kind"] = float((scores - of_kind).mean())
        metrics[f"{name}/beats_kind"] = float((low > of_kind).sum())
        metrics[f"{name}/kind_only"] = float(sum(label.kind_only for label in labels))
    return metrics
