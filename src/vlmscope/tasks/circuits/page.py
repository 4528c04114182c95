"""The diagram and the page of task=circuit: supernodes with pictures on which they fire, edges, features, limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.circuits.spec_config import ANSWER_PREFIX, SOFT, SURROUNDINGS, TEXT
from vlmscope.core.intervention import CircuitEdge, CircuitFeature, Supernode
from vlmscope.data.images import for_figures
from vlmscope.report.circuit_figure import circuit_diagram, drawable
from vlmscope.report.page import Card, Cards, Features, Figure, Percent, ReportPage, Section, Table, Text
from vlmscope.report.page import drawn as picture_of
from vlmscope.report.thumbnails import decode, example_png
from vlmscope.tasks.circuits.examples import examples_of
from vlmscope.tasks.circuits.inputs import Asked

if TYPE_CHECKING:
    from vlmscope.circuits.circuit import Circuit
    from vlmscope.config import AppConfig
    from vlmscope.core.graph import PrunedGraph
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.scope import Scope

SHOWN = 6  # features of a supernode with evidence
THUMBNAILS = 3  # pictures in a supernode's box
WORDS = 3  # of the line in a box
WRITES = "discovery, writes "  # how a discovered supernode of one answer was chosen, before the answer


@dataclass(frozen=True)
class Scene:
    """What the page is about: the model, what was traced, and other inputs in which features may fire."""

    scope: Scope
    asked: Sequence[Asked]
    graphs: Sequence[PrunedGraph]
    others: Sequence[Asked]


@dataclass(frozen=True)
class Origin:
    """What the page says of how the circuit was found.

    Attributes:
        title: the page's, if not the circuit's name.
        summary: sentences before the circuit's own.
        numbers: sections on top.
        details: sections below the circuit's.
        intro: sentences under the diagram's heading.
    """

    title: str = ""
    summary: str = ""
    numbers: tuple[Section, ...] = ()
    details: tuple[Section, ...] = ()
    intro: str = ""


def draw_circuit(
    cfg: AppConfig,
    folder: Path,
    circuit: Circuit,
    name: str,
    scene: Scene,
    study: StudyFolder | None,
    metrics: dict[str, float],
    origin: Origin,
) -> None:
    """Write figures/circuit.png and report.html."""
    nodes = described(circuit, scene, study, cfg.seed)
    pictures: dict[str, Sequence[np.ndarray]] = {node.name: thumbnails(node) for node in nodes}
    pictures[SOFT] = next((for_figures(one.pictures[:1]) for one in scene.asked if one.pictures), [])
    answers = {node.name for node in nodes if node.chosen.startswith(WRITES)}
    shown_edges = [e for e in circuit.edges if shown_edge(e) and not {e.source, e.target} <= answers]
    drawn, left_out = drawable([(e.source, e.target, 100 * e.share) for e in shown_edges], 100 * cfg.task.min_share)
    words = {node.name: line_of(node) for node in nodes}
    path = circuit_diagram(
        nodes,
        drawn,
        folder / "figures" / "circuit.png",
        {key: found for key, found in pictures.items() if found},
        "% of all that the target takes in",
        words,
        "{:+.1f}",
    )
    words_above = f"{intro(scene, left_out, len(answers) > 1)} {origin.intro}".strip()
    page = ReportPage(
        title=origin.title or f"Circuit: {name}",
        question="Which named groups of features act on each other and on the answer, directly, and how strongly?",
        summary=f"{origin.summary} {summary(circuit, metrics)}".strip(),
        sections=(
            headline(metrics),
            *origin.numbers,
            Figure(
                "The circuit", (picture_of(path, f"Diagram of the circuit {name}: {said(drawn)}", True),), words_above
            ),
            edge_table(circuit.edges),
            chosen_table(nodes),
            *feature_sections(nodes),
            *origin.details,
            limits(),
            rerun(cfg, folder, name),
        ),
        footer=f"vlmscope · {scene.scope.vlm.name} · {folder.name}",
    )
    page.write(folder / "report.html")


def shown_edge(edge: CircuitEdge) -> bool:
    """What is drawn: from inputs and supernodes, not from a supernode to itself, not from errors and the like."""
    return edge.source != edge.target and (edge.source not in SURROUNDINGS or edge.source in (SOFT, TEXT))


def described(circuit: Circuit, scene: Scene, study: StudyFolder | None, seed: int) -> list[Supernode]:
    """The supernodes, their strongest features first and with top examples and the words that they write."""
    from vlmscope.features.readouts import top_and_bottom_logits

    order = {name: strongest(node) for name, node in circuit.supernodes.items()}
    wanted = list(dict.fromkeys(m.feature for members in order.values() for m in members[:SHOWN]))
    examples = examples_of(wanted, scene, study, seed, SHOWN)
    nodes = []
    for name, members in order.items():
        first = []
        for member in members[:SHOWN]:
            top, bottom = top_and_bottom_logits(scene.scope, member.feature)
            found = examples.get(member.feature, ())
            first.append(replace(member, examples=found, top_logits=top, bottom_logits=bottom))
        nodes.append(replace(circuit.supernodes[name], features=(*first, *members[SHOWN:])))
    return nodes


def strongest(node: Supernode) -> list[CircuitFeature]:
    """Members by influence; in their own order where none is known."""
    return sorted(node.features, key=lambda m: -m.influence)


def thumbnails(node: Supernode) -> list[np.ndarray]:
    """Pictures on which the first features are most active, one of each, none twice.

    Where a supernode is meant at soft tokens their activations are shown; one meant at words of the question has none.
    """
    where = node.positions
    if where is not None and where.box is None and not {*where.roles} & {"image", "last", "answer"}:
        return []
    found: dict[bytes, np.ndarray] = {}
    for rank in range(SHOWN):
        for member in node.features[:SHOWN]:
            example = member.examples[rank] if rank < len(member.examples) else None
            if example is None or example.image_png is None or example.image_png in found:
                continue
            tinted = example_png(example) if at_pictures(node) else example.image_png
            assert tinted is not None, "it has a picture"
            found[example.image_png] = np.asarray(decode(tinted))
            if len(found) == THUMBNAILS:
                return list(found.values())
    return list(found.values())


def line_of(node: Supernode) -> str:
    """What its strongest features are about, for the box: the words that they write, or the ones that they fire at."""
    if at_pictures(node):
        return ""
    roles = node.positions.roles if node.positions is not None else ()
    fires_at = bool(roles) and not {"last", "answer"} & {*roles}
    sums: dict[str, float] = {}
    for member in node.features[:SHOWN]:
        weight = max(member.influence, 1e-9)
        words = peaks(member) if fires_at else [word for word, _ in member.top_logits[:1] if word[:1] != "<"]
        for word in words:
            sums[word] = sums.get(word, 0.0) + weight
    best = sorted(sums, key=lambda word: -sums[word])[:WORDS]
    return f"{'fires at' if fires_at else 'writes'} {', '.join(best)}" if best else ""


def peaks(member: CircuitFeature) -> list[str]:
    """The word of each example at which the feature is most active, where it is a word."""
    found = []
    for example in member.examples[:3]:
        if example.tokens and max(example.token_activations) >= max(example.patch_activations, default=0.0):
            found.append(example.tokens[int(np.argmax(example.token_activations))].strip())
    return [word for word in found if word]


def at_pictures(node: Supernode) -> bool:
    """Whether it is meant at soft tokens alone."""
    where = node.positions
    return where is not None and not {*where.roles} - {"image"}


def said(edges: Sequence[tuple[str, str, float]]) -> str:
    """The strongest arrows in words, for readers who cannot see the picture."""
    first = sorted(edges, key=lambda edge: -abs(edge[2]))[:6]
    return "; ".join(f"{source} to {target} {share:+.1f} %" for source, target, share in first) or "no edges"


def intro(scene: Scene, left_out: int, answers: bool) -> str:
    """What the diagram shows, under its heading."""
    count = len(scene.graphs)
    where = "one input" if count == 1 else f"{count} inputs (means)"
    text = (
        "Arrows are direct effects: sums of the attribution graph's edges over features and positions, as a share of "
        "all that the target takes in. Pictures are those on which a supernode's features are most active"
    )
    text += f"; traced on {where}." if count else "; edges as they were saved."
    if left_out:
        text += f" {left_out} weaker edges back to an earlier box are in the table only."
    if answers:
        text += " Edges between supernodes of different answers are in the table only."
    return text


def summary(circuit: Circuit, metrics: Mapping[str, float]) -> str:
    """The result in one paragraph."""
    into = [e for e in circuit.edges if e.target.startswith(ANSWER_PREFIX) and e.source in circuit.supernodes]
    parts = [
        f"{e.source} {'raises' if e.weight > 0 else 'lowers'} {e.target.removeprefix(ANSWER_PREFIX)} by "
        f"{abs(e.weight):.2g} logits ({100 * e.share:+.1f} % of what it takes in)"
        for e in sorted(into, key=lambda e: -abs(e.share))[:4]
    ]
    text = "; ".join(parts) or "no supernode acts on the answer directly"
    share = metrics.get("circuit/influence_share")
    if share is not None:
        text += f". The circuit's features hold {share:.0%} of all features' influence on the answer"
    return text[:1].upper() + text[1:] + "."


def headline(metrics: Mapping[str, float]) -> Cards:
    """Numbers on top."""
    cards = [
        Card("supernodes", int(metrics["circuit/supernodes"])),
        Card("features", int(metrics["circuit/features"])),
        Card("inputs traced", int(metrics["circuit/graphs"])),
    ]
    if "circuit/influence_share" in metrics:
        detail = "of all features' influence on the answer"
        cards.append(Card("influence of the circuit", Percent(metrics["circuit/influence_share"]), detail))
    return Cards("In numbers", tuple(cards))


def edge_table(edges: Sequence[CircuitEdge]) -> Table:
    """All edges, the largest share first."""
    rows = tuple(
        (e.source, e.target, e.weight, Percent(e.share), e.graphs) for e in sorted(edges, key=lambda e: -abs(e.share))
    )
    note = (
        "Sum: of all direct edges between the members, in units of the target's pre-activations, into an answer in "
        "logits. Share: of the sum of all absolute edges into the target. A supernode's edges to itself are among its "
        "own members. Errors, biases and other features are what the circuit leaves unexplained."
    )
    return Table("Edges", ("from", "to", "sum", "share of what it takes in", "inputs"), rows, note=note)


def chosen_table(nodes: Sequence[Supernode]) -> Table:
    """How supernodes were chosen and where they are meant."""
    rows = tuple(
        (node.name, node.chosen or "-", str(node.positions) if node.positions else "everywhere", len(node.features))
        for node in nodes
    )
    return Table("Supernodes", ("name", "chosen by", "positions", "features"), rows)


def feature_sections(nodes: Sequence[Supernode]) -> list[Section]:
    """Members with their evidence."""
    return [Features(f"Features of {node.name}", node, shown=4) for node in nodes]


def limits() -> Text:
    """What the diagram does not say."""
    return Text(
        "Limits",
        (
            "Edges are direct effects in the model with attention patterns and norms frozen at these inputs: they say "
            "neither what happens through other features nor what happens when attention changes. Shares are signed, "
            "and effects of opposite sign cancel in a sum.",
            "That a supernode matters is shown by intervening: task=steer or task=patch with task.circuit=, or an "
            "interchange with interchange.circuit=, each beside its controls.",
        ),
    )


def rerun(cfg: AppConfig, folder: Path, name: str) -> Text:
    """Commands that go on from here."""
    place = folder / "circuits" / name
    return Text(
        "Go on",
        ("The same seed gives the same circuit on the same machine; overrides.yaml of the run holds its command.",),
        code=f"python run.py task=circuit task.load={place}\n"
        f"python run.py task=steer task.circuit={place} 'prompt=...' image=...",
    )
