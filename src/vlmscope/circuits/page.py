"""The diagram and the page of a circuit: supernodes with pictures on which they fire, edges, features, limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vlmscope.circuits.build import RIGHT, Asked
from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.discovery.discover import WRITES, Discovery
from vlmscope.circuits.discovery.report import sections, summary
from vlmscope.circuits.spec_config import ANSWER_PREFIX, SOFT, SURROUNDINGS, TEXT
from vlmscope.core.intervention import CircuitEdge, CircuitFeature, FeatureExample, Supernode
from vlmscope.core.records import FeatureId
from vlmscope.data.images import for_figures, png_bytes
from vlmscope.features.readouts import top_and_bottom_logits
from vlmscope.features.top_examples import StudyItem, top_examples
from vlmscope.report.circuit_figure import circuit_diagram, drawable
from vlmscope.report.page import Card, Cards, Features, Figure, Percent, ReportPage, Table, Text, drawn
from vlmscope.report.thumbnails import decode, example_png
from vlmscope.scope import Scope

SHOWN = 6  # features of a supernode with evidence
THUMBNAILS = 3  # pictures in a supernode's box
WORDS = 3  # of the line in a box
EDGES = (
    "Sum: of all direct edges between the members, in units of the target's pre-activations, into an answer in logits. "
    "Share: of the sum of all absolute edges into the target. A supernode's edges to itself are among its own members. "
    "Errors, biases and other features are what the circuit leaves unexplained."
)
LIMITS = (
    "Edges are direct effects in the model with attention patterns and norms frozen at these inputs: they say neither "
    "what happens through other features nor what happens when attention changes. Shares are signed, and effects of "
    "opposite sign cancel in a sum.",
    "That a supernode matters is shown by intervening: task=steer or task=patch with task.circuit=, or an interchange "
    "with interchange.circuit=, each beside its controls.",
)
Examples = Mapping[FeatureId, tuple[FeatureExample, ...]]


def examples_among(scope: Scope, features: Sequence[FeatureId], pool: Sequence[Asked]) -> Examples:
    """The inputs of a pool on which features are most active."""
    items = [
        StudyItem(each.prepared(scope), each.caption, png_bytes(each.pictures[0], 256) if each.pictures else None)
        for each in pool
    ]
    return top_examples(scope, features, items) if items else {}


def described(
    scope: Scope, circuit: Circuit, examples: Callable[[list[FeatureId]], Examples], shown: int = 8
) -> list[Supernode]:
    """The supernodes, most influential members first; the `shown` first with top examples and the words they write."""
    ranked = {name: sorted(node.features, key=lambda m: -m.influence) for name, node in circuit.supernodes.items()}
    found = examples(list(dict.fromkeys(m.feature for members in ranked.values() for m in members[:shown])))
    nodes = []
    for name, members in ranked.items():
        first = []
        for member in members[:shown]:
            top, bottom = top_and_bottom_logits(scope, member.feature)
            own = found.get(member.feature, ())
            first.append(replace(member, examples=own, top_logits=top, bottom_logits=bottom))
        nodes.append(replace(circuit.supernodes[name], features=(*first, *members[shown:])))
    return nodes


@dataclass(frozen=True)
class Diagram:
    """A drawn diagram: its edges in per cent, and how many weaker ones back to an earlier box it leaves out."""

    path: Path
    edges: list[tuple[str, str, float]]
    left_out: int

    def __str__(self) -> str:
        first = sorted(self.edges, key=lambda edge: -abs(edge[2]))[:6]
        return "; ".join(f"{source} to {target} {share:+.1f} %" for source, target, share in first) or "no edges"


def draw_diagram(
    path: Path, nodes: Sequence[Supernode], edges: Sequence[CircuitEdge], picture: np.ndarray | None, min_share: float
) -> Diagram:
    """Draw described supernodes and, from inputs and supernodes, edges of at least `min_share` of what a target takes
    in; `picture` is that of the inputs. Edges between supernodes of different answers are left out.
    """
    answers = {node.name for node in nodes if node.chosen.startswith(WRITES)}
    shares = [
        (edge.source, edge.target, 100 * edge.share)
        for edge in edges
        if edge.source not in SURROUNDINGS or edge.source in (SOFT, TEXT)
        if not {edge.source, edge.target} <= answers
    ]
    arrows, left_out = drawable(shares, 100 * min_share)
    pictures: dict[str, Sequence[np.ndarray]] = {node.name: _thumbnails(node) for node in nodes}
    pictures[SOFT] = [] if picture is None else [picture]
    circuit_diagram(
        nodes,
        arrows,
        path,
        {name: shown for name, shown in pictures.items() if shown},
        "% of all that the target takes in",
        {node.name: _line(node) for node in nodes},
        "{:+.1f}",
    )
    return Diagram(path, arrows, left_out)


def _at_pictures(node: Supernode) -> bool:
    """Whether a supernode is meant at soft tokens alone."""
    return node.positions is not None and not {*node.positions.roles} - {"image"}


def _thumbnails(node: Supernode) -> list[np.ndarray]:
    """Pictures on which the first features are most active, one of each, none twice.

    Where a supernode is meant at soft tokens their activations are shown; one meant at words of the question has none.
    """
    where = node.positions
    if where is not None and where.box is None and not {*where.roles} & {"image", "last", "answer"}:
        return []
    shown: dict[bytes, np.ndarray] = {}
    ranked = ((member, rank) for rank in range(SHOWN) for member in node.features[:SHOWN])
    for example in (member.examples[rank] for member, rank in ranked if rank < len(member.examples)):
        if example.image_png is not None and example.image_png not in shown and len(shown) < THUMBNAILS:
            tinted = example_png(example) if _at_pictures(node) else example.image_png
            assert tinted is not None, "it has a picture"
            shown[example.image_png] = np.asarray(decode(tinted))
    return list(shown.values())


def _line(node: Supernode) -> str:
    """What a supernode's strongest features are about, for its box: their commonest label, or the words that they
    write or fire at.
    """
    labels = Counter(member.label.rsplit(" (", 1)[0] for member in node.features if member.label)
    if labels:
        return labels.most_common(1)[0][0]
    if _at_pictures(node):
        return ""
    roles = node.positions.roles if node.positions is not None else ()
    fires_at = bool(roles) and not {"last", "answer"} & {*roles}
    sums: dict[str, float] = {}
    for member in node.features[:SHOWN]:
        words = _peaks(member) if fires_at else [word for word, _ in member.top_logits[:1] if word[:1] != "<"]
        for word in words:
            sums[word] = sums.get(word, 0.0) + max(member.influence, 1e-9)
    best = sorted(sums, key=lambda word: -sums[word])[:WORDS]
    return f"{'fires at' if fires_at else 'writes'} {', '.join(best)}" if best else ""


def _peaks(member: CircuitFeature) -> list[str]:
    """The word of each example at which the feature is most active, where it is a word."""
    words = [
        example.tokens[int(np.argmax(example.token_activations))].strip()
        for example in member.examples[:3]
        if example.tokens and max(example.token_activations) >= max(example.patch_activations, default=0.0)
    ]
    return [word for word in words if word]


@dataclass(frozen=True)
class Origin:
    """How a circuit was discovered: what was found, by which pairs, and the other questions that these pairs have."""

    discovery: Discovery
    pairs: str
    others: Sequence[str] = ()


def write_page(
    folder: Path,
    name: str,
    circuit: Circuit,
    nodes: Sequence[Supernode],
    asked: Sequence[Asked],
    metrics: Mapping[str, float],
    min_share: float,
    origin: Origin | None = None,
) -> None:
    """Write figures/circuit.png and report.html of a circuit, `nodes` being its described supernodes."""
    picture = next((for_figures(each.pictures[:1])[0] for each in asked if each.pictures), None)
    diagram = draw_diagram(folder / "figures" / "circuit.png", nodes, circuit.edges, picture, min_share)
    title, text, numbers, details = f"Circuit: {name}", _summary(circuit, metrics), [], []
    if origin is not None:
        title = f"Circuit found by {origin.pairs}: the question {origin.discovery.question}"
        text = f"{summary(origin.discovery)} {text}"
        cards, details = sections(origin.discovery, folder)
        numbers = [cards]
    cards = [Card(key, int(metrics[f"circuit/{key}"])) for key in ("supernodes", "features", "graphs")]
    if "circuit/influence_share" in metrics:
        share = Percent(metrics["circuit/influence_share"])
        cards.append(Card("influence of the circuit", share, "of all features' influence on the answer"))
    intro = _intro(int(metrics["circuit/graphs"]), diagram, nodes, origin)
    edges = sorted(circuit.edges, key=lambda e: -abs(e.share))
    place = folder / "circuits" / name
    ReportPage(
        title,
        "Which named groups of features act on each other and on the answer, directly, and how strongly?",
        text,
        (
            Cards("In numbers", tuple(cards)),
            *numbers,
            Figure("The circuit", (drawn(diagram.path, f"Diagram of the circuit {name}: {diagram}", True),), intro),
            Table(
                "Edges",
                ("from", "to", "sum", "share of what it takes in", "inputs"),
                tuple((e.source, e.target, e.weight, Percent(e.share), e.graphs) for e in edges),
                note=EDGES,
            ),
            Table(
                "Supernodes",
                ("name", "chosen by", "positions", "features"),
                tuple((n.name, n.chosen or "-", str(n.positions or "everywhere"), len(n.features)) for n in nodes),
            ),
            *(Features(f"Features of {node.name}", node, shown=4) for node in nodes),
            *details,
            Text("Limits", LIMITS),
            Text(
                "Go on",
                ("The same seed gives the same circuit on the same machine; overrides.yaml holds the run's command.",),
                code=f"python run.py task=circuit task.load={place}\n"
                f"python run.py task=steer task.circuit={place} 'prompt=...' image=...",
            ),
        ),
        f"vlmscope · {circuit.model} · {folder.name}",
    ).write(folder / "report.html")


def _summary(circuit: Circuit, metrics: Mapping[str, float]) -> str:
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


def _intro(graphs: int, diagram: Diagram, nodes: Sequence[Supernode], origin: Origin | None) -> str:
    """What the diagram shows, under its heading."""
    where = "one input" if graphs == 1 else f"{graphs} inputs (means)"
    text = (
        "Arrows are direct effects: sums of the attribution graph's edges over features and positions, as a share of "
        "all that the target takes in. Pictures are those on which a supernode's features are most active"
    )
    text += f"; traced on {where}." if graphs else "; edges as they were saved."
    if diagram.left_out:
        text += f" {diagram.left_out} weaker edges back to an earlier box are in the table only."
    if sum(node.chosen.startswith(WRITES) for node in nodes) > 1:
        text += " Edges between supernodes of different answers are in the table only."
    if origin is not None:
        text += (
            " Features at the last position that write an answer of the pairs most are named by it; the others, and "
            f"those elsewhere, by where they are. {RIGHT}: the logit of the original's answer minus that of its "
            "counterfactual's."
        )
        if origin.others:
            text += f" Other questions of these pairs: discovery.question={' or '.join(origin.others)}."
    return text
