"""A small diagram of a circuit: supernodes as boxes from left (input) to right (answer), signed arrows between them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from vlmscope.core.intervention import Supernode
from vlmscope.report.style import MUTED, NEGATIVE, POSITIVE, drawing

Edge = tuple[str, str, float]  # source name, target name, weight
_WIDTH, _HEIGHT, _PICTURE = 2.1, 0.95, 0.85
_STEP_X, _STEP_Y = 3.5, 1.55


def circuit_diagram(
    supernodes: Sequence[Supernode],
    edges: Sequence[Edge],
    path: str | Path,
    thumbnails: Mapping[str, np.ndarray] | None = None,
    unit: str = "summed edge weight",
) -> Path:
    """Draw the circuit. Names in `edges` that are no supernode (inputs, answers) become plain boxes.

    A node stands one step right of its furthest source. `thumbnails[name]` is uint8 `[H, W, 3]`; `unit` says in the
    legend what the weights are.

    Raises:
        ValueError: the edges form a cycle, or there is nothing to draw.
    """
    members = {node.name: node for node in supernodes}
    names = list(dict.fromkeys([*members, *(name for edge in edges for name in edge[:2])]))
    if not names:
        raise ValueError("no supernodes to draw")
    places = _places(names, edges)
    pictures = dict(thumbnails or {})
    x, y = np.array([place for place in places.values()]).T
    width, height = np.ptp(x) + _WIDTH + 0.5, np.ptp(y) + _HEIGHT + _PICTURE + 0.6
    with drawing(path, max(6.0, 0.95 * width), max(2.2, 0.95 * height) + 0.4) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(x.min() - _WIDTH / 2 - 0.25, x.max() + _WIDTH / 2 + 0.25)
        axes.set_ylim(y.min() - _HEIGHT / 2 - 0.3, y.max() + _HEIGHT / 2 + _PICTURE + 0.3)
        strongest = max((abs(weight) for *_, weight in edges), default=1.0) or 1.0
        for edge in edges:
            _arrow(axes, edge, places, strongest)
        for name, place in places.items():
            _box(axes, name, members.get(name), place, pictures.get(name))
        axes.legend(handles=_legend(unit, edges), loc="lower center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    return Path(path)


def describe(node: Supernode) -> str:
    """What a supernode holds in a line: number of features, layers, position roles."""
    if not node.features:
        return "no features"
    layers = sorted({member.feature.layer for member in node.features})
    span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    count = len(node.features)
    return f"{count} feature{'s' if count > 1 else ''}, {span}"


def _places(names: Sequence[str], edges: Sequence[Edge]) -> dict[str, tuple[float, float]]:
    """Column = length of the longest path from an input; nodes of a column are spread around the middle."""
    rank = dict.fromkeys(names, 0)
    for sweep in range(len(names) + 1):
        moved = False
        for source, target, _ in edges:
            if rank[target] <= rank[source]:
                rank[target], moved = rank[source] + 1, True
        if not moved:
            break
        if sweep == len(names):
            raise ValueError("the circuit's edges form a cycle")
    columns = {value: [name for name in names if rank[name] == value] for value in sorted(set(rank.values()))}
    return {
        name: (value * _STEP_X, ((len(column) - 1) / 2 - at) * _STEP_Y)
        for value, column in columns.items()
        for at, name in enumerate(column)
    }


def _box(
    axes: Axes, name: str, node: Supernode | None, place: tuple[float, float], picture: np.ndarray | None
) -> None:
    x, y = place
    face = "#eef4fa" if node is not None else "#f4f4f4"
    corner = (x - _WIDTH / 2, y - _HEIGHT / 2)
    style = "round,pad=0,rounding_size=0.16" if node is not None else "square,pad=0"
    axes.add_patch(FancyBboxPatch(corner, _WIDTH, _HEIGHT, boxstyle=style, facecolor=face, edgecolor=MUTED, zorder=3))
    lift = 0.16 if node is not None else 0.0
    axes.text(x, y + lift, name, ha="center", va="center", fontweight="bold", fontsize=10, zorder=4)
    if node is not None:
        axes.text(x, y - 0.2, describe(node), ha="center", va="center", fontsize=7.5, zorder=4)
    if picture is not None:
        resized = np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.LANCZOS))
        image = OffsetImage(resized, zoom=0.85 * _PICTURE * 72 / 128)
        above = (x, y + _HEIGHT / 2 + 0.06)
        axes.add_artist(AnnotationBbox(image, above, frameon=False, box_alignment=(0.5, 0), pad=0, zorder=3))


def _arrow(axes: Axes, edge: Edge, places: Mapping[str, tuple[float, float]], strongest: float) -> None:
    source, target, weight = edge
    start = (places[source][0] + _WIDTH / 2, places[source][1])
    end = (places[target][0] - _WIDTH / 2, places[target][1])
    jump = places[target][0] - places[source][0] > 1.5 * _STEP_X
    bend = 0.28 if jump else 0.0
    arrow = FancyArrowPatch(
        start,
        end,
        connectionstyle=f"arc3,rad={bend}",
        arrowstyle="-|>",
        mutation_scale=14,
        linewidth=0.8 + 4.2 * abs(weight) / strongest,
        linestyle="-" if weight >= 0 else (0, (2.5, 1.2)),
        color=POSITIVE if weight >= 0 else NEGATIVE,
        shrinkA=1,
        shrinkB=1,
        zorder=2,
    )
    axes.add_patch(arrow)
    # A third of the way: two arrows that cross do so in the middle, where their labels would collide.
    share = 0.5 if jump else 0.36
    x = start[0] + share * (end[0] - start[0])
    y = start[1] + share * (end[1] - start[1]) - bend * (end[0] - start[0]) / 2
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9}
    axes.text(x, y, f"{weight:+.2f}", ha="center", va="center", fontsize=8.5, bbox=paper, zorder=5)


def _legend(unit: str, edges: Sequence[Edge]) -> list[Line2D]:
    signs = {weight >= 0 for *_, weight in edges}
    handles = []
    if True in signs:
        handles.append(Line2D([], [], color=POSITIVE, linewidth=2.5, label=f"raises ({unit})"))
    if False in signs:
        handles.append(
            Line2D([], [], color=NEGATIVE, linewidth=2.5, linestyle=(0, (2.5, 1.2)), label=f"lowers ({unit})")
        )
    return handles
