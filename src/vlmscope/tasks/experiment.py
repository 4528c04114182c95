"""A causal experiment as its YAML declares it: cases, features, trials in settings, one table, one report."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import pandas as pd
    from torch import Tensor

    from vlmscope.circuits.circuit import Circuit
    from vlmscope.circuits.experiment import Declared
    from vlmscope.circuits.trial_config import SettingConfig, TrialConfig
    from vlmscope.config import AppConfig
    from vlmscope.core.graph import PrunedGraph
    from vlmscope.features.readouts import RoleMeans
    from vlmscope.features.top_examples import StudyItem
    from vlmscope.interventions.trials import Cases
    from vlmscope.tasks.bench import Bench
    from vlmscope.tasks.context import RunContext

# Name in `analyses:` -> its class, a dataclass of settings with some of `check(cfg)`, `declare(bench)`,
# `trials(bench, declared)` and `analyse(bench)`. Imported when used: they need torch and pandas.
ANALYSES = {
    "modality": "vlmscope.tasks.analyses.Modality",
}
CAPTION_PROMPT = "describe this image in detail ."

USES = (
    "data", "attribution", "intervention", "interchange", "discovery", "study", "where", "trials", "settings",
    "association", "circuit", "pairs", "images", "analyses", "analysis", "report", "headline", "paper", "figure",
)  # fmt: skip


@dataclass
class Config:
    """`study`: the analysis reads a study of all features, that of `study.path` or one made first.

    What is done is in `trials`, `settings`, `analysis` and `report`.
    """

    study: bool = False

    def reads_shards(self, cfg: AppConfig) -> bool:
        """Whether the run goes through the data's shards."""
        return self.study and cfg.study.path is None


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Run every declared trial, write trials.parquet, let `experiments/<name>.py` analyse, draw report.html.

    Raises:
        UserError: nothing is declared, or nothing that it can act on.
    """
    from hydra.core.hydra_config import HydraConfig

    from vlmscope.core.errors import UserError
    from vlmscope.data.images import check_image
    from vlmscope.tasks.label import look_for_labels
    from vlmscope.tasks.study import look_for, study_sources

    if cfg.task.reads_shards(cfg):
        look_for(study_sources(cfg))
    look_for_labels(cfg)
    # They import torch and pandas, and what is missing is said before.
    from vlmscope.report.marks import check_marks
    from vlmscope.tasks.bench import Bench
    from vlmscope.tasks.run_report import draw_report

    for path in (path for own in cfg.images.values() for path in own):
        check_image(path)
    chosen = HydraConfig.get().runtime.choices.get("experiment")  # `name=` may call the run something else
    module = own_analysis(cfg.name if chosen in (None, "null") else chosen)
    own = checked_settings(getattr(module, "Settings", None), cfg.analysis, "analysis")
    analyses = [general_analysis(name, given) for name, given in cfg.analyses.items()]
    analyses += [] if module is None else [module]
    if not cfg.trials and not analyses:
        raise UserError("this task runs what an experiment declares: choose one (docs/experiments.md)")
    for analysis in analyses:
        if hasattr(analysis, "check"):
            analysis.check(cfg)
    declared = {name: setting.of or list(cfg.trials) for name, setting in cfg.settings.items()}
    check_marks(cfg.report, declared, more=any(hasattr(one, "trials") for one in analyses))
    bench = Bench(cfg, context.run_dir, analysis=own)
    if cfg.trials:
        bench.metrics |= run_declared(bench, analyses)
    for analysis in analyses:
        if hasattr(analysis, "analyse"):
            bench.metrics |= analysis.analyse(bench)
    draw_report(context.run_dir, asdict(cfg), bench.metrics)
    return bench.metrics


def general_analysis(name: str, given: Mapping[str, Any]) -> Any:
    """One of `ANALYSES` with its settings.

    Raises:
        UserError: there is no such analysis, or it has no such setting.
    """
    from pydoc import locate

    from vlmscope.core.errors import check_choice

    check_choice("analyses", name, tuple(ANALYSES))
    return checked_settings(locate(ANALYSES[name]), given, f"analyses.{name}")


def own_analysis(name: str | None) -> Any:
    """The module `experiments/<name>.py`; None without one.

    It may have `check(config)`, which refuses settings before anything is loaded, `declare(bench) -> Declared` where
    its trials run on other cases or features than a circuit's, and `analyse(bench) -> metrics` for what no trial
    measures.
    """
    import importlib.util
    import sys

    from vlmscope.config.catalog import conf_dir

    path = conf_dir() / "experiment" / f"{name}.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def checked_settings(settings: Any, given: Mapping[str, Any], where: str) -> Any:
    """Keys of the configuration as an instance of the dataclass `settings`; None where there is none.

    Raises:
        UserError: a key that it does not have, a value of another type, or a key without a value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from vlmscope.core.errors import UserError

    known = () if settings is None else fields(settings)
    for key in given:
        if key not in [item.name for item in known]:
            there = ", ".join(item.name for item in known) or "none at all"
            raise UserError(f"{where}.{key}: no such setting; there are {there}")
    for item in known:
        if item.name not in given and item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{where}.{item.name} has no value; give it as {where}.{item.name}=...")
    try:
        return settings and OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings), dict(given)))
    except OmegaConfBaseException as error:
        raise UserError(f"{where}.{error.full_key}: {str(error.msg).splitlines()[0]}; correct it") from error


def run_declared(bench: Bench, analyses: Sequence[Any] = ()) -> dict[str, float]:
    """All trials, with those that analyses add: trials.parquet, examples.parquet and metrics."""
    from itertools import chain

    from vlmscope.circuits.experiment import settle
    from vlmscope.core.artifacts import atomic_path
    from vlmscope.interventions.trials import run_trials

    cfg = bench.cfg
    declare = next((one.declare for one in analyses if hasattr(one, "declare")), None)
    if declare is not None:
        declared = declare(bench)
    elif cfg.pairs is not None:
        declared = from_pairs(bench)
    else:
        declared = from_circuit(bench) if len(bench.circuit_config.concepts) == 2 else from_matrix(bench)
    declared = settle(bench.scope, declared, cfg.trials, cfg.settings)
    bench.metrics |= {f"settled/{question}": strength for question, strength in declared.settled.items()}
    more = (one.trials(bench, declared) for one in analyses if hasattr(one, "trials"))
    trials = chain(declared.trials(cfg.trials, cfg.settings), *more)
    table = run_trials(bench.scope, trials, cfg.seed)
    with atomic_path(bench.run_dir / "trials.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    if declared.metrics is None:  # else the case sets are not one question's pictures before and after
        write_examples(bench, declared, table)
    return (declared.metrics or trial_metrics)(table, cfg.trials, cfg.settings)


def from_circuit(bench: Bench) -> Declared:
    """Pictures of two concepts; the circuit is found, and written with its graph and evidence, first."""
    from functools import cache

    from vlmscope.circuits.contrast import control_means
    from vlmscope.circuits.experiment import Declared, concept_cases, concept_operation

    config, settings, count = bench.circuit_config, bench.cfg.settings, bench.intervention.pictures
    circuit, means = find_circuit(bench)
    pictures = cache(bench.concept_pictures)
    modes = {mode for setting in settings.values() for mode in setting.mode}
    cases = {
        "test": concept_cases(bench.scope, config, pictures, count, sorted(modes)),
        "third": third_cases(bench),
        "unrelated": unrelated_cases(bench),
    }
    for one in cases["test"]:
        bench.metrics[f"base/{one.question}/accuracy"] = one.batch.size / len(
            pictures(config.concepts[0], "test", count)
        )
    return Declared(cases, concept_operation(circuit, config), control_means(means))


def find_circuit(bench: Bench) -> tuple[Circuit, Mapping[str, Mapping[str, RoleMeans]]]:
    """The circuit of two concepts and their role means: circuits/, graph files, evidence.parquet and their figures."""
    import numpy as np

    from vlmscope.attribution.export import save_graph, write_graph_json
    from vlmscope.circuits.circuit import labelled, save_circuit
    from vlmscope.circuits.contrast import concept_influence, concept_means, contrast_circuit, described
    from vlmscope.report.marks import write_evidence
    from vlmscope.tasks.tracing.graph_metrics import graph_metrics

    config, folder = bench.circuit_config, bench.run_dir
    train = {concept: bench.concept_pictures(concept, "train", config.pictures) for concept in config.concepts}
    prompts = {name: question.prompt for name, question in config.questions.items()}
    means = concept_means(bench.scope, train, prompts)
    influence, traces, seconds = concept_influence(bench.scope, train, prompts, config.graphs, bench.cfg.attribution)
    circuit, metrics = contrast_circuit(bench.transcoders, means, influence, config.per_layer, bench.vlm.name)
    circuit, pruned = labelled(circuit, bench.labels), traces[0].pruned
    save_circuit(circuit, folder / "circuits" / "_".join(config.concepts))
    save_graph(folder / "graph.safetensors", pruned)
    write_graph_json(folder / "graph.json", pruned, folder.name, bench.vlm.name, bench.labels)
    write_evidence(folder / "evidence.parquet", described(bench.scope, circuit, evidence_items(bench)))
    draw_circuit(bench, circuit, pruned, np.asarray(train[config.concepts[0]][0]))
    bench.metrics |= metrics | graph_metrics(traces[0], float(np.median(seconds)))
    return circuit, means


def evidence_items(bench: Bench, count: int = 10) -> list[StudyItem]:
    """Training pictures searched for top examples, `count` of every planet, or of the concepts if these are none.

    Each is asked every question: a feature that writes `dust` is silent unless it is asked for.
    """
    from vlmscope.data.images import png_bytes
    from vlmscope.data.orrery.scenes import PLANETS
    from vlmscope.features.top_examples import StudyItem

    config = bench.circuit_config
    items = []
    for concept in PLANETS if set(config.concepts) <= set(PLANETS) else config.concepts:
        images = bench.concept_pictures(concept, "train", count)
        for question in config.questions.values():
            pairs = zip(bench.inputs(images, question.prompt), images, strict=True)
            items += [StudyItem(inputs, concept, png_bytes(image)) for inputs, image in pairs]
    return items


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
    return Declared(cases, source.operation, source.means, source.sets, source)


def from_matrix(bench: Bench) -> Declared:
    """Pictures of every ordered pair of concepts; means and graphs are computed once per concept, for all circuits."""
    from itertools import combinations

    from vlmscope.circuits.circuit import save_circuit
    from vlmscope.circuits.contrast import concept_influence, concept_means, contrast_circuit, control_means
    from vlmscope.circuits.experiment import Declared, concept_operation, matrix_cases
    from vlmscope.interventions.trials import Operation

    config, modes = bench.circuit_config, {mode for setting in bench.cfg.settings.values() for mode in setting.mode}
    count = bench.intervention.pictures
    cases = matrix_cases(bench.scope, config, bench.concept_pictures, count, sorted(modes))
    for one in cases["test"]:
        bench.metrics[f"base/{one.question}/{one.tags['recipient']}/accuracy"] = one.batch.size / count
    train = {c: bench.concept_pictures(c, "train", config.pictures) for c in config.concepts}
    prompts = {name: question.prompt for name, question in config.questions.items()}
    means = concept_means(bench.scope, train, prompts)
    influence, _, _ = concept_influence(bench.scope, train, prompts, config.graphs, bench.cfg.attribution)
    circuits: dict[frozenset[str], Circuit] = {}
    controls: dict[frozenset[str], Mapping[int, Tensor]] = {}
    for pair in combinations(config.concepts, 2):
        both = {concept: means[concept] for concept in pair}
        circuit, _ = contrast_circuit(bench.transcoders, both, influence, config.per_layer, bench.vlm.name)
        save_circuit(circuit, bench.run_dir / "circuits" / "_".join(pair))
        circuits[frozenset(pair)], controls[frozenset(pair)] = circuit, control_means(both)

    def operation(trial: TrialConfig, of: Cases, limit: int | None) -> Operation:
        pair = (of.tags["recipient"], of.tags["donor"])
        return concept_operation(circuits[frozenset(pair)], config, pair)(trial, of, limit)

    return Declared(
        cases,
        operation,
        lambda _, of: controls[frozenset((of.tags["recipient"], of.tags["donor"]))],
        metrics=cell_metrics,
    )


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


def draw_circuit(bench: Bench, circuit: Circuit, pruned: PrunedGraph, image: np.ndarray) -> None:
    """figures/circuit.png and figures/graph.png, of the graph of one training picture."""
    from vlmscope.circuits.circuit import commonest_label
    from vlmscope.circuits.flow import circuit_edges
    from vlmscope.report.circuit_figure import circuit_diagram
    from vlmscope.report.graph_figure import attribution_graph

    folder, nodes = bench.run_dir / "figures", tuple(circuit.supernodes.values())
    edges = circuit_edges(pruned, {node.name: {m.feature for m in node.features} for node in nodes})
    words = {node.name: said for node in nodes if (said := commonest_label(node))}
    circuit_diagram(nodes, edges, folder / "circuit.png", {"soft tokens": image}, words=words)
    groups = {m.feature: node.name for node in nodes for m in node.features}
    attribution_graph(pruned, folder / "graph.png", [image], groups, labels=bench.labels)


def trial_metrics(
    table: pd.DataFrame, trials: Mapping[str, TrialConfig], settings: Mapping[str, SettingConfig]
) -> dict[str, float]:
    """`steer/main` (the worst question) with `_ci_low`, `_ci_high`, `_control`, and `steer/main/name`.

    A setting of several modes gives `steer/frozen/direct`, one of several strengths or limits `steer/dose/strength_2`
    (the worst question) alone; several places are in the table. Further measures of a setting are means over its cases:
    `steer/unrelated_kl`.
    """
    import numpy as np

    from vlmscope.metrics.table import rates, worst

    metrics: dict[str, float] = {}
    axes = ["positions", "layers", "strength", "limit"]
    key: Any
    part: Any
    for key, part in table.groupby(["operation", "setting"], sort=False):
        operation, setting = map(str, key)
        measure, *others = counted(trials, settings, operation, setting)
        varied = [axis for axis in axes if (part.groupby(["mode", "question"])[axis].nunique(dropna=False) > 1).any()]
        if varied in (["strength"], ["limit"]) and part["mode"].nunique() == 1:
            doses: Any = rates(part, [*varied, "question"], measure)
            lowest = doses.groupby(level=varied[0], sort=False)["value"].min()
            metrics |= {f"{operation}/{setting}/{varied[0]}_{dose:g}": value for dose, value in lowest.items()}
        if varied:
            continue
        several = part["mode"].nunique() > 1
        for mode, of in part.groupby("mode", sort=False):
            name = f"{operation}/{setting}" + (f"/{mode}" if several else "")
            found: Any = rates(of, ["setting", "question"], measure)
            metrics |= {f"{name}_{other}": float(of[of.control == ""][other].mean()) for other in others}
            if "/" in operation:  # another set's features on a question: no question is the worst of them
                metrics |= {f"{name}/{question}": one.value for (_, question), one in found.iterrows()}
                continue
            row = (worst(found, "question") if len(found) > 1 else found).iloc[0]
            metrics |= {name: row.value, f"{name}_ci_low": row.ci_low, f"{name}_ci_high": row.ci_high}
            if not np.isnan(row.matched):
                metrics[f"{name}_control"] = row.matched
            if len(found) > 1 and not several:
                metrics |= {f"{name}/{question}": one.value for (_, question), one in found.iterrows()}
    return metrics


def counted(
    trials: Mapping[str, TrialConfig], settings: Mapping[str, SettingConfig], operation: str, setting: str
) -> list[str]:
    """The measures of a trial in a setting, its rate first; "hit" of trials that an experiment makes by itself."""
    from vlmscope.circuits.trial_config import measures_of

    trial, where = trials.get(operation.partition("/")[0]), settings.get(setting)
    if trial is None or where is None:
        return ["hit" if trial is None else trial.measure]
    return measures_of(vars(trial), vars(where))


def cell_metrics(
    table: pd.DataFrame, trials: Mapping[str, TrialConfig], settings: Mapping[str, SettingConfig]
) -> dict[str, float]:
    """`steer/main`, the mean over cells of recipient, donor and question, with its interval, and `steer/main/name`.

    `_control` is the mean over cells, `_lowest` and `_highest` are cells, `_significant` the share above its control.
    """
    from vlmscope.metrics.table import CELL, cell_means, measured

    by = ["operation", "setting"]
    found = measured(table, [*by, *CELL], {name: trial.measure for name, trial in trials.items()})
    metrics: dict[str, float] = {"cells": float(len(found.groupby(level=CELL)))}
    key: Any
    row: Any
    for key, row in cell_means(found, by).iterrows():
        name = "/".join(key)
        metrics |= {name: row.value, f"{name}_ci_low": row.ci_low, f"{name}_ci_high": row.ci_high}
        more = {"control": row.matched, "lowest": row.lowest, "highest": row.highest, "significant": row.significant}
        metrics |= {f"{name}_{which}": float(value) for which, value in more.items() if value == value}
    for key, row in cell_means(found, [*by, "question"]).iterrows():
        metrics["/".join(key)] = row.value
    return metrics


def write_examples(bench: Bench, declared: Declared, table: pd.DataFrame) -> None:
    """examples.parquet: some answers before and after each exchange and transfer, in free mode everywhere; whole
    answers are those of the trial's first setting.
    """
    from vlmscope.circuits.experiment import EACH
    from vlmscope.core.intervention import AnswerExample
    from vlmscope.interventions.run import run_edited
    from vlmscope.report.marks import write_records

    shown = []
    for cases in declared.cases["test"]:
        few = cases.select(range(min(2, cases.batch.size)))
        for name, trial in bench.cfg.trials.items():
            if few.texts:
                run: Any = table[(table.operation == name) & (table.question == few.question) & (table.control == "")]
                said = run.drop_duplicates("case").set_index("case").text
                shown += [
                    AnswerExample(few.pngs[row], few.prompt, name, few.texts[row], said[few.ids[row]], (), ())
                    for row in range(few.batch.size)
                ]
            if few.texts or trial.do not in ("exchange", "carry") or trial.features == EACH:
                continue
            plan = declared.operation(trial, few, None).plan(bench.scope, few, trial.strength or 0.0)
            logits = run_edited(bench.scope, few.batch, plan)
            for row in range(few.batch.size):
                before, after = (probable_words(bench, one[row]) for one in (few.base.logits, logits))
                shown.append(AnswerExample(few.pngs[row], few.prompt, name, before[0][0], after[0][0], before, after))
    write_records(bench.run_dir / "examples.parquet", shown)
    write_captions(bench, declared)


def probable_words(bench: Bench, logits: Tensor, count: int = 5) -> tuple[tuple[str, float], ...]:
    """The most probable next words of logits [V] with their probabilities."""
    import numpy as np

    from vlmscope.metrics.causal import log_softmax
    from vlmscope.models.base import token_strings

    probabilities = np.exp(log_softmax(logits.double().numpy(force=True)))
    best = np.argsort(-probabilities)[:count]
    return tuple(zip(token_strings(bench.vlm.tokenizer, best), map(float, probabilities[best]), strict=True))


def write_captions(bench: Bench, declared: Declared, count: int = 3) -> None:
    """captions.parquet: descriptions of some test pictures, token by token, before and under the first exchange."""
    from vlmscope.circuits.experiment import bystanders
    from vlmscope.interventions.run import generate_edited
    from vlmscope.report.marks import write_rows

    trial = next((trial for trial in bench.cfg.trials.values() if trial.do == "exchange"), None)
    if trial is None:
        return
    recipient, rows = bench.circuit_config.concepts[0], []
    for image in bench.concept_pictures(recipient, "test", count)[:count]:
        inputs = bench.scope.inputs(CAPTION_PROMPT, [image])
        cases = bystanders(bench.scope, "captions", CAPTION_PROMPT, [inputs], [recipient])
        plan = declared.operation(trial, cases, None).plan(bench.scope, cases, trial.strength or 0.0)
        rows.append(
            {"before": generate_edited(bench.scope, inputs), "after": generate_edited(bench.scope, inputs, plan)}
        )
    write_rows(bench.run_dir / "captions.parquet", rows)
