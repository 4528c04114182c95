"""Trials of an experiment: their case sets and operations, from concepts or from counterfactual pairs.

Called by `vlmscope.tasks.experiment`, which is free of torch. Also the parts of the report that are not in the table of
trials: graph, evidence, examples and captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from vlmscope.analyses.association import Association, from_association, set_metrics
from vlmscope.analyses.bench import Bench
from vlmscope.attribution.export import save_graph, write_graph_json
from vlmscope.attribution.trace import Trace, spread, spread_in_words
from vlmscope.circuits.baselines import Baselines
from vlmscope.circuits.build import described, draw_diagram
from vlmscope.circuits.cases import bystanders, concept_cases, concept_questions, matrix_cases
from vlmscope.circuits.circuit import Circuit, direct_edges, labelled, load_circuit, save_circuit, with_labels
from vlmscope.circuits.config import CircuitConfig, TrialConfig
from vlmscope.circuits.experiment import ALL, EACH, ConceptMaterial, Declared, PairSource, concept_operation, settle
from vlmscope.circuits.selectors import Contrasts
from vlmscope.core.results import AnswerExample, Supernode
from vlmscope.data.images import png_bytes
from vlmscope.data.orrery.dataset import unrelated_scenes
from vlmscope.features.study import CaptionedPrompt, top_examples
from vlmscope.interventions.run import generate_edited, run_edited
from vlmscope.interventions.trials import Cases, Operation, run_trials
from vlmscope.metrics.claims import claim_metrics, claims
from vlmscope.metrics.prediction import prior
from vlmscope.metrics.rates import cell_metrics, counted, log_softmax, trial_metrics, without_baselines
from vlmscope.models.base import token_strings
from vlmscope.models.batching import aligned
from vlmscope.report.graph_figure import attribution_graph
from vlmscope.report.marks import write_evidence, write_records, write_rows
from vlmscope.training.evaluation import warn_if_strange

CAPTION_PROMPT = "describe this image in detail ."
MIN_SHARE = 0.005  # of what a supernode takes in: weaker edges are not drawn
CAPTIONS = 3  # test pictures described before and under the first exchange
SHOWN = 2  # cases of each question with their words before and after


def run_declared(bench: Bench, analyses: Sequence[Any] = ()) -> dict[str, float]:
    """All trials, with those that analyses add: trials.parquet, claims.parquet, examples.parquet and metrics."""
    cfg = bench.cfg
    modules = [analysis for analysis in analyses if hasattr(analysis, "declare")]
    declare = modules[0].declare if modules else source_of(bench)
    declared = settle(bench.scope, declare(bench), cfg.trials, cfg.settings)
    bench.metrics |= {f"settled/{question}": strength for question, strength in declared.settled.items()}
    if cfg.images or (cfg.pairs is not None and cfg.pairs.path is not None):  # the user's own
        warn_if_strange(bench.scope, [cases.batch for sets in declared.cases.values() for cases in sets])
    more = (analysis.trials(bench, declared) for analysis in analyses if hasattr(analysis, "trials"))
    trials, layers = [*declared.trials(cfg.trials, cfg.settings)], bench.scope.transcoders.layers
    total = sum(trial.work(layers) for trial in trials)
    table = run_trials(bench.scope, chain(trials, *more), cfg.seed, total)
    bench.write_table("trials", table)
    ran = table[["operation", "setting"]].drop_duplicates().to_numpy()
    found = claims(table, {f"{a}/{b}": counted(cfg.trials, cfg.settings, a, b)[0] for a, b in ran})
    bench.write_table("claims", found)
    for name, rows in declared.baselines.tables().items() if declared.baselines else ():
        bench.write_table(name, rows)
    if declared.metrics is None:  # else the case sets are not one question's pictures before and after
        write_records(bench.run_dir / "examples.parquet", [*examples(bench, declared, table)])
        write_captions(bench, declared)
    return (declared.metrics or trial_metrics)(table, cfg.trials, cfg.settings) | claim_metrics(found)


def source_of(bench: Bench) -> Callable[[Bench], Declared]:
    """What the cases come from: sets of concepts, pairs, or pictures of two or more concepts (also with such sets)."""
    if bench.cfg.association:
        return from_association if bench.cfg.circuit is None else from_both
    if bench.cfg.pairs is not None:
        return from_pairs
    return from_circuit if len(bench.circuit_config.concepts) == 2 else from_matrix


def modes_of(bench: Bench) -> set[str]:
    """Modes that some setting uses."""
    return {mode for setting in bench.cfg.settings.values() for mode in setting.mode}


def contrasts(bench: Bench, keep_graphs: bool = False) -> Contrasts:
    """What the circuits of the experiment's concepts are chosen by; if asked for, the graph of each concept's first
    picture is written under graphs/, to look at.
    """
    config = bench.circuit_config
    images = {c: bench.concept_pictures(c, "train", config.pictures, purpose="contrast") for c in config.concepts}
    for concept, shown in images.items():
        bench.recorded("train", f"{concept} train {config.seed}", shown[: config.graphs], "confirming graphs")

    def keep(concept: str, question: str, traced: Trace) -> None:
        if keep_graphs:
            place = bench.run_dir / "graphs" / f"{question}_{concept}"
            named = (place.name, bench.vlm.name, bench.labels)
            write_graph_json(place / "graph.json", traced.pruned, *named, pictures=[images[concept][0]])

    return Contrasts.measure(bench.scope, config, images, bench.cfg.attribution, keep)


def from_circuit(bench: Bench) -> Declared:
    """Pictures of two concepts; their circuit is chosen by contrast first."""
    config, count = bench.circuit_config, bench.cfg.intervention.pictures
    chosen_by = contrasts(bench)
    circuit, pictures = concept_circuit(bench, chosen_by), cache(bench.concept_pictures)
    cases = {
        "test": concept_cases(bench.scope, config, pictures, count, modes_of(bench)),
        "third": third_cases(bench),
        "unrelated": unrelated_cases(bench),
    }
    if any(trial.settle for trial in bench.cfg.trials.values()):
        validation = concept_cases(
            bench.scope, config, lambda concept, _, n: bench.concept_pictures(concept, "val", n), count, {"free"}
        )
        cases["validation"] = [replace(each, name="validation") for each in validation]
    shown = len(pictures(config.concepts[0], "test", count))
    bench.metrics |= {f"base/{each.question}/accuracy": each.batch.size / shown for each in cases["test"]}
    bench.metrics |= priors(config)
    return Declared(cases, concept_operation(circuit, config), baselines=concept_baselines(chosen_by))


def from_both(bench: Bench) -> Declared:
    """Pictures of concepts under a circuit's questions, and sets of concepts in pictures and words, in one table."""
    first = (from_circuit if len(bench.circuit_config.concepts) == 2 else from_matrix)(bench)
    sets = Association(bench)

    def operation(trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        return (sets if cases.name in sets.cases else first).operation(trial, cases, limit)

    def metrics(table: Any, trials: Any, settings: Any) -> dict[str, float]:
        of_sets = table.cases.isin([*sets.cases])
        found = (first.metrics or trial_metrics)(table[~of_sets].reset_index(drop=True), trials, settings)
        more = table[of_sets].reset_index(drop=True)  # none where no question of a set is answered rightly
        return found | (set_metrics(more, trials, settings) if len(more) else {})

    both = {**first.cases, **sets.cases}
    return Declared(both, operation, metrics=metrics, baselines=first.baselines)


def priors(config: CircuitConfig) -> dict[str, float]:
    """`base/<question>/prior`, the share of the most frequent right answer where concepts are equally frequent."""
    questions = config.questions.items()
    return {f"base/{name}/prior": prior([*asked.of(config.concepts).values()]) for name, asked in questions}


def concept_circuit(bench: Bench, chosen_by: Contrasts) -> Circuit:
    """The circuit of two concepts; written are circuits/, graph files, evidence.parquet and their figures."""
    config, folder, pruned = bench.circuit_config, bench.run_dir, chosen_by.first.pruned
    circuit, metrics = chosen_by.circuit(config.concepts)
    circuit = labelled(circuit, bench.labels)
    save_circuit(circuit, folder / "circuits" / "_".join(config.concepts))
    save_graph(folder / "graph.safetensors", pruned)
    picture = bench.concept_pictures(config.concepts[0], "train", config.pictures, purpose="contrast")[0]
    items, image = evidence_items(bench), np.asarray(picture)
    nodes = described(bench.scope, circuit, lambda features: top_examples(bench.scope, features, items))
    write_evidence(folder / "evidence.parquet", nodes)
    draw_diagram(folder / "figures" / "circuit.png", nodes, direct_edges([pruned.graph], nodes), image, MIN_SHARE)
    groups = {m.feature: node.name for node in nodes for m in node.features}
    named = (folder.name, bench.vlm.name, bench.labels)
    write_graph_json(folder / "graph.json", pruned, *named, pictures=[picture], groups=groups)
    attribution_graph(pruned, folder / "figures" / "graph.png", [image], groups, labels=bench.labels)
    together = spread(chosen_by.graphs)
    print(f"graphs that confirm the circuit: {spread_in_words(together)}", flush=True)
    bench.metrics |= metrics | chosen_by.first.metrics() | together
    bench.metrics["graph/seconds"] = float(np.median([graph["graph/seconds"] for graph in chosen_by.graphs]))
    return circuit


def concept_baselines(chosen_by: Contrasts) -> Baselines:
    """Baselines of circuits of concepts, from what these were chosen by."""

    @cache
    def unconfirmed(*pair: str) -> Circuit:
        return chosen_by.circuit(pair, confirmed=False)[0]

    batches, scope = chosen_by.batches, chosen_by.scope
    return Baselines(scope, ConceptMaterial(scope, chosen_by.config, batches, lambda pair: unconfirmed(*sorted(pair))))


def evidence_items(bench: Bench, count: int = 10) -> list[CaptionedPrompt]:
    """Training pictures searched for top examples, `count` of every planet, or of the concepts if these are none.

    Each is asked every question: a feature that writes `dust` is silent unless it is asked for.
    """
    items = []
    for concept in bench.all_concepts:
        images = bench.concept_pictures(concept, "train", count, purpose="evidence")
        for question in concept_questions(bench.scope, bench.circuit_config).values():
            asked = [question.inputs(bench.scope, [image]) for image in images]
            pairs = zip(asked, images, strict=True)
            items += [CaptionedPrompt(inputs, concept, png_bytes(image)) for inputs, image in pairs]
    return items


def third_cases(bench: Bench) -> Sequence[Cases]:
    """Pictures of a concept that is neither; a hit is the donor's word."""
    config = bench.circuit_config
    if config.third is None:
        return ()
    images = bench.concept_pictures(config.third, "test", bench.cfg.intervention.pictures)
    ids = [f"{config.third} {i}" for i in range(len(images))]
    cases = []
    for name, question in concept_questions(bench.scope, config).items():
        inputs = [question.inputs(bench.scope, [image]) for image in images]
        cases.append(bystanders(bench.scope, "third", name, inputs, ids, question.token(config.concepts[1])))
    return cases


def unrelated_cases(bench: Bench) -> Sequence[Cases]:
    """Other scenes and text alone, of which no question names a concept; prompts of one shape are one case set."""
    config, scope, inputs = bench.circuit_config, bench.scope, []
    for scene in unrelated_scenes(
        "test", bench.cfg.intervention.unrelated, config.seed, without=tuple(config.concepts)
    ):
        pictures = [] if scene.image is None else [Image.fromarray(scene.image)]
        bench.recorded("test", scene.key, pictures, "unrelated")
        inputs.append(scope.inputs(scene.questions[0].question, pictures))
    return [
        bystanders(scope, "unrelated", "other", [inputs[i] for i in group], [f"scene {i}" for i in group])
        for group in aligned(inputs)
    ]


def from_matrix(bench: Bench) -> Declared:
    """Pictures of every ordered pair of concepts; means and graphs are computed once per concept, for all circuits."""
    config, count = bench.circuit_config, bench.cfg.intervention.pictures
    pictures = cache(bench.concept_pictures)
    cases, accuracy = matrix_cases(bench.scope, config, pictures, count, modes_of(bench))
    bench.metrics |= accuracy | priors(config)
    chosen_by = contrasts(bench, keep_graphs=True)
    circuits: dict[frozenset[str], Circuit] = {}
    for pair in combinations(config.concepts, 2):
        if not chosen_by.means[pair[0]].keys() & chosen_by.means[pair[1]].keys():
            continue
        circuit, _ = chosen_by.circuit(pair)
        save_circuit(circuit, bench.run_dir / "circuits" / "_".join(pair))
        circuits[frozenset(pair)] = circuit

    def operation(trial: TrialConfig, subject: Cases, limit: int | None) -> Operation:
        pair = subject.tags["recipient"], subject.tags["donor"]
        return concept_operation(circuits[frozenset(pair)], config, pair)(trial, subject, limit)

    return Declared(cases, operation, metrics=cell_metrics, baselines=concept_baselines(chosen_by))


def from_pairs(bench: Bench) -> Declared:
    """Counterfactual pairs with the features of a given circuit, or with some chosen on training pairs and saved."""
    cfg, config = bench.cfg, bench.cfg.interchange
    assert cfg.pairs is not None, "cases come from pairs where there are some"
    circuit = None if config.circuit is None else load_circuit(Path(config.circuit))
    if circuit is not None:
        circuit.check_fits(bench.vlm.name, bench.transcoders.widths, str(config.circuit))
        bench.used.inherit(Path(str(config.circuit)).absolute().parent.parent)  # its run, if it is where one leaves it
    modes: dict[str, set[str]] = {}
    for setting in cfg.settings.values():
        modes.setdefault(setting.cases, set()).update(set(setting.mode) - {"generate"})
    deepest = max((limit for setting in cfg.settings.values() for limit in setting.limit), default=0)
    source = PairSource(bench.scope, cfg.pairs, bench.pairs, config, circuit, deepest)
    cases = source.cases(modes)
    bench.metrics |= source.accuracy
    if circuit is None and any(trial.features != ALL for trial in cfg.trials.values()):
        ranked = {name: source.ranked(name)[: config.features] for name in source.questions}
        nodes = {name: with_labels(Supernode(name, tuple(members)), bench.labels) for name, members in ranked.items()}
        chosen = Circuit(nodes, {}, model=bench.vlm.name, n_features=bench.transcoders.widths)
        save_circuit(chosen, bench.run_dir / "circuits" / (cfg.pairs.change or "pairs"))
    return Declared(cases, source.operation, source.sets, source, baselines=Baselines(bench.scope, source))


def examples(bench: Bench, declared: Declared, table: pd.DataFrame) -> Iterator[AnswerExample]:
    """Some answers before and after each exchange and transfer, in free mode everywhere; whole answers are those of
    the trial's first setting.
    """
    for cases in declared.cases["test"]:
        few = cases.select(range(min(SHOWN, cases.batch.size)))
        for name, trial in bench.cfg.trials.items():
            if few.texts:
                own: Any = without_baselines(table)
                run = own[(own.operation == name) & (own.question == few.question) & (own.control == "")]
                after = run.drop_duplicates("case").set_index("case").text
                for png, case, text in zip(few.pngs, few.ids, few.texts, strict=True):
                    yield AnswerExample(png, few.prompt, name, text, after[case], (), ())
            elif trial.do in ("exchange", "carry") and trial.features != EACH:
                plan = declared.operation(trial, few, None).plan(bench.scope, few, trial.strength or 0.0)
                rows = zip(few.pngs, few.base.logits, run_edited(bench.scope, few.batch, plan), strict=True)
                for png, *logits in rows:
                    words = [probable_words(bench, row) for row in logits]
                    yield AnswerExample(png, few.prompt, name, words[0][0][0], words[1][0][0], *words)


def probable_words(bench: Bench, logits: Tensor, count: int = 5) -> tuple[tuple[str, float], ...]:
    """The most probable next words of logits [V] with their probabilities."""
    probabilities = np.exp(log_softmax(logits.double().numpy(force=True)))
    best = np.argsort(-probabilities)[:count]
    return tuple(zip(token_strings(bench.vlm.tokenizer, best), map(float, probabilities[best]), strict=True))


def write_captions(bench: Bench, declared: Declared) -> None:
    """captions.parquet: descriptions of some test pictures, token by token, before and under the first exchange."""
    trial = next((trial for trial in bench.cfg.trials.values() if trial.do == "exchange"), None)
    if trial is None:
        return
    recipient, rows = bench.circuit_config.concepts[0], []
    for image in bench.concept_pictures(recipient, "test", CAPTIONS)[:CAPTIONS]:
        inputs = bench.scope.inputs(CAPTION_PROMPT, [image])
        cases = bystanders(bench.scope, "captions", CAPTION_PROMPT, [inputs], [recipient])
        plan = declared.operation(trial, cases, None).plan(bench.scope, cases, trial.strength or 0.0)
        answers = (generate_edited(bench.scope, inputs, edits) for edits in (None, plan))
        rows.append(dict(zip(("before", "after"), answers, strict=True)))
    write_rows(bench.run_dir / "captions.parquet", rows)
