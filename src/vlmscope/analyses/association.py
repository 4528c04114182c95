"""Features that fire for a picture of a concept and for its word in a text, in every set of `association:`; and trials
on them (docs/structure.md).

Text comes first, since it is few prompts: a feature is a *candidate* for a concept when its peak from the concept's
word on is at least `ratio` times its mean peak over the other concepts' prompts of the same wording. Candidates are
then looked at on pictures, where no word names the concept, at three places: soft tokens, the question's and
template's words after the picture, the last position. A feature is *shared* when it is selective for the same concept
there (`metrics.decoding.Rule`), and its contrast stands against shuffled pictures.

Case sets: "picture" and "text" (test pictures, and the texts that chose; answered rightly), "picture_other" and
"text_other" (once for each other concept whose features are ablated), "picture_to_text" and "text_to_picture" (another
concept's prompts of the other kind as donors). Written: counts.parquet, shared.parquet and figures.

Legend: C concepts, F features of a layer, M candidates of all layers, P places, N pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from vlmscope.analyses.bench import Bench
from vlmscope.circuits.cases import answer_token, bystanders
from vlmscope.circuits.config import TrialConfig
from vlmscope.circuits.experiment import ALL, Declared
from vlmscope.circuits.operations import Ablate, Carry
from vlmscope.core.errors import UserError, check_choice
from vlmscope.core.records import FeatureId, generator
from vlmscope.core.results import Curve
from vlmscope.data.orrery.dataset import colour_scenes, digit_scenes, pictures
from vlmscope.features.config import CrossModalConfig
from vlmscope.interventions.edits import by_layer
from vlmscope.interventions.trials import Cases, Operation
from vlmscope.metrics.decoding import Contrast, Rule, contrast, contrast_p, matching_p, shuffled
from vlmscope.metrics.prediction import prior
from vlmscope.metrics.rates import benjamini_hochberg, known, measured, permutation_p, rate_metrics, rates
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import InputBatch
from vlmscope.report.figures import dose_response, share_matrices
from vlmscope.scope import Scope

KINDS = ("picture", "text")
CASE_SETS = ("picture", "text", "picture_other", "text_other", "picture_to_text", "text_to_picture")
SUMMARY = ("shared", "by_rule", "by_rule_null", "by_rule_p", "matching_expected", "matching_p")  # of each question
CHOICES = ("shared", "every_question", "other", ALL)
SharedByQuestion = Mapping[str, "Shared"]


class Association:
    """All sets: their cases and features."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.cases: dict[str, list[Cases]] = {name: [] for name in CASE_SETS}
        self.features: dict[tuple[str, str, str], dict[str | None, set[FeatureId]]] = {}  # by set, question, concept
        counted, listed = [], []
        for name, config in bench.cfg.association.items():
            by_question = {question: self.shared(config, question) for question in config.questions}
            table = counts(by_question, config.concepts, bench.transcoders.layers, config.seed)
            counted.append(table.assign(set=name))
            listed.append(shared_features(by_question, config.concepts).assign(set=name))
            draw(by_question, config.concepts, bench.transcoders.layers, bench.run_dir / "figures", name)
            every = in_every_question(by_question)
            for question, shared in by_question.items():
                total = table[(table.question == question) & (table.of == "all")].iloc[0]
                bench.metrics |= {f"{name}/{question}/{key}": float(total[key]) for key in SUMMARY}
                for c, concept in enumerate(config.concepts):
                    sets: dict[str | None, set[FeatureId]] = {"shared": shared.features(c), "every_question": every[c]}
                    self.features[name, question, concept] = sets
                self.add_cases(name, config, question)
        for file, tables in (("counts", counted), ("shared", listed)):
            bench.write_table(file, pd.concat(tables))

    def shared(self, config: CrossModalConfig, question: str) -> Shared:
        """What is shared under one question, from training pictures."""
        scope, wording = self.bench.scope, config.questions[question]
        texts = [scope.inputs(wording.asked_in_text(concept)) for concept in config.concepts]
        candidates = text_candidates(scope, texts, config.ratio)
        images = [self.images(config, question, concept, "train", config.pictures) for concept in config.concepts]
        batches = [scope.batch(self.bench.inputs(shown, wording.picture)) for shown in images]
        peaks = np.concatenate(
            [picture_peaks(scope, batch, by_layer(scope.transcoders, candidates.features)) for batch in batches]
        )
        labels = np.repeat(np.arange(len(images)), [len(shown) for shown in images])
        rule, numbers = Rule(config.ratio, config.fires), (config.q, config.permutations, config.seed)
        return find_shared(candidates, peaks, labels, scope.transcoders.layers, rule, *numbers)

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
        others = drawn_others(config, question, bench.cfg.seed)
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
    if not any(sets.cases.values()):
        raise UserError("no question of any set is answered rightly: there is nothing to ablate or to carry")
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
    for row, place in enumerate(PLACES):
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
    by, measures = ["operation", "setting", "set"], {name: trial.measure for name, trial in trials.items()}
    rows: Any = measured(table, by, measures)
    changed: Any = rates(table, by, "changed")
    metrics: dict[str, float] = {}
    for key, row in rows.iterrows():
        metrics |= rate_metrics("/".join(key), row)
    for key, row in changed.iterrows():
        name = "/".join(key)
        metrics |= known({f"{name}_changed": row.value, f"{name}_control_changed": row.matched})
    return metrics


PLACES = ("image", "question", "last")  # of a prompt with a picture
TEXT_PLACES = ("word", "after")  # of a prompt without one: the concept's tokens, and all that follow
SHARED_COLUMNS = ("question", "concept", "feature", "layer", "place", "text_place", "text_peak", "picture_mean",
                  "other_pictures_mean", "fires_on", "q", "every_question")  # fmt: skip


@dataclass(frozen=True)
class Candidates:
    """Features that prefer the word of a concept to the words of the others."""

    features: tuple[FeatureId, ...]  # M
    text: np.ndarray  # [C, M] bool, which concepts each is selective for
    peaks: np.ndarray  # [C, M] float64, its peak from the word on
    place: np.ndarray  # [C, M], of `TEXT_PLACES`, where that peak is


def word_positions(prompts: Sequence[ModelInputs]) -> list[slice]:
    """The tokens by which each prompt differs from the others, between their common beginning and common end."""
    ids = [inputs.input_ids for inputs in prompts]
    head = tail = 0
    shortest = min(map(len, ids))
    while head < shortest and len({row[head] for row in ids}) == 1:
        head += 1
    while tail < shortest - head and len({row[-1 - tail] for row in ids}) == 1:
        tail += 1
    assert all(head < len(row) - tail for row in ids), f"prompts do not differ by a word: {prompts[0].prompt!r}"
    return [slice(head, len(row) - tail) for row in ids]


@torch.no_grad()
def text_candidates(scope: Scope, prompts: Sequence[ModelInputs], ratio: float) -> Candidates:
    """The features that prefer a concept's word: with a peak of `ratio` times the mean over the other prompts' peaks.

    There is one prompt per concept, of one wording and without a picture.
    """
    at_word: dict[int, list[np.ndarray]] = {layer: [] for layer in scope.transcoders.layers}
    after: dict[int, list[np.ndarray]] = {layer: [] for layer in scope.transcoders.layers}
    for inputs, word in zip(prompts, word_positions(prompts), strict=True):
        width = word.stop - word.start
        for layer, x in scope.capture(scope.batch([inputs])).items():
            acts = scope.transcoders[layer].encode(x[0, word.start :]).dense(scope.transcoders[layer].config.n_features)
            rest = acts[width:] if len(acts) > width else torch.zeros_like(acts[:1])
            at_word[layer].append(acts[:width].amax(0).double().numpy(force=True))
            after[layer].append(rest.amax(0).double().numpy(force=True))
    features, selective, peaks, places = [], [], [], []
    for layer in scope.transcoders.layers:
        word, later = np.stack(at_word[layer]), np.stack(after[layer])
        peak = np.maximum(word, later)
        rest = (peak.sum(0) - peak) / (len(prompts) - 1)
        prefers = (peak > 0) & (peak >= ratio * rest)
        kept = np.flatnonzero(prefers.any(0))
        features += [FeatureId(layer, int(index)) for index in kept]
        selective.append(prefers[:, kept])
        peaks.append(peak[:, kept])
        places.append(np.where(word >= later, *TEXT_PLACES)[:, kept])
    return Candidates(tuple(features), *(np.concatenate(parts, axis=1) for parts in (selective, peaks, places)))


@torch.no_grad()
def picture_peaks(scope: Scope, batch: InputBatch, features: Mapping[int, Tensor]) -> np.ndarray:
    """[B, P, M] float32, the largest activation of chosen features at each of `PLACES`; layers ascending."""
    after = np.arange(batch.length) > np.flatnonzero(batch.is_image).max()
    masks = (batch.is_image, after & (batch.roles != "last"), batch.roles == "last")
    peaks: list[Tensor] = []
    for layer, x in scope.capture(batch, sorted(features)).items():
        indices, width = features[layer].to(x.device), scope.transcoders[layer].config.n_features
        acts = scope.transcoders[layer].encode(x).select(indices, width)
        peaks.append(torch.stack([acts[:, torch.from_numpy(mask)].amax(1) for mask in masks], 1))
    return torch.cat(peaks, -1).float().numpy(force=True)


@dataclass(frozen=True)
class Shared:
    """Features shared by pictures and words under one question.

    `q` has the p-values of the contrasts of each concept's own candidates, adjusted over all of these; nan for other
    concepts' candidates. `null` counts coincidences by the rule alone under shuffled pictures, by place and (last) each
    feature once, at whichever place; `null_layers` by layer of the transcoders.
    """

    candidates: Candidates
    contrast: Contrast  # of candidates on pictures, [C, P M], places first
    q: np.ndarray  # [C, P, M]
    picture: np.ndarray  # [C, P, M] bool, selective for the concept on pictures, by the rule alone
    shared: np.ndarray  # [C, P, M] bool: by the rule, with q low enough, and a candidate of the same concept
    null: np.ndarray  # [draws, C, P + 1]
    null_layers: np.ndarray  # [draws, L]
    coincidences: np.ndarray  # [C, C], features selective for the row's pictures at some place, and the column's word

    def features(self, concept: int) -> set[FeatureId]:
        """The features shared for a concept, at any place."""
        kept = self.shared[concept].any(0)
        return {feature for feature, keep in zip(self.candidates.features, kept, strict=True) if keep}


def find_shared(
    candidates: Candidates,
    peaks: np.ndarray,
    labels: np.ndarray,
    layers: Sequence[int],
    rule: Rule,
    q: float,
    permutations: int,
    seed: int,
) -> Shared:
    """Test M candidates on pictures, with the false discovery rate `q`.

    `peaks` [N, P, M] are those of `picture_peaks`; `labels` [N], the concept that each picture shows, are shuffled in
    `permutations` orders.
    """
    n_concepts, m = candidates.text.shape
    values = peaks.reshape(len(peaks), -1)
    observed = contrast(values, labels, n_concepts)
    shape = (n_concepts, peaks.shape[1], m)
    layer_number = np.searchsorted(np.asarray(layers), [feature.layer for feature in candidates.features])
    null = np.zeros((permutations, n_concepts, peaks.shape[1] + 1), np.int64)
    null_layers = np.zeros((permutations, len(layers)), np.int64)

    def shuffled_contrasts() -> Iterator[Contrast]:
        """Count the coincidences of every shuffled contrast as it passes, so that none is stored."""
        for draw, contrasts in enumerate(shuffled(values, labels, n_concepts, permutations, seed)):
            hits = contrasts.selective(rule).reshape(shape) & candidates.text[:, None]
            null[draw] = _counts(hits)
            null_layers[draw] = np.bincount(layer_number, hits.any(1).sum(0), len(layers))
            yield contrasts

    p_values = contrast_p(observed, shuffled_contrasts()).reshape(shape)
    tested = np.broadcast_to(candidates.text[:, None], shape)
    q_values = np.full(shape, np.nan)
    q_values[tested] = benjamini_hochberg(p_values[tested])
    picture = observed.selective(rule).reshape(shape)
    coincidences = picture.any(1).astype(np.int64) @ candidates.text.T.astype(np.int64)
    shared = picture & (q_values <= q)  # nan, what was not tested, is no less than anything
    return Shared(candidates, observed, q_values, picture, shared, null, null_layers, coincidences)


def _counts(hits: np.ndarray) -> np.ndarray:
    """[C, P + 1] counts of [C, P, M] bool, by place and at any of them."""
    return np.concatenate([hits.sum(2), hits.any(1).sum(1, keepdims=True)], axis=1)


def counts(
    by_question: Mapping[str, Shared], concepts: Sequence[str], layers: Sequence[int], seed: int
) -> pd.DataFrame:
    """Counts of shared features by question, next to those under shuffled pictures: a row for each group of features.

    `of` is "all", "concept", "place", "layer", "every question" (shared under all of them) or "other concepts" (another
    concept's under the others, a mean), `name` which. `shared` with q below the threshold, `by_rule` by the rule alone,
    `by_rule_null` its mean under shuffling with `by_rule_p`; of concepts `by_rule_q`; of "all" `by_rule_null_max`,
    `candidates`, and `matching`, `matching_expected` and `matching_p` of names exchanged (under the seed).
    """
    rows: list[dict[str, str | float]] = []
    for question, shared in by_question.items():

        def add(group: str, name: str, count: float, question: str = question, **numbers: float) -> None:
            rows.append({"question": question, "of": group, "name": name, "shared": count, **numbers})

        observed, null = _counts(shared.picture & shared.candidates.text[:, None]), shared.null
        by_concept = [shared.features(c) for c in range(len(concepts))]
        p = permutation_p(observed[:, -1], null[..., -1])
        expected, p_names = matching_p(shared.coincidences, seed)
        total, totals = observed[:, -1].sum(), null[..., -1].sum(1)
        add("all", "", sum(map(len, by_concept)), candidates=len(shared.candidates.features), by_rule=total,
            by_rule_null=totals.mean(), by_rule_null_max=totals.max(), by_rule_p=float(permutation_p(total, totals)),
            matching=shared.coincidences.trace(), matching_expected=expected, matching_p=p_names)  # fmt: skip
        for c, (concept, q) in enumerate(zip(concepts, benjamini_hochberg(p), strict=True)):
            numbers = {"by_rule": observed[c, -1], "by_rule_null": null[:, c, -1].mean(), "by_rule_p": p[c]}
            add("concept", concept, len(by_concept[c]), **numbers, by_rule_q=q)
        for number, place in enumerate(PLACES):
            by_rule = {"by_rule": observed[:, number].sum(), "by_rule_null": null[:, :, number].sum(1).mean()}
            add("place", place, shared.shared[:, number].sum(), **by_rule)
        for layer, drawn in zip(layers, shared.null_layers.mean(0), strict=True):
            here = sum(feature.layer == layer for group in by_concept for feature in group)
            add("layer", str(layer), here, by_rule_null=drawn)
    for concept, always in zip(concepts, in_every_question(by_question), strict=True):
        rows.append({"question": "", "of": "every question", "name": concept, "shared": len(always)})
    first, *rest = by_question.values()
    crossed = [
        len(first.features(c).intersection(*(shared.features(d) for shared in rest)))
        for c, d in permutations(range(len(concepts)), 2)
    ]
    rows.append({"question": "", "of": "other concepts", "name": "", "shared": float(np.mean(crossed))})
    return pd.DataFrame(rows)


def in_every_question(by_question: Mapping[str, Shared]) -> list[set[FeatureId]]:
    """For each concept the features that are shared under every question: of the concept, not of one answer."""
    n_concepts = len(next(iter(by_question.values())).coincidences)
    return [set.intersection(*(shared.features(c) for shared in by_question.values())) for c in range(n_concepts)]


def drawn_others(config: CrossModalConfig, question: str, seed: int) -> dict[str, list[str]]:
    """For each concept the other concepts that it is tested with, those with another answer first."""
    drawn: dict[str, list[str]] = {}
    answers = config.questions[question].answers
    for concept in config.concepts:
        rest = [name for name in config.concepts if name != concept]
        if config.others is not None:
            rest = generator(seed, "others", question, concept).permutation(rest).tolist()
            rest = sorted(rest, key=lambda name: answers[name] == answers[concept])[: config.others]
        drawn[concept] = rest
    return drawn


def shared_features(by_question: Mapping[str, Shared], concepts: Sequence[str]) -> pd.DataFrame:
    """A row (`SHARED_COLUMNS`) for each question, concept, feature and place at which it is shared."""
    rows, every = [], in_every_question(by_question)
    for question, shared in by_question.items():
        shape, candidates = shared.shared.shape, shared.candidates
        mean, rest, rate = (getattr(shared.contrast, name).reshape(shape) for name in ("mean", "rest", "rate"))
        for c, place, m in np.argwhere(shared.shared).tolist():
            cell, feature = (c, place, m), candidates.features[m]
            rows.append((question, concepts[c], str(feature), feature.layer, PLACES[place], candidates.place[c, m],
                         candidates.peaks[c, m], mean[cell], rest[cell], rate[cell], shared.q[cell],
                         feature in every[c]))  # fmt: skip
    return pd.DataFrame(rows, columns=list(SHARED_COLUMNS))
