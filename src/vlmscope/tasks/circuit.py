"""A circuit, declared or found by pairs=: its supernodes, the edges between them, and a diagram (docs/circuits.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmscope.attribution.config import AttributionConfig
    from vlmscope.circuits.build import Asked
    from vlmscope.circuits.circuit import Circuit
    from vlmscope.circuits.page import Origin
    from vlmscope.circuits.spec_config import CircuitSpecConfig
    from vlmscope.config import AppConfig
    from vlmscope.core.graph import PrunedGraph
    from vlmscope.data.inputs import Pair
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.tasks.bench import Bench
    from vlmscope.tasks.registry import RunContext

USES = (
    "attribution",
    "circuit",
    "circuit_spec",
    "data",
    "discovery",
    "images",
    "interchange",
    "intervention",
    "pairs",
    "study",
)
MEMORY = "attribution.max_nodes, attribution.batch_size, attribution.memory_gb or task.traces"
RIGHT = "right - other"  # the end of graphs whose pairs have different answers
SEARCHED = 60  # inputs of contrasts and pairs in which top examples are looked for
PER_PLANET = 4  # of Orrery's pictures besides


@dataclass
class Config:
    """What is traced is `prompt=` on `image=`, every row of `rows` (a CSV or JSONL file), or the spec's own inputs.

    `load` draws a saved circuit (`/run/circuits/name`) instead of finding one; with inputs its edges are theirs.
    Without `load` and without supernodes in a circuit_spec, `pairs=` finds the circuit (`discovery`), and `traces` of
    its training pairs' originals are traced where no input is given.
    Edges go to the `answers` most probable answers; those of at least `min_share` of what a target takes in are drawn.
    `study.path=` names a study from which pictures of features are taken; without one they come from the inputs and,
    for Orrery, from its scenes.
    """

    load: str | None = None
    rows: str | None = None
    answers: int = 1
    traces: int = 8
    min_share: float = 0.005
    figure: bool = True

    def __post_init__(self) -> None:
        for key in ("answers", "traces"):
            if getattr(self, key) < 1:
                raise UserError(f"task.{key}={getattr(self, key)}: it must be at least 1")
        if not 0 <= self.min_share < 1:
            raise UserError(f"task.min_share={self.min_share}: it is a share; choose a number from 0 to below 1")


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write circuits/<name>/, graph.safetensors, circuit.json, figures/circuit.png and report.html.

    A circuit that is found also leaves discovery.json, its tables and its figures.
    """
    from dataclasses import replace
    from pathlib import Path

    from vlmscope.circuits.build import Sources, build_circuit
    from vlmscope.circuits.circuit import circuit_metrics, direct_edges, labelled, load_circuit, save_circuit
    from vlmscope.config.resolve import declared_circuit
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.tasks.bench import Bench
    from vlmscope.tasks.wiring import look_for_labels

    # What can be refused without a model is refused first.
    look_for_labels(cfg)
    spec = None if cfg.circuit_spec is None else declared_circuit(cfg.circuit_spec)
    check_source(cfg, spec)
    asked = traced_inputs(cfg, spec)
    loaded = None if cfg.task.load is None else load_circuit(Path(cfg.task.load))
    declares = loaded is None and spec is not None and bool(spec.supernodes)
    discovers = loaded is None and not declares
    if not discovers and not asked and (loaded is None or not loaded.edges):
        raise UserError("nothing to trace: add prompt= (and image=), task.rows=FILE, or inputs in the circuit_spec")
    sources = Sources.of(spec, asked, cfg.pairs, cfg.seed) if declares and spec is not None else Sources()
    contrasts = [] if spec is None else [node.contrast for node in spec.supernodes.values() if node.contrast]
    if cfg.pairs is not None and not discovers and not any(contrast.pairs for contrast in contrasts):
        print("pairs= finds circuits; this one is declared or loaded, so they are not used")
    study = None if cfg.study.path is None else StudyFolder(cfg.study.path)

    bench, origin, others = Bench(cfg, context.run_dir, overrides=context.overrides), None, sources.inputs()
    if discovers:
        circuit, graphs, asked, others, origin = discovered(bench, asked)
        name = origin.discovery.question
    else:
        if loaded is not None:
            loaded.check_fits(bench.vlm.name, bench.transcoders.widths, str(cfg.task.load))
        graphs = traced(bench, asked)
        if loaded is not None:
            circuit, name = loaded, Path(cfg.task.load).name
        else:
            assert spec is not None, "without a spec a circuit is loaded or discovered"
            circuit, name = build_circuit(bench.scope, spec, sources, [one.graph for one in graphs]), spec.name
    whole = [pruned.graph for pruned in graphs]
    if whole:
        circuit = replace(circuit, edges=direct_edges(whole, list(circuit.supernodes.values()), cfg.task.answers))
    circuit = labelled(circuit, bench.labels)
    save_circuit(circuit, context.run_dir / "circuits" / name)
    metrics = circuit_metrics(circuit, whole)
    if cfg.task.figure:
        draw(bench, circuit, name, asked, others, study, metrics, origin)
    return bench.metrics | metrics


def check_source(cfg: AppConfig, spec: CircuitSpecConfig | None) -> None:
    """Refuse a run that names no circuit, several, or pairs that cannot find one."""
    from vlmscope.data.inputs import check_choosing

    declares = spec is not None and bool(spec.supernodes)
    if cfg.task.load is not None:
        if declares:
            raise UserError("task.load= brings a circuit and circuit_spec= declares one; leave one of them out")
        return
    if spec is None and cfg.pairs is None:
        raise UserError(
            "no circuit: find one with pairs=planet, declare one with circuit_spec=red_mars or circuit_spec=file "
            "circuit_spec.path=my.yaml, or load one with task.load=/run/circuits/name"
        )
    if not declares and cfg.pairs is None:
        raise UserError(
            "the circuit_spec has no supernodes; docs/circuits.md shows how to declare them; pairs=planet finds some"
        )
    if not declares and cfg.pairs is not None:
        check_choosing(cfg.pairs)


def traced_inputs(cfg: AppConfig, spec: CircuitSpecConfig | None) -> list[Asked]:
    """What is traced: the rows of `task.rows`, `prompt=` on `image=`, or the spec's own inputs."""
    from vlmscope.circuits.build import Asked, asked_of
    from vlmscope.data.images import PictureFiles
    from vlmscope.data.inputs import read_rows
    from vlmscope.tasks.wiring import user_pictures

    if cfg.task.rows is not None:
        if cfg.prompt is not None or cfg.image is not None:
            raise UserError("task.rows= brings its own prompts and pictures; leave out prompt= and image=")
        rows, bad = read_rows(cfg.task.rows)
        if bad:
            raise UserError(f"{bad[0]}; correct the file")
        return [Asked(row.prompt, PictureFiles(row.images), row.id) for row in rows]
    if cfg.prompt is not None:
        return [Asked(cfg.prompt, user_pictures(cfg), cfg.prompt)]
    if cfg.image is not None:
        raise UserError("image= without prompt=: add 'prompt=what is this ?'")
    return [] if spec is None or spec.inputs is None else asked_of("circuit_spec.inputs", spec.inputs, (), cfg.seed)


def traced(bench: Bench, asked: Sequence[Asked], settings: Sequence[AttributionConfig] = ()) -> list[PrunedGraph]:
    """The graphs of all inputs, with settings of their own if given; the first one is written to the run folder."""
    from tqdm import tqdm

    from vlmscope.attribution.export import save_graph
    from vlmscope.attribution.trace import trace

    graphs: list[PrunedGraph] = []
    each = zip(asked, settings or [bench.cfg.attribution] * len(asked), strict=True)
    for one, how in tqdm(each, desc="trace", unit="input", total=len(asked), disable=len(asked) < 2):
        graphs.append(trace(bench.scope, one.prepared(bench.scope), how, bench.run_dir).pruned)
        if len(graphs) == 1:
            save_graph(bench.run_dir / "graph.safetensors", graphs[0])
    return graphs


def discovered(bench: Bench, asked: list[Asked]) -> tuple[Circuit, list[PrunedGraph], list[Asked], list[Asked], Origin]:
    """The circuit of one question of the pairs with named supernodes, the graphs of what was asked (or else of the
    pairs' originals), inputs in which its features may fire, and how it was found.
    """
    from dataclasses import replace

    from vlmscope.circuits.build import Asked
    from vlmscope.circuits.discovery.discover import by_answer, circuit_subject, discover, moving_questions
    from vlmscope.circuits.discovery.report import write_discoveries
    from vlmscope.circuits.page import Origin
    from vlmscope.circuits.spec_config import ANSWER_PREFIX
    from vlmscope.features.readouts import top_and_bottom_logits
    from vlmscope.report.style import label

    cfg = bench.cfg
    if not asked and (cfg.attribution.asked != "logits" or cfg.attribution.token_ids):
        key = "token_ids" if cfg.attribution.asked == "logits" else cfg.attribution.asked
        raise UserError(
            f"attribution.{key}: the graphs of pairs= explain the difference of the pair's two answers; leave it out, "
            "or give prompt= (and image=) to trace an input of your own"
        )
    cfg.attribution.check()
    train, test = (bench.pairs(split) for split in ("train", "test"))
    question, *more = moving_questions(train, test, cfg.discovery.question)
    if more:
        print(f"the circuit of the question {question}; discovery.question= takes {' or '.join(more)}")
    choose, judge = (
        circuit_subject(bench.scope, question, pairs[question], cfg.interchange.least, cfg.discovery.modes)
        for pairs in (train, test)
    )
    found = discover(bench.scope, choose, judge, cfg.discovery, cfg.attribution)
    bench.metrics |= write_discoveries([found], bench.run_dir, cfg.task.figure)
    sides = [side for pair in train[question] for side in (pair.original, pair.counterfactual)]
    words = {
        member.feature: top_and_bottom_logits(bench.scope, member.feature, 1)[0][0][0].strip()
        for member in found.features()
        if member.role == "last"
    }
    circuit = found.to_circuit(bench.vlm.name, bench.transcoders.widths)
    circuit = by_answer(circuit, list(dict.fromkeys(side.answer for side in sides)), words)
    explains = ""
    if asked:
        graphs = traced(bench, asked)
    else:
        # Each original's graph is of its own two answers, whose difference discovery keeps.
        pairs = spread_answers([train[question][row] for row in choose.pairs.rows.tolist()], cfg.task.traces)
        asked = [Asked.of(pair.original) for pair in pairs]
        answers = [(pair.original.answer, pair.counterfactual.answer) for pair in pairs]
        ends = [[f"id:{bench.token(word)}" for word in both] for both in answers]
        graphs = traced(bench, asked, [replace(cfg.attribution, difference=end) for end in ends])
        names = {word for pruned in graphs for word in pruned.graph.logit_tokens}
        if len(names) > 1:
            names = {RIGHT}
            explains = f" {RIGHT}: the logit of the original's answer minus that of its counterfactual's."
        name = ANSWER_PREFIX + names.pop()
        graphs = [replace(pruned, graph=replace(pruned.graph, logit_tokens=[name])) for pruned in graphs]
    change = None if cfg.pairs is None else cfg.pairs.change
    what = "own pairs" if change is None else f"pairs of {label(change)}"
    return circuit, graphs, asked, [Asked.of(side) for side in sides], Origin(found, what, explains, more)


def spread_answers(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """At most so many pairs, whose originals have as many different answers as can be; earlier ones first."""
    from collections import Counter

    seen: Counter[str] = Counter()
    turns: list[int] = []
    for pair in pairs:
        turns.append(seen[pair.original.answer])
        seen[pair.original.answer] += 1
    return [pairs[i] for i in sorted(range(len(pairs)), key=lambda i: turns[i])[:count]]


def draw(
    bench: Bench,
    circuit: Circuit,
    name: str,
    asked: Sequence[Asked],
    others: Sequence[Asked],
    study: StudyFolder | None,
    metrics: dict[str, float],
    origin: Origin | None,
) -> None:
    """The diagram and the page, with inputs on which features are most active: of a study, or of what is at hand."""
    import numpy as np

    from vlmscope.circuits.build import Asked, concept_pictures
    from vlmscope.circuits.page import SHOWN, Examples, described, examples_among, write_page
    from vlmscope.core.records import FeatureId
    from vlmscope.data.orrery.scenes import PLANETS
    from vlmscope.features.top_examples import study_examples
    from vlmscope.tasks.wiring import is_orrery

    def examples(features: list[FeatureId]) -> Examples:
        if study is not None:
            return {feature: study_examples(study, feature, SHOWN) for feature in features}
        spread = np.unique(np.linspace(0, len(others) - 1, SEARCHED).astype(int)) if others else []
        pool = [*asked, *(others[i] for i in spread)]
        if is_orrery(bench.vlm):
            prompt = next((each.prompt for each in asked if each.pictures), "what planet is this ?")
            shown = [(p, image) for p in PLANETS for image in concept_pictures(p, PER_PLANET, bench.cfg.seed + 1)]
            pool += [Asked(prompt, (image,), planet) for planet, image in shown]
        return examples_among(bench.scope, features, pool)

    nodes = described(bench.scope, circuit, examples, SHOWN)
    write_page(bench.run_dir, name, circuit, nodes, asked, metrics, bench.cfg.task.min_share, origin)
