"""Check the identities of docs/maths.md on this model: a table with the error, tolerance and time of each."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from vlmscope.analyses.anatomy import in_short
from vlmscope.config import AppConfig
from vlmscope.config.schema import RandomTranscodersConfig
from vlmscope.config.wiring import is_default, load_model, load_scope, names_transcoders, random_scope, user_pictures
from vlmscope.conformance import CASES, PROMPT, CaseReport, Check, Limits, run_cases
from vlmscope.core.errors import CheckFailed
from vlmscope.tasks.settings import RunContext


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Check the model on `prompt=` (it has a default) and `image=` (random pictures fill up)."""
    pictures = user_pictures(cfg)
    vlm = load_model(cfg)
    # The named set; else the shipped one for Orrery 2 and a random one for any other model.
    named = names_transcoders(context.overrides) or is_default(vlm)
    # The tower of a tiny model, or of one with transcoders of the tower, costs little.
    if cfg.model.family is not None or (named and getattr(cfg.transcoder, "tower", None) is not None):
        cfg.attribution.tower = vlm.adapter.has_vision
    if named:
        scope = load_scope(cfg, vlm)
        which = "random" if isinstance(cfg.transcoder, RandomTranscodersConfig) else cfg.transcoder.path
    else:
        # Every active feature has a row of edges, and rows are what takes time: in deep models fewer are active.
        config = RandomTranscodersConfig(seed=cfg.seed, k=max(2, min(8, 64 // vlm.adapter.n_layers)))
        scope = random_scope(config, vlm, cfg.attribution.tower)
        which = "random"
    adapter, task = vlm.adapter, cfg.task
    limits = Limits(task.targets, task.sources, task.positions, new_tokens=task.new_tokens, seed=cfg.seed)
    cases = run_cases(scope, cfg.prompt or PROMPT, pictures, limits)
    reports = list(tqdm(cases, desc="check", total=len(CASES), unit="case"))
    print(
        f"{vlm.name}: {adapter.n_layers} layers of width {adapter.d_model}; transcoders: {which}"
        f"{'' if scope.tower is None else f'; {len(scope.tower)} layers of the vision tower too'}; errors in float64\n"
    )
    print(render(reports, "" if cfg.model.dtype == "float64" else cfg.model.dtype))
    metrics = flat_metrics(reports)
    if task.cases:
        line, numbers = in_short(vlm, task.cases, cfg.seed)
        print(line)
        metrics |= numbers
    broken = failures(reports)
    if broken:
        raise CheckFailed(f"{vlm.name} fails {'; '.join(broken)}; do not trust its graphs", metrics)
    return metrics


def render(reports: Sequence[CaseReport], own_dtype: str = "") -> str:
    """An aligned table with a row per identity; below it sizes, and the reasons for skipped ones.

    `own_dtype` is the heading of the column of errors in the model's own dtype; "" leaves the column out.
    """
    done = [report for report in reports if report.exact]
    lines = [["identity", *(report.case for report in done), "tolerance", "holds", "seconds"]]
    lines[0] += [f"in {own_dtype}", "what it says"] if own_dtype else ["what it says"]
    for outcomes in zip(*(report.exact for report in done), strict=True):
        first, seconds = outcomes[0], sum(outcome.seconds for outcome in outcomes)
        verdict = "skipped" if all(outcome.skipped for outcome in outcomes) else "yes"
        verdict = "NO" if any(outcome.failed for outcome in outcomes) else verdict
        cells = [first.name, *(_number(o.error) for o in outcomes), _bound(first), verdict, f"{seconds:.1f}"]
        if own_dtype:
            cells.append(_number(max((r.own[first.name] for r in done if first.name in r.own), default=None)))
        lines.append([*cells, first.claim])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    for r in reports:
        size = f"{r.n_tokens} tokens, {r.n_features:,} active features, {r.seconds:.1f} s"
        text.append(f"{r.case}: {size if r.exact else f'skipped, {r.reason}'}")
    text += [f"{o.name}, {r.case}: skipped, {o.reason}" for r in reports for o in r.exact if o.skipped]
    return "\n".join(text)


def _number(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.0f}" if error == 0 else f"{error:.1e}"


def _bound(outcome: Check) -> str:
    return f"{'>' if outcome.at_least else '<='} {outcome.tolerance:.0e}" if outcome.tolerance else "= 0"


def failures(reports: Sequence[CaseReport]) -> list[str]:
    """A phrase for each identity that was measured and does not hold."""
    return [
        f"{outcome.name} on {report.case} ({_number(outcome.error)}, needs {_bound(outcome)})"
        for report in reports
        for outcome in report.exact
        if outcome.failed
    ]


def flat_metrics(reports: Sequence[CaseReport]) -> dict[str, float]:
    """`check/<case>/<identity>/error`, `.../seconds`, `.../error_own_dtype`, and the counts of all."""
    every = [outcome for report in reports for outcome in report.exact]
    metrics = {f"check/{what}": float(sum(getattr(o, what) for o in every)) for what in ("held", "failed", "skipped")}
    for report in reports:
        for outcome in report.exact:
            if outcome.error is not None:
                metrics[f"check/{report.case}/{outcome.name}/error"] = outcome.error
                metrics[f"check/{report.case}/{outcome.name}/seconds"] = outcome.seconds
        for name, error in report.own.items():
            metrics[f"check/{report.case}/{name}/error_own_dtype"] = error
        if report.exact:
            metrics[f"check/{report.case}/seconds"] = report.seconds
    return metrics
