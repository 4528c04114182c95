"""Find features of a study by words ('query=red planet') or by a picture of your own (image=FILE) (docs/labels.md)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmscope.config import AppConfig
    from vlmscope.features.labels.label import Label
    from vlmscope.features.labels.propose import Labels
    from vlmscope.features.labels.search import Match
    from vlmscope.features.study.records import StudyFolder
    from vlmscope.report.feature_page import FeatureRow
    from vlmscope.tasks.context import RunContext

USES = ("data", "query", "study")


@dataclass
class Config:
    """`query` is looked for in labels and in what fires features; with `image=` (and `prompt=`, else the study's most
    frequent question about a picture) features that are active there and rare elsewhere come first.

    `study.path=` names the study, the run folder of a task=study; `hand` is a YAML file of labels instead of the
    study's own; `count` features are shown with `examples` thumbnails each.
    """

    hand: str | None = None
    count: int = 10
    examples: int = 6
    words: int = 2000
    figure: bool = True


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Print a table; write find.json and figures/find.png."""
    from vlmscope.core.artifacts import write_json
    from vlmscope.tasks.studies.data import needed_study

    task: Config = cfg.task
    folder = needed_study(cfg)
    if (cfg.query is None) == (cfg.image is None):
        raise UserError("give one of the two: 'query=red planet', or image=path/to/picture.png")
    if task.count < 1 or task.examples < 1:
        raise UserError("task.count and task.examples must be at least 1")

    from vlmscope.features.labels.facts import study_facts
    from vlmscope.features.labels.propose import Labels
    from vlmscope.features.labels.search import find_by_words
    from vlmscope.features.study.records import StudyFolder
    from vlmscope.report.feature_page import feature_sheet

    study = StudyFolder(folder)
    labels = Labels(study, task.hand)
    if cfg.query is not None:
        found = find_by_words(study, study_facts(study, task.words), labels, cfg.query, task.count)
        what = cfg.query
    else:
        found, what = _by_picture(cfg, context, study)
    _print(found, labels)
    write_json(
        context.run_dir / "find.json", {"query": what, "features": [_record(study, one, labels) for one in found]}
    )
    if task.figure:
        rows = [_row(study, one, labels.of(one.feature), task.examples) for one in found]
        feature_sheet(rows, context.run_dir / "figures" / "find.png", what, task.examples)
    return {"find/features": float(len(found))}


def _by_picture(cfg: AppConfig, context: RunContext, study: StudyFolder) -> tuple[list[Match], str]:
    """Features that are active on the user's picture."""
    import torch

    from vlmscope.features.labels.propose import check_same
    from vlmscope.features.labels.search import find_by_activations
    from vlmscope.tasks.wiring import load_model, load_scope, user_pictures

    prompt = cfg.prompt if cfg.prompt is not None else _usual_question(study)
    pictures = user_pictures(cfg)
    vlm = load_model(cfg)
    scope = load_scope(cfg, vlm, context.overrides)
    check_same(study, vlm.name, scope.transcoders.widths)
    inputs = vlm.prepare(prompt, pictures)
    found = scope.capture(scope.batch([inputs]), study.layers)
    # Without a question of the user's the picture alone counts.
    where = torch.from_numpy(inputs.is_image) if cfg.prompt is None else slice(None)
    peaks = {}
    for layer, x in found.items():
        transcoder = scope.transcoders[layer]
        peaks[layer] = transcoder.encode(x).dense(transcoder.config.n_features)[0, where].amax(0).float().numpy()
    names = ", ".join(str(image) for image in cfg.image)
    return find_by_activations(study, peaks, cfg.task.count), f"{names}: {prompt}"


def _usual_question(study: StudyFolder) -> str:
    table = study.items.table.select(["users", "n_pictures"]).to_pylist()
    asked = Counter(row["users"][0] for row in table if row["users"] and row["n_pictures"])
    if not asked:
        raise UserError(f"{study.path} has no question about a picture to ask; add prompt=")
    return asked.most_common(1)[0][0]


def _print(found: Sequence[Match], labels: Labels) -> None:
    from vlmscope.core.runs import text_table

    rows = [["feature", "label", "relevance", "because of"]]
    rows += [[str(one.feature), str(labels.of(one.feature)) or "-", f"{one.relevance:.2f}", one.why] for one in found]
    print(text_table(rows))


def _record(study: StudyFolder, match: Match, labels: Labels) -> dict[str, object]:
    label = labels.of(match.feature)
    record = study.feature(match.feature)
    return {
        "layer": match.feature.layer,
        "index": match.feature.index,
        "label": label.text,
        "score": label.score,
        "source": label.source,
        "beats_chance": label.beats_chance,
        "relevance": match.relevance,
        "why": match.why,
        "activation": match.activation,
        "items_fired": record.items_fired,
        "examples": [
            {"item": one.item, "origin": study.items[one.item].origin, "activation": one.activation}
            for one in record.group("top")
        ],
    }


def _row(study: StudyFolder, match: Match, label: Label, count: int) -> FeatureRow:
    from vlmscope.report.feature_page import FeatureRow
    from vlmscope.tasks.studies.examples import study_example

    examples = tuple(study_example(study, one) for one in study.feature(match.feature).group("top")[:count])
    return FeatureRow(f"{match.feature}  {label}", f"{match.relevance:.2f}: {match.why}", examples)
