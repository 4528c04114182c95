"""Parts of the report that need no result: pictures as sections, how to read it, how to run it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmscope.core.artifacts import read_text
from vlmscope.report.page import Details, Figure, Picture, Text

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench


def picture(path: Path, alt: str, wide: bool = False) -> Picture:
    """A drawn figure as part of the page."""
    return Picture(path.read_bytes(), alt, alt, wide)


def figure(title: str, path: Path, alt: str, intro: str = "", wide: bool = False) -> Figure:
    """A section of one picture."""
    return Figure(title, (picture(path, alt, wide),), intro)


def limits(gated: bool) -> Text:
    """What the numbers do not say."""
    paragraphs = (
        "free: nothing is frozen. frozen attention: the attention patterns of the unedited run. direct: patterns, "
        "norms and MLPs frozen, so the change travels along the edges of the attribution graph only.",
        "Editing all layers and positions includes the last layer at the last position, where a feature can write "
        "the answer by itself. That shows that the features suffice, not that they are how the model computes it.",
    )
    gate = (
        "Steering exchanges: at each layer and position it acts as far as the features that it suppresses are "
        "active there (the gate), so a prompt without them stays as it is."
    )
    return Text("How to read this", (*paragraphs, gate) if gated else paragraphs)


def rerun(bench: Bench) -> Text:
    """The command that made this page."""
    return Text(
        "Run it again",
        ("The same seed gives the same numbers on the same machine.",),
        code=f"python run.py experiment={bench.cfg.name}",
    )


def configuration(bench: Bench) -> Details:
    """The resolved configuration, folded."""
    path = bench.run_dir / "config.yaml"
    return Details("Configuration", "config.yaml of this run", read_text(path) if path.is_file() else "(not recorded)")
