"""A study's records as pages: which examples are shown, their small pictures, labels and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.study import IMAGE, TOP
from vlmscope.report.feature_page import (
    ExampleGroup,
    FeaturePage,
    GraphUse,
    PageExample,
    PageLabel,
    StudyFacts,
    guess,
    word_shares,
)
from vlmscope.report.thumbnails import HeatPicture, thumbnail

if TYPE_CHECKING:
    from vlmscope.core.study import ExampleView, FeatureRecord, StudyItem
    from vlmscope.features.labels import Label
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.tasks.pages import Config

AUTOMATIC = "auto"  # the set of labels that may be missing
_CACHED = 4096  # items whose small pictures are kept
_BLANK = 128  # pixels of a picture that is gone


def study_labels(study: StudyFolder, name: str) -> dict[FeatureId, Label]:
    """The set of labels of that name; none when it is the automatic one and was not made.

    Raises:
        UserError: another set is not there, or it cannot be read.
    """
    from vlmscope.features.labels import read_labels, set_path

    path = set_path(study.path, name)
    if name == AUTOMATIC and not path.is_file():
        return {}
    return read_labels(path)


class PageMaker:
    """Makes `FeaturePage`s of one study; `gone` counts the items whose pictures could not be had."""

    def __init__(
        self,
        study: StudyFolder,
        task: Config,
        labels: Mapping[FeatureId, Label],
        graphs: Mapping[FeatureId, Sequence[GraphUse]],
        tags: Mapping[FeatureId, tuple[str, ...]],
    ) -> None:
        self.study, self.task, self.labels, self.graphs, self.tags = study, task, labels, graphs, tags
        info = study.info
        self.facts = StudyFacts(
            info.model, str(info.transcoders.get("name", "")), info.items, info.positions, tuple(study.layers),
            study.path.parent.name if study.path.name == "study" else study.path.name,
        )  # fmt: skip
        self.usual = word_shares(study.items[int(item)].caption for item in study.items.ids)
        self.missing, self.gone = "", 0
        # Features share their strongest items.
        self._small = lru_cache(_CACHED)(self._thumbnails)

    def summary(self, count: int) -> str:
        """What the gallery is, in a paragraph."""
        info = self.study.info
        every = sum(info.n_features.values())
        return (
            f"A feature is a direction that the model uses for something. Here are {count:,} of {every:,}, each with "
            f"inputs on which it is strongest, out of {info.items:,} that were studied. Open one to see where it fires "
            "and what it does to the answer."
        )

    def page(self, record: FeatureRecord) -> tuple[FeaturePage, list[ExampleView]]:
        """The page of a feature, and the views of all its examples."""
        views = [self.study.view(example) for example in record.examples]
        names = dict.fromkeys(view.example.group for view in views)
        quarters = sorted((name for name in names if name != TOP), key=lambda name: -int(name[1:]))
        groups = [
            self._group(name, quarters, [v for v in views if v.example.group == name]) for name in (TOP, *quarters)
        ]
        strongest = _once([view for view in views if view.example.group == TOP])
        said = guess([(one[0].item.caption, one[0].places()) for one in strongest], self.usual)
        page = FeaturePage(
            record,
            self.facts,
            said,
            tuple(group for group in groups if group.examples),
            _label(self.labels.get(record.feature)),
            tuple(self.graphs.get(record.feature, ())),
            self.tags.get(record.feature, ()),
            self.missing if any(p.data is None for g in groups for e in g.examples for p in e.pictures) else "",
        )
        return page, views

    def extra(self, page: FeaturePage) -> dict[str, Any]:
        """What a page says and a study does not, for the JSON."""
        label = None if page.label is None else vars(page.label)
        graphs = [{"name": one.name, "prompt": one.prompt, "share": one.share} for one in page.graphs]
        return {"label": label, "guess": page.guess, "sentence": page.sentence(), "graphs": graphs}

    def _group(self, name: str, quarters: Sequence[str], views: Sequence[ExampleView]) -> ExampleGroup:
        shown = _once(views)[: self.task.examples if name == TOP else self.task.samples]
        examples = tuple(self._example(view, times) for view, times in shown)
        return ExampleGroup(name, _title(name, quarters), examples, len(views))

    def _example(self, view: ExampleView, times: int) -> PageExample:
        item = view.item
        return PageExample(
            view.example.activation, self._pictures(view), view.places(), item.caption, item.origin, times
        )

    def _pictures(self, view: ExampleView) -> tuple[HeatPicture, ...]:
        item, position = view.item, view.example.position
        at_peak = -1
        if item.kinds[position] == IMAGE:
            at_peak = int(item.pictures[np.count_nonzero(item.kinds[:position] == IMAGE)])
        found = []
        for number, (data, width, height) in enumerate(self._small(item.id)):
            boxes, levels = view.picture_boxes(number), view.picture_levels(number)
            found.append(HeatPicture(data, width, height, item.caption, boxes, levels, number == at_peak))
        return tuple(found)

    def _thumbnails(self, number: int) -> list[tuple[bytes | None, int, int]]:
        item: StudyItem = self.study.items[number]
        try:
            return [thumbnail(picture) for picture in self.study.pictures(item)]
        except UserError as error:
            self.missing = self.missing or str(error)
            self.gone += 1
            return [(None, _BLANK, _BLANK)] * item.n_pictures


def _once(views: Sequence[ExampleView]) -> list[tuple[ExampleView, int]]:
    """Every input once, with how often it is there; the order stays."""
    first: dict[tuple[str, int], ExampleView] = {}
    times: dict[tuple[str, int], int] = {}
    for view in views:
        key = (view.item.digest, view.item.part)
        first.setdefault(key, view)
        times[key] = times.get(key, 0) + 1
    return [(view, times[key]) for key, view in first.items()]


def _title(name: str, quarters: Sequence[str]) -> str:
    if name == TOP:
        return "Strongest examples"
    place = quarters.index(name)
    ends = {0: "the stronger", len(quarters) - 1: "the weakest"}
    return f"Part {place + 1} of {len(quarters)}" + (f", {ends[place]} inputs" if place in ends else "")


def _label(label: Label | None) -> PageLabel | None:
    if label is None or not label.text:
        return None
    return PageLabel(label.text, label.source, label.score, label.low, label.high, label.beats_chance, label.place)
