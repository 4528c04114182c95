"""On which items a feature is known to fire, and on which not, without running the model again.

A study keeps, of every feature, the m items of smallest hash on which it fires. So of all items up to the last of these
(of all items, when there are fewer than m), those that are kept fire it and the others do not: exactly.

Legend: F features of a layer, R rows (a feature with an item on which it fires), N items in the order of their hashes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vlmscope.core.study import TOP
from vlmscope.features.labels.item_facts import ItemFacts
from vlmscope.features.study.records import StudyFolder

MOST_FIRING = 0.5  # of the items; a feature that fires on more is labelled by the items on which it is strong


@dataclass(frozen=True)
class KnownItems:
    """The rows of a layer, by feature.

    Attributes:
        item: `[R]` int64, place in `ItemFacts.ids`.
        peak: `[R]` float32.
        drawn: `[R]` bool: one of the feature's random draw; else only among its strongest.
        top: `[R]` bool: among its strongest.
        positive: `[R]` bool: what a label must tell from other items: where the feature fires; or, if it does so on
            more than half of the items, where its peak is at least the median of those drawn.
        row: `[R]` int64, in the table of examples.
        starts: `[F + 1]`, where each feature's rows begin.
        reach: `[F]`: of so many first items it is known whether the feature fires.
        strong: `[F]` bool: the second meaning of `positive`.
    """

    item: np.ndarray
    peak: np.ndarray
    drawn: np.ndarray
    top: np.ndarray
    positive: np.ndarray
    row: np.ndarray
    starts: np.ndarray
    reach: np.ndarray
    strong: np.ndarray

    def rows(self, feature: int) -> slice:
        """The rows of one feature."""
        return slice(self.starts[feature], self.starts[feature + 1])

    def shuffled(self, rng: np.random.Generator, n_items: int) -> KnownItems:
        """The same activations on random items: each feature's draw among its first `reach`, its other rows anywhere.

        What is left to find is chance, so that the scores of labels of the outcome are those of no meaning.
        """
        item = self.item.copy()
        for feature, reach in enumerate(self.reach.tolist()):
            rows = np.arange(self.starts[feature], self.starts[feature + 1])
            drawn = rows[self.drawn[rows]]
            item[drawn] = rng.permutation(reach)[: len(drawn)]
            others = rows[~self.drawn[rows]]
            item[others] = reach + rng.permutation(n_items - reach)[: len(others)]
        return KnownItems(**{**vars(self), "item": item})


def known_items(study: StudyFolder, layer: int, examples: pa.Table, facts: ItemFacts) -> KnownItems:
    """Read the rows of a layer off its table of examples."""
    n_features = study.info.n_features[layer]
    feature = examples["feature"].to_numpy().astype(np.int64)
    top = examples["group"].to_numpy() == TOP
    item = facts.places(examples["item"].to_numpy())
    # An item may be among the strongest and drawn: then it is one row, which comes as drawn (last).
    order = np.lexsort((~top, item, feature))
    key = feature[order] * len(facts.ids) + item[order]
    last = np.append(np.diff(key) != 0, True)
    first = np.append(True, last[:-1])
    rows, any_top = order[last], top[order[first]]
    found, drawn = feature[rows], ~top[rows]
    starts = np.searchsorted(found, np.arange(n_features + 1))
    peak = examples["activation"].to_numpy()[rows]
    drawn_count = np.bincount(found[drawn], minlength=n_features)
    reach = np.full(n_features, len(facts.ids))
    full = drawn_count >= int(str(study.info.settings["samples"]))
    latest = np.zeros(n_features, dtype=np.int64)
    np.maximum.at(latest, found[drawn], item[rows][drawn] + 1)
    reach[full] = latest[full]
    strong = study.layer(layer).items_fired > MOST_FIRING * study.info.items
    positive = np.ones(len(rows), dtype=bool)
    for one in np.flatnonzero(strong).tolist():
        span = slice(starts[one], starts[one + 1])
        own = peak[span]
        positive[span] = own >= np.median(own[drawn[span]]) if drawn[span].any() else True
    return KnownItems(item[rows], peak, drawn, any_top, positive, rows, starts, reach, strong)
