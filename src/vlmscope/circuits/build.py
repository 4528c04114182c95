"""Parts of task=circuit: inputs, their graphs, the supernodes that a declaration chooses, diagram and page.

Files that a declaration names are opened before a model loads; its features are chosen once there are graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vlmscope.attribution.compare import graph_file
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.export import load_graph, save_graph
from vlmscope.attribution.trace import trace
from vlmscope.circuits import selectors
from vlmscope.circuits.cases import answer_token
from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.config import (
    ANSWER_PREFIX,
    AUTO,
    PATCHES,
    SOFT,
    SURROUNDINGS,
    TEXT,
    CircuitSpecConfig,
    ContrastConfig,
    InputSetConfig,
    SupernodeConfig,
)
from vlmscope.circuits.discovery.discover import WRITES, Discovery, sections, summary
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AttributionGraph
from vlmscope.core.launch import program
from vlmscope.core.records import FeatureId
from vlmscope.core.results import CircuitEdge, CircuitFeature, FeatureExample, Supernode
from vlmscope.data.config import PairsConfig
from vlmscope.data.images import PictureFiles, png_bytes
from vlmscope.data.inputs import Pair, Side, load_pairs
from vlmscope.data.orrery.dataset import concept_scenes, pictures
from vlmscope.data.orrery.scenes import PLANETS
from vlmscope.features.labels import Labels, check_same, short_label
from vlmscope.features.readouts import RoleMeans, role_means, top_and_bottom_logits
from vlmscope.features.study import CaptionedPrompt, study_examples, top_examples
from vlmscope.features.study_files import StudyFolder
from vlmscope.models.batching import aligned
from vlmscope.report.circuit_figure import circuit_diagram, drawable
from vlmscope.report.page import Card, Cards, Features, Figure, Percent, ReportPage, Section, Table, Text, drawn
from vlmscope.report.pictures import decode, example_png
from vlmscope.scope import Scope

RIGHT = "right - other"  # the end of graphs whose pairs have different answers


def asked_of(where: str, inputs: InputSetConfig, prompts: Sequence[str], seed: int) -> list[Side]:
    """Inputs of a set, every prompt with every picture, with what they show for an answer; `prompts` are used where the
    set names none.
    """
    prompts = inputs.prompts or prompts
    if not prompts:
        raise UserError(f"{where}: what is asked? give prompts there, or prompt=")
    shown: list[tuple[Sequence[Image.Image], str]] = [((), "")]
    if inputs.concept is not None:
        shown = [((picture,), inputs.concept) for picture in concept_pictures(inputs.concept, inputs.pictures, seed)]
    elif inputs.images:
        shown = [(PictureFiles([path]), Path(path).name) for path in inputs.images]
    return [Side(prompt, images, name or prompt) for prompt in prompts for images, name in shown]


def concept_pictures(concept: str, count: int, seed: int) -> list[Image.Image]:
    """Training pictures of one of Orrery's planets."""
    return [Image.fromarray(picture) for picture in pictures(concept_scenes(concept, "train", count, seed))]


def _contrast_sets(
    where: str, contrast: ContrastConfig, prompts: Sequence[str], pairs: PairsConfig | None, seed: int
) -> tuple[list[Side], list[Side]]:
    """The inputs on which features should be active, and those on which they should not."""
    if contrast.pairs is None:
        assert contrast.of is not None and contrast.against is not None, "checked when the spec was read"
        return (
            asked_of(f"{where}.of", contrast.of, prompts, seed),
            asked_of(f"{where}.against", contrast.against, prompts, seed),
        )
    if pairs is None:
        raise UserError(f"{where}.pairs={contrast.pairs}: which pairs? choose some, such as pairs=planet")
    moving = [pair for pair in load_pairs(pairs, "train") if pair.moves]
    if not moving:
        raise UserError(f"{where}.pairs: no training pair's answers differ; give more pairs, or set pairs.train higher")
    originals, others = [pair.original for pair in moving], [pair.counterfactual for pair in moving]
    return (originals, others) if contrast.pairs == "original" else (others, originals)


def trace_all(
    scope: Scope, asked: Sequence[Side], settings: Sequence[AttributionConfig], folder: Path
) -> list[AttributionGraph]:
    """The graph of each input with its settings; the first one is written to the run folder."""
    graphs: list[AttributionGraph] = []
    each = zip(asked, settings, strict=True)
    for inputs, config in tqdm(each, desc="trace", unit="input", total=len(asked), disable=len(asked) < 2):
        pruned = trace(scope, scope.inputs(inputs.prompt, inputs.images), config, folder).pruned
        if not graphs:
            save_graph(folder / "graph.safetensors", pruned)
        graphs.append(pruned.graph)
    return graphs


def trace_pairs(
    scope: Scope, pairs: Sequence[Pair], attribution: AttributionConfig, folder: Path
) -> list[AttributionGraph]:
    """Graphs of the originals that explain the answer's logit minus the counterfactual's, which discovery keeps; this
    end has the same name in all of them.
    """
    ends = [[answer_token(scope, side.answer) for side in (pair.original, pair.counterfactual)] for pair in pairs]
    settings = [replace(attribution, difference=[f"id:{token}" for token in both]) for both in ends]
    graphs = trace_all(scope, [pair.original for pair in pairs], settings, folder)
    words = {word for graph in graphs for word in graph.logit_tokens}
    end = ANSWER_PREFIX + (words.pop() if len(words) == 1 else RIGHT)
    return [replace(graph, logit_tokens=[end]) for graph in graphs]


def spread_answers(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """At most `count` pairs whose originals have as many different answers as possible; earlier pairs first."""
    seen: Counter[str] = Counter()
    turns: list[int] = []  # of each pair: how many earlier pairs have its answer
    for pair in pairs:
        turns.append(seen[pair.original.answer])
        seen[pair.original.answer] += 1
    return [pairs[i] for i in sorted(range(len(pairs)), key=lambda i: turns[i])[:count]]


@dataclass
class Sources:
    """Of supernodes, by their keys: graphs of named traces, labels of studies, and both sets of inputs of contrasts."""

    graphs: dict[str, AttributionGraph] = field(default_factory=dict)
    labels: dict[str, Labels] = field(default_factory=dict)
    contrasts: dict[str, tuple[list[Side], list[Side]]] = field(default_factory=dict)

    @classmethod
    def open(cls, spec: CircuitSpecConfig, asked: Sequence[Side], pairs: PairsConfig | None, seed: int) -> Sources:
        """Open the sources that the supernodes name; contrasts without prompts take those of `asked`."""
        sources = cls()
        prompts = list(dict.fromkeys(each.prompt for each in asked))
        for key, node in spec.supernodes.items():
            where = f"circuit_spec.supernodes.{key}"
            if node.influence is not None and node.influence.run is not None:
                sources.graphs[key] = load_graph(graph_file(node.influence.run)).graph
            if node.label is not None:
                sources.labels[key] = Labels(StudyFolder(node.label.study))
                if not sources.labels[key].all():
                    raise UserError(f"{where}: {node.label.study} has no labels; run task=label on it")
            if node.contrast is not None:
                sources.contrasts[key] = _contrast_sets(f"{where}.contrast", node.contrast, prompts, pairs, seed)
        return sources

    def inputs(self) -> list[Side]:
        """The inputs of all contrasts."""
        return [each for sets in self.contrasts.values() for asked in sets for each in asked]


def build_circuit(
    scope: Scope, spec: CircuitSpecConfig, sources: Sources, graphs: Sequence[AttributionGraph]
) -> Circuit:
    """All supernodes, named; `graphs` are those of the run's own inputs.

    Raises:
        UserError: a supernode comes out empty, names what is not there, or two come out with one name.
    """
    nodes: dict[str, Supernode] = {}
    levels = {}
    known = selectors.mean_influence(graphs)
    for key, node in spec.supernodes.items():
        members, chosen, means = _choose(scope, key, node, sources, graphs, known)
        if not members:
            advice = "try other layers or positions, and for a contrast inputs that differ more, or confirmed: false"
            raise UserError(f"circuit_spec.supernodes.{key}: {chosen} finds no feature; {advice}")
        name = node.name or key
        if name == AUTO:
            query = "" if node.label is None else " ".join(node.label.query.split())
            name = query or _auto_name(scope, sources, members) or key
        if name in nodes:
            raise UserError(f"circuit_spec.supernodes.{key} comes out as {name!r} too; give it a name")
        nodes[name] = Supernode(name, tuple(members), node.where, chosen)
        if means is not None:
            levels[name] = selectors.mean_levels(members, means, "contrast")
    circuit = Circuit(nodes, levels, (), scope.vlm.name, scope.transcoders.widths)
    circuit.check_fits(scope.vlm.name, scope.transcoders.widths, "circuit_spec")
    return circuit


def _choose(
    scope: Scope,
    key: str,
    node: SupernodeConfig,
    sources: Sources,
    graphs: Sequence[AttributionGraph],
    known: Mapping[FeatureId, float],
) -> tuple[list[CircuitFeature], str, RoleMeans | None]:
    """The features of a supernode by the one selector that it has, how they were chosen, and at which means they are
    active, where these were measured.
    """
    model, widths = scope.vlm.name, scope.transcoders.widths
    if node.ids:
        named = map(FeatureId.parse, dict.fromkeys(node.ids))
        return [CircuitFeature(feature, "", 0.0, known.get(feature, 0.0)) for feature in named], "ids", None
    if node.label is not None:
        labels = sources.labels[key]
        check_same(labels.study, model, widths)
        return selectors.by_label(node.label, labels, node, known), f"label {node.label.query!r}", None
    if node.influence is not None:
        target, run = node.influence.target, node.influence.run
        if (graph := sources.graphs.get(key)) is not None:
            selectors.check_graph(graph, str(run), model, widths)
            graphs = [graph]
        chosen = f"influence on {target or 'the most probable answer'} in {run or 'the graphs of the inputs'}"
        # Of several graphs, one that does not explain the target counts as none.
        explain = [target is None or target.strip() in map(str.strip, graph.logit_tokens) for graph in graphs]
        tables = [
            selectors.feature_influence(graph, target, node.where) if explains or not any(explain) else {}
            for graph, explains in zip(graphs, explain, strict=True)
        ]
        return selectors.by_influence(tables, node), chosen, None
    assert node.contrast is not None, "checked when the spec was read"
    sets = [[scope.inputs(each.prompt, each.images) for each in asked] for asked in sources.contrasts[key]]
    batches = [[scope.batch([inputs[i] for i in group]) for group in aligned(inputs, boxes=True)] for inputs in sets]
    active, against = (role_means(scope, each, node.where) for each in batches)
    there = selectors.mean_influence(graphs, node.where)
    members = selectors.by_contrast(scope.transcoders, active, against, node, there, node.contrast.confirmed)
    return members, str(node.contrast), active


def _auto_name(scope: Scope, sources: Sources, members: Sequence[CircuitFeature]) -> str:
    """A name from the labels of any study that the spec uses, else from the words that the features write."""
    texts: dict[FeatureId, str] = {}
    for labels in sources.labels.values():
        texts |= {feature: label.text for feature, label in labels.trusted().items()}
    words = [texts[member.feature] for member in members if member.feature in texts]
    words = words or [top_and_bottom_logits(scope, member.feature, 1)[0][0][0].strip() for member in members]
    return Counter(map(short_label, words)).most_common(1)[0][0]


SHOWN = 6  # features of a supernode with evidence
FEEDING = 2  # features of the vision tower that are drawn before a supernode
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
FEEDERS = (
    "Direct edges through the frozen tower, pooling, projector and attention of the decoder, of all positions at which "
    "a feature is active: those with the largest absolute sum. They are part of the edge from tower features above."
)
LIMITS = (
    "Edges are direct effects in the model with attention patterns and norms frozen at these inputs: they say neither "
    "what happens through other features nor what happens when attention changes. Shares are signed, and effects of "
    "opposite sign cancel in a sum.",
    "That a supernode matters is shown by intervening: task=steer or task=patch with task.circuit=, or an interchange "
    "with interchange.circuit=, each next to its controls.",
)
Examples = Mapping[FeatureId, tuple[FeatureExample, ...]]


def example_pool(asked: Sequence[Side], others: Sequence[Side], orrery: bool, seed: int) -> list[Side]:
    """Inputs among which examples are looked for: what was traced, some others and, for Orrery, its planets."""
    spread = np.unique(np.linspace(0, len(others) - 1, SEARCHED).astype(int)) if others else []
    pool = [*asked, *(others[i] for i in spread)]
    prompt = next((each.prompt for each in asked if each.images), "what planet is this ?")
    for planet in PLANETS if orrery else ():
        pool += [Side(prompt, (image,), planet) for image in concept_pictures(planet, PER_PLANET, seed)]
    return pool


def examples_among(
    scope: Scope, features: Sequence[FeatureId], pool: Sequence[Side], study: StudyFolder | None
) -> Examples:
    """The inputs of a pool, or of a study, on which features are most active."""
    if study is not None:
        return {feature: study_examples(study, feature, SHOWN) for feature in features}
    items = [
        CaptionedPrompt(
            scope.inputs(each.prompt, each.images), each.answer, png_bytes(each.images[0], 256) if each.images else None
        )
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
    path: Path,
    nodes: Sequence[Supernode],
    edges: Sequence[CircuitEdge],
    picture: np.ndarray | None,
    min_share: float,
    examples: Callable[[list[FeatureId]], Examples] = lambda _: {},
    labels: Mapping[FeatureId, str] | None = None,
) -> None:
    """Draw described supernodes and, from inputs and supernodes, edges of at least `min_share` of what a target takes
    in; `picture` is that of the inputs. Edges between supernodes of different answers are left out.

    Into each supernode the `FEEDING` strongest features of the vision tower are drawn, however weak, with their
    `examples` and `labels`.
    """
    feeds = [edge for name in (node.name for node in nodes) for edge in feeding(edges, name)[:FEEDING]]
    tower = {edge.source: FeatureId.parse(edge.source) for edge in feeds}
    answers = {node.name for node in nodes if node.chosen.startswith(WRITES)}
    shares = [
        (edge.source, edge.target, 100 * edge.share)
        for edge in edges
        if edge.source not in SURROUNDINGS or edge.source in (SOFT, PATCHES, TEXT)
        if not {edge.source, edge.target} <= answers and "/" not in edge.source
    ]
    arrows = drawable(shares, 100 * min_share) + [(edge.source, edge.target, 100 * edge.share) for edge in feeds]
    pictures: dict[str, Sequence[np.ndarray]] = {node.name: _thumbnails(node) for node in nodes}
    pictures[SOFT] = pictures[PATCHES] = [] if picture is None else [picture]
    for name, found in zip(tower, map(examples(list(tower.values())).get, tower.values()), strict=True):
        tinted = [png for example in found or () if (png := example_png(example)) is not None]
        pictures[name] = [np.asarray(decode(png)) for png in tinted[:1]]
    shown = {name: images for name, images in pictures.items() if images}
    words = {node.name: _line(node) for node in nodes}
    words |= {name: (labels or {}).get(feature, "") for name, feature in tower.items()}
    circuit_diagram(nodes, arrows, path, shown, words)


def feeding(edges: Sequence[CircuitEdge], name: str) -> list[CircuitEdge]:
    """The edges from features of the vision tower (their ids have a slash) into a target, strongest first."""
    mine = [edge for edge in edges if edge.target == name and "/" in edge.source]
    return sorted(mine, key=lambda edge: -abs(edge.weight))


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
    labels: Mapping[FeatureId, str] | None = None,
) -> None:
    """Write report.html of a circuit, `nodes` being its described supernodes, next to its figures."""
    title, text, details = f"Circuit: {name}", _summary(circuit, metrics), []
    if discovery is not None:
        title, text = f"Circuit found by pairs: the question {name}", f"{summary(discovery)} {text}"
        details = sections(folder)
    cards = [Card(key, int(metrics[f"circuit/{key}"])) for key in ("supernodes", "features", "graphs")]
    if "circuit/influence_share" in metrics:
        share = Percent(metrics["circuit/influence_share"])
        cards.append(Card("influence of the circuit", share, "of all features' influence on the answer"))
    edges = sorted((e for e in circuit.edges if "/" not in e.source), key=lambda e: -abs(e.share))
    targets = list(dict.fromkeys(edge.target for edge in circuit.edges))
    below = [edge for target in targets for edge in feeding(circuit.edges, target)]
    named = {edge.source: (labels or {}).get(FeatureId.parse(edge.source), "") for edge in below}
    place = folder / "circuits" / name
    again = f"{program()} task=circuit task.load={place}\n{program()} task=steer task.circuit={place} 'prompt=...'"
    parts: list[Section] = [
        Cards("In numbers", tuple(cards)),
        Figure("The circuit", (drawn(folder / "figures" / "circuit.png", f"Diagram of {name}", True),), DIAGRAM),
        Table(
            "Edges",
            ("from", "to", "sum", "share of what it takes in", "inputs"),
            tuple((e.source, e.target, e.weight, Percent(e.share), e.graphs) for e in edges),
            note=EDGES,
        ),
        *(
            [
                Table(
                    "Features of the vision tower that feed them",
                    ("to", "feature", "label", "sum", "share of what it takes in"),
                    tuple((e.target, e.source, named[e.source] or "-", e.weight, Percent(e.share)) for e in below),
                    note=FEEDERS,
                )
            ]
            if below
            else []
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
