"""The diagram and the page of a circuit: supernodes with pictures on which they fire, edges, features, limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlmscope.circuits.build import RIGHT, Asked, concept_pictures
from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.config import ANSWER_PREFIX, SOFT, SURROUNDINGS, TEXT
from vlmscope.circuits.discovery.discover import WRITES, Discovery
from vlmscope.circuits.discovery.report import sections, summary
from vlmscope.core.launch import program
from vlmscope.core.records import FeatureId
from vlmscope.core.results import CircuitEdge, CircuitFeature, FeatureExample, Supernode
from vlmscope.data.images import png_bytes
from vlmscope.data.orrery.scenes import PLANETS
from vlmscope.features.readouts import top_and_bottom_logits
from vlmscope.features.study import CaptionedPrompt, study_examples, top_examples
from vlmscope.features.study_files import StudyFolder
from vlmscope.report.circuit_figure import circuit_diagram, drawable
from vlmscope.report.page import Card, Cards, Features, Figure, Percent, ReportPage, Section, Table, Text, drawn
from vlmscope.report.pictures import decode, example_png
from vlmscope.scope import Scope

SHOWN = 6  # features of a supernode with evidence
THUMBNAILS = 3  # pictures in a supernode's box
WORDS = 3  # of the line in a box
SEARCHED = 60  # inputs of contrasts and pairs in which top examples are looked for
PER_PLANET = 4  # of Orrery's pictures besides
DIAGRAM = (
    "Arrows are direct effects: sums of the attribution graph's edges over features and positions, as a share of all "
    "that the target takes in; means over the inputs traced. Pictures are those on which a supernode's features are "
    "most active. Weaker edges back to an earlier box, and edges between supernodes of different answers, are in the "
    f"table only. Of pairs with several answers, {RIGHT} is the original's answer's logit minus its counterfactual's."
)
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


def example_pool(asked: Sequence[Asked], others: Sequence[Asked], orrery: bool, seed: int) -> list[Asked]:
    """Inputs among which examples are looked for: what was traced, some others and, for Orrery, its planets."""
    spread = np.unique(np.linspace(0, len(others) - 1, SEARCHED).astype(int)) if others else []
    pool = [*asked, *(others[i] for i in spread)]
    prompt = next((each.prompt for each in asked if each.pictures), "what planet is this ?")
    for planet in PLANETS if orrery else ():
        pool += [Asked(prompt, (image,), planet) for image in concept_pictures(planet, PER_PLANET, seed)]
    return pool


def examples_among(
    scope: Scope, features: Sequence[FeatureId], pool: Sequence[Asked], study: StudyFolder | None
) -> Examples:
    """The inputs of a pool, or of a study, on which features are most active."""
    if study is not None:
        return {feature: study_examples(study, feature, SHOWN) for feature in features}
    items = [
        CaptionedPrompt(each.prepared(scope), each.caption, png_bytes(each.pictures[0], 256) if each.pictures else None)
        for each in pool
    ]
    return top_examples(scope, features, items) if items else {}


def described(
    scope: Scope, circuit: Circuit, examples: Callable[[list[FeatureId]], Examples], shown: int = 8
) -> list[Supernode]:
    """The supernodes, most influential members first; the `shown` first with top examples and the words they write."""
    ranked = {name: sorted(node.features, key=lambda m: -m.influence) for name, node in circuit.supernodes.items()}
    evidence = examples(list(dict.fromkeys(m.feature for members in ranked.values() for m in members[:shown])))
    nodes = []
    for name, members in ranked.items():
        first = []
        for member in members[:shown]:
            top, bottom = top_and_bottom_logits(scope, member.feature)
            top_inputs = evidence.get(member.feature, ())
            first.append(replace(member, examples=top_inputs, top_logits=top, bottom_logits=bottom))
        nodes.append(replace(circuit.supernodes[name], features=(*first, *members[shown:])))
    return nodes


def draw_diagram(
    path: Path, nodes: Sequence[Supernode], edges: Sequence[CircuitEdge], picture: np.ndarray | None, min_share: float
) -> None:
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
    arrows = drawable(shares, 100 * min_share)
    pictures: dict[str, Sequence[np.ndarray]] = {node.name: _thumbnails(node) for node in nodes}
    pictures[SOFT] = [] if picture is None else [picture]
    shown = {name: images for name, images in pictures.items() if images}
    words = {node.name: _line(node) for node in nodes}
    circuit_diagram(nodes, arrows, path, shown, words)


def _at_pictures(node: Supernode) -> bool:
    """Whether a supernode acts at soft tokens alone."""
    return node.positions is not None and not {*node.positions.roles} - {"image"}


def _thumbnails(node: Supernode) -> list[np.ndarray]:
    """Pictures on which the first features are most active, one of each, none twice.

    If a supernode acts at soft tokens, their activations are shown; one that acts at words of the question has none.
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
    """Text of a supernode's box: the commonest label of its features, or the words that the strongest of them write or
    fire at.
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


def write_page(
    folder: Path,
    name: str,
    circuit: Circuit,
    nodes: Sequence[Supernode],
    metrics: Mapping[str, float],
    discovery: Discovery | None = None,
) -> None:
    """Write report.html of a circuit, `nodes` being its described supernodes, next to its figures."""
    title, text, numbers, details = f"Circuit: {name}", _summary(circuit, metrics), [], []
    if discovery is not None:
        title, text = f"Circuit found by pairs: the question {name}", f"{summary(discovery)} {text}"
        numbers, details = sections(discovery, folder)
    cards = [Card(key, int(metrics[f"circuit/{key}"])) for key in ("supernodes", "features", "graphs")]
    if "circuit/influence_share" in metrics:
        share = Percent(metrics["circuit/influence_share"])
        cards.append(Card("influence of the circuit", share, "of all features' influence on the answer"))
    edges = sorted(circuit.edges, key=lambda e: -abs(e.share))
    place = folder / "circuits" / name
    again = f"{program()} task=circuit task.load={place}\n{program()} task=steer task.circuit={place} 'prompt=...'"
    parts: list[Section] = [
        Cards("In numbers", tuple(cards)),
        *numbers,
        Figure("The circuit", (drawn(folder / "figures" / "circuit.png", f"Diagram of {name}", True),), DIAGRAM),
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
        Text("Go on", code=again),
    ]
    question = "Which named groups of features act on each other and on the answer, directly, and how strongly?"
    footer = f"vlmscope · {circuit.model} · {folder.name}"
    ReportPage(title, question, text, tuple(parts), footer).write(folder / "report.html")


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
