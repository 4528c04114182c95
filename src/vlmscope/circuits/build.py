"""Parts of task=circuit: inputs, their graphs, and the supernodes that a declaration chooses.

Files that a declaration names are opened before a model loads; its features are chosen once there are graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
    CircuitSpecConfig,
    ContrastConfig,
    InputSetConfig,
    SupernodeConfig,
)
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AttributionGraph
from vlmscope.core.records import FeatureId
from vlmscope.core.results import CircuitFeature, Supernode
from vlmscope.data.config import PairsConfig
from vlmscope.data.images import PictureFiles
from vlmscope.data.inputs import Pair, Side, load_pairs
from vlmscope.data.orrery.dataset import concept_scenes, pictures
from vlmscope.features.labels import Labels, check_same, short_label
from vlmscope.features.readouts import RoleMeans, role_means, top_and_bottom_logits
from vlmscope.features.study_files import StudyFolder
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope

RIGHT = "right - other"  # the end of graphs whose pairs have different answers


@dataclass(frozen=True)
class Asked:
    """A prompt with its pictures, before a model has seen it; `caption` tells people what it is."""

    prompt: str
    pictures: Sequence[Image.Image]
    caption: str

    @classmethod
    def from_side(cls, side: Side) -> Asked:
        """A side of a pair, with its answer as the caption."""
        return cls(side.prompt, side.images, side.answer)

    def prepared(self, scope: Scope) -> ModelInputs:
        """Inputs of the model."""
        return scope.inputs(self.prompt, list(self.pictures))


def asked_of(where: str, inputs: InputSetConfig, prompts: Sequence[str], seed: int) -> list[Asked]:
    """Inputs of a set: every prompt with every picture; `prompts` are used where the set names none."""
    prompts = inputs.prompts or prompts
    if not prompts:
        raise UserError(f"{where}: what is asked? give prompts there, or prompt=")
    shown: list[tuple[Sequence[Image.Image], str]] = [((), "")]
    if inputs.concept is not None:
        shown = [((picture,), inputs.concept) for picture in concept_pictures(inputs.concept, inputs.pictures, seed)]
    elif inputs.images:
        shown = [(PictureFiles([path]), Path(path).name) for path in inputs.images]
    return [Asked(prompt, images, name or prompt) for prompt in prompts for images, name in shown]


def concept_pictures(concept: str, count: int, seed: int) -> list[Image.Image]:
    """Training pictures of one of Orrery's planets."""
    return [Image.fromarray(picture) for picture in pictures(concept_scenes(concept, "train", count, seed))]


def _contrast_sets(
    where: str, contrast: ContrastConfig, prompts: Sequence[str], pairs: PairsConfig | None, seed: int
) -> tuple[list[Asked], list[Asked]]:
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
    originals, others = (
        [Asked.from_side(getattr(pair, side)) for pair in moving] for side in ("original", "counterfactual")
    )
    return (originals, others) if contrast.pairs == "original" else (others, originals)


def trace_all(
    scope: Scope, asked: Sequence[Asked], settings: Sequence[AttributionConfig], folder: Path
) -> list[AttributionGraph]:
    """The graph of each input with its settings; the first one is written to the run folder."""
    graphs: list[AttributionGraph] = []
    each = zip(asked, settings, strict=True)
    for inputs, config in tqdm(each, desc="trace", unit="input", total=len(asked), disable=len(asked) < 2):
        pruned = trace(scope, inputs.prepared(scope), config, folder).pruned
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
    graphs = trace_all(scope, [Asked.from_side(pair.original) for pair in pairs], settings, folder)
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
    contrasts: dict[str, tuple[list[Asked], list[Asked]]] = field(default_factory=dict)

    @classmethod
    def open(cls, spec: CircuitSpecConfig, asked: Sequence[Asked], pairs: PairsConfig | None, seed: int) -> Sources:
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

    def inputs(self) -> list[Asked]:
        """The inputs of all contrasts."""
        return [each for sets in self.contrasts.values() for asked in sets for each in asked]


@dataclass(frozen=True)
class _Choice:
    """Members of a supernode, how they were chosen, a name that comes with them, and means at which they are active."""

    members: list[CircuitFeature]
    chosen: str
    name: str = ""
    means: RoleMeans | None = None


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
        choice = _choose(scope, key, node, sources, graphs, known)
        if not choice.members:
            advice = "try other layers or positions, and for a contrast inputs that differ more, or confirmed: false"
            raise UserError(f"circuit_spec.supernodes.{key}: {choice.chosen} finds no feature; {advice}")
        name = node.name or key
        if name == AUTO:
            name = choice.name or _auto_name(scope, sources, choice.members) or key
        if name in nodes:
            raise UserError(f"circuit_spec.supernodes.{key} comes out as {name!r} too; give it a name")
        nodes[name] = Supernode(name, tuple(choice.members), node.where, choice.chosen)
        if choice.means is not None:
            levels[name] = selectors.mean_levels(choice.members, choice.means, "contrast")
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
) -> _Choice:
    """The features of a supernode by the one selector that it has."""
    model, widths = scope.vlm.name, scope.transcoders.widths
    if node.ids:
        return _Choice(selectors.by_ids(node.ids, known), "ids")
    if node.label is not None:
        labels = sources.labels[key]
        check_same(labels.study, model, widths)
        members = selectors.by_label(node.label, labels, node, known)
        return _Choice(members, f"label {node.label.query!r}", " ".join(node.label.query.split()))
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
        return _Choice(selectors.by_influence(tables, node), chosen)
    assert node.contrast is not None, "checked when the spec was read"
    active, against = (
        role_means(scope, _aligned(scope, [each.prepared(scope) for each in asked]), node.where)
        for asked in sources.contrasts[key]
    )
    there = selectors.mean_influence(graphs, node.where)
    members = selectors.by_contrast(scope.transcoders, active, against, node, there, node.contrast.confirmed)
    return _Choice(members, str(node.contrast), means=active)


def _aligned(scope: Scope, inputs: Sequence[ModelInputs]) -> list[InputBatch]:
    """Batches of inputs that have the same length, soft tokens and patches."""
    groups: dict[tuple[int, bytes, tuple[object, ...]], list[ModelInputs]] = {}
    for each in inputs:
        groups.setdefault((len(each), each.is_image.tobytes(), tuple(each.patch_boxes)), []).append(each)
    return [scope.batch(group) for group in groups.values()]


def _auto_name(scope: Scope, sources: Sources, members: Sequence[CircuitFeature]) -> str:
    """A name from the labels of any study that the spec uses, else from the words that the features write."""
    texts: dict[FeatureId, str] = {}
    for labels in sources.labels.values():
        texts |= {feature: label.text for feature, label in labels.trusted().items()}
    words = [texts[member.feature] for member in members if member.feature in texts]
    words = words or [top_and_bottom_logits(scope, member.feature, 1)[0][0][0].strip() for member in members]
    return Counter(map(short_label, words)).most_common(1)[0][0]
