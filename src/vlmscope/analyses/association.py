"""Trials on features that a concept's pictures and its word share, in every set of `association:` (docs/circuits.md).

Case sets: "picture" and "text" (test pictures, and the texts that chose; answered rightly), "picture_other" and
"text_other" (once for each other concept whose features are ablated), "picture_to_text" and "text_to_picture" (another
concept's prompts of the other kind as donors). Written: counts.parquet, shared.parquet and figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from vlmscope.analyses.bench import Bench
from vlmscope.circuits.cases import answer_token, bystanders
from vlmscope.circuits.config import TrialConfig
from vlmscope.circuits.experiment import ALL, Declared
from vlmscope.circuits.operations import Ablate, Carry
from vlmscope.core.errors import UserError, check_choice
from vlmscope.core.records import FeatureId
from vlmscope.core.results import Curve
from vlmscope.data.orrery.dataset import colour_scenes, digit_scenes, pictures
from vlmscope.features import cross_modal as search
from vlmscope.features.config import CrossModalConfig
from vlmscope.interventions.edits import by_layer
from vlmscope.interventions.trials import Cases, Operation
from vlmscope.metrics.decoding import Rule
from vlmscope.metrics.prediction import prior
from vlmscope.metrics.rates import known, measured, rate_metrics, rates
from vlmscope.report.figures import dose_response, share_matrices

KINDS = ("picture", "text")
CASE_SETS = ("picture", "text", "picture_other", "text_other", "picture_to_text", "text_to_picture")
SUMMARY = ("shared", "by_rule", "by_rule_null", "by_rule_p", "matching_expected", "matching_p")  # of each question
CHOICES = ("shared", "every_question", "other", ALL)
SharedByQuestion = Mapping[str, search.Shared]


class Association:
    """All sets: their cases and features."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.cases: dict[str, list[Cases]] = {name: [] for name in CASE_SETS}
        self.features: dict[tuple[str, str, str], dict[str | None, set[FeatureId]]] = {}  # by set, question, concept
        counted, listed = [], []
        for name, config in bench.cfg.association.items():
            by_question = {question: self.shared(config, question) for question in config.questions}
            table = search.counts(by_question, config.concepts, bench.transcoders.layers, config.seed)
            counted.append(table.assign(set=name))
            listed.append(search.shared_features(by_question, config.concepts).assign(set=name))
            draw(by_question, config.concepts, bench.transcoders.layers, bench.run_dir / "figures", name)
            every = search.in_every_question(by_question)
            for question, shared in by_question.items():
                total = table[(table.question == question) & (table.of == "all")].iloc[0]
                bench.metrics |= {f"{name}/{question}/{key}": float(total[key]) for key in SUMMARY}
                for c, concept in enumerate(config.concepts):
                    sets: dict[str | None, set[FeatureId]] = {"shared": shared.features(c), "every_question": every[c]}
                    self.features[name, question, concept] = sets
                self.add_cases(name, config, question)
        if not any(self.cases.values()):
            raise UserError("no question of any set is answered rightly: there is nothing to ablate or to carry")
        for file, tables in (("counts", counted), ("shared", listed)):
            bench.write_table(file, pd.concat(tables))

    def shared(self, config: CrossModalConfig, question: str) -> search.Shared:
        """What is shared under one question, from training pictures."""
        scope, wording = self.bench.scope, config.questions[question]
        texts = [scope.inputs(wording.asked_in_text(concept)) for concept in config.concepts]
        candidates = search.text_candidates(scope, texts, config.ratio)
        images = [self.images(config, question, concept, "train", config.pictures) for concept in config.concepts]
        batches = [scope.batch(self.bench.inputs(shown, wording.picture)) for shown in images]
        peaks = np.concatenate([search.picture_peaks(scope, batch, candidates.by_layer()) for batch in batches])
        labels = np.repeat(np.arange(len(images)), [len(shown) for shown in images])
        rule, numbers = Rule(config.ratio, config.fires), (config.q, config.permutations, config.seed)
        return search.find_shared(candidates, peaks, labels, scope.transcoders.layers, rule, *numbers)

    def images(
        self, config: CrossModalConfig, question: str, concept: str, split: str, count: int
    ) -> list[Image.Image]:
        """Pictures of a concept under a question; on the test split the user's own take their place."""
        if config.source == "planets" or (split == "test" and self.bench.cfg.images.get(concept)):
            return self.bench.concept_pictures(concept, split, count, config.seed)
        if config.source == "digits":
            scenes = digit_scenes(concept, split, count, config.seed, config.questions[question].second)
        else:
            scenes = colour_scenes(concept, split, count, config.seed)
        shown = [Image.fromarray(picture) for picture in pictures(scenes)]
        return self.bench.recorded(split, f"{question} {concept} {split}", shown)

    def add_cases(self, name: str, config: CrossModalConfig, question: str) -> None:
        """Add the case sets and accuracies of one question."""
        bench, scope, wording = self.bench, self.bench.scope, config.questions[question]
        right: dict[tuple[str, str], Cases] = {}
        asked_for = dict.fromkeys(KINDS, 0)
        for concept in config.concepts:
            images = self.images(config, question, concept, "test", config.test_pictures)
            texts = [scope.inputs(wording.asked_in_text(concept))]
            for kind, prompts in zip(KINDS, (bench.inputs(images, wording.picture), texts), strict=True):
                ids = [f"{concept} {kind} {number}" for number in range(len(prompts))]
                tags = {"set": name, "concept": concept, "kind": kind, "other": ""}
                every = bystanders(scope, kind, question, prompts, ids).tagged(tags)
                rows = (every.answer == answer_token(scope, wording.answers[concept])).nonzero().flatten().tolist()
                asked_for[kind] += len(prompts)
                if rows:
                    right[concept, kind] = every.select(rows)
        for kind in KINDS:
            size = sum(cases.batch.size for (_, known), cases in right.items() if known == kind)
            bench.metrics[f"{name}/{question}/{kind}_accuracy"] = size / asked_for[kind]
        bench.metrics[f"{name}/{question}/prior"] = prior([wording.answers[concept] for concept in config.concepts])
        others = search.drawn_others(config, question, bench.cfg.seed)
        for (concept, kind), cases in right.items():
            self.cases[kind].append(cases)
            for other in others[concept]:
                paired = cases.tagged({"other": other})
                self.cases[f"{kind}_other"].append(paired)
                donor = right.get((other, KINDS[1 - KINDS.index(kind)]))
                if donor is not None and wording.answers[other] != wording.answers[concept]:
                    # Pictures are many and a text is one, which stands next to each: a case is its picture's.
                    ids = (paired if kind == "picture" else donor).ids
                    self.cases[f"{donor.tags['kind']}_to_{kind}"].append(paired.facing(donor, ids))

    def operation(self, trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        """Ablate or carry the features that `trial.features` names."""
        check_choice("trials.features", str(trial.features), CHOICES)
        if trial.features == ALL:
            return Carry(None, last=trial.last)
        tags, question = cases.tags, cases.question
        first, second = (self.features.get((tags["set"], question, tags[key]), {}) for key in ("concept", "other"))
        if trial.features == "other":  # features that both concepts share are not the other's alone
            chosen = second["shared"] - first["shared"]
        else:
            chosen = first.get(trial.features, set()) | second.get(trial.features, set())
        features = by_layer(self.bench.transcoders, sorted(chosen))
        return Ablate(features) if trial.do == "ablate" else Carry(features, last=trial.last)


def from_association(bench: Bench) -> Declared:
    """Shared features of every set, with the cases of trials on them."""
    sets = Association(bench)
    return Declared(sets.cases, sets.operation, metrics=set_metrics)


def draw(
    by_question: SharedByQuestion, concepts: Sequence[str], layers: Sequence[int], folder: Path, name: str
) -> None:
    """figures/<set>_coincidences.png and figures/<set>_layers.png (all questions, next to shuffled pictures)."""
    maps = {question: shared.coincidences for question, shared in by_question.items()}
    axes = ("prefers pictures of", "prefers the word")
    share_matrices(concepts, maps, folder / f"{name}_coincidences.png", axes_of=axes, percent=False)
    lines, x = [], tuple(map(float, layers))
    null = np.sum([shared.null_layers for shared in by_question.values()], 0)
    for row, place in enumerate(search.PLACES):
        members = [
            shared.candidates.features[feature].layer
            for shared in by_question.values()
            for _, feature in np.argwhere(shared.shared[:, row])
        ]
        lines.append(Curve.line(place, x, map(members.count, layers)))
    band = (null.mean(0), *np.quantile(null, (0.025, 0.975), axis=0))
    lines.append(Curve("any place, shuffled", x, *(tuple(map(float, line)) for line in band)))
    dose_response(lines, folder / f"{name}_layers.png", "layer", "shared features", percent=False)


def set_metrics(table: pd.DataFrame, trials: Mapping[str, TrialConfig], settings: Any) -> dict[str, float]:
    """`<trial>/<setting>/<set>` over all questions, with an interval over pictures and the control's rate."""
    rows = measured(table, ["operation", "setting", "set"], {name: trial.measure for name, trial in trials.items()})
    metrics: dict[str, float] = {}
    key: Any
    row: Any
    for key, row in rows.iterrows():
        metrics |= rate_metrics("/".join(key), row)
    for key, row in rates(table, ["operation", "setting", "set"], "changed").iterrows():
        name = "/".join(key)
        metrics |= known({f"{name}_changed": row.value, f"{name}_control_changed": row.matched})
    return metrics
