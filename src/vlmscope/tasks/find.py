"""Find features of a study by words ('query=red planet') or by a picture of your own (image=FILE) (docs/labels.md)."""

from __future__ import annotations

from collections import Counter

import torch

from vlmscope.config import AppConfig
from vlmscope.config.wiring import load_model, load_scope, needed_study, user_pictures
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.results import text_table
from vlmscope.features.item_facts import Match, find_by_activations, find_by_words, study_facts
from vlmscope.features.labels import Labels, check_same
from vlmscope.features.study import study_examples
from vlmscope.features.study_files import StudyFolder
from vlmscope.report.pictures import FeatureRow, feature_sheet
from vlmscope.tasks.settings import FindSettings, RunContext
from vlmscope.training.batches import collect
from vlmscope.training.evaluation import warn_if_strange


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Print a table; write find.json and figures/find.png."""
    task: FindSettings = cfg.task
    folder = needed_study(cfg, shipped=True)
    if (cfg.query is None) == (cfg.image is None):
        raise UserError("give one of the two: 'query=red planet', or image=path/to/picture.png")

    study = StudyFolder(folder)
    labels = Labels(study, task.hand)
    if cfg.query is not None:
        what, matches = cfg.query, find_by_words(study, study_facts(study), labels, cfg.query, task.count)
    else:
        what, matches = find_by_picture(cfg, context, study)
    rows = [[str(m.feature), str(labels.of(m.feature)) or "-", f"{m.relevance:.2f}", m.why] for m in matches]
    print(text_table([["feature", "label", "relevance", "because of"], *rows]))
    records = [record(study, match, labels) for match in matches]
    write_json(context.run_dir / "find.json", {"query": what, "features": records})
    if task.figure:
        sheet = [
            FeatureRow(
                f"{match.feature}  {labels.of(match.feature)}",
                f"{match.relevance:.2f}: {match.why}",
                study_examples(study, match.feature, task.examples),
            )
            for match in matches
        ]
        feature_sheet(sheet, context.run_dir / "figures" / "find.png", what, task.examples)
    return {"find/features": float(len(matches))}


def find_by_picture(cfg: AppConfig, context: RunContext, study: StudyFolder) -> tuple[str, list[Match]]:
    """A title for the search, and the features that are active on the user's picture."""
    prompt = cfg.prompt if cfg.prompt is not None else usual_question(study)
    pictures = user_pictures(cfg)
    if study.layers[0] < 0 and getattr(cfg.transcoder, "tower", None) is not None:
        cfg.attribution.tower = True  # a study of the vision tower next to the decoder's transcoders
    scope = load_scope(cfg, load_model(cfg), context.overrides).at(study.layers[0])
    check_same(study, scope.vlm.name, scope.widths)
    inputs = scope.vlm.prepare(prompt, pictures)
    if cfg.prompt is None:  # else `load_scope` has asked already
        warn_if_strange(scope, [inputs.tensors])
    seen = collect(scope.stack, inputs.tensors)
    # The default question is not the user's, so only the picture counts.
    where = seen.is_image if cfg.prompt is None else torch.ones_like(seen.is_image)
    peaks = {}
    for layer, transcoder in scope.layers.items():
        x = seen.by_layer[layer - scope.first_layer][0][where]
        peaks[layer] = transcoder.encode(x).dense(transcoder.config.n_features).amax(0).float().numpy(force=True)
    names = ", ".join(str(image) for image in cfg.image)
    return f"{names}: {prompt}", find_by_activations(study, peaks, cfg.task.count)


def usual_question(study: StudyFolder) -> str:
    """The study's most frequent question about a picture."""
    table = study.items.table.select(["users", "n_pictures"]).to_pylist()
    questions = Counter(row["users"][0] for row in table if row["users"] and row["n_pictures"])
    if not questions:
        raise UserError(f"{study.path} has no question about a picture to ask; add prompt=")
    return questions.most_common(1)[0][0]


def record(study: StudyFolder, match: Match, labels: Labels) -> dict[str, object]:
    """The entry of a match in find.json."""
    label, feature = labels.of(match.feature), study.feature(match.feature)
    return {
        "layer": match.feature.layer,
        "index": match.feature.index,
        "label": label.text,
        **{key: getattr(label, key) for key in ("score", "source", "beats_chance")},
        **{key: getattr(match, key) for key in ("relevance", "why", "activation")},
        "items_fired": feature.items_fired,
        "examples": [
            {"item": example.item, "origin": study.items[example.item].origin, "activation": example.activation}
            for example in feature.group("top")
        ],
    }
