"""A small diagram of a circuit: supernodes as boxes from left (input) to right (answer), signed arrows between them.

A box holds the supernode's name, how many features it has, a line of words and the pictures on which they fire.

Layout in layers, as in Sugiyama et al. 1981: a node's column is its longest path from an input, an arrow over several
columns gets a lane of its own in each column between, and columns are ordered by the mean height of what feeds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from PIL import Image

from vlmscope.core.intervention import Supernode
from vlmscope.report.style import MUTED, NEGATIVE, POSITIVE, drawing

Edge = tuple[str, str, float]  # source name, target name, weight
Lane = tuple[int, int]  # number of the edge, column that it crosses
_WIDTH, _LANE, _GAP = 2.1, 0.3, 0.38
_PLAIN, _LINE, _PAD = 0.5, 0.24, 0.13  # a box with a name alone, each line below it, and around pictures
_PICTURE, _SMALL = 0.9, 0.6  # one picture of a box, and each of several
_MOST = 3  # pictures of a box
_CHARACTERS = 32  # of a line
_STEP = 3.6
_DASHES = (0, (2.5, 1.2))


@dataclass(frozen=True)
class _Layout:
    """Centres of the boxes and of the lanes, by node name and by (edge number, column), and the boxes' heights."""

    columns: dict[str, int]
    places: dict[str | Lane, tuple[float, float]]
    heights: dict[str, float]


@dataclass(frozen=True)
class _Content:
    """What stands in a box below its name."""

    lines: tuple[str, ...]
    pictures: tuple[np.ndarray, ...]

    @property
    def side(self) -> float:
        return _PICTURE if len(self.pictures) == 1 else _SMALL

    @property
    def height(self) -> float:
        return _PLAIN + _LINE * len(self.lines) + (self.side + _PAD if self.pictures else 0.0)


def circuit_diagram(
    supernodes: Sequence[Supernode],
    edges: Sequence[Edge],
    path: str | FilePath,
    thumbnails: Mapping[str, np.ndarray | Sequence[np.ndarray]] | None = None,
    unit: str = "summed edge weight",
    words: Mapping[str, str] | None = None,
    form: str = "{:+.2f}",
) -> FilePath:
    """Draw the circuit. Names in `edges` that are no supernode (inputs, answers) become plain boxes.

    Args:
        supernodes: of the circuit.
        edges: without a cycle (see `drawable`).
        path: of the PNG.
        thumbnails: by name a picture, uint8 `[H, W, 3]`, or up to three of them.
        unit: what the weights are, for the legend.
        words: by name a line for the box.
        form: how weights are written on the arrows.

    Raises:
        ValueError: the edges form a cycle, or there is nothing to draw.
    """
    members = {node.name: node for node in supernodes}
    names = list(dict.fromkeys([*members, *(name for edge in edges for name in edge[:2])]))
    if not names:
        raise ValueError("no supernodes to draw")
    contents = {
        name: _content(members.get(name), (thumbnails or {}).get(name), (words or {}).get(name)) for name in names
    }
    layout = _lay_out(names, edges, set(members), {name: found.height for name, found in contents.items()})
    x = np.array([place[0] for place in layout.places.values()])
    left, right = x.min() - _WIDTH / 2 - 0.15, x.max() + _WIDTH / 2 + 0.15
    ends = [(layout.places[name][1], layout.heights[name] / 2) for name in names]
    ends += [(place[1], _LANE / 2) for item, place in layout.places.items() if not isinstance(item, str)]
    low, high = min(y - half for y, half in ends) - 0.6, max(y + half for y, half in ends) + 0.15
    with drawing(path, 0.95 * (right - left), 0.95 * (high - low), constrained=False) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(left, right)
        axes.set_ylim(low, high)
        _draw_arrows(axes, edges, layout, form)
        for name in names:
            _box(axes, name, name in members, layout.places[name], contents[name])
        axes.legend(handles=_legend(unit, edges), loc="lower center", ncols=2, frameon=False, borderaxespad=0.2)
    return FilePath(path)


def drawable(edges: Sequence[Edge], least: float = 0.0) -> tuple[list[Edge], int]:
    """The edges of at least |weight| `least`, without the weakest one of every cycle, and how many that leaves out."""
    kept = [edge for edge in edges if abs(edge[2]) >= least and edge[0] != edge[1]]
    count = len(kept)
    while (cycle := _cycle(kept)) is not None:
        kept.remove(min(cycle, key=lambda edge: abs(edge[2])))
    return kept, count - len(kept)


def _cycle(edges: Sequence[Edge]) -> list[Edge] | None:
    """The edges of some cycle, None without one."""
    out: dict[str, list[Edge]] = {}
    for edge in edges:
        out.setdefault(edge[0], []).append(edge)
    done: set[str] = set()

    def search(name: str, path: list[Edge]) -> list[Edge] | None:
        for edge in out.get(name, []):
            names = [one[0] for one in path] + [name]
            if edge[1] in names:
                return [*path, edge][names.index(edge[1]) :]
            if edge[1] not in done and (found := search(edge[1], [*path, edge])) is not None:
                return found
        done.add(name)
        return None

    return next((found for name in list(out) if name not in done and (found := search(name, [])) is not None), None)


def describe(node: Supernode) -> str:
    """What a supernode holds in a line: its number of features and their layers."""
    if not node.features:
        return "no features"
    layers = sorted({member.feature.layer for member in node.features})
    span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    count = len(node.features)
    return f"{count} feature{'s' if count > 1 else ''}, {span}"


def _columns(names: Sequence[str], edges: Sequence[Edge], supernodes: set[str]) -> dict[str, int]:
    """Longest path from an input; answers, which feed nothing, all stand in the last column."""
    column = dict.fromkeys(names, 0)
    for sweep in range(len(names) + 1):
        moved = False
        for source, target, _ in edges:
            if column[target] <= column[source]:
                column[target], moved = column[source] + 1, True
        if not moved:
            break
        if sweep == len(names):
            raise ValueError("the circuit's edges form a cycle")
    last = max(column.values())
    ends = {target for _, target, _ in edges} - {source for source, _, _ in edges} - supernodes
    return {name: last if name in ends else at for name, at in column.items()}


def _content(node: Supernode | None, given: np.ndarray | Sequence[np.ndarray] | None, words: str | None) -> _Content:
    pictures = () if given is None else (given,) if isinstance(given, np.ndarray) else tuple(given)[:_MOST]
    lines = ([] if node is None else [describe(node)]) + ([words] if words else [])
    cut = [line if len(line) <= _CHARACTERS else line[: _CHARACTERS - 1] + "…" for line in lines]
    return _Content(tuple(cut), pictures)


def _lay_out(names: Sequence[str], edges: Sequence[Edge], supernodes: set[str], boxes: Mapping[str, float]) -> _Layout:
    columns = _columns(names, edges, supernodes)
    members: dict[int, list[str | Lane]] = {at: [] for at in range(max(columns.values()) + 1)}
    feeds: dict[str | Lane, list[str | Lane]] = {name: [] for name in names}
    for name in names:
        members[columns[name]].append(name)
    for number, (source, target, _) in enumerate(edges):
        before: str | Lane = source
        for at in range(columns[source] + 1, columns[target]):
            lane = (number, at)
            members[at].append(lane)
            feeds[lane] = [before]
            before = lane
        feeds[target].append(before)
    places: dict[str | Lane, tuple[float, float]] = {}
    for at, column in members.items():
        mean = {item: np.mean([places[source][1] for source in feeds[item]] or [0.0]) for item in column}
        column.sort(key=lambda item: -mean[item])
        tall = [boxes[item] if isinstance(item, str) else _LANE for item in column]
        top = (sum(tall) + _GAP * (len(column) - 1)) / 2
        for item, height in zip(column, tall, strict=True):
            places[item] = (at * _STEP, top - height / 2)
            top -= height + _GAP
    return _Layout(columns, places, dict(boxes))


def _box(axes: Axes, name: str, is_supernode: bool, place: tuple[float, float], content: _Content) -> None:
    x, y = place
    height = content.height
    face = "#eef4fa" if is_supernode else "#f4f4f4"
    corner = (x - _WIDTH / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.16" if is_supernode else "square,pad=0"
    axes.add_patch(FancyBboxPatch(corner, _WIDTH, height, boxstyle=style, facecolor=face, edgecolor=MUTED, zorder=3))
    top = y + height / 2 - _PLAIN / 2
    shown, size = (name, 11 if len(name) < 20 else 8.5) if len(name) <= 26 else (name[:25] + "…", 8.5)
    axes.text(x, top, shown, ha="center", va="center", fontweight="bold", fontsize=size, zorder=4)
    for line in content.lines:
        top -= _LINE
        axes.text(x, top, line, ha="center", va="center", fontsize=9 if len(line) < 28 else 8, zorder=4)
    side, count = content.side, len(content.pictures)
    for number, picture in enumerate(content.pictures):
        resized = np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.LANCZOS))
        image = OffsetImage(resized, zoom=0.95 * side * 72 / 128)
        middle = (x + (number - (count - 1) / 2) * (side + 0.06), y - height / 2 + _PAD + side / 2)
        axes.add_artist(AnnotationBbox(image, middle, frameon=False, box_alignment=(0.5, 0.5), pad=0, zorder=3.5))


def _ports(edges: Sequence[Edge], layout: _Layout, end: int) -> dict[int, float]:
    """Where on its box's side each edge leaves (`end` 0) or arrives (1): spread, ordered by where it goes."""
    heights = {}
    for name in layout.columns:
        mine = [number for number, edge in enumerate(edges) if edge[end] == name]
        mine.sort(key=lambda number: layout.places[_stops(number, edges[number], layout)[1 if end == 0 else -2]][1])
        for at, number in enumerate(mine):
            spread = (at + 1) / (len(mine) + 1) - 0.5
            heights[number] = layout.places[name][1] + 0.85 * layout.heights[name] * spread
    return heights


def _stops(number: int, edge: Edge, layout: _Layout) -> list[str | Lane]:
    source, target, _ = edge
    lanes = [(number, at) for at in range(layout.columns[source] + 1, layout.columns[target])]
    return [source, *lanes, target]


def _draw_arrows(axes: Axes, edges: Sequence[Edge], layout: _Layout, form: str) -> None:
    strongest = max((abs(weight) for *_, weight in edges), default=1.0) or 1.0
    leaves, arrives = _ports(edges, layout, 0), _ports(edges, layout, 1)
    paths: list[np.ndarray] = []
    for number, edge in enumerate(edges):
        source, target, weight = edge
        points = [(layout.places[source][0] + _WIDTH / 2, leaves[number])]
        for stop in _stops(number, edge, layout)[1:-1]:
            x, y = layout.places[stop]
            points += [(x - _WIDTH / 2, y), (x + _WIDTH / 2, y)]
        points.append((layout.places[target][0] - _WIDTH / 2 - 0.02, arrives[number]))
        style = {"color": POSITIVE, "linestyle": "-"} if weight >= 0 else {"color": NEGATIVE, "linestyle": _DASHES}
        width = 0.8 + 4.0 * abs(weight) / strongest
        path = _smooth(points)
        head = {"arrowstyle": "-|>", "mutation_scale": 12 + 1.5 * width, "shrinkA": 0, "shrinkB": 0}
        axes.add_patch(FancyArrowPatch(path=path, linewidth=width, zorder=2, **head, **style))  # pyright: ignore[reportArgumentType]
        paths.append(_sampled(points))
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.92}
    for (x, y), (*_, weight) in zip(_label_places(paths), edges, strict=True):
        axes.text(x, y, form.format(weight), ha="center", va="center", fontsize=9, bbox=paper, zorder=5)


def _smooth(points: Sequence[tuple[float, float]]) -> Path:
    """A path through the points that is level at each of them."""
    vertices, codes = [points[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        middle = (x0 + x1) / 2
        vertices += [(middle, y0), (middle, y1), (x1, y1)]
        codes += [Path.CURVE4] * 3
    return Path(vertices, codes)


def _label_places(paths: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """For every arrow the place of its label: where it is farthest from the other arrows and from labels before it."""
    scale = np.array([0.5, 0.2])  # a label is wider than high
    placed: list[np.ndarray] = []
    for number, path in enumerate(paths):
        others = [other for at, other in enumerate(paths) if at != number]
        obstacles = (
            np.concatenate([*others, *(p[None] for p in placed for _ in range(2))]) if others or placed else None
        )
        candidates = path[len(path) // 4 : len(path) - len(path) // 4]
        if obstacles is None:
            best = len(candidates) // 2
        else:
            gaps = np.linalg.norm((candidates[:, None] - obstacles[None]) / scale, axis=-1).min(1)
            # Far enough is enough: then the middle of the arrow is the best place.
            middle = np.abs(np.linspace(-1, 1, len(candidates)))
            best = int(np.argmax(np.minimum(gaps, 1.5) - 0.05 * middle))
        placed.append(candidates[best])
    return [(float(x), float(y)) for x, y in placed]


def _sampled(points: Sequence[tuple[float, float]], count: int = 24) -> np.ndarray:
    """`[n, 2]` points of the path that `_smooth` draws."""
    share = np.linspace(0, 1, count)
    level, across = share**2 * (3 - 2 * share), 1.5 * share * (1 - share) + share**3
    parts = [
        np.stack([x0 + across * (x1 - x0), y0 + level * (y1 - y0)], 1)
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False)
    ]
    return np.concatenate(parts)


def _legend(unit: str, edges: Sequence[Edge]) -> list[Line2D]:
    signs = {weight >= 0 for *_, weight in edges}
    handles = []
    if True in signs:
        handles.append(Line2D([], [], color=POSITIVE, linewidth=2.5, label=f"raises ({unit})"))
    if False in signs:
        handles.append(Line2D([], [], color=NEGATIVE, linewidth=2.5, linestyle=_DASHES, label=f"lowers ({unit})"))
    return handles
