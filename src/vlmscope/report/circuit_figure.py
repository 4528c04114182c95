"""A small diagram of a circuit: supernodes as boxes from left (input) to right (answer), signed arrows between them.

A box holds the supernode's name, how many features it has, a line of words and the pictures on which they fire.

Layout in layers, as in Sugiyama et al. 1981: a node's column is its longest path from an input, an arrow over several
columns gets a lane of its own in each column between, and columns are ordered by the mean height of what feeds them.
"""

from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from PIL import Image

from vlmscope.core.results import Supernode
from vlmscope.report.figures import MUTED, NEGATIVE, POSITIVE, drawing

Edge = tuple[str, str, float]  # source name, target name, weight in per cent
Lane = tuple[int, int]  # number of the edge, column that it crosses
Point = tuple[float, float]
_WIDTH, _LANE, _GAP, _STEP = 2.1, 0.3, 0.38, 3.6  # of a box and a lane; between boxes of a column, and of columns
_PLAIN, _LINE, _PAD = 0.5, 0.24, 0.13  # a box with a name alone, each line below it, and around pictures
_PICTURE, _SMALL = 0.9, 0.6  # one picture of a box, and each of several
_MOST = 3  # pictures of a box
_CHARACTERS = 32  # of a line
_SIGNS: dict[bool, dict[str, Any]] = {
    True: {"color": POSITIVE, "linestyle": "-"},
    False: {"color": NEGATIVE, "linestyle": (0, (2.5, 1.2))},
}


def circuit_diagram(
    supernodes: Sequence[Supernode],
    edges: Sequence[Edge],
    path: str | FilePath,
    thumbnails: Mapping[str, Sequence[np.ndarray]],
    words: Mapping[str, str],
) -> FilePath:
    """Draw the circuit; names in `edges` (without a cycle) that are no supernode, inputs and answers, are plain boxes.

    By name, `thumbnails` are up to three pictures, uint8 `[H, W, 3]`, and `words` a line for the box.
    """
    members = {node.name: node for node in supernodes}
    names = list(dict.fromkeys([*members, *(name for edge in edges for name in edge[:2])]))
    boxes = {name: _Box(name, members.get(name), thumbnails.get(name, ()), words.get(name)) for name in names}
    layout = _Layout(boxes, edges)
    x = [place[0] for place in layout.places.values()]
    left, right = min(x) - _WIDTH / 2 - 0.15, max(x) + _WIDTH / 2 + 0.15
    low = min(y - layout.height(item) / 2 for item, (_, y) in layout.places.items()) - 0.6
    high = max(y + layout.height(item) / 2 for item, (_, y) in layout.places.items()) + 0.15
    with drawing(path, 0.95 * (right - left), 0.95 * (high - low), constrained=False) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        _draw_arrows(axes, edges, layout)
        for name, box in boxes.items():
            box.draw(axes, layout.places[name])
        shown = sorted({weight >= 0 for *_, weight in edges}, reverse=True)
        unit = "% of all that the target takes in"
        words_of = {True: f"raises ({unit})", False: f"lowers ({unit})"}
        handles = [Line2D([], [], linewidth=2.5, label=words_of[sign], **_SIGNS[sign]) for sign in shown]
        axes.legend(handles=handles, loc="lower center", ncols=2, frameon=False, borderaxespad=0.2)
    return FilePath(path)


def drawable(edges: Sequence[Edge], least: float = 0.0) -> list[Edge]:
    """The edges of at least |weight| `least`, without the weakest one of every cycle."""
    kept = [edge for edge in edges if abs(edge[2]) >= least and edge[0] != edge[1]]
    while True:
        try:
            _sorter(kept).prepare()
            return kept
        except CycleError as error:
            around = set(pairwise(error.args[1]))  # graphlib gives the nodes of the cycle in the order of its edges
            kept.remove(min((edge for edge in kept if edge[:2] in around), key=lambda edge: abs(edge[2])))


def _sorter(edges: Sequence[Edge], names: Iterable[str] = ()) -> TopologicalSorter[str]:
    sorter = TopologicalSorter(dict.fromkeys(names, ()))
    for source, target, _ in edges:
        sorter.add(target, source)
    return sorter


def describe(node: Supernode) -> str:
    """A line about a supernode: its number of features and their layers."""
    if not node.features:
        return "no features"
    layers = sorted({member.feature.layer for member in node.features})
    span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    count = len(node.features)
    return f"{count} feature{'s' if count > 1 else ''}, {span}"


class _Box:
    """A name, lines of words below it, and pictures."""

    def __init__(self, name: str, node: Supernode | None, pictures: Sequence[np.ndarray], words: str | None) -> None:
        self.name, self.is_supernode = name, node is not None
        self.pictures = pictures[:_MOST]
        lines = ([] if node is None else [describe(node)]) + ([words] if words else [])
        self.lines = [line if len(line) <= _CHARACTERS else line[: _CHARACTERS - 1] + "…" for line in lines]
        self.side = _PICTURE if len(self.pictures) == 1 else _SMALL
        self.height = _PLAIN + _LINE * len(lines) + (self.side + _PAD if self.pictures else 0.0)

    def draw(self, axes: Axes, place: Point) -> None:
        x, y = place
        face, style = "#f4f4f4", "square,pad=0"
        if self.is_supernode:
            face, style = "#eef4fa", "round,pad=0,rounding_size=0.16"
        corner = (x - _WIDTH / 2, y - self.height / 2)
        box = FancyBboxPatch(corner, _WIDTH, self.height, boxstyle=style, facecolor=face, edgecolor=MUTED, zorder=3)
        axes.add_patch(box)
        centred = {"ha": "center", "va": "center", "zorder": 4}
        top, name = y + self.height / 2 - _PLAIN / 2, self.name
        shown = name if len(name) <= 26 else name[:25] + "…"
        axes.text(x, top, shown, fontweight="bold", fontsize=11 if len(name) < 20 else 8.5, **centred)
        for line in self.lines:
            top -= _LINE
            axes.text(x, top, line, fontsize=9 if len(line) < 28 else 8, **centred)
        for number, picture in enumerate(self.pictures):
            resized = np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.LANCZOS))
            image = OffsetImage(resized, zoom=0.95 * self.side * 72 / 128)
            across = (number - (len(self.pictures) - 1) / 2) * (self.side + 0.06)
            middle = (x + across, y - self.height / 2 + _PAD + self.side / 2)
            axes.add_artist(AnnotationBbox(image, middle, frameon=False, box_alignment=(0.5, 0.5), pad=0, zorder=3.5))


class _Layout:
    """Centres of the boxes, by name, and of the lanes, by edge number and column."""

    def __init__(self, boxes: Mapping[str, _Box], edges: Sequence[Edge]) -> None:
        self.boxes, self.edges, self.columns = boxes, edges, _columns(boxes, edges)
        self.places: dict[str | Lane, Point] = {}
        members: dict[int, list[str | Lane]] = {column: [] for column in range(max(self.columns.values()) + 1)}
        feeds: dict[str | Lane, list[str | Lane]] = {name: [] for name in boxes}
        for name in boxes:
            members[self.columns[name]].append(name)
        for number in range(len(edges)):
            source, *lanes, target = self.stops(number)
            for lane in lanes:
                members[lane[1]].append(lane)  # pyright: ignore[reportArgumentType]
                feeds[lane], source = [source], lane
            feeds[target].append(source)
        # From left to right: the places of what feeds a column are known when it is ordered.
        for column, items in members.items():
            mean = {item: np.mean([self.places[source][1] for source in feeds[item]] or [0.0]) for item in items}
            items.sort(key=lambda item: -mean[item])
            top = (sum(map(self.height, items)) + _GAP * (len(items) - 1)) / 2
            for item in items:
                self.places[item] = (column * _STEP, top - self.height(item) / 2)
                top -= self.height(item) + _GAP

    def height(self, item: str | Lane) -> float:
        return self.boxes[item].height if isinstance(item, str) else _LANE

    def stops(self, number: int) -> list[str | Lane]:
        """Source, lanes and target of an edge, in order."""
        source, target, _ = self.edges[number]
        return [source, *((number, column) for column in range(self.columns[source] + 1, self.columns[target])), target]

    def ports(self, end: int) -> dict[int, float]:
        """The height at which each edge leaves its source (`end` 0) or enters its target (1), so that few cross."""
        heights = {}
        for name in self.boxes:
            attached = [number for number, edge in enumerate(self.edges) if edge[end] == name]
            attached.sort(key=lambda number: self.places[self.stops(number)[1 if end == 0 else -2]][1])
            for rank, number in enumerate(attached):
                spread = (rank + 1) / (len(attached) + 1) - 0.5
                heights[number] = self.places[name][1] + 0.85 * self.height(name) * spread
        return heights


def _columns(boxes: Mapping[str, _Box], edges: Sequence[Edge]) -> dict[str, int]:
    """The longest path from an input to each box; answers, which feed nothing, are all in the last column."""
    column: dict[str, int] = {}
    for name in _sorter(edges, boxes).static_order():  # refuses a cycle
        column[name] = max((column[source] + 1 for source, target, _ in edges if target == name), default=0)
    last, sources = max(column.values()), {source for source, *_ in edges}
    answers = {target for _, target, _ in edges if target not in sources and not boxes[target].is_supernode}
    return {name: last if name in answers else column[name] for name in boxes}


def _draw_arrows(axes: Axes, edges: Sequence[Edge], layout: _Layout) -> None:
    strongest = max((abs(weight) for *_, weight in edges), default=1.0) or 1.0
    leaves, arrives = layout.ports(0), layout.ports(1)
    paths: list[np.ndarray] = []
    for number, (source, target, weight) in enumerate(edges):
        points = [(layout.places[source][0] + _WIDTH / 2, leaves[number])]
        for x, y in (layout.places[stop] for stop in layout.stops(number)[1:-1]):
            points += [(x - _WIDTH / 2, y), (x + _WIDTH / 2, y)]
        points.append((layout.places[target][0] - _WIDTH / 2 - 0.02, arrives[number]))
        width = 0.8 + 4.0 * abs(weight) / strongest
        head = {"arrowstyle": "-|>", "mutation_scale": 12 + 1.5 * width, "shrinkA": 0, "shrinkB": 0}
        path = _smooth(points)
        axes.add_patch(FancyArrowPatch(path=path, linewidth=width, zorder=2, **head, **_SIGNS[weight >= 0]))  # pyright: ignore[reportArgumentType]
        line = path.to_polygons(closed_only=False)[0]  # a few points on each curve
        paths.append(np.asarray(Path(line).interpolated(8).vertices))
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.92}
    for (x, y), (*_, weight) in zip(_label_places(paths), edges, strict=True):
        axes.text(x, y, f"{weight:+.1f}", ha="center", va="center", fontsize=9, bbox=paper, zorder=5)


def _smooth(points: Sequence[Point]) -> Path:
    """A path through the points that is level at each of them."""
    vertices, codes = [points[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (x0 + x1) / 2
        vertices += [(middle, y0), (middle, y1), (x1, y1)]
        codes += [Path.CURVE4] * 3
    return Path(vertices, codes)


def _label_places(paths: Sequence[np.ndarray]) -> list[Point]:
    """For every arrow the place of its label: where it is farthest from the other arrows and from labels before it."""
    scale = np.array([0.5, 0.2])  # a label is wider than high
    placed: list[np.ndarray] = []
    for number, path in enumerate(paths):
        candidates = path[len(path) // 4 : len(path) - len(path) // 4]
        others = [line for i, line in enumerate(paths) if i != number] + [label[None] for label in placed]
        best = len(candidates) // 2
        if others:
            gaps = np.linalg.norm((candidates[:, None] - np.concatenate(others)[None]) / scale, axis=-1).min(1)
            # Far enough is enough: then the middle of the arrow is the best place.
            middle = np.abs(np.linspace(-1, 1, len(candidates)))
            best = int(np.argmax(np.minimum(gaps, 1.5) - 0.05 * middle))
        placed.append(candidates[best])
    return [(float(x), float(y)) for x, y in placed]
