"""The plan of a layered graph picture: columns from left to right, layers from bottom to top."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from vlmscope.core.graph import ENDS, NodeKind

MARKS = {  # kind: (marker, face colour, words)
    NodeKind.TOKEN: ("s", "#444444", "token or soft token"),
    NodeKind.FEATURE: ("o", "#56B4E9", "feature"),
    NodeKind.ERROR: ("D", "#bdbdbd", "error"),
    NodeKind.BIAS: ("^", "#F0E442", "bias"),
    NodeKind.LEFT_OUT: ("P", "#999999", "features left out"),
}
_NODES_ACROSS = 84  # room for this many nodes side by side over the whole width
_LOGIT_STEP = 7.0  # distance between logits, in nodes
INCHES, LEFT, ACROSS = 14.0, 0.068, 0.925  # picture width; the axes' left edge and width as fractions of it
SIDE_COLUMN = -1  # position of nodes without one (bias, left out)


@dataclass(frozen=True)
class Layout:
    """Where things go. `xy [N, 2]` is NaN for nodes that are not drawn; `slots[position]` = (centre, width)."""

    xy: np.ndarray
    slots: dict[int, tuple[float, float]]
    rows: dict[int, int]  # layer -> height in the picture


class Placed(Protocol):
    """A table of nodes; `position` is the number of a column, -1 for none."""

    @property
    def kind(self) -> np.ndarray:
        """`[N]`, `NodeKind`."""
        ...

    @property
    def layer(self) -> np.ndarray:
        """`[N]`."""
        ...

    @property
    def position(self) -> np.ndarray:
        """`[N]`."""
        ...

    def __len__(self) -> int: ...


def lay_out(nodes: Placed, shown: np.ndarray, strength: np.ndarray, is_image: np.ndarray, n_layers: int) -> Layout:
    """Give the nodes `shown` a place each.

    Args:
        nodes: N nodes, of which the last is an end.
        shown: node numbers, ascending.
        strength: `[N]`, the strongest of a cell stand first.
        is_image: `[T]` bool, columns that need room for a thumbnail.
        n_layers: of the model.
    """
    ends = np.isin(nodes.kind[shown], ENDS)
    body = shown[~ends]
    cells: dict[tuple[int, int], list[int]] = {}
    for node in body[np.argsort(-strength[body], kind="stable")]:
        cells.setdefault((int(nodes.position[node]), int(nodes.layer[node])), []).append(int(node))
    n_tokens = len(is_image)
    used = {position for position, _ in cells}
    # A short prompt keeps its empty positions as context; a long one only has room for those that matter.
    positions = sorted(used | set(range(n_tokens)) if n_tokens <= 48 else used)
    widest = dict.fromkeys(positions, 0)
    for (position, _), cell in cells.items():
        widest[position] = max(widest[position], len(cell))
    # A thumbnail needs some room even where hardly anything fires.
    least = {at: 1.6 if at >= 0 and is_image[at] else 1.0 for at in positions}
    most = max(widest.values())  # nodes side by side in one cell before they wrap: as many as the picture has room for
    while most > 3 and sum(max(least[at], min(most, widest[at])) + 0.35 for at in positions) > _NODES_ACROSS:
        most -= 1
    slots, edge = {}, 0.0
    for position in positions:
        width = max(least[position], min(most, widest[position])) + 0.35
        slots[position] = (edge + width / 2, width)
        edge += width
    # What is explained stands in a row of its own, above all that its layer holds.
    last_layer = nodes.layer[-1]
    above = int(last_layer) + int(last_layer < n_layers)
    seen = {int(layer) for layer in nodes.layer[body]} | {above}
    every = range(-1, above + 1)
    rows = {layer: at for at, layer in enumerate(every if len(every) <= 16 else sorted(seen))}
    xy = np.full((len(nodes), 2), np.nan)
    for (position, layer), cell in cells.items():
        lines = [cell[at : at + most] for at in range(0, len(cell), most)]
        for level, line in enumerate(lines):
            y = rows[layer] + (level - (len(lines) - 1) / 2) * min(0.28, 0.8 / len(lines))
            for at, node in enumerate(line):
                xy[node] = slots[position][0] + (at - (len(line) - 1) / 2), y
    top = shown[ends]
    # Logits share the last position; side by side they need more room than it has, which is to its left.
    step = min(_LOGIT_STEP, edge / max(len(top), 1))
    last = slots[positions[-1]][0]
    first = min(last - step * (len(top) - 1) / 2, edge - step * (len(top) - 0.5))
    xy[top] = [(max(first, step / 2) + step * at, rows[above] + 0.1) for at in range(len(top))]
    return Layout(xy, slots, rows)


def frame(axes: Axes, layout: Layout, above: str, title: str) -> None:
    """Draw rows, columns and the names of the layers; `above` names the row of what is explained."""
    first, last = min(layout.slots), max(layout.slots)
    axes.set_xlim(
        layout.slots[first][0] - layout.slots[first][1] / 2, layout.slots[last][0] + layout.slots[last][1] / 2
    )
    axes.set_ylim(-0.5, len(layout.rows) - 0.35)
    axes.grid(False)
    axes.set_xticks([])
    names = {-1: "embedding", max(layout.rows): above}
    axes.set_yticks(list(layout.rows.values()), [names.get(layer, str(layer)) for layer in layout.rows])
    axes.set_ylabel("layer")
    axes.yaxis.set_label_coords(-0.058, 0.5)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for row in layout.rows.values():
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#f5f6f8", zorder=0)
    for number, (centre, width) in enumerate(layout.slots.values()):
        if number:
            axes.axvline(centre - width / 2, color="#e4e4e4", linewidth=0.6, zorder=0.5)
    axes.set_title(title, loc="left", fontsize=10)


def draw_edges(
    axes: Axes, layout: Layout, ends: tuple[np.ndarray, np.ndarray], widths: np.ndarray, style: tuple[str, object]
) -> None:
    """Draw edges from `ends[0]` to `ends[1]`, node numbers `[n]`, `widths [n]` points wide, in one colour and dash."""
    if len(widths):
        lines = np.stack([layout.xy[ends[0]], layout.xy[ends[1]]], axis=1)
        chosen = LineCollection(list(lines), linewidths=widths, colors=style[0], linestyles=style[1])  # pyright: ignore[reportArgumentType]
        chosen.set_alpha(0.42)
        chosen.set_zorder(1)
        axes.add_collection(chosen)


def edge_widths(sizes: np.ndarray) -> np.ndarray:
    """Points, for `sizes [n]` >= 0; the root keeps weak edges visible beside one that dwarfs them all."""
    return 0.35 + 3.4 * np.sqrt(sizes / (sizes.max() or 1.0))
