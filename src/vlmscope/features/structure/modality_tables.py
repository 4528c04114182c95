"""Where the features of a study belong, layer by layer: pictures, words, or both (docs/structure.md).

Two things are told apart. *At which positions* a feature fires is in the study's counts: soft tokens or words. *In
which prompts* it fires at words is in its random examples: beside a picture, without one, or either; a feature of words
that never fires without a picture may carry what was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.study import ANSWER, IMAGE, TEXT
from vlmscope.features.study.records import StudyFolder
from vlmscope.metrics.dictionary import Modality, modality, wilson_interval

GROUPS = ("image", "both", "words beside a picture", "words in either", "words alone", "unsettled", "rare", "dead")


@dataclass(frozen=True)
class LayerModality:
    """One layer.

    Attributes:
        layer: which.
        found: index, interval and class of its F features.
        with_picture: [F] float64, share of the sampled items on which a feature fires that have a picture; nan where
            there is none.
        fired_image, fired_text: [F] int64, active positions; the answer's count as text.
    """

    layer: int
    found: Modality
    with_picture: np.ndarray
    fired_image: np.ndarray
    fired_text: np.ndarray

    @property
    def group(self) -> np.ndarray:
        """[F], of `GROUPS`: the class, with features of words divided by the prompts in which they fire."""
        names = self.found.kind.astype(f"<U{max(map(len, GROUPS))}")
        words = names == "text"
        names[words] = "words in either"
        names[words & (self.with_picture == 1)] = "words beside a picture"
        names[words & (self.with_picture == 0)] = "words alone"
        return names

    def counts(self) -> dict[str, int]:
        """How many features each of `GROUPS` has."""
        names, counts = np.unique(self.group, return_counts=True)
        found = dict(zip(names.tolist(), counts.tolist(), strict=True))
        return {name: found.get(name, 0) for name in GROUPS}

    def shared_firing(self) -> tuple[float, float]:
        """Share of all firing at soft tokens, and at words, that is by features of both; nan where nothing fires."""
        both = self.found.kind == "both"
        sums = [(fired[both].sum(), fired.sum()) for fired in (self.fired_image, self.fired_text)]
        image, text = (float(part / whole) if whole else float("nan") for part, whole in sums)
        return image, text


def modality_tables(study: StudyFolder, least: int = 5, alone: float = 0.1) -> list[LayerModality]:
    """All layers of a study.

    Args:
        study: of data with pictures and words.
        least: items below which a feature is called rare.
        alone: see `metrics.modality.modality`.

    Raises:
        UserError: the data of the study have no picture, or nothing else.
    """
    positions = study.info.positions
    n_image, n_text = positions["image"], positions["text"] + positions["answer"]
    if not n_image or not n_text:
        raise UserError(
            f"{study.path} went through {n_image} soft tokens and {n_text} words; study data that have both"
        )
    ids, pictures = study.items.ids, study.items.table["n_pictures"].to_numpy()
    tables = []
    for layer in study.layers:
        table = study.layer(layer)
        image, text = table.fired[:, IMAGE], table.fired[:, TEXT] + table.fired[:, ANSWER]
        features, items = study.example_items(layer, top=False)
        seen = pictures[np.searchsorted(ids, items)] > 0
        total = np.bincount(features, minlength=len(image))
        with_picture = np.full(len(image), np.nan)
        np.divide(np.bincount(features, seen, len(image)), total, out=with_picture, where=total > 0)
        found = modality(image, text, table.items_fired, n_image, n_text, least, alone)
        tables.append(LayerModality(layer, found, with_picture, image, text))
    return tables


def modality_metrics(tables: Sequence[LayerModality]) -> dict[str, float]:
    """`layers/modality_<group>/layer_03`, shares of all features of the layer; of features of both modalities the 95 %
    interval too, and their share of the firing at soft tokens and at words; `modality/meeting_layer` has most of them.
    """
    found: dict[str, float] = {}
    for one in tables:
        counts, width = one.counts(), len(one.found.index)

        def name(what: str, layer: int = one.layer) -> str:
            return f"layers/modality_{what.replace(' ', '_')}/layer_{layer:02d}"

        found |= {name(group): count / width for group, count in counts.items()}
        low, high = wilson_interval(np.array(counts["both"] / width), np.array(width))
        found |= {name("both_ci_low"): float(low), name("both_ci_high"): float(high)}
        found[name("both_firing_image")], found[name("both_firing_text")] = one.shared_firing()
    totals = {group: sum(one.counts()[group] for one in tables) for group in GROUPS}
    everything = sum(totals.values())
    found |= {f"modality/{group.replace(' ', '_')}": count / everything for group, count in totals.items()}
    most = max(tables, key=lambda one: one.counts()["both"] / len(one.found.index))
    return found | {"modality/meeting_layer": float(most.layer)}


def modality_parts(tables: Sequence[LayerModality]) -> tuple[Sequence[int], dict, Sequence[np.ndarray], dict]:
    """Columns by layer as `report.study_figures.modality_by_layer` draws them.

    Numbers of layers, counts by group, modality indices of the features that fire often enough, and the share of all
    firing that is by features of both modalities.
    """
    counts, shared = [one.counts() for one in tables], [one.shared_firing() for one in tables]
    return (
        [one.layer for one in tables],
        {group: [of[group] for of in counts] for group in GROUPS},
        [one.found.index[~np.isin(one.found.kind, ("rare", "dead"))] for one in tables],
        {"at soft tokens": [image for image, _ in shared], "at words": [text for _, text in shared]},
    )
