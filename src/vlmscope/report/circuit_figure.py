"""A small diagram of a circuit: supernodes as boxes from left (input) to right (answer), signed arrows between them.

A box holds the supernode's name, how many features it has, a line of words and the pictures on which they fire.

Layout in layers, as in Sugiyama et al. 1981: a node's column is its longest path from an input, an arrow over several
columns gets a lane of its own in each column between, and columns are ordered by the mean height of what feeds them.
"""

from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path as FilePath
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from PIL import Image

from vlmscope.core.results import Supernode
from vlmscope.report.figures import INK, MUTED, NEGATIVE, POSITIVE, drawing

Edge = tuple[str, str, float]  # source name, target name, weight in per cent
Lane = tuple[int, int]  # number of the edge, column that it crosses
Point = tuple[float, float]
_INCH, _DPI = 0.5, 220  # inches a unit: few, so that the words stay legible where a page shows the picture small
_WIDTH, _LANE, _GAP, _STEP = 2.8, 0.4, 0.5, 4.4  # of a box and a lane; between boxes of a column, and of columns
_NAME, _LINE, _PAD = 0.4, 0.34, 0.16  # a line of the name, each line below it, and around both and the pictures
_PICTURE, _SMALL = 1.5, 0.8  # one picture of a box, and each of several
_MOST = 3  # pictures of a box
_CHARACTERS = {"name": 15, "line": 19, "most": 60}  # of a line of the name, of those below it, and of all these


class _Look(NamedTuple):
    """Colours of paper, words, frames, boxes of inputs and of supernodes, and of arrows that raise and lower."""

    paper: str
    ink: str
    frame: str
    plain: str
    node: str
    raises: str
    lowers: str

    def arrow(self, raises: bool) -> dict[str, Any]:
        return {"color": self.raises} if raises else {"color": self.lowers, "linestyle": (0, (2.5, 1.2))}


_LIGHT = _Look("#ffffff", INK, MUTED, "#f4f4f4", "#eef4fa", POSITIVE, NEGATIVE)
_DARK = _Look("#15181c", "#e8eaed", "#a6afba", "#262b32", "#1b2b3c", "#56B4E9", "#E69F00")


def circuit_diagram(
    supernodes: Sequence[Supernode],
    edges: Sequence[Edge],
    path: str | FilePath,
    thumbnails: Mapping[str, Sequence[np.ndarray]],
    words: Mapping[str, str],
    dark: bool = False,
    shares: str = "",
) -> FilePath:
    """Draw the circuit; names in `edges` (without a cycle) that are no supernode, inputs and answers, are plain boxes.

    By name, `thumbnails` are up to three pictures, uint8 `[H, W, 3]`, and `words` a line for the box. `shares` says
    what the weights are where they have no sign.
    """
    look = _DARK if dark else _LIGHT
    members = {node.name: node for node in supernodes}
    names = list(dict.fromkeys([*members, *(name for edge in edges for name in edge[:2])]))
    boxes = {name: _Box(name, members.get(name), thumbnails.get(name, ()), words.get(name)) for name in names}
    layout = _Layout(boxes, edges)
    x = [place[0] for place in layout.places.values()]
    left, right = min(x) - _WIDTH / 2 - 0.15, max(x) + _WIDTH / 2 + 0.15
    low = min(y - layout.height(item) / 2 for item, (_, y) in layout.places.items()) - 0.7
    high = max(y + layout.height(item) / 2 for item, (_, y) in layout.places.items()) + 0.15
    with drawing(path, _INCH * (right - left), _INCH * (high - low), constrained=False, dpi=_DPI) as figure:
        figure.set_facecolor(look.paper)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        _draw_arrows(axes, edges, layout, look, "{:.0f} %" if shares else "{:+.1f}")
        for name, box in boxes.items():
            box.draw(axes, layout.places[name], look)
        shown = sorted({weight >= 0 for *_, weight in edges}, reverse=True)
        words_of = {True: shares or "raises, in % of all that the box takes in", False: "lowers"}
        handles = [Line2D([], [], linewidth=2.5, label=words_of[sign], **look.arrow(sign)) for sign in shown]
        axes.legend(handles=handles, loc="lower center", ncols=2, frameon=False, borderaxespad=0.2, labelcolor=look.ink)
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
        self.is_supernode, self.pictures = node is not None, pictures[:_MOST]
        self.name, self.lines = _lines(name, "name"), []
        for line in ([] if node is None else [describe(node)]) + ([words] if words else []):
            self.lines += _lines(line, "line")
        self.side = _PICTURE if len(self.pictures) == 1 else _SMALL
        pictured = self.side + _PAD if self.pictures else 0.0
        self.height = 2 * _PAD + _NAME * len(self.name) + _LINE * len(self.lines) + pictured

    def draw(self, axes: Axes, place: Point, look: _Look) -> None:
        x, y = place
        face, style = (
            (look.node, "round,pad=0,rounding_size=0.2") if self.is_supernode else (look.plain, "square,pad=0")
        )
        corner = (x - _WIDTH / 2, y - self.height / 2)
        box = FancyBboxPatch(
            corner, _WIDTH, self.height, boxstyle=style, facecolor=face, edgecolor=look.frame, zorder=3
        )
        axes.add_patch(box)
        top = y + self.height / 2 - _PAD
        for lines, height, weight, size in ((self.name, _NAME, "bold", 11), (self.lines, _LINE, "normal", 9.5)):
            for line in lines:
                text = axes.text(x, top - height / 2, line, ha="center", va="center", color=look.ink, zorder=4)
                text.set(fontsize=size, fontweight=weight)
                top -= height
        for number, picture in enumerate(self.pictures):
            resized = np.asarray(Image.fromarray(picture).resize((256, 256), Image.Resampling.LANCZOS))
            image = OffsetImage(resized, zoom=_INCH * self.side * 72 / 256)
            across = (number - (len(self.pictures) - 1) / 2) * (self.side + 0.06)
            middle = (x + across, y - self.height / 2 + _PAD + self.side / 2)
            axes.add_artist(AnnotationBbox(image, middle, frameon=False, box_alignment=(0.5, 0.5), pad=0, zorder=3.5))


def _lines(text: str, kind: str) -> list[str]:
    """The text in lines that fit into a box."""
    most = _CHARACTERS["most"]
    return wrap(text if len(text) <= most else f"{text[: most - 1]}…", _CHARACTERS[kind])


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


def _draw_arrows(axes: Axes, edges: Sequence[Edge], layout: _Layout, look: _Look, form: str) -> None:
    strongest = max((abs(weight) for *_, weight in edges), default=1.0) or 1.0
    leaves, arrives = layout.ports(0), layout.ports(1)
    paths: list[np.ndarray] = []
    for number, (source, target, weight) in enumerate(edges):
        points = [(layout.places[source][0] + _WIDTH / 2, leaves[number])]
        for x, y in (layout.places[stop] for stop in layout.stops(number)[1:-1]):
            points += [(x - _WIDTH / 2, y), (x + _WIDTH / 2, y)]
        points.append((layout.places[target][0] - _WIDTH / 2 - 0.02, arrives[number]))
        width = 0.8 + 5.0 * abs(weight) / strongest
        head = {"arrowstyle": "-|>", "mutation_scale": 9 + 1.1 * width, "shrinkA": 0, "shrinkB": 0}
        path = _smooth(points)
        axes.add_patch(FancyArrowPatch(path=path, linewidth=width, zorder=2, **head, **look.arrow(weight >= 0)))  # pyright: ignore[reportArgumentType]
        line = path.to_polygons(closed_only=False)[0]  # a few points on each curve
        paths.append(np.asarray(Path(line).interpolated(8).vertices))
    paper = {"facecolor": look.paper, "edgecolor": "none", "pad": 0.8, "alpha": 0.92}
    for (x, y), (*_, weight) in zip(_label_places(paths), edges, strict=True):
        axes.text(
            x, y, form.format(weight), ha="center", va="center", fontsize=9.5, color=look.ink, bbox=paper, zorder=5
        )


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
        candidates = path[len(path) // 3 : len(path) - len(path) // 3]  # both ends stay free
        others = [line for i, line in enumerate(paths) if i != number] + [label[None] for label in placed]
        best = len(candidates) // 2
        if others:
            gaps = np.linalg.norm((candidates[:, None] - np.concatenate(others)[None]) / scale, axis=-1).min(1)
            # Far enough is enough: then the middle of the arrow is the best place.
            middle = np.abs(np.linspace(-1, 1, len(candidates)))
            best = int(np.argmax(np.minimum(gaps, 1.5) - 0.05 * middle))
        placed.append(candidates[best])
    return [(float(x), float(y)) for x, y in placed]
