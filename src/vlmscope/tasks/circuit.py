"""A circuit, declared or found by pairs=: its supernodes, the edges between them, and a diagram (docs/circuits.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from vlmscope.analyses.bench import Bench
from vlmscope.circuits.build import (
    SHOWN,
    Examples,
    Sources,
    asked_of,
    build_circuit,
    described,
    draw_diagram,
    example_pool,
    examples_among,
    spread_answers,
    trace_all,
    trace_pairs,
    write_page,
)
from vlmscope.circuits.circuit import Circuit, circuit_metrics, direct_edges, labelled, load_circuit, save_circuit
from vlmscope.circuits.config import CircuitSpecConfig
from vlmscope.circuits.discovery import discover
from vlmscope.config import AppConfig
from vlmscope.config.resolve import declared_circuit
from vlmscope.config.wiring import user_pictures
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.data.images import PictureFiles, for_figures
from vlmscope.data.inputs import Pair, Side, check_choosing, read_rows
from vlmscope.features.study_files import StudyFolder
from vlmscope.tasks.settings import RunContext
from vlmscope.training.evaluation import speaks_orrery


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write circuits/<name>/, graph.safetensors, figures/circuit.png and report.html.

    A discovered circuit also has discovery.json, tables and figures.
    """
    # Refuse all that needs no model before one is loaded.
    spec = None if cfg.circuit_spec is None else declared_circuit(cfg.circuit_spec)
    check_source(cfg, spec)
    inputs = traced_inputs(cfg, spec)
    folder = Path(cfg.task.load or "")
    loaded = None if cfg.task.load is None else load_circuit(folder)
    declared = spec if loaded is None and spec is not None and spec.supernodes else None
    discovers = loaded is None and declared is None
    if not discovers and not inputs and (loaded is None or not loaded.edges):
        raise UserError("nothing to trace: add prompt= (and image=), task.rows=FILE, or inputs in the circuit_spec")
    sources = Sources() if declared is None else Sources.open(declared, inputs, cfg.pairs, cfg.seed)
    contrasts = [] if spec is None else [node.contrast for node in spec.supernodes.values() if node.contrast]
    if cfg.pairs is not None and not discovers and not any(contrast.pairs for contrast in contrasts):
        print("pairs= is not used: this circuit is declared or loaded, not found")
    study = None if cfg.study.path is None else StudyFolder(cfg.study.path)

    bench = Bench(cfg, context.run_dir, overrides=context.overrides)
    circuit, name, discovery, pairs, others = loaded, folder.name, None, [], sources.inputs()
    if loaded is not None:
        loaded.check_fits(bench.vlm.name, bench.transcoders.widths, folder)
    elif declared is None:
        discovery, circuit, train = discovered(bench, bool(inputs))
        name, others = discovery.question, [side for pair in train for side in (pair.original, pair.counterfactual)]
        pairs = [] if inputs else spread_answers([train[row] for row in discovery.train_rows], cfg.task.traces)
    if pairs:
        inputs = [pair.original for pair in pairs]
        graphs = trace_pairs(bench.scope, pairs, cfg.attribution, bench.run_dir)
    else:
        graphs = trace_all(bench.scope, inputs, [cfg.attribution] * len(inputs), bench.run_dir)
    if circuit is None:
        assert declared is not None, "a circuit is loaded, discovered or declared"
        circuit, name = build_circuit(bench.scope, declared, sources, graphs), declared.name
    if graphs:
        circuit = replace(circuit, edges=direct_edges(graphs, list(circuit.supernodes.values()), cfg.task.answers))
    circuit = labelled(circuit, bench.labels)
    save_circuit(circuit, bench.run_dir / "circuits" / name)
    bench.used.save(bench.run_dir)
    bench.metrics |= circuit_metrics(circuit, graphs)
    if cfg.task.figure:
        pool = example_pool(inputs, others, speaks_orrery(bench.vlm), cfg.seed + 1)

        def examples(features: list[FeatureId], study: StudyFolder | None = study) -> Examples:
            return examples_among(bench.scope, features, pool, study)

        nodes = described(bench.scope, circuit, examples, SHOWN)
        picture = next((for_figures(item.images[:1])[0] for item in inputs if item.images), None)
        path = bench.run_dir / "figures" / "circuit.png"
        below = partial(examples, study=None)  # the study is of the decoder
        draw_diagram(path, nodes, circuit.edges, picture, cfg.task.min_share, below, bench.labels)
        write_page(bench.run_dir, name, circuit, nodes, bench.metrics, discovery, bench.labels)
    return bench.metrics


def check_source(cfg: AppConfig, spec: CircuitSpecConfig | None) -> None:
    """Refuse a run that names no circuit or several, or pairs that cannot find one."""
    declares = spec is not None and bool(spec.supernodes)
    if cfg.task.load is not None:
        if declares:
            raise UserError("task.load= brings a circuit and circuit_spec= declares one; leave one of them out")
        return
    if declares:
        return
    if spec is None and cfg.pairs is None:
        raise UserError(
            "no circuit: find one with pairs=planet, declare one with circuit_spec=red_mars or circuit_spec=file "
            "circuit_spec.path=my.yaml, or load one with task.load=/run/circuits/name"
        )
    if cfg.pairs is None:
        raise UserError(
            "the circuit_spec has no supernodes; docs/circuits.md shows how to declare them; pairs=planet finds some"
        )
    check_choosing(cfg.pairs)


def traced_inputs(cfg: AppConfig, spec: CircuitSpecConfig | None) -> list[Side]:
    """The inputs to trace: rows of `task.rows`, `prompt=` on `image=`, or the spec's own."""
    if cfg.task.rows is not None:
        if cfg.prompt is not None or cfg.image is not None:
            raise UserError("task.rows= brings its own prompts and pictures; leave out prompt= and image=")
        rows, bad = read_rows(cfg.task.rows)
        if bad:
            raise UserError(f"{bad[0]}; correct the file")
        return [Side(row.prompt, PictureFiles(row.images), row.id) for row in rows]
    if cfg.prompt is not None:
        return [Side(cfg.prompt, user_pictures(cfg), cfg.prompt)]
    if cfg.image is not None:
        raise UserError("image= without prompt=: add 'prompt=what is this ?'")
    return [] if spec is None or spec.inputs is None else asked_of("circuit_spec.inputs", spec.inputs, (), cfg.seed)


def discovered(bench: Bench, own: bool) -> tuple[discover.Discovery, Circuit, Sequence[Pair]]:
    """The circuit of one question of the pairs, with named supernodes, and the question's training pairs.

    `own` says that the user's own inputs will be traced, not the pairs.
    """
    cfg = bench.cfg
    if not own and (cfg.attribution.asked != "logits" or cfg.attribution.token_ids):
        key = "token_ids" if cfg.attribution.asked == "logits" else cfg.attribution.asked
        raise UserError(
            f"attribution.{key}: the graphs of pairs= explain the difference of the pair's two answers; leave it out, "
            "or give prompt= (and image=) to trace an input of your own"
        )
    cfg.attribution.check()
    train, test = bench.pairs("train"), bench.pairs("test")
    question, *more = discover.moving_questions(train, test, cfg.discovery.question)
    if more:
        print(f"the circuit of the question {question}; discovery.question= takes {' or '.join(more)}")
    settings = (cfg.discovery, cfg.attribution, cfg.interchange.least)
    discovery = discover.discover_question(bench.scope, question, train, test, *settings)
    bench.metrics |= discover.write_discoveries([discovery], bench.run_dir, cfg.task.figure)
    answers = dict.fromkeys(side.answer for pair in train[question] for side in (pair.original, pair.counterfactual))
    return discovery, discover.named_circuit(bench.scope, discovery, list(answers)), train[question]
