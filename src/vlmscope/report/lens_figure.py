"""What the logit lens says at the soft tokens of a picture, state by state, and how early over many pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from vlmscope.core.images import PatchBox
from vlmscope.report.patch_figure import shrunk
from vlmscope.report.style import INK, drawing

_READABLE = 36  # soft tokens whose words still fit
_COLUMNS = 5


def soft_token_words(
    pictures: Sequence[np.ndarray],
    places: Sequence[tuple[int, PatchBox | None]],
    words: np.ndarray,
    probability: np.ndarray,
    word: str,
    path: str | Path,
) -> Path:
    """The first picture, then one panel a state: the probability of a word, with the most probable word as text.

    Args:
        pictures: uint8 `[H, W, 3]`; the first one is drawn.
        places: picture and box of each of the S soft tokens.
        words: `[states, S]` strings.
        probability: `[states, S]`, of `word`.
        word: the word that is looked for.
        path: the PNG to write.
    """
    mine = [(at, box) for at, (picture, box) in enumerate(places) if picture == 0 and box is not None]
    rows = -(-(len(words) + 1) // _COLUMNS)
    colours = sns.light_palette("#0072B2", as_cmap=True)
    with drawing(path, 2.1 * _COLUMNS, 2.3 * rows + 0.3) as figure:
        grid = figure.subplots(rows, _COLUMNS, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        grid.flat[0].imshow(shrunk(pictures[0]))
        grid.flat[0].set_title("picture", loc="left", fontsize=9)
        for state, axes in enumerate(grid.flat[1 : len(words) + 1]):
            name = f"before layer {state}" if state < len(words) - 1 else "after the last layer"
            axes.set_title(name, loc="left", fontsize=9)
            axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
            for at, box in mine:
                value = float(probability[state, at])
                width, height = box.right - box.left, box.bottom - box.top
                spot = Rectangle((box.left, box.top), width, height, facecolor=colours(value), edgecolor="white")
                axes.add_patch(spot)
                if len(mine) <= _READABLE:
                    middle = (box.left + width / 2, box.top + height / 2)
                    ink = "white" if value > 0.6 else INK
                    axes.text(*middle, _short(words[state, at]), ha="center", va="center", fontsize=5.5, color=ink)
        bar = ScalarMappable(Normalize(0, 1), colours)
        figure.colorbar(bar, ax=grid, label=f"probability of {word!r}", shrink=0.6)
    return Path(path)


def _short(word: str) -> str:
    return word if len(word) <= 9 else f"{word[:8]}…"
