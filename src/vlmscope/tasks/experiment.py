"""A causal experiment as its YAML declares it: cases, features, trials in settings, one table, one report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from vlmscope.circuits.experiment import Declared
    from vlmscope.circuits.trial_config import TrialConfig
    from vlmscope.config import AppConfig
    from vlmscope.interventions.trials import Cases
    from vlmscope.tasks.context import RunContext
    from vlmscope.tasks.steps.bench import Bench


@dataclass
class Config:
    """Nothing of its own: `trials`, `settings` and `report` say what is done."""


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Run every declared trial, write trials.parquet, let `experiments/<name>.py` analyse, draw report.html.

    Raises:
        UserError: nothing is declared, or nothing that it can act on.
    """
    from vlmscope.core.errors import UserError
    from vlmscope.tasks.report import draw_report
    from vlmscope.tasks.steps.bench import Bench

    analysis = own_analysis(cfg.name)
    if not cfg.trials and analysis is None:
        raise UserError("this task runs what an experiment declares: choose one (docs/experiments.md)")
    if hasattr(analysis, "check"):
        analysis.check(cfg)
    bench = Bench(cfg, context.run_dir)
    if cfg.trials:
        bench.metrics |= run_declared(bench, analysis)
    if analysis is not None:
        bench.metrics |= analysis.analyse(bench)
    draw_report(context.run_dir, asdict(cfg), bench.metrics)
    return bench.metrics


def own_analysis(name: str | None) -> Any:
    """The module `experiments/<name>.py` with `analyse(bench) -> metrics`, for what no trial measures; None without."""
    import importlib.util

    from vlmscope.config.catalog import conf_dir

    path = conf_dir() / "experiment" / f"{name}.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_declared(bench: Bench, analysis: Any = None) -> dict[str, float]:
    """All trials, with those of `analysis.trials(bench, declared)`: trials.parquet, examples.parquet and metrics."""
    from itertools import chain

    from vlmscope.core.artifacts import atomic_path
    from vlmscope.interventions.trials import run_trials

    cfg = bench.cfg
    declared = from_circuit(bench) if cfg.pairs is None else from_pairs(bench)
    trials = declared.trials(cfg.trials, cfg.settings)
    own = getattr(analysis, "trials", None)
    table = run_trials(bench.scope, chain(trials, own(bench, declared) if own else ()), cfg.seed)
    with atomic_path(bench.run_dir / "trials.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    write_examples(bench, declared)
    return trial_metrics(table, cfg.trials)


def from_circuit(bench: Bench) -> Declared:
    """Pictures of two concepts; the circuit is found, and written with its graph and evidence, first."""
    from vlmscope.circuits.experiment import Declared, concept_cases, concept_operation
    from vlmscope.report.marks import write_evidence
    from vlmscope.tasks.steps import find_circuit
    from vlmscope.tasks.steps.describe_features import describe_features
    from vlmscope.tasks.steps.intervene import control_means

    config, settings = bench.circuit_config, bench.cfg.settings
    find_circuit.run(bench)
    circuit = bench.record("find_circuit")["circuit"]
    modes = {mode for setting in settings.values() for mode in setting.mode}
    cases = {
        "test": concept_cases(bench.scope, config, bench.concept_pictures, bench.intervention.pictures, sorted(modes)),
        "third": third_cases(bench),
        "unrelated": unrelated_cases(bench),
    }
    for one in cases["test"]:
        bench.metrics[f"base/{one.question}/accuracy"] = one.batch.size / bench.intervention.pictures
    write_evidence(bench.run_dir / "evidence.parquet", describe_features(bench, circuit))
    draw_circuit(bench)
    return Declared(cases, concept_operation(circuit, config), control_means(bench))


def from_pairs(bench: Bench) -> Declared:
    """Counterfactual pairs with the features of a given circuit, or with some chosen on training pairs and saved."""
    from vlmscope.circuits.circuit import Circuit, load_circuit, save_circuit, with_labels
    from vlmscope.circuits.experiment import ALL, Declared, PairSource
    from vlmscope.core.intervention import Supernode

    cfg, config = bench.cfg, bench.cfg.interchange
    assert cfg.pairs is not None, "cases come from pairs where there are some"
    circuit = None if config.circuit is None else load_circuit(Path(config.circuit))
    if circuit is not None:
        circuit.check_fits(bench.vlm.name, bench.transcoders.widths, str(config.circuit))
    modes: dict[str, set[str]] = {}
    for setting in cfg.settings.values():
        modes.setdefault(setting.cases, set()).update(set(setting.mode) - {"generate"})
    deepest = max((limit for setting in cfg.settings.values() for limit in setting.limit), default=0)
    source = PairSource(bench.scope, cfg.pairs, config, circuit, deepest)
    cases = source.cases(modes)
    bench.metrics |= source.accuracy
    if circuit is None and any(trial.features != ALL for trial in cfg.trials.values()):
        ranked = {name: source.ranked(name)[: config.features] for name in source.questions}
        nodes = {name: with_labels(Supernode(name, tuple(found)), bench.labels) for name, found in ranked.items()}
        found = Circuit(nodes, {}, model=bench.vlm.name, n_features=bench.transcoders.widths)
        save_circuit(found, bench.run_dir / "circuits" / (cfg.pairs.change or "pairs"))
    return Declared(cases, source.operation, source.means, source.sets)


def third_cases(bench: Bench) -> Sequence[Cases]:
    """Pictures of a concept that is neither; a hit is the donor's word."""
    from vlmscope.circuits.experiment import answer_token, bystanders

    config = bench.circuit_config
    if config.third is None:
        return ()
    images = bench.concept_pictures(config.third, "test", bench.intervention.pictures)
    ids = [f"{config.third} {i}" for i in range(len(images))]
    return [
        bystanders(
            bench.scope,
            "third",
            name,
            [bench.scope.inputs(question.prompt, [image]) for image in images],
            ids,
            answer_token(bench.scope, question.answers[config.concepts[1]]),
        )
        for name, question in config.questions.items()
    ]


def unrelated_cases(bench: Bench) -> Sequence[Cases]:
    """Other scenes and text alone, of which no question names a concept; prompts of one shape are one case set."""
    from PIL import Image

    from vlmscope.circuits.experiment import bystanders
    from vlmscope.data.orrery.dataset import unrelated_scenes

    config, groups = bench.circuit_config, {}
    scenes = unrelated_scenes("test", bench.intervention.unrelated, config.seed, without=tuple(config.concepts))
    for number, scene in enumerate(scenes):
        pictures = [] if scene.image is None else [Image.fromarray(scene.image)]
        inputs = bench.scope.inputs(scene.questions[0].question, pictures)
        groups.setdefault((len(inputs), inputs.is_image.tobytes()), []).append((f"scene {number}", inputs))
    return [
        bystanders(bench.scope, "unrelated", "other", [one for _, one in group], [name for name, _ in group])
        for group in groups.values()
    ]


def draw_circuit(bench: Bench) -> None:
    """figures/circuit.png and figures/graph.png."""
    import numpy as np

    from vlmscope.circuits.circuit import commonest_label
    from vlmscope.circuits.flow import circuit_edges
    from vlmscope.report.circuit_figure import circuit_diagram
    from vlmscope.report.graph_figure import attribution_graph

    found, folder = bench.record("find_circuit"), bench.run_dir / "figures"
    pruned, image = found["trace"].pruned, np.asarray(found["trace_image"])
    nodes = tuple(found["circuit"].supernodes.values())
    edges = circuit_edges(pruned, {node.name: {m.feature for m in node.features} for node in nodes})
    words = {node.name: said for node in nodes if (said := commonest_label(node))}
    circuit_diagram(nodes, edges, folder / "circuit.png", {"soft tokens": image}, words=words)
    groups = {m.feature: node.name for node in nodes for m in node.features}
    attribution_graph(pruned, folder / "graph.png", [image], groups, labels=bench.labels)


def trial_metrics(table: pd.DataFrame, trials: Mapping[str, TrialConfig]) -> dict[str, float]:
    """`steer/main` (the worst question) with `_ci_low`, `_ci_high`, `_control`, and `steer/main/name`.

    A setting of several modes gives `steer/frozen/direct`, one of several strengths or limits `steer/dose/strength_2`
    (the worst question) alone; several places are in the table.
    """
    import numpy as np

    from vlmscope.metrics.table import rates, worst

    metrics: dict[str, float] = {}
    axes = ["positions", "layers", "strength", "limit"]
    key: Any
    part: Any
    for key, part in table.groupby(["operation", "setting"], sort=False):
        operation, setting = key
        varied = [axis for axis in axes if (part.groupby("mode")[axis].nunique(dropna=False) > 1).any()]
        if varied in (["strength"], ["limit"]) and part["mode"].nunique() == 1:
            doses: Any = rates(part, [*varied, "question"], measure_of(trials, operation))
            lowest = doses.groupby(level=varied[0], sort=False)["value"].min()
            metrics |= {f"{operation}/{setting}/{varied[0]}_{dose:g}": value for dose, value in lowest.items()}
        if varied:
            continue
        several = part["mode"].nunique() > 1
        for mode, of in part.groupby("mode", sort=False):
            name = f"{operation}/{setting}" + (f"/{mode}" if several else "")
            found: Any = rates(of, ["setting", "question"], measure_of(trials, str(operation)))
            if "/" in str(operation):  # another set's features on a question: no question is the worst of them
                metrics |= {f"{name}/{question}": one.value for (_, question), one in found.iterrows()}
                continue
            row = (worst(found, "question") if len(found) > 1 else found).iloc[0]
            metrics |= {name: row.value, f"{name}_ci_low": row.ci_low, f"{name}_ci_high": row.ci_high}
            if not np.isnan(row.matched):
                metrics[f"{name}_control"] = row.matched
            if len(found) > 1 and not several:
                metrics |= {f"{name}/{question}": one.value for (_, question), one in found.iterrows()}
    return metrics


def measure_of(trials: Mapping[str, TrialConfig], operation: str) -> str:
    """What the rate of an operation of the table counts: as its trial declares, or hits."""
    declared = trials.get(operation.partition("/")[0])
    return "hit" if declared is None else declared.measure


def write_examples(bench: Bench, declared: Declared) -> None:
    """examples.parquet: some answers before and after each exchange and transfer, in free mode everywhere."""
    from vlmscope.circuits.experiment import EACH
    from vlmscope.core.intervention import AnswerExample
    from vlmscope.interventions.run import run_edited
    from vlmscope.report.marks import write_records

    shown = []
    for cases in declared.cases["test"]:
        few = cases.select(range(min(2, cases.batch.size)))
        for name, trial in bench.cfg.trials.items():
            if trial.do not in ("exchange", "carry") or trial.features == EACH:
                continue
            plan = declared.operation(trial, few, None).plan(bench.scope, few, trial.strength)
            logits = run_edited(bench.scope, few.batch, plan)
            for row in range(few.batch.size):
                before, after = bench.words(few.base.logits[row]), bench.words(logits[row])
                shown.append(AnswerExample(few.pngs[row], few.prompt, name, before[0][0], after[0][0], before, after))
    write_records(bench.run_dir / "examples.parquet", shown)
