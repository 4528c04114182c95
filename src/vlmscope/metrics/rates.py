"""Statistics of causal claims: rates with bootstrap intervals, p-values and their correction, ranges over seeds; and
queries on tables of trials (`trials.parquet`) that give them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pandas as pd

from vlmscope.core.records import generator
from vlmscope.core.results import Rate

RESAMPLES = 2000


def bootstrap_rate(
    hits: Sequence[bool] | np.ndarray, seed: int = 0, control: float | None = None, groups: Sequence[str] | None = None
) -> Rate:
    """The share of hits with its percentile-bootstrap 95 % interval; `groups` as for `bootstrap_mean`.

    When all cases agree every resample does too, which says nothing about the next case; the open end then comes from
    the rule of three (Hanley and Lippman-Hand 1983: 3 / n), so that 100 of 100 reads as 0.97 to 1.
    """
    mean = bootstrap_mean(np.asarray(hits, dtype=float), seed, control, groups)
    n = mean.cases if groups is None else len(set(groups))
    if mean.value == 1.0:
        return replace(mean, ci_low=max(1.0 - 3.0 / n, 0.0))
    return replace(mean, ci_high=min(3.0 / n, 1.0)) if mean.value == 0.0 else mean


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    seed: int = 0,
    control: float | None = None,
    groups: Sequence[str] | None = None,
) -> Rate:
    """The mean of a measure with its percentile-bootstrap 95 % interval.

    With `groups`, a name for each case, whole groups are drawn instead of cases: cases of one picture are correlated.
    """
    sample = np.asarray(values, dtype=float)
    if sample.size == 0:
        raise ValueError("a mean needs at least one case")
    if groups is not None and len(groups) != sample.size:
        raise ValueError(f"{sample.size} cases, but {len(groups)} names of groups")
    low, high = _interval(sample.tobytes(), None if groups is None else tuple(groups), seed)
    return Rate(float(sample.mean()), low, high, int(sample.size), control)


@lru_cache(maxsize=1024)  # metrics and every mark of a report ask for the same rates
def _interval(values: bytes, groups: tuple[str, ...] | None, seed: int) -> tuple[float, float]:
    """The interval of `bootstrap_mean`, from float64 values."""
    sample, drawn = np.frombuffer(values), generator(seed, "bootstrap")
    if groups is None:
        resampled = drawn.choice(sample, (RESAMPLES, sample.size)).mean(1)
    else:
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        sums, counts = np.bincount(group, sample), np.bincount(group)
        chosen = drawn.integers(0, len(counts), (RESAMPLES, len(counts)))
        resampled = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = (float(v) for v in np.quantile(resampled, (0.025, 0.975)))
    return low, high


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits [.., V], in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def paired_p(done: Sequence[bool] | np.ndarray, control: Sequence[bool] | np.ndarray) -> float:
    """One-sided exact p-value that an intervention hits no more cases than its control on the same cases.

    McNemar's test in its exact form: of the cases where only one of the two hits, at least as many hits of the
    intervention as were seen, if either were as likely. 1 when none differs.
    """
    a, b = np.asarray(done, bool), np.asarray(control, bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} cases of the intervention, but {b.size} of the control")
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    n = gained + lost
    return sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values q, of any shape, that control the false discovery rate (Benjamini and Hochberg 1995).

    `q[i] = min over j with p[j] >= p[i] of p[j] * m / rank(j)`, at most 1: rejecting all with q <= alpha keeps the
    expected share of false rejections below alpha when the tests are independent or positively dependent.
    """
    values = np.asarray(p, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p-values lie between 0 and 1")
    flat = values.ravel()
    order = np.argsort(flat, kind="stable")
    raised = flat[order] * len(flat) / np.arange(1, len(flat) + 1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1.0)
    return adjusted.reshape(values.shape)


def permutation_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """One-sided p-values (r + 1) / (n + 1) of `observed` [..]: r of the n null draws [n, ..] are at least as large
    (Phipson and Smyth 2010), so never 0.
    """
    observed, null = np.asarray(observed), np.asarray(null)
    return ((null >= observed).sum(0) + 1) / (len(null) + 1)


SHARE_FLOOR = 0.03  # of a share: what 100 cases without a single failure leave open at 95 % (the rule of three)
VALUE_FLOOR = 0.05  # of any other number, relative to its mean
RULE = (
    "lowest and highest value over the seeds, widened on both sides by the larger of the spread between the seeds and "
    "the half-width of the 95 % interval of any seed; of a number without an interval, by the spread or "
    f"{SHARE_FLOOR:g} of a share, {VALUE_FLOOR:.0%} of the mean of anything else; shares stay within 0 and 1; rounded "
    "outwards to two decimals (three digits)"
)


def half_width(value: float, low: float, high: float) -> float:
    """The longer side of an interval around a value."""
    return max(value - low, high - value, 0.0)


def suggested_range(values: Sequence[float], half_widths: Sequence[float], share: bool) -> tuple[float, float]:
    """The range by `RULE` of values, one per seed, from the half-widths of those that have an interval; `share` says
    whether the number is a share of cases.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a range needs finite values: {list(values)}")
    low, high = min(values), max(values)
    floor = SHARE_FLOOR if share else VALUE_FLOOR * abs(sum(values) / len(values))
    margin = max([*(half_widths or [floor]), high - low])
    if share:
        return _outwards(max(low - margin, 0.0), -1, 2), _outwards(min(high + margin, 1.0), 1, 2)
    size = max(abs(low - margin), abs(high + margin))
    decimals = 2 - math.floor(math.log10(size)) if size else 2
    return _outwards(low - margin, -1, decimals), _outwards(high + margin, 1, decimals)


def _outwards(value: float, sign: int, decimals: int) -> float:
    """Round up for sign 1, down for -1; a value that float arithmetic alone moved past a decimal stays there."""
    scaled = round(value * 10.0**decimals, 6)
    return round((math.ceil(scaled) if sign > 0 else math.floor(scaled)) / 10.0**decimals, max(decimals, 0))


def without_baselines(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the trials themselves and of their controls; a table of an earlier version has no baselines."""
    return table[table.baseline == ""] if "baseline" in table else table


def rates(table: pd.DataFrame, by: Sequence[str], measure: str = "hit") -> pd.DataFrame:
    """A measure (a column) of each group of trials, rows of `run_trials`, with its interval, controls and p-value.

    Where a case occurs several times, the bootstrap draws whole cases. Baselines count only if `by` has `baseline`.

    Returns:
        Indexed by `by`: `value`, `ci_low`, `ci_high` (bootstrap, 95 %), `cases`, `edited` features, `matched` and
        `random_direction` (means over all draws, NaN without one), `p` (exact, one-sided, paired with the first matched
        draw) and `q` (corrected over all rows, Benjamini and Hochberg); p and q only of shares.
    """
    rows: dict[Any, dict[str, float]] = {}
    table = table if "baseline" in by else without_baselines(table)
    groupings = cast(Any, table.groupby(list(by), sort=False, dropna=False))  # pandas' own types are too wide
    for key, group in groupings:
        done = group[group.control == ""]
        values = done[measure].to_numpy()
        share = values.dtype == bool
        repeated = "case" in done and bool(done["case"].duplicated().any())
        rate = (bootstrap_rate if share else bootstrap_mean)(values, groups=done["case"] if repeated else None)
        row = {"value": rate.value, "ci_low": rate.ci_low, "ci_high": rate.ci_high, "cases": rate.cases}
        row["edited"] = int(done.features.max())
        for control in ("matched", "random_direction"):
            drawn = group[group.control == control].groupby("draw", sort=False)
            draws = [draw[measure].to_numpy() for _, draw in drawn]
            row[control] = float(np.mean([draw.mean() for draw in draws])) if draws else np.nan
            if control == "matched":
                row["p"] = paired_p(values, draws[0]) if draws and share else np.nan
        rows[key if len(by) > 1 else key[0]] = row
    return corrected(indexed(rows, by))


def indexed(rows: dict[Any, dict[str, float]], by: Sequence[str]) -> Any:
    """Rows by key as a frame whose index has the levels `by`."""
    frame: Any = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=by) if len(by) > 1 else frame.index.rename(by[0])
    return frame


def corrected(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `rates`, of several calls perhaps, with `q` corrected over all of them together."""
    known = rows.p.notna().to_numpy()
    q = np.full(len(rows), np.nan)
    q[known] = benjamini_hochberg(rows.p.to_numpy(float)[known])
    return rows.assign(q=q)


def measured(table: pd.DataFrame, by: Sequence[str], measures: Mapping[str, str]) -> pd.DataFrame:
    """`rates` of each operation by its own measure ("hit" where none is given), q corrected over all rows together."""
    by_operation = table.groupby("operation", sort=False)
    parts = [rates(part, by, measures.get(str(name), "hit")) for name, part in by_operation]
    return corrected(pd.concat(parts))


CELL = ["question", "recipient", "donor"]
ALPHA = 0.01  # the false discovery rate below which a cell counts as above its control


def cell_means(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Means over cells (levels `CELL` of rows of `rates`), each counted once whatever its number of cases.

    Returns:
        Indexed by `by`: the columns of `rates` without p and q, with `cases` the number of cells and an interval that
        draws unordered pairs of concepts, since a pair's cells share one circuit; and `lowest`, `highest` (cell) and
        `significant`, the share of cells whose q is below `ALPHA`.
    """
    means: dict[Any, dict[str, float]] = {}
    groups = cast(Any, rows.groupby(level=list(by), sort=False))
    for key, cells in groups:
        pairs = ["-".join(sorted(pair)) for pair in cells.reset_index()[["recipient", "donor"]].to_numpy()]
        mean = bootstrap_rate(cells.value.to_numpy(), groups=pairs)
        means[key if len(by) > 1 else key[0]] = {
            "value": mean.value, "ci_low": mean.ci_low, "ci_high": mean.ci_high, "cases": mean.cases,
            "edited": cells.edited.max(), "matched": cells.matched.mean(),
            "random_direction": cells.random_direction.mean(), "lowest": cells.value.min(),
            "highest": cells.value.max(),
            "significant": (cells.q < ALPHA).mean() if cells.q.notna().any() else np.nan,
        }  # fmt: skip
    return indexed(means, by)


def worst(rows: pd.DataFrame, over: str) -> pd.DataFrame:
    """Of rows of `rates`, those with the least value over the level `over`, next to the highest controls of any."""
    others = [name for name in rows.index.names if name != over]
    groups = rows.groupby(level=others, sort=False)
    lowest: Any = rows.loc[groups["value"].idxmin()]
    for control in ("matched", "random_direction"):
        lowest[control] = np.asarray(groups[control].max())
    return lowest.droplevel(over)


def trial_metrics(table: pd.DataFrame, trials: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, float]:
    """`steer/main` (the worst question) with `_ci_low`, `_ci_high`, `_control`, and `steer/main/name`.

    A setting of several modes gives `steer/frozen/direct`, one of several strengths or limits `steer/dose/strength_2`
    (the worst question) alone; several places are in the table. A baseline gives `steer/main/only_writers`, also the
    worst question. Further measures of a setting are means over its cases: `steer/unrelated_kl`.
    """
    metrics: dict[str, float] = {}
    axes = ["positions", "layers", "strength", "limit"]
    key: Any
    part: Any
    for key, part in without_baselines(table).groupby(["operation", "setting"], sort=False):
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
        for mode, runs in part.groupby("mode", sort=False):
            name = f"{operation}/{setting}" + (f"/{mode}" if several else "")
            shares: Any = rates(runs, ["setting", "question"], measure)
            by_question = {f"{name}/{question}": row.value for (_, question), row in shares.iterrows()}
            metrics |= {f"{name}_{extra}": float(runs[runs.control == ""][extra].mean()) for extra in others}
            if "/" in operation:  # another set's features on a question: no question is the worst of them
                metrics |= by_question
                continue
            row = (worst(shares, "question") if len(shares) > 1 else shares).iloc[0]
            metrics |= {name: row.value, f"{name}_ci_low": row.ci_low, f"{name}_ci_high": row.ci_high}
            if not np.isnan(row.matched):
                metrics[f"{name}_control"] = row.matched
            if len(shares) > 1 and not several:
                metrics |= by_question
            same = (table.operation == operation) & (table.setting == setting) & (table["mode"] == mode)
            if "baseline" in table and (same & (table.baseline != "")).any():
                variants: Any = rates(table[same & (table.baseline != "")], ["baseline", "question"], measure)
                lowest = variants.groupby(level="baseline", sort=False)["value"].min()
                metrics |= {f"{name}/{baseline}": value for baseline, value in lowest.items()}
    return metrics


def measures_of(trial: Mapping[str, Any], setting: Mapping[str, Any]) -> list[str]:
    """What is counted of a trial in a setting, both as mappings; the first is the rate."""
    return list(setting["measures"]) or [trial["measure"]]


def counted(trials: Mapping[str, Any], settings: Mapping[str, Any], operation: str, setting: str) -> list[str]:
    """`measures_of` of a row's trial and setting; "hit" of trials that an analysis adds."""
    trial, where = trials.get(operation.partition("/")[0]), settings.get(setting)
    if trial is None or where is None:
        return ["hit" if trial is None else trial.measure]
    return measures_of(vars(trial), vars(where))


def cell_metrics(table: pd.DataFrame, trials: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, float]:
    """`steer/main`, the mean over cells of recipient, donor and question, with its interval, and `steer/main/name`.

    `_control` is the mean over cells, `_lowest` and `_highest` are cells, `_significant` the share above its control.
    """
    by = ["operation", "setting"]
    cells = measured(table, [*by, *CELL], {name: trial.measure for name, trial in trials.items()})
    metrics: dict[str, float] = {"cells": float(len(cells.groupby(level=CELL)))}
    key: Any
    row: Any
    for key, row in cell_means(cells, by).iterrows():
        name = "/".join(key)
        metrics |= {name: row.value, f"{name}_ci_low": row.ci_low, f"{name}_ci_high": row.ci_high}
        more = {"control": row.matched, "lowest": row.lowest, "highest": row.highest, "significant": row.significant}
        metrics |= {f"{name}_{kind}": float(value) for kind, value in more.items() if value == value}
    for key, row in cell_means(cells, [*by, "question"]).iterrows():
        metrics["/".join(key)] = row.value
    return metrics
