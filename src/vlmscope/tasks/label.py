"""Label the features of a study by contrast; every label is scored (docs/labels.md)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from vlmscope.config import AppConfig
from vlmscope.config.wiring import needed_study
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.results import text_table
from vlmscope.features.labels import Label, set_path, would_pass, write_labels
from vlmscope.features.proposals import ADVISED, label_study
from vlmscope.features.study_files import StudyFolder
from vlmscope.tasks.settings import LabelSettings, RunContext

FEW = 20  # held-out items below which a score is unsure


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write the set of labels and print the surest ones."""
    study = StudyFolder(needed_study(cfg))
    if not len(study.items):
        raise UserError(
            f"{study.path} has no items, so nothing can be said of its features; run task=study on more data"
        )
    task: LabelSettings = cfg.task
    labelled, shuffled = label_study(study, cfg.seed, task.shuffled, task.kind)
    write_labels(set_path(study.path, "auto"), labelled)
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


def basis(labels: Sequence[Label], samples: int) -> str:
    """One line: on how many items the scores rest, and how to get more where these are few."""
    held_out = [label.positives for label in labels if label.level == "items"]
    if not held_out:
        return "no label is about items"
    line = f"scores rest on {median(held_out):.0f} held-out items that fire the feature (median)"
    if median(held_out) < FEW and samples < ADVISED:
        line += f": few; a study with study.samples={ADVISED} has about {ADVISED / samples:.1f} times as many"
    return line


def print_labels(labels: Sequence[tuple[FeatureId, Label]]) -> None:
    """A table of the surest labels."""
    best = sorted(((f, label) for f, label in labels if label.text), key=lambda pair: -(pair[1].low or 0.0))[:12]
    rows = [["feature", "label", "AUROC", "95 %", "about", "firing items"]]
    for feature, label in best:
        scores = ["", ""] if label.score is None else [f"{label.score:.2f}", f"{label.low:.2f} to {label.high:.2f}"]
        rows.append([str(feature), label.text, *scores, label.level, str(label.positives)])
    print(text_table(rows))


def metrics_of(labels: Sequence[Label], name: str) -> dict[str, float]:
    """Numbers of features with a label and better than chance, and mean scores of labels by level."""
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
