"""A causal experiment as its YAML declares it: cases, features, trials in settings, one table, one report."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlmscope.analyses import anatomy, feature_codes, measures, predicted_effects
from vlmscope.analyses.bench import Bench
from vlmscope.analyses.declared import run_declared
from vlmscope.analyses.run_report import draw_report
from vlmscope.circuits.config import check_baselines
from vlmscope.config import AppConfig
from vlmscope.config.catalog import conf_dir, module_file
from vlmscope.core.errors import CheckFailed, UserError, check_choice, first_line
from vlmscope.core.launch import program
from vlmscope.data.inputs import check_own_pictures
from vlmscope.metrics.claims import claims_text
from vlmscope.report.marks import check_marks
from vlmscope.tasks.settings import RunContext
from vlmscope.viewer.graphs import export_with_report

_LOG = logging.getLogger(__name__)
# Name in `analyses:` -> its class, a dataclass of settings with some of `check(cfg)`, `declare(bench)`,
# `trials(bench, declared)` and `analyse(bench)`.
ANALYSES = {
    "anatomy": anatomy.Anatomy,
    "discovery": measures.Discover,
    "feature_kinds": feature_codes.FeatureKinds,
    "lens": measures.Lens,
    "mean_ablation": measures.MeanAblation,
    "modality": measures.Modality,
    "number_line": feature_codes.NumberLine,
    "number_shift": measures.NumberShift,
    "predicted_effects": predicted_effects.PredictedEffects,
    "smallest": measures.Smallest,
    "transfer": measures.Transfer,
    "word_sources": measures.WordSources,
}


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Run every declared trial, write trials.parquet, analyse, draw report.html."""
    check_own_pictures(cfg.images)
    chosen = HydraConfig.get().runtime.choices.get("experiment")  # `name=` may call the run something else
    module = own_analysis(cfg.name if chosen in (None, "null") else chosen, cfg.experiment_file)
    settings = checked_settings(getattr(module, "Settings", None), cfg.analysis, "analysis")
    analyses = [general_analysis(name, given) for name, given in cfg.analyses.items()]
    analyses += [] if module is None else [module]
    if not cfg.trials and not analyses:
        raise UserError("this task runs what an experiment declares: choose one (docs/experiments.md)")
    for analysis in analyses:
        if hasattr(analysis, "check"):
            analysis.check(cfg)
    check_baselines(cfg.trials, cfg.settings)
    declared = {name: setting.of or list(cfg.trials) for name, setting in cfg.settings.items()}
    check_marks(cfg.report, declared, more=any(hasattr(analysis, "trials") for analysis in analyses))
    bench = Bench(cfg, context.run_dir, analysis=settings)
    if cfg.trials:
        bench.metrics |= run_declared(bench, analyses)
    for analysis in analyses:
        if hasattr(analysis, "analyse"):
            bench.metrics |= analysis.analyse(bench)
    bench.used.save(context.run_dir)
    try:
        export_with_report(context.run_dir)
        draw_report(context.run_dir, asdict(cfg), bench.metrics)
    except Exception as error:  # a fault in a page must not cost hours of measuring
        _LOG.exception("report.html")
        again = f"its numbers are recorded; {program()} task=report task.run={context.run_dir} draws it again"
        raise CheckFailed(f"the report was not drawn ({first_line(error)}); {again}", bench.metrics) from error
    if cfg.trials and len(found := pd.read_parquet(context.run_dir / "claims.parquet")):
        print(f"\nWhat this shows (docs/circuits.md):\n{claims_text(found)}\n", flush=True)
    return bench.metrics


def general_analysis(name: str, given: Mapping[str, Any]) -> Any:
    """One of `ANALYSES` with its settings."""
    check_choice("analyses", name, tuple(ANALYSES))
    return checked_settings(ANALYSES[name], given, f"analyses.{name}")


def own_analysis(name: str | None, experiment_file: str | None = None) -> Any:
    """The module `experiments/<name>.py`, or that next to an experiment outside the clone, its functions named as the
    methods of `ANALYSES`; None without one.

    `check(config)` refuses settings before anything is loaded, `declare(bench) -> Declared` gives trials other cases or
    features, `trials(bench, declared)` adds some, and `analyse(bench) -> metrics` is for what no trial measures.
    """
    shipped = conf_dir() / "experiment" / f"{name}.py"
    path = shipped if experiment_file is None else module_file(experiment_file)
    if path is None or not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"experiments_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def checked_settings(settings: Any, given: Mapping[str, Any], where: str) -> Any:
    """Keys of the configuration as an instance of the dataclass `settings`; None where that is None.

    Raises:
        UserError: a key that it does not have, a value of another type, or a key without a value.
    """
    known = () if settings is None else fields(settings)
    names = [item.name for item in known if item.init]
    for key in given:
        if key not in names:
            raise UserError(f"{where}.{key}: no such setting; there are {', '.join(names) or 'none at all'}")
    for item in known:
        if item.name not in given and item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{where}.{item.name} has no value; give it as {where}.{item.name}=...")
    try:
        return settings and OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings), dict(given)))
    except OmegaConfBaseException as error:
        raise UserError(f"{where}.{error.full_key}: {str(error.msg).splitlines()[0]}; correct it") from error
