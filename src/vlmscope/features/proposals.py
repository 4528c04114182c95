"""Automatic labels of all features of a study, offline: proposed by contrast on one half of the items, scored on the
other.

*Rules about items.* The contrast of a rule is Youden's J = share of positives that match - share of negatives that
match, each with half an item added to matches and one to items, since few positives are known. J adds up over values of
one fact (an item has one), so the best two values are read off the values' own contrasts. Pairs of the best parts that
must both hold are then tried. A longer rule must earn its length; there is no "or" between parts, whose labels nobody
can read: what a picture shows and what words say of it is one part already (`ABOUT`). Positives count as their
activations do. Whether the winner beats chance is asked with a G-test, corrected (Bonferroni) for how many rules were
tried.

*Places in items.* Within the items on which a feature fires, positions at which it does are held against those at which
it does not: at which tokens, after which, on which part of the picture. The score is the AUROC of "the position is such
a place": 0.5 + (share of firing positions there - share of others) / 2.

Legend: R rows of a layer, T positions of all items together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import chdtrc, ndtr, xlogy
from tqdm import tqdm

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, generator
from vlmscope.core.study import IMAGE, KINDS
from vlmscope.features.item_facts import ItemFacts, KnownItems, known_items, study_facts
from vlmscope.features.labels import (
    MOST_VALUES,
    NONE,
    SMALL,
    WORDS,
    Detection,
    Label,
    Part,
    Rule,
    detection,
    discoveries,
)
from vlmscope.features.study_files import FEATURE_TABLE, FEATURES, StudyFolder, StudyItems, layer_table, read_table
from vlmscope.metrics.rates import wilson_interval

GAIN = 0.05  # in contrast, that another value or part must bring
CHANCE = 0.05
ADVISED = 60  # samples of a feature, with which scores are sure
_PAIRED = 10  # parts that are tried in pairs
_BACKGROUND = 1000  # negatives for pairs; the first in the order of hashes are a random draw
KEYS = ("kind", "token", "after", "rows", "columns")  # of places
_ROWS, _COLUMNS = ("upper part", "middle rows", "lower part"), ("left part", "middle columns", "right part")
_OF_SMALL = 2  # values that an article or a preposition counts as
_CLEAR = 1.5  # times the second logit, from which a feature is said to write its word
_TOGETHER = 1 << 22  # positions in memory at a time


def propose(facts: ItemFacts, known: KnownItems, feature: int, only: str | None = None) -> Rule | None:
    """The best rule for one feature, from the proposing half of the items; None when nothing beats chance.

    With `only`, the best values of that fact, better than chance or not: a baseline. None where it has no two values.
    """
    rows = known.rows(feature)
    item, fires = known.item[rows], known.positive[rows]
    proposing = ~facts.half[item]
    positive = item[fires & proposing]
    reach = int(known.reach[feature])
    if len(positive) < 2 or not len(facts.names):
        return None
    inside = positive[known.drawn[rows][fires & proposing]]
    others = facts.proposing[reach] - facts.matrix[inside].sum(0)
    n_others = int((~facts.half[:reach]).sum()) - len(inside)
    if n_others < 2:
        return None
    # An item counts as its activation does, or weak and impure firings would drown what the feature is about.
    weight = known.peak[rows][fires & proposing]
    weight = weight / weight.mean()
    contrast = _rate(weight @ facts.matrix[positive], len(positive)) - _rate(others, n_others)
    negative = np.setdiff1d(np.flatnonzero(~facts.half[:reach]), inside)[:_BACKGROUND]
    parts = _parts(facts, contrast, only)
    if not parts:
        return None
    up = np.stack([facts.holds(part, positive) for part in parts], axis=1)
    down = np.stack([facts.holds(part, negative) for part in parts], axis=1)
    rule, tried = _best(parts, up, down, weight, None if only else len(inside) / (len(inside) + n_others))
    return rule if only or _beats_chance(facts, rule, positive, negative, tried + len(facts.names)) else None


def _rate(matched: np.ndarray, total: int) -> np.ndarray:
    return (matched + 0.5) / (total + 1)


def _parts(facts: ItemFacts, contrast: np.ndarray, only: str | None = None) -> list[Part]:
    """The best single predicates, and the best set of values of each fact; or of the fact `only`."""
    best = np.argsort(-contrast, kind="stable")
    keys = facts.keys if only is None else {key: columns for key, columns in facts.keys.items() if key == only}
    best = (best if only is None else best[np.isin(best, [*keys.values()])])[:_PAIRED].tolist()
    # The best one stays even without any contrast.
    parts = [Part(facts.names[c].key, (facts.names[c].value,)) for c in best if contrast[c] > 0 or c == best[0]]
    for columns in keys.values():
        order = columns[np.argsort(-contrast[columns], kind="stable")][:MOST_VALUES]
        order = order[contrast[order] > GAIN].tolist()
        if len(order) > 1:
            parts.append(Part(facts.names[order[0]].key, tuple(facts.names[c].value for c in order)))
    return parts


def _worth(up: np.ndarray, down: np.ndarray, base: float | None) -> np.ndarray:
    """The correlation (phi) of rules with firing, from the shares of positives and negatives that match and the share
    of positives; their contrast without `base`.

    A feature that fires on mars alone is as well told by "planet" as by "mars" in contrast: every mars is a planet.
    The correlation counts the other planets too.
    """
    if base is None:
        return up - down
    matched = base * up + (1 - base) * down
    return (up - down) * (1 + np.sqrt(base * (1 - base) / (matched * (1 - matched)))) / 2


def _best(
    parts: Sequence[Part], up: np.ndarray, down: np.ndarray, weight: np.ndarray, base: float | None
) -> tuple[Rule, int]:
    """The rule of the largest `_worth` less `GAIN` for each value after the first, and how many were tried.

    `up` [positives, parts] and `down` [negatives, parts], bool: whether items match; `weight` [positives], mean 1.
    """
    length = np.array([len(part.values) + _OF_SMALL * (not SMALL.isdisjoint(part.values)) for part in parts])
    up, down = up.astype(np.float32), down.astype(np.float32)  # products of bool arrays would be bool
    both = _worth(_rate((up * weight[:, None]).T @ up, len(up)), _rate(down.T @ down, len(down)), base)
    single = both.diagonal() - GAIN * (length - 1)
    first = int(single.argmax())
    keys = np.array([part.key for part in parts])
    allowed = np.triu((keys[:, None] != keys) | np.isin(keys, WORDS), 1)
    pairs = np.where(allowed, both - GAIN * (length[:, None] + length - 1), -np.inf)
    tried = int(allowed.sum()) + len(parts)
    if pairs.max() > single[first]:
        return Rule(tuple(parts[i] for i in divmod(int(pairs.argmax()), len(parts)))), tried
    return Rule((parts[first],)), tried


def _beats_chance(facts: ItemFacts, rule: Rule, positive: np.ndarray, negative: np.ndarray, tried: int) -> bool:
    up, down = facts.grades(rule, positive) > 0.75, facts.grades(rule, negative) > 0.75
    table = np.array([[up.sum(), (~up).sum()], [down.sum(), (~down).sum()]], dtype=float)
    if table[0, 0] * len(down) <= table[1, 0] * len(up):
        return False
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    g = 2 * float((xlogy(table, table) - xlogy(table, expected)).sum())
    return float(chdtrc(1, g)) * tried < CHANCE


def score_rule(facts: ItemFacts, known: KnownItems, feature: int, rule: Rule) -> tuple[Detection | None, float | None]:
    """Score a rule on the other half: the detection of the drawn items, and the AUROC of the strongest ones alone."""
    rows = known.rows(feature)
    item, drawn = known.item[rows], known.drawn[rows]
    scoring = facts.scoring[item]
    positive = item[scoring & drawn & known.positive[rows]]
    background = np.flatnonzero(facts.scoring[: int(known.reach[feature])])
    others = facts.grades(rule, np.setdiff1d(background, positive))
    silent = facts.grades(rule, np.setdiff1d(background, item[drawn]))
    top = detection(facts.grades(rule, item[scoring & known.top[rows]]), silent)
    return detection(facts.grades(rule, positive), others), None if top is None else top.score


@dataclass(frozen=True)
class Places:
    """Predicates of all positions of a study's items."""

    starts: np.ndarray  # `[N + 1]`, where each item's positions begin; items as in `ItemFacts`
    codes: np.ndarray  # `[T, keys]` int32, which value of each of `KEYS`, -1 for none
    values: tuple[tuple[str, ...], ...]  # by key
    picture: np.ndarray  # `[T]` bool
    text: np.ndarray  # `[T]` int32, text positions of the item up to here


def read_places(items: StudyItems, facts: ItemFacts) -> Places:
    """Read the positions of all items of a study."""
    table = items.table.take(np.searchsorted(items.ids, facts.ids))
    tokens, kinds = (table[name].combine_chunks() for name in ("token_ids", "kinds"))
    starts = tokens.offsets.to_numpy().astype(np.int64)
    starts = starts - starts[0]
    token, kind = tokens.flatten().to_numpy(), kinds.flatten().to_numpy()
    vocabulary = np.array(sorted(items.words))
    code = np.searchsorted(vocabulary, token).astype(np.int32)
    picture = kind == IMAGE
    before = np.concatenate([[-1], code[:-1]]).astype(np.int32)
    before[starts[:-1]] = -1
    thirds: dict[str, np.ndarray] = {}  # of the picture, down and across, that soft tokens lie in
    geometries = table["geometry"].to_pylist()
    for name in set(geometries):
        boxes = np.array(items.boxes(name)).reshape(-1, 4)
        middle = np.stack([boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]]) / 2
        thirds[name] = np.minimum((middle * 3).astype(np.int32), 2)
    codes = np.full((len(token), len(KEYS)), -1, dtype=np.int32)
    codes[:, 0] = kind
    codes[:, 1] = np.where(picture, -1, code)
    codes[:, 2] = np.where(picture, -1, before)
    codes[picture, 3], codes[picture, 4] = np.concatenate([thirds[name] for name in geometries], axis=1)
    words = tuple(items.words[number] for number in vocabulary.tolist())
    values = (KINDS, words, words, _ROWS, _COLUMNS)
    return Places(starts, codes, values, picture, np.cumsum(~picture).astype(np.int32))


PlaceLabel = tuple[Part, Detection]


def place_labels(
    places: Places,
    facts: ItemFacts,
    known: KnownItems,
    examples: pa.Table,
    window: int,
    rng: np.random.Generator | None = None,
) -> list[PlaceLabel | None]:
    """The best place of every feature of a layer with its score; None where none beats `GAIN`.

    `window` is the study's: text positions around the peak that it kept. With `rng` each row's positions are shuffled
    first, so that scores are those of chance.
    """
    labels: list[PlaceLabel | None] = []
    total = np.concatenate([[0], np.cumsum(np.diff(places.starts)[known.item])])[known.starts]
    first, n_features = 0, len(known.reach)
    while first < n_features:
        last = int(np.searchsorted(total, total[first] + _TOGETHER, "right")) - 1
        last = min(max(last, first + 1), n_features)
        labels += _place_labels(places, facts, known, examples, window, range(first, last), rng)
        first = last
    return labels


def _place_labels(
    places: Places, facts: ItemFacts, known: KnownItems, examples: pa.Table, window: int, features: range,
    rng: np.random.Generator | None,
) -> list[PlaceLabel | None]:  # fmt: skip
    """`place_labels` of a range of features."""
    rows = np.arange(known.starts[features.start], known.starts[features.stop])
    item = known.item[rows]
    lengths = np.diff(places.starts)[item]
    begins = np.concatenate([[0], np.cumsum(lengths)])
    row = np.repeat(np.arange(len(rows)), lengths)
    position = np.arange(begins[-1]) - np.repeat(begins[:-1] - places.starts[item], lengths)
    fired = np.zeros(len(position), dtype=bool)
    picked = examples.take(known.row[rows])
    kept = picked["positions"].combine_chunks()
    fired[kept.flatten().to_numpy() + np.repeat(begins[:-1], np.diff(kept.offsets.to_numpy()))] = True
    # Of other positions than soft tokens and the text near the peak the study does not say whether they fire.
    peak = places.starts[item] + picked["position"].to_numpy()
    near = places.picture[position] | (np.abs(places.text[position] - np.repeat(places.text[peak], lengths)) <= window)
    row, position, fired = row[near], position[near], fired[near]
    if rng is not None:
        fired = fired[np.lexsort((rng.random(len(row)), row))]
    feature = np.repeat(np.arange(len(features)), np.diff(known.starts[features.start : features.stop + 1]))
    scoring, drawn = facts.scoring[item], known.drawn[rows]
    # Scored on the random draw alone, each content once; the strongest help to propose.
    use = (~facts.half[item] | (scoring & drawn))[row]
    row, position, fired = row[use], position[use], fired[use]
    items = np.bincount(feature[scoring & drawn], minlength=len(features))
    group = feature[row] * 4 + scoring[row] * 2 + fired  # [features, half, fired]
    return _best_places(places, position, group, items)


def _best_places(places: Places, position: np.ndarray, group: np.ndarray, items: np.ndarray) -> list[PlaceLabel | None]:
    """The place of the largest contrast on the proposing half, scored on the other, of each feature.

    `group` has for each position feature * 4 + scoring * 2 + fired, `items` [F] the scored items of each feature.
    """
    count = len(items)
    totals = np.bincount(group, minlength=4 * count).reshape(count, 2, 2)
    best: list[PlaceLabel | None] = [None] * count
    value = np.full(count, GAIN)
    for number, key in enumerate(KEYS):
        code, size = places.codes[position, number], len(places.values[number])
        has = code >= 0
        counts = np.bincount(group[has] * size + code[has], minlength=4 * count * size).reshape(count, 2, 2, size)
        share = (counts + 0.5 / size) / (totals[..., None] + 1)
        contrast = share[:, 0, 1] - share[:, 0, 0]
        pick = contrast.argmax(1)
        score = np.take_along_axis(contrast, pick[:, None], 1)[:, 0]
        better = np.flatnonzero((score > value) & (totals[:, 1] > 0).all(1))
        value[better] = score[better]
        for feature in better.tolist():
            rates = counts[feature, 1, :, pick[feature]] / totals[feature, 1]
            auroc = 0.5 + 0.5 * float(rates[1] - rates[0])
            # Positions of one item are not independent, so interval and p count items, at the largest variance (1/4)
            # that an item's own AUROC can have.
            n = max(int(items[feature]), 1)
            p = float(ndtr(-(auroc - 0.5) * 2 * n**0.5))
            part = Part(key, (places.values[number][pick[feature]],))
            low, high = wilson_interval(np.array(auroc), np.array(n))
            best[feature] = part, Detection(auroc, float(low), float(high), auroc, p, n, 0)
    return best


def label_layer(
    study: StudyFolder, layer: int, facts: ItemFacts, places: Places, seed: int = 0, shuffled: int = 256,
    kind: str | None = None,
) -> tuple[list[Label], list[Label]]:  # fmt: skip
    """Labels of all features of a layer, and those that the same steps give on the shuffled activations of some; next
    to each, the score of the fact `kind` alone.
    """
    examples = study.examples(layer)
    known = known_items(study, layer, examples, facts)
    window = int(study.info.settings["window"])
    best_places, writes = place_labels(places, facts, known, examples, window), _written(study, layer)
    labels = [_label(facts, known, feature, place, kind, writes[feature]) for feature, place in enumerate(best_places)]
    if not shuffled:
        return labels, []
    rng = generator(seed, "shuffled labels", layer)
    mixed = known.shuffled(rng, len(facts.ids))
    # Places are shuffled within the items on which the feature fires, so those stay as they are.
    shuffled_places = place_labels(places, facts, known, examples, window, rng)
    picked = np.sort(rng.permutation(len(labels))[:shuffled]).tolist()
    return labels, [_label(facts, mixed, feature, shuffled_places[feature], kind) for feature in picked]


def _written(study: StudyFolder, layer: int) -> list[str]:
    """The word that each feature raises clearly more than any other token; "" where there is none."""
    table = read_table(study.path / layer_table(FEATURES, layer), FEATURE_TABLE)
    rows = zip(table["top_tokens"].to_pylist(), table["top_logits"].to_pylist(), strict=True)
    return [
        words[0].strip().lower() if len(raised) > 1 and raised[0] > _CLEAR * max(raised[1], 0) else ""
        for words, raised in rows
    ]


def _label(
    facts: ItemFacts, known: KnownItems, feature: int, place: PlaceLabel | None, kind: str | None = None,
    writes: str = "",
) -> Label:  # fmt: skip
    where: dict[str, Any] = {"strong": bool(known.strong[feature])}
    if place is not None:
        where |= {"place": place[0].place, "place_score": place[1].score}
    rule = propose(facts, known, feature)
    if rule is not None:
        score, top = score_rule(facts, known, feature, rule)
        if score is not None:
            words = rule.phrase(None if place is None else place[0], writes)
            words = f"strong: {words}" if where["strong"] else words
            alone = None if kind is None else propose(facts, known, feature, kind)
            if alone is not None:
                of_kind, _ = score_rule(facts, known, feature, alone)
                where["kind_score"] = None if of_kind is None else of_kind.score
                where["kind_only"] = all(part.key == kind for part in rule.parts)
            return Label(words, "auto", "items", **vars(score), top_score=top, rule=rule.to_json(), **where)
    return NONE if place is None else Label(place[0].place, "auto", "positions", **vars(place[1]), **where)


def judged(labels: Sequence[tuple[FeatureId, Label]]) -> list[tuple[FeatureId, Label]]:
    """The labels of a set with `beats_chance`, corrected over all of them together."""
    better = discoveries(np.array([np.nan if label.p is None else label.p for _, label in labels]))
    return [
        (feature, replace(label, beats_chance=bool(beats)))
        for (feature, label), beats in zip(labels, better, strict=True)
    ]


def label_study(
    study: StudyFolder, seed: int = 0, shuffled: int = 256, kind: str | None = None
) -> tuple[list[tuple[FeatureId, Label]], list[Label]]:
    """Labels of all features of a study (`label_layer` of each layer), `judged`; and those of shuffled activations.

    Raises:
        UserError: the study has no samples, on which labels are scored.
    """
    if not study.info.settings["samples"]:
        raise UserError(
            f"{study.path} has no samples, on which labels are scored; run task=study with study.samples={ADVISED}"
        )
    facts = study_facts(study)
    places = read_places(study.items, facts)
    proposed: list[tuple[FeatureId, Label]] = []
    by_chance: list[Label] = []
    for layer in tqdm(study.layers, desc="labels", unit="layer"):
        labels, chance = label_layer(study, layer, facts, places, seed, shuffled, kind)
        proposed += [(FeatureId(layer, index), label) for index, label in enumerate(labels)]
        by_chance += chance
    return judged(proposed), by_chance
