"""Proposals of labels by contrast: which rule tells the items on which a feature fires best from a background.

The contrast of a rule is Youden's J = share of positives that match - share of negatives that match, each with half an
item added to matches and one to items, since few positives are known. J adds up over values of one fact (an item has
one), so the best set of values is read off the values' own contrasts. Pairs of the best parts are then tried, both ways
of joining them. A longer rule must earn its length. Whether the winner beats chance is asked with a G-test, corrected
(Bonferroni) for how many rules were tried.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc, xlogy

from vlmscope.features.labels.item_facts import ItemFacts
from vlmscope.features.labels.known import KnownItems
from vlmscope.features.labels.rules import MOST_VALUES, Part, Rule

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
