"""One look for all figures: a colour-blind safe palette that also survives a grey printer, and one way to save.

Series differ by hatch, marker or line style besides their colour (Okabe and Ito's palette), so no meaning depends on
hue.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vlmscope.core.artifacts import atomic_path

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 1)))
# Light and dark alternate, and neighbours differ by hatch, so that a grey print tells the parts of a bar.
FILLS = (
    ("#0072B2", ""),
    ("#F0E442", "///"),
    ("#D55E00", ""),
    ("#F6B8D0", "..."),
    ("#009E73", "\\\\\\"),
    ("#dcdcdc", ""),
    ("#a8a8a8", "xxx"),
    ("#4d4d4d", ""),
)
POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
INK, MUTED = "#222222", "#6b6b6b"
DPI = 150

_RC = {
    # The style "whitegrid" of seaborn, whose import takes half a second.
    **dict.fromkeys(("xtick.color", "ytick.color"), ".15"),
    **dict.fromkeys(("xtick.bottom", "ytick.left"), False),
    **{"axes.grid": True, "axes.axisbelow": True, "lines.solid_capstyle": "round"},
    **{"patch.edgecolor": "w", "patch.force_edgecolor": True},
    "font.family": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.labelsize": 10.0,
    "axes.titlesize": 11.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.8,
    # Tokens are shown as they are: a dollar sign must not start a formula.
    "text.parse_math": False,
}

LABELS = {
    "steer": "steering",
    "patch": "patching",
    "ablate": "ablation",
    "generate": "generated, token by token",
    "all": "all layers, all positions",
    "no_last_layer": "without last layer",
    "no_last_position": "without last position",
    "role_image": "picture positions only",
    "role_question": "question positions only",
    "role_last": "last position only",
    "role_special": "special tokens only",
    "worst": "worst question",
}

logging.getLogger("matplotlib.category").setLevel(logging.WARNING)  # layers are strings that look like numbers


def label(name: str) -> str:
    """The words to show for the name of a method, mode, question or scope."""
    return LABELS.get(name, name.replace("_", " "))


def pick(choices: tuple[Any, ...], number: int) -> Any:
    """The style of series `number`; styles repeat when there are more series than styles."""
    return choices[number % len(choices)]


def line_style(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of a line; where colours repeat, dashes and markers differ."""
    other = number + number // len(COLOURS)
    look = {"color": pick(COLOURS, number), "linestyle": pick(LINES, other), "marker": pick(MARKERS, other)}
    return look | {"markersize": 5}


def bar_style(number: int) -> dict[str, Any]:
    """Colour and hatch of a bar; where colours repeat, hatches differ."""
    hatch = pick(HATCHES, number + number // len(COLOURS))
    return {"color": pick(COLOURS, number), "hatch": hatch, "edgecolor": "white", "linewidth": 0}


def percent_axis(axis: Axis) -> None:
    """Label shares 0..1 in per cent; the unit belongs to the axis label."""
    axis.set_major_formatter(PercentFormatter(1.0, symbol=""))


@contextmanager
def drawing(path: str | Path, width: float, height: float, constrained: bool = True) -> Iterator[Figure]:
    """Yield an empty figure of `width` x `height` inches; on success it is written to `path` as PNG, atomically."""
    with mpl.rc_context(_RC):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained" if constrained else None)
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(path) as temporary:
            # Without the software's name, equal figures are equal bytes.
            figure.savefig(temporary, format="png", metadata={"Software": None})


def tidy(axes: Axes, grid: str | None = "y") -> None:
    """Keep the grid lines of one axis (or none) behind the data and drop the frame's right and top side."""
    axes.set_axisbelow(True)
    axes.grid(False)
    if grid is not None:
        axes.grid(True, axis=grid)  # type: ignore[arg-type]
    axes.spines[["top", "right"]].set_visible(False)
