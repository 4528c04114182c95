"""A key below a figure: the features that it names by their numbers, with their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from vlmscope.core.ids import FeatureId

_LINE = 0.17  # inches
_CHARACTERS = 88  # of an entry; two stand side by side


def key_entries(features: Sequence[FeatureId], labels: Mapping[FeatureId, str] | None) -> list[str]:
    """`L5/709  planet = mars (0.97)` for each different feature that has a label, in order."""
    found = [f"{one}  {labels[one]}" for one in dict.fromkeys(features) if labels and one in labels]
    return [text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 3]}..." for text in found]


def key_height(entries: Sequence[str]) -> float:
    """Inches that the key takes; 0 without entries."""
    return _LINE * ((len(entries) + 1) // 2) + 0.15 if entries else 0.0


def draw_key(figure: Figure, entries: Sequence[str]) -> None:
    """Write the entries in two columns at the bottom of a figure, in `key_height` inches."""
    height = float(figure.get_figheight())
    rows = (len(entries) + 1) // 2
    for number, text in enumerate(entries):
        column, row = divmod(number, rows)
        y = (key_height(entries) - 0.05 - row * _LINE) / height
        figure.text(0.03 + 0.48 * column, y, text, ha="left", va="top", fontsize=8)
