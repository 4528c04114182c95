"""Made-up features for the tests of pages and JSON: of words, of pictures, and one whose every word is hostile."""

from pathlib import Path

import numpy as np
from PIL import Image
from tests.unit.report.conftest import BOXES, GRID, HOSTILE, MARS

from vlmscope.core.records import Exchange, FeatureId
from vlmscope.core.study import (
    ANSWER,
    BINS,
    IMAGE,
    TEXT,
    ExampleView,
    FeatureRecord,
    StudyExample,
    StudyInfo,
    StudyItem,
)
from vlmscope.features.labels import Label
from vlmscope.report.feature_page import ExampleGroup, FeaturePage, GraphUse, PageExample
from vlmscope.report.gallery import write_gallery
from vlmscope.report.pictures import HeatPicture, thumbnail

N = len(BOXES)
INFO = StudyInfo(
    "orrery", {"name": "set"}, {3: 64}, {}, {"window": 32}, 200, 200, {"text": 1000, "image": 3200, "answer": 400}
)
MARS_LABEL = Label("planet = mars", "auto", "items", 0.97, 0.9, 0.99, beats_chance=True)


def make_item(words: tuple[str, ...] = ("what", "is", "this", "?"), answer: str = "mars", number: int = 1) -> StudyItem:
    """A picture of `GRID` by `GRID` patches, then words and an answer."""
    tokens = ("<bos>", "<soi>", *["<soft>"] * N, "<eoi>", *words, answer)
    kinds = np.array([TEXT, TEXT, *[IMAGE] * N, *[TEXT] * (1 + len(words)), ANSWER], np.uint8)
    return StudyItem(
        number, "planets", number, 0, f"row {number}", f"{number:032x}", (Exchange(" ".join(words), answer),), "", 1,
        np.arange(len(tokens)), tokens, kinds, np.zeros(N, np.int64), BOXES, ((GRID, GRID),),
    )  # fmt: skip


def make_view(
    at: dict[int, int], activation: float = 4.0, group: str = "top", item: StudyItem | None = None
) -> ExampleView:
    """An example that fires at these positions with these levels; the peak is the largest."""
    item = item or make_item()
    positions = np.array(sorted(at), np.uint16)
    levels = np.array([at[int(p)] for p in positions], np.uint8)
    example = StudyExample(group, 0, activation, item.id, int(positions[levels.argmax()]), positions, levels)
    length = len(item.token_ids)
    return ExampleView(example, item, example.activations(length), example.dense_levels(length))


def make_record(views: list[ExampleView], index: int = 5, words: str = "mars") -> FeatureRecord:
    """With firings counted as if these views were all."""
    histogram = np.zeros((3, BINS), np.int64)
    histogram[0, 30], histogram[1, 36] = 7, 3
    return FeatureRecord(
        FeatureId(3, index), {"text": 7, "image": 3, "answer": 0}, 9, 20.0, 4.0, histogram, (1.0, 2.0),
        tuple(view.example for view in views), ((words, 0.4), ("red", 0.2)), (("blue", -0.3),),
    )  # fmt: skip


def make_feature_page(
    words: str = "mars", index: int = 5, label: Label | None = None, gone: bool = False
) -> FeaturePage:
    """A page whose token, caption, logit, graph and origin all are `words`."""
    item = make_item(("what", words, "?"), words)
    views = [make_view({4: 255, N + 5: 120}, item=item), make_view({N + 5: 255}, 1.0, "q1", item)]
    groups = []
    for title, view in zip(("Strongest examples", "Part 1 of 1"), views, strict=True):
        data, width, height = thumbnail(Image.fromarray(MARS))
        peak = item.kinds[view.example.position] == IMAGE
        picture = HeatPicture(None if gone else data, width, height, words, BOXES, view.picture_levels(0), bool(peak))
        example = PageExample(view.example.activation, (picture,), view.places(), words, words)
        groups.append(ExampleGroup(view.example.group, title, (example,)))
    graph = GraphUse(words, words, (("report", "../run/report.html"),), ((3, words, 1.5),), 0.02)
    missing = f"{words}: no such file" if gone else ""
    record = make_record(views, index, words)
    return FeaturePage(record, INFO, f"at {words}", tuple(groups), label, (graph,), (words,), "run", missing)


def write_pages(folder: Path) -> Path:
    """A gallery of a labelled feature, a hostile one, and one whose pictures are gone; returns its index."""
    pages = [
        make_feature_page("mars", 5, MARS_LABEL),
        make_feature_page(HOSTILE, 6, Label(HOSTILE, "hand")),
        make_feature_page("earth", 7, gone=True),
    ]
    for page in pages:
        page.write(folder, None, pages[-1].feature)
    return write_gallery(folder, pages, "Features", "Three of them.")
