"""Small tables for people: aligned text for a terminal, HTML for a notebook. The first row is the head."""

from collections.abc import Sequence
from html import escape


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as lines with aligned columns; control characters of a token are written out."""
    shown = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in shown) for at in range(len(shown[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    )


def html_table(rows: Sequence[Sequence[str]], caption: str) -> str:
    """The same as an HTML table; everything is escaped."""
    head, *body = [[escape(_plain(cell)) for cell in row] for row in rows]
    lines = [f"<table><caption>{escape(_plain(caption))}</caption>"]
    lines.append("<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join([*lines, "</table>"])


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
