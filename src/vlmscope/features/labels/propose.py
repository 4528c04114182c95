"""Proposing labels: from facts, places and texts, and all of them for a study.

Proposals of labels by contrast: which rule tells the items on which a feature fires best from a background.

The contrast of a rule is Youden's J = share of positives that match - share of negatives that match, each with half an
item added to matches and one to items, since few positives are known. J adds up over values of one fact (an item has
one), so the best set of values is read off the values' own contrasts. Pairs of the best parts are then tried, both ways
of joining them. A longer rule must earn its length. Whether the winner beats chance is asked with a G-test, corrected
(Bonferroni) for how many rules were tried.

Where in an item a feature fires: at which tokens, after which, on which part of the picture.

Within the items on which a feature fires, positions at which it does are held against those at which it does not. The
score is the AUROC of "the position is such a place": 0.5 + (share of firing positions there - share of others) / 2.

Legend: R rows of a layer, E positions of all rows together, T positions of all items together.

The labels of a study as they are used: hand labels first, then of the automatic ones that of the surest score.

labels = Labels(StudyFolder("outputs/study/..."))
labels.of(FeatureId(5, 123)).text

Automatic labels of all features of a study, offline: proposed by contrast on one half of the items, scored on the
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import chdtrc, ndtr, xlogy

from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, generator
from vlmscope.core.study import IMAGE, KINDS
from vlmscope.features.labels.facts import ItemFacts, KnownItems, known_items
from vlmscope.features.labels.label import (
    FOLDER,
    MOST_VALUES,
    NONE,
    Detection,
    Label,
    Part,
    Rule,
    detection,
    discoveries,
    read_labels,
    wilson,
)
from vlmscope.features.study.items import StudyItems
from vlmscope.features.study.records import StudyFolder

GAIN = 0.05  # in contrast, that another value or part must bring
CHANCE = 0.05
_PAIRED = 10  # parts that are tried in pairs
_BACKGROUND = 1000  # negatives for pairs; the first in the order of hashes are a random draw


@dataclass(frozen=True)
class Proposal:
    """A rule and its contrast on the items it was found on (not its score)."""

    rule: Rule
    contrast: float


@dataclass(frozen=True)
class Found:
    """Parts of rules with which items match [n, parts] and their contrasts [parts]."""

    parts: list[Part]
    positive: np.ndarray
    negative: np.ndarray
    contrast: np.ndarray


def propose(facts: ItemFacts, known: KnownItems, feature: int) -> Proposal | None:
    """The best rule for one feature, from items for proposing alone; None when nothing beats chance."""
    rows = known.rows(feature)
    item, wanted = known.item[rows], known.positive[rows]
    own = ~facts.half[item]
    positive = item[wanted & own]
    reach = int(known.reach[feature])
    if len(positive) < 2 or not len(facts.names):
        return None
    matched = facts.matrix[positive].sum(0)
    inside = positive[known.drawn[rows][wanted & own]]
    others = facts.proposing[reach] - facts.matrix[inside].sum(0)
    n_others = int((~facts.half[:reach]).sum()) - len(inside)
    if n_others < 2:
        return None
    contrast = _rate(matched, len(positive)) - _rate(others, n_others)
    negative = np.setdiff1d(np.flatnonzero(~facts.half[:reach]), inside)[:_BACKGROUND]
    found = _parts(facts, contrast, positive, negative)
    rule, best, tried = _best(found)
    if not _beats_chance(facts, rule, positive, negative, tried + len(facts.names)):
        return None
    return Proposal(rule, best)


def _rate(matched: np.ndarray, total: int) -> np.ndarray:
    return (matched + 0.5) / (total + 1)


def _parts(facts: ItemFacts, contrast: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> Found:
    """The best single predicates, and the best set of values of each fact."""
    best = np.argsort(-contrast, kind="stable")[:_PAIRED]
    parts = [Part(facts.names[c].key, (facts.names[c].value,)) for c in best.tolist() if contrast[c] > 0]
    for columns in facts.keys.values():
        order = columns[np.argsort(-contrast[columns], kind="stable")][:MOST_VALUES]
        order = order[contrast[order] > GAIN]
        if len(order) > 1:
            parts.append(Part(facts.names[order[0]].key, tuple(facts.names[c].value for c in order.tolist())))
    if not parts:
        parts = [Part(facts.names[int(best[0])].key, (facts.names[int(best[0])].value,))]
    up = np.stack([facts.holds(part, positive) for part in parts], axis=1)
    down = np.stack([facts.holds(part, negative) for part in parts], axis=1)
    return Found(parts, up, down, _rate(up.sum(0), len(up)) - _rate(down.sum(0), len(down)))


def _best(found: Found) -> tuple[Rule, float, int]:
    """The rule of the largest contrast less `GAIN` for each value after the first, and how many were tried."""
    length = np.array([len(part.values) for part in found.parts])
    single = found.contrast - GAIN * (length - 1)
    first = int(single.argmax())
    rule, best, value = Rule((found.parts[first],)), float(found.contrast[first]), float(single[first])
    up, down = found.positive.astype(np.float32), found.negative.astype(np.float32)
    both_up, both_down = up.T @ up, down.T @ down
    either_up = up.sum(0)[:, None] + up.sum(0) - both_up
    either_down = down.sum(0)[:, None] + down.sum(0) - both_down
    keys = np.array([part.key for part in found.parts])
    allowed = np.triu(keys[:, None] != keys, 1)
    lengths = length[:, None] + length - 1
    for joint, ups, downs in (("and", both_up, both_down), ("or", either_up, either_down)):
        contrast = _rate(ups, len(up)) - _rate(downs, len(down))
        values = np.where(allowed, contrast - GAIN * lengths, -np.inf)
        one, other = np.unravel_index(int(values.argmax()), values.shape)
        if values[one, other] > value:
            value, best = float(values[one, other]), float(contrast[one, other])
            rule = Rule((found.parts[int(one)], found.parts[int(other)]), joint)
    return rule, best, int(2 * allowed.sum()) + len(found.parts)


def _beats_chance(facts: ItemFacts, rule: Rule, positive: np.ndarray, negative: np.ndarray, tried: int) -> bool:
    up, down = facts.grades(rule, positive) > 0.75, facts.grades(rule, negative) > 0.75
    table = np.array([[up.sum(), (~up).sum()], [down.sum(), (~down).sum()]], dtype=float)
    if table[0, 0] * len(down) <= table[1, 0] * len(up):
        return False
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    g = 2 * float((xlogy(table, table) - xlogy(table, expected)).sum())
    return float(chdtrc(1, g)) * tried < CHANCE


KEYS = ("kind", "token", "after", "rows", "columns")
_THIRDS = {
    "rows": ("upper part", "middle rows", "lower part"),
    "columns": ("left part", "middle columns", "right part"),
}
_AT_A_TIME = 1 << 22  # positions in memory


@dataclass(frozen=True)
class Places:
    """What can be said of all positions.

    Attributes:
        starts: `[N + 1]`, where each item's positions begin; items as in `ItemFacts`.
        codes: `[T, keys]` int32, which value of each of `KEYS`, -1 for none.
        values: the values by key.
        picture: `[T]` bool.
        said: `[T]` int32, text positions of the item up to here.
    """

    starts: np.ndarray
    codes: np.ndarray
    values: tuple[tuple[str, ...], ...]
    picture: np.ndarray
    said: np.ndarray


@dataclass(frozen=True)
class PlaceLabel:
    """Where a feature fires, with the score on `items` items that it was not found on.

    Positions of one item are not independent, so the interval and p count items, at the largest variance (1/4) that
    an item's own AUROC can have.
    """

    part: Part
    auroc: float
    low: float
    high: float
    p: float
    items: int


def places(items: StudyItems, facts: ItemFacts) -> Places:
    """Read the positions of all items of a study."""
    table = items.table.take(np.searchsorted(items.ids, facts.ids))
    tokens, kinds = (table[name].combine_chunks() for name in ("token_ids", "kinds"))
    starts = tokens.offsets.to_numpy().astype(np.int64)
    starts = starts - starts[0]
    token, kind = tokens.flatten().to_numpy(), kinds.flatten().to_numpy()
    known = np.array(sorted(items.words))
    code = np.searchsorted(known, token).astype(np.int32)
    picture = kind == IMAGE
    before = np.concatenate([[-1], code[:-1]]).astype(np.int32)
    before[starts[:-1]] = -1
    rows, columns = _thirds(items, table["geometry"].to_pylist())
    codes = np.full((len(token), len(KEYS)), -1, dtype=np.int32)
    codes[:, 0] = kind
    codes[:, 1] = np.where(picture, -1, code)
    codes[:, 2] = np.where(picture, -1, before)
    codes[picture, 3], codes[picture, 4] = rows, columns
    words = tuple(items.words[number] for number in known.tolist())
    said = np.cumsum(~picture).astype(np.int32)
    values = (KINDS, words, words, _THIRDS["rows"], _THIRDS["columns"])
    return Places(starts, codes, values, picture, said)


def _thirds(items: StudyItems, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    found: dict[str, Any] = {}
    for name in set(names):
        boxes = np.array([tuple(box) for box in items.geometries[name].boxes]).reshape(-1, 4)
        middle = np.stack([boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]]) / 2
        found[name] = np.minimum((middle * 3).astype(np.int32), 2)
    both = np.concatenate([found[name] for name in names], axis=1)
    return both[0], both[1]


def place_labels(
    at: Places,
    facts: ItemFacts,
    known: KnownItems,
    examples: pa.Table,
    window: int,
    rng: np.random.Generator | None = None,
) -> list[PlaceLabel | None]:
    """The best place of every feature of a layer; None where none beats `GAIN`.

    Args:
        at: all positions.
        facts: which items are for proposing, which for scoring.
        known: the layer's rows.
        examples: its table of examples.
        window: of the study: text positions around the peak that it kept.
        rng: when given, each row's positions are shuffled first, so that scores are those of chance.
    """
    found: list[PlaceLabel | None] = []
    for first, last in _chunks(at, known):
        found += _chunk(at, facts, known, examples, window, first, last, rng)
    return found


def _chunks(at: Places, known: KnownItems) -> Iterator[tuple[int, int]]:
    sizes = np.diff(at.starts)[known.item]
    total = np.concatenate([[0], np.cumsum(sizes)])[known.starts]
    first = 0
    while first < len(known.reach):
        last = int(np.searchsorted(total, total[first] + _AT_A_TIME, "right")) - 1
        last = min(max(last, first + 1), len(known.reach))
        yield first, last
        first = last


def _chunk(
    at: Places, facts: ItemFacts, known: KnownItems, examples: pa.Table, window: int, first: int, last: int,
    rng: np.random.Generator | None,
) -> list[PlaceLabel | None]:  # fmt: skip
    rows = np.arange(known.starts[first], known.starts[last])
    item = known.item[rows]
    lengths = np.diff(at.starts)[item]
    begins = np.concatenate([[0], np.cumsum(lengths)])
    row = np.repeat(np.arange(len(rows)), lengths)
    flat = np.arange(begins[-1]) - np.repeat(begins[:-1] - at.starts[item], lengths)
    fired = np.zeros(len(flat), dtype=bool)
    picked = examples.take(known.row[rows])
    kept = picked["positions"].combine_chunks()
    fired[kept.flatten().to_numpy() + np.repeat(begins[:-1], np.diff(kept.offsets.to_numpy()))] = True
    peak = at.starts[item] + picked["position"].to_numpy()
    near = at.picture[flat] | (np.abs(at.said[flat] - np.repeat(at.said[peak], lengths)) <= window)
    row, flat, fired = row[near], flat[near], fired[near]
    if rng is not None:
        fired = fired[np.lexsort((rng.random(len(row)), row))]
    feature = np.repeat(np.arange(last - first), np.diff(known.starts[first : last + 1]))
    scoring = facts.half[item]
    # Scored on the random draw alone; the strongest help to propose.
    use = np.where(scoring, known.drawn[rows], True)[row]
    row, flat, fired = row[use], flat[use], fired[use]
    items = np.bincount(feature[scoring & known.drawn[rows]], minlength=last - first)
    group = feature[row] * 4 + scoring[row] * 2 + fired  # [features, half, fired]
    return _best_places(at, flat, group, items, last - first)


def _best_places(
    at: Places, flat: np.ndarray, group: np.ndarray, items: np.ndarray, count: int
) -> list[PlaceLabel | None]:
    totals = np.bincount(group, minlength=4 * count).reshape(count, 2, 2)
    best: list[PlaceLabel | None] = [None] * count
    value = np.full(count, GAIN)
    features = np.arange(count)
    for number, key in enumerate(KEYS):
        code, size = at.codes[flat, number], len(at.values[number])
        has = code >= 0
        counts = np.bincount(group[has] * size + code[has], minlength=4 * count * size).reshape(count, 2, 2, size)
        share = (counts + 0.5 / size) / (totals[..., None] + 1)
        contrast = share[:, 0, 1] - share[:, 0, 0]
        most = np.argsort(-contrast, axis=1, kind="stable")[:, : min(MOST_VALUES, size - 1)]
        gains = np.take_along_axis(contrast, most, 1)
        chosen = gains > np.where(np.arange(most.shape[1]) == 0, 0, GAIN)
        score = (gains * chosen).sum(1) - GAIN * (chosen.sum(1) - 1)
        better = features[(score > value) & chosen[:, 0] & (totals[:, 1] > 0).all(1)]
        value[better] = score[better]
        for one in better.tolist():
            picks = most[one][chosen[one]]
            rates = counts[one, 1][:, picks].sum(1) / totals[one, 1]
            auroc = 0.5 + 0.5 * float(rates[1] - rates[0])
            part = Part(key, tuple(at.values[number][pick] for pick in picks.tolist()))
            n = float(max(items[one], 1))
            best[one] = PlaceLabel(part, auroc, *wilson(auroc, n), float(ndtr(-(auroc - 0.5) * 2 * n**0.5)), int(n))
    return best


HAND = "hand.yaml"  # beside the sets; no task writes it


class Labels:
    """All labels of a study."""

    def __init__(self, study: StudyFolder, hand: str | Path | None = None) -> None:
        """Read every set of the study and the hand labels.

        Args:
            study: the study.
            hand: a YAML file `L5/123: text`; by default `labels/hand.yaml` of the study, if it is there.

        Raises:
            UserError: a file cannot be read, or names a feature that the study does not have.
        """
        self.study = study
        self.automatic: dict[FeatureId, Label] = {}
        for path in sorted((study.path / FOLDER).glob("*.parquet")):
            for feature, label in read_labels(path).items():
                if _rank(label) > _rank(self.automatic.get(feature, NONE)):
                    self.automatic[feature] = label
        path = Path(hand) if hand is not None else study.path / FOLDER / HAND
        self.hand = read_hand(path, study) if hand is not None or path.is_file() else {}

    def of(self, feature: FeatureId) -> Label:
        """The label of a feature; one without text when there is none.

        Raises:
            UserError: the study does not have the feature.
        """
        self.study.check(feature)
        return self.hand.get(feature) or self.automatic.get(feature, NONE)

    def all(self) -> dict[FeatureId, Label]:
        """Every label."""
        return {**self.automatic, **self.hand}

    def trusted(self) -> dict[FeatureId, Label]:
        """Hand labels, and those that beat chance."""
        return {feature: one for feature, one in self.all().items() if one.source == "hand" or one.beats_chance}

    def texts(self) -> dict[FeatureId, str]:
        """The trusted labels, each with its score."""
        return {feature: str(label) for feature, label in self.trusted().items()}


def read_hand(path: Path, study: StudyFolder) -> dict[FeatureId, Label]:
    """Read labels that a person wrote.

    Raises:
        UserError: the file cannot be read, or an entry is not `L<layer>/<index>: text` of the study's features.
    """
    body = read_yaml(path)
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise UserError(f"{path}: it holds no labels; write a line such as 'L5/123: red planet' for each")
    found = {}
    for name, text in body.items():
        try:
            feature = FeatureId.parse(str(name))
            study.check(feature)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: {name} has no text; write a line such as '{name}: red planet'")
        found[feature] = Label(" ".join(text.split()), "hand")
    return found


def labels_for(path: str | Path, model: str, n_features: Mapping[int, int] | None) -> Labels:
    """The labels of a study, for a model with its transcoders.

    Args:
        path: of the study.
        model: the model's name.
        n_features: of the transcoders, by layer; None where they are not known.

    Raises:
        UserError: the study is of another model or of other transcoders, or has no labels.
    """
    study = StudyFolder(path)
    check_same(study, model, n_features)
    found = Labels(study)
    if not found.all():
        raise UserError(f"{study.path} has no labels; run task=label study.path={path}")
    return found


def check_same(study: StudyFolder, model: str, n_features: Mapping[int, int] | None) -> None:
    """Refuse a study of another model or of other transcoders.

    Raises:
        UserError: it is.
    """
    if study.info.model != model:
        raise UserError(f"{study.path} is a study of the model {study.info.model}, not of {model}; give one of {model}")
    if n_features is not None and study.info.n_features != dict(n_features):
        raise UserError(
            f"{study.path} is a study of other transcoders ({_widths(study.info.n_features)}) than these "
            f"({_widths(n_features)}); run task=study with them"
        )


def _widths(n_features: Mapping[int, int]) -> str:
    return f"{len(n_features)} layers, {sum(n_features.values()):,} features"


def _rank(label: Label) -> tuple[bool, float]:
    return bool(label.text), -1.0 if label.low is None else label.low


@dataclass(frozen=True)
class LabelledLayer:
    """Labels of a layer's features in order, and the scores that the same steps give on shuffled activations."""

    layer: int
    labels: list[Label]
    shuffled: list[Label]


def label_layer(
    study: StudyFolder, layer: int, facts: ItemFacts, at: Places, seed: int = 0, shuffled: int = 256
) -> LabelledLayer:
    """Label all features of a layer.

    Args:
        study: the study.
        layer: which.
        facts: of its items.
        at: of its items' positions.
        seed: of the shuffles.
        shuffled: on the shuffled activations of so many of the layer's features everything is done again.
    """
    examples = study.examples(layer)
    known = known_items(study, layer, examples, facts)
    window = int(str(study.info.settings["window"]))
    found = place_labels(at, facts, known, examples, window)
    labels = [_label(facts, known, feature, place) for feature, place in enumerate(found)]
    if not shuffled:
        return LabelledLayer(layer, labels, [])
    rng = generator(seed, "shuffled labels", layer)
    mixed = known.shuffled(rng, len(facts.ids))
    # Places are shuffled within the items on which the feature fires, so those stay as they are.
    mixed_places = place_labels(at, facts, known, examples, window, rng)
    picked = np.sort(rng.permutation(len(labels))[:shuffled]).tolist()
    return LabelledLayer(layer, labels, [_label(facts, mixed, one, mixed_places[one]) for one in picked])


def judged(found: Sequence[tuple[FeatureId, Label]]) -> list[tuple[FeatureId, Label]]:
    """Labels of a set, with what beats chance decided over all of them together."""
    better = discoveries(np.array([np.nan if label.p is None else label.p for _, label in found]))
    return [
        (feature, replace(label, beats_chance=bool(beats)))
        for (feature, label), beats in zip(found, better, strict=True)
    ]


def score_rule(facts: ItemFacts, known: KnownItems, feature: int, rule: Rule) -> tuple[Detection | None, float | None]:
    """A rule on the items for scoring: detection of the drawn items, and the AUROC of the strongest ones alone."""
    rows = known.rows(feature)
    item, drawn = known.item[rows], known.drawn[rows]
    own = facts.half[item]
    positive = item[own & drawn & known.positive[rows]]
    background = np.flatnonzero(facts.half[: int(known.reach[feature])])
    others = facts.grades(rule, np.setdiff1d(background, positive))
    strongest = facts.grades(rule, item[own & known.top[rows]])
    silent = facts.grades(rule, np.setdiff1d(background, item[drawn]))
    top = detection(strongest, silent)
    return detection(facts.grades(rule, positive), others), None if top is None else top.auroc


def _label(facts: ItemFacts, known: KnownItems, feature: int, place: PlaceLabel | None) -> Label:
    proposal = propose(facts, known, feature)
    where = {} if place is None else {"place": place.part.place, "place_score": place.auroc}
    strong = bool(known.strong[feature])
    if proposal is not None:
        rule = proposal.rule
        score, top = score_rule(facts, known, feature, rule)
        if score is not None:
            words = ", ".join(part for part in (rule.text, where.get("place")) if part)
            return Label(
                f"strong: {words}" if strong else words, "auto", "items",
                score.auroc, score.low, score.high, score.balanced, score.p, score.positives, score.negatives,
                strong=strong, top_score=top, rule=rule.to_json(), **where,
            )  # fmt: skip
    if place is None:
        return NONE
    return Label(
        place.part.place, "auto", "positions", place.auroc, place.low, place.high, place.auroc, place.p, place.items,
        strong=strong, **where,
    )  # fmt: skip
