"""Statistics of causal claims: rates with intervals, ranks among control draws, p-values and their correction, ranges
over seeds; and queries on tables of trials (`trials.parquet`) that give them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import betaincinv, stdtrit

from vlmscope.core.records import generator
from vlmscope.core.results import Rate

RESAMPLES = 2000
_Z = 1.959963984540054  # two-sided 95 %


def rate_of(values: Sequence[float] | np.ndarray, groups: Sequence[str] | None = None) -> Rate:
    """The mean of a measure with its 95 % interval: `share_rate` of booleans, `bootstrap_mean` of anything else."""
    sample = np.asarray(values)
    return (share_rate if sample.dtype == bool else bootstrap_mean)(sample, groups=groups)


def share_rate(
    hits: Sequence[bool] | np.ndarray, seed: int = 0, control: float | None = None, groups: Sequence[str] | None = None
) -> Rate:
    """The share of hits (or the mean of shares) with its 95 % interval.

    Of independent cases the exact binomial interval (Clopper and Pearson 1934): 99 of 100 reads as 94.6 to 100 %. With
    `groups` that repeat, as for `bootstrap_mean`, the cluster bootstrap, but never narrower than the exact interval of
    the effective number of cases: few groups, or groups that agree, make every resample look alike.
    """
    sample = np.asarray(hits, dtype=float)
    rate = bootstrap_mean(sample, seed, control, groups)
    size = float(len(sample)) if groups is None else effective_size(sample, groups)
    low, high = _exact(rate.value * size, size)
    if size == len(sample):
        return replace(rate, ci_low=low, ci_high=high)
    return replace(rate, ci_low=min(low, rate.ci_low), ci_high=max(high, rate.ci_high))


def effective_size(sample: np.ndarray, groups: Sequence[str]) -> float:
    """How many independent cases say as much as these grouped ones (Korn and Graubard 1998).

    n = p (1 - p) / v with v the variance of the mean between groups, at most the number of cases, times the squared
    ratio of Student's quantiles for cases and for groups; the number of groups where these agree, so that v is 0.
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    p, count, cases = sample.mean(), int(group.max()) + 1, len(sample)
    if count == cases:
        return float(cases)
    excess = np.bincount(group, sample) - p * np.bincount(group)
    variance = count / max(count - 1, 1) * float((excess**2).sum()) / cases**2
    if variance <= 1e-12:
        return float(count)
    quantiles = [float(stdtrit(size - 1, 0.975)) for size in (cases, count)]
    return min(p * (1 - p) / variance, cases) * (quantiles[0] / quantiles[1]) ** 2


def _exact(hits: float, n: float) -> tuple[float, float]:
    """The Clopper-Pearson 95 % interval of a share, by quantiles of the beta distribution."""
    low = float(betaincinv(hits, n - hits + 1, 0.025)) if hits > 0 else 0.0
    return low, float(betaincinv(hits + 1, n - hits, 0.975)) if hits < n else 1.0


def wilson_interval(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a binomial share [..] seen in n [..] >= 1 cases: low [..] and high [..]."""
    n = np.asarray(n, np.float64)
    middle = share + _Z**2 / (2 * n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return np.clip((middle - half) / scale, 0, 1), np.clip((middle + half) / scale, 0, 1)


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
    assert sample.size and (groups is None or len(groups) == sample.size), "a mean of no case, or groups of other cases"
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
    """One-sided exact p-value that one run hits no more cases than another on the same cases.

    For runs that differ in nothing drawn, such as a trial and its baseline: the cases are then what is random. Of a
    control, the draw is, which `rates` ranks.

    McNemar's test in its exact form: of the cases where only one of the two hits, at least as many hits of the
    intervention as were seen, if either were as likely. 1 when none differs.
    """
    a, b = np.asarray(done, bool), np.asarray(control, bool)
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    n = gained + lost
    return sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values q, of any shape, that control the false discovery rate (Benjamini and Hochberg 1995).

    `q[i] = min over j with p[j] >= p[i] of p[j] * m / rank(j)`, at most 1: rejecting all with q <= alpha keeps the
    expected share of false rejections below alpha when the tests are independent or positively dependent.
    """
    values = np.asarray(p, np.float64)
    assert ((values >= 0) & (values <= 1)).all(), "p-values lie between 0 and 1"
    flat = values.ravel()
    order = np.argsort(flat, kind="stable")
    raised = flat[order] * len(flat) / np.arange(1, len(flat) + 1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1.0)
    return adjusted.reshape(values.shape)


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values [n] that control the chance of any false rejection, whatever hangs together (Holm 1979).

    `adjusted[i] = max over j with p[j] <= p[i] of p[j] (n + 1 - rank(j))`, at most 1.
    """
    values = np.asarray(p, np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1.0)
    return adjusted


def permutation_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """One-sided p-values (r + 1) / (n + 1) of `observed` [..]: r of the n null draws [n, ..] are at least as large
    (Phipson and Smyth 2010), so never 0.
    """
    observed, null = np.asarray(observed), np.asarray(null)
    return ((null >= observed).sum(0) + 1) / (len(null) + 1)


LEAST_DRAWS = 19  # of a control: no rank among fewer has p <= 0.05
CONTROLS = ("matched", "random_direction")
NO_CONTROL = "no control was run"
SHARE_FLOOR = 0.03  # of a share: what 100 cases without a single failure leave open at 95 % (the rule of three)
VALUE_FLOOR = 0.05  # of any other number, relative to its mean
RULE = (
    "made on seeds other than the one that is tested: lowest and highest value, widened on both sides by the larger "
    "of the spread between the seeds and the half-width of the 95 % interval of any seed; of a number without an "
    f"interval, by the spread or {SHARE_FLOOR:g} of a share, {VALUE_FLOOR:.0%} of the mean of anything else; shares "
    "stay within 0 and 1; rounded outwards to two decimals (three digits)"
)


def half_width(value: float, low: float, high: float) -> float:
    """The longer side of an interval around a value."""
    return max(value - low, high - value, 0.0)


def suggested_range(values: Sequence[float], half_widths: Sequence[float], share: bool) -> tuple[float, float]:
    """The range by `RULE` of values, one per seed, from the half-widths of those that have an interval; `share` says
    whether the number is a share of cases.
    """
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


def without_baselines(table: Any) -> pd.DataFrame:
    """Rows of the trials themselves and of their controls; a table of an earlier version has no baselines."""
    return table[table.baseline == ""] if "baseline" in table else table


@dataclass(frozen=True)
class Draws:
    """The control draws of a trial that bite, and what is wrong with the others.

    A draw that moves the residual stream by less than half of what the edit does (`weak` in the table) is no control.
    """

    means: np.ndarray  # [n], the measure's mean under each draw that counts
    numbers: tuple[int, ...]  # of these draws
    control: str  # their kind
    reason: str  # why there is none; "" when there is
    value: float = np.nan  # the trial's own mean on the cases that were drawn on

    @property
    def rank(self) -> int:
        """The rank of the trial among itself and the draws, 1 being above all of them."""
        return 1 + int((self.means >= self.value).sum())

    @property
    def p(self) -> float:
        """The p-value of that rank; NaN without a draw that counts."""
        known = len(self.means) and self.value == self.value
        return float(permutation_p(np.asarray(self.value), self.means)) if known else np.nan


def deciding_control(group: pd.DataFrame) -> str:
    """Matched draws, or random directions where none was drawn."""
    return "matched" if (group.control == "matched").any() else "random_direction"


def numbered(table: Any) -> Any:
    """The table with a column `case_number`, equal in rows of the same case: made once, as comparing texts is slow."""
    keys = [column for column in CASE if column in table]
    numbers = table.groupby(keys, sort=False, dropna=False).ngroup() if keys else 0
    return table.assign(case_number=numbers)


def draws_of(group: pd.DataFrame, measure: str, control: str | None = None) -> Draws:
    """The draws of a control in rows of one trial; by default matched ones, or random directions where none was drawn.

    The control whose draws are the harder to tell from the trial decides, as it has the edit's own kind of content.
    """
    kind = control or deciding_control(group)
    group = group if "case_number" in group else numbered(group)
    rows: Any = group[group.control == kind]
    edit: Any = group[group.control == ""]
    if rows.empty:
        return Draws(np.empty(0), (), kind, NO_CONTROL)
    weak: Any = rows.weak if "weak" in rows else pd.Series(False, rows.index)
    refused = weak.groupby(rows.draw, sort=False).any()
    means: Any = rows.groupby("draw", sort=False)[measure].mean()
    if not refused.all():
        counted = means[~refused]
        same = edit.case_number.isin(rows.case_number)
        return Draws(counted.to_numpy(float), tuple(counted.index), kind, "", float(edit[measure][same].mean()))
    # A draw may bite on some questions or cases and not on others: those where it does not are what refuses it.
    ratio = float(rows.moved[weak].median()) if "moved" in rows else displacement_ratio(rows, edit)
    return Draws(np.empty(0), (), kind, f"control too weak: it moves {ratio:.2g} of what the edit does")


def displacement_ratio(rows: pd.DataFrame, edit: pd.DataFrame) -> float:
    """The median displacement of the residual stream in some rows over that in rows of the edit itself; NaN where it
    was not measured, or the edit moves nothing.
    """
    if "displacement" not in edit or not len(edit) or not (moved := float(np.median(edit.displacement))):
        return np.nan
    return float(np.median(rows.displacement)) / moved


def rates(table: pd.DataFrame, by: Sequence[str], measure: str = "hit") -> pd.DataFrame:
    """A measure (a column) of each group of trials, rows of `run_trials`, with its interval, controls and rank.

    Where a case occurs several times, intervals draw whole cases. Baselines count only if `by` has `baseline`.

    Returns:
        Indexed by `by`: `value`, `ci_low`, `ci_high` (95 %), `cases`, `edited` features, `matched` and
        `random_direction` (means over the draws that bite, NaN without one), the trial's `rank` among itself and the
        `draws` (their number), the rank's `p` = rank / (1 + draws), NaN for the `reason` when no draw counts, and `q`
        (see `corrected`).
    """
    rows: dict[Any, dict[str, Any]] = {}
    table = table if "baseline" in by else without_baselines(table)
    # Every selection of rows copies all columns of the table, and those of Arrow's texts slowly: few, and as objects.
    read = ["case", "case_number", measure, "control", "draw", "features", "weak", "moved", "displacement"]
    narrow: Any = numbered(table).filter(list(dict.fromkeys(read)))
    narrow = narrow.astype({column: object for column in ("case", "control") if column in narrow})
    groupings = narrow.groupby([table[column] for column in by], sort=False, dropna=False)
    for key, group in groupings:
        done = group[group.control == ""]
        repeated = "case" in done and bool(done["case"].duplicated().any())
        rate = rate_of(done[measure].to_numpy(), done["case"].astype(str) if repeated else None)
        row = {"value": rate.value, "ci_low": rate.ci_low, "ci_high": rate.ci_high, "cases": rate.cases}
        row["edited"] = int(done.features.max())
        drawn = {control: draws_of(group, measure, control) for control in CONTROLS}
        row |= {name: float(each.means.mean()) if len(each.means) else np.nan for name, each in drawn.items()}
        draws = drawn[deciding_control(group)]
        row |= {"p": draws.p, "rank": draws.rank, "draws": len(draws.means)}
        unknown = "" if rate.value == rate.value else "not measured"
        rows[key if len(by) > 1 else key[0]] = row | {"reason": draws.reason or unknown}
    return corrected(indexed(rows, by))


def indexed(rows: dict[Any, dict[str, Any]], by: Sequence[str]) -> Any:
    """Rows by key as a frame whose index has the levels `by`."""
    frame: Any = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=by) if len(by) > 1 else frame.index.rename(by[0])
    return frame


def corrected(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of `rates`, of several calls perhaps, with `q`: p corrected over all of them that have `LEAST_DRAWS` draws.

    Benjamini and Hochberg's correction, not Holm's, which no rank among few draws passes beside other rows. A rank
    among fewer draws tests nothing, whatever the trial does: it has no q and does not count against the others.
    """
    tested = (rows.p.notna() & (rows.draws >= LEAST_DRAWS)).to_numpy(bool)
    q = np.full(len(rows), np.nan)
    q[tested] = benjamini_hochberg(rows.p.to_numpy(float)[tested])
    return rows.assign(q=q)


def measured(table: pd.DataFrame, by: Sequence[str], measures: Mapping[str, str]) -> pd.DataFrame:
    """`rates` of each operation by its own measure ("hit" where none is given), q corrected over all rows together."""
    by_operation = table.groupby("operation", sort=False)
    parts = [rates(part, by, measures.get(str(name), "hit")) for name, part in by_operation]
    return corrected(pd.concat(parts))


CASE = ["cases", "set", "question", "recipient", "donor", "case"]  # columns that make two rows the same case
CELL = ["question", "recipient", "donor"]


def cell_means(rows: Any, by: Sequence[str]) -> Any:
    """Means over cells (levels `CELL` of rows of `rates`), each counted once whatever its number of cases.

    Returns:
        Indexed by `by`: the columns of `rates` without ranks, with `cases` the number of cells and an interval that
        draws unordered pairs of concepts, since a pair's cells share one circuit; and `lowest`, `highest` (cell).
    """
    means: dict[Any, dict[str, float]] = {}
    for key, cells in rows.groupby(level=list(by), sort=False):
        pairs = ["-".join(sorted(pair)) for pair in cells.reset_index()[["recipient", "donor"]].to_numpy()]
        mean = share_rate(cells.value.to_numpy(), groups=pairs)
        means[key if len(by) > 1 else key[0]] = {
            "value": mean.value, "ci_low": mean.ci_low, "ci_high": mean.ci_high, "cases": mean.cases,
            "edited": cells.edited.max(), "matched": cells.matched.mean(),
            "random_direction": cells.random_direction.mean(), "lowest": cells.value.min(),
            "highest": cells.value.max(),
        }  # fmt: skip
    return indexed(means, by)


def worst(rows: pd.DataFrame) -> pd.DataFrame:
    """Of rows of `rates`, those with the least value over the level `question`, next to the highest controls and the
    weakest evidence (rank, p, q) of any.
    """
    others = [name for name in rows.index.names if name != "question"]
    groups = rows.groupby(level=others, sort=False)
    # A value that could not be measured is not the least one.
    lowest: Any = rows.loc[rows["value"].fillna(np.inf).groupby(level=others, sort=False).idxmin()]
    for control in CONTROLS:
        lowest[control] = np.asarray(groups[control].max())
    weakest = rows.loc[rows.p.fillna(2.0).groupby(level=others, sort=False).idxmax()]  # unknown is weaker than 1
    for column in ("p", "q", "rank", "draws", "reason"):
        lowest[column] = weakest[column].to_numpy()
    return lowest.droplevel("question")


def trial_metrics(table: pd.DataFrame, trials: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, float]:
    """`steer/main` (the worst question) with `_ci_low`, `_ci_high`, `_control`, and `steer/main/name`.

    `_changed` and `_control_changed` are the shares of answers that change at all, the least and the highest of any
    question. A setting of several modes gives `steer/frozen/direct`, one of several strengths or limits
    `steer/dose/strength_2` (the worst question) and its `_control` alone; several places are in the table. A baseline
    gives `steer/main/only_writers`, also the worst question. Further measures of a setting are means over its cases:
    `steer/unrelated_kl`.
    """
    metrics: dict[str, float] = {}
    axes = ["positions", "layers", "strength", "limit"]
    own: Any = without_baselines(table)
    for key, part in own.groupby(["operation", "setting"], sort=False):
        operation, setting = map(str, key)
        measure, *others = counted(trials, settings, operation, setting)
        varied = [axis for axis in axes if (part.groupby(["mode", "question"])[axis].nunique(dropna=False) > 1).any()]
        if varied in (["strength"], ["limit"]) and part["mode"].nunique() == 1:
            doses: Any = rates(part, [*varied, "question"], measure)
            for dose, row in worst(doses).iterrows():
                name = f"{operation}/{setting}/{varied[0]}_{dose:g}"
                metrics |= {name: row.value} | known({f"{name}_control": row.matched})
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
            row = worst(shares).iloc[0]
            metrics |= rate_metrics(name, row)
            if "changed" in runs and "changed" not in (measure, *others):
                moved = worst(rates(runs, ["setting", "question"], "changed")).iloc[0]
                metrics |= known({f"{name}_changed": moved.value, f"{name}_control_changed": moved.matched})
            if len(shares) > 1 and not several:
                metrics |= by_question
            same: Any = (table.operation == operation) & (table.setting == setting) & (table["mode"] == mode)
            if "baseline" in table and (same & (table.baseline != "")).any():
                variants: Any = rates(table.loc[same & (table.baseline != "")], ["baseline", "question"], measure)
                lowest = variants.groupby(level="baseline", sort=False)["value"].min()
                metrics |= {f"{name}/{baseline}": value for baseline, value in lowest.items()}
    return metrics


def rate_metrics(name: str, row: Any) -> dict[str, float]:
    """Metrics `name`, `_ci_low`, `_ci_high` and, if there is one, `_control` (matched) of a row of `rates`."""
    interval = {name: float(row.value), f"{name}_ci_low": float(row.ci_low), f"{name}_ci_high": float(row.ci_high)}
    return interval | known({f"{name}_control": row.matched})


def known(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers that are not NaN."""
    return {name: float(value) for name, value in numbers.items() if value == value}


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

    `_control` is the mean over cells, `_lowest` and `_highest` are cells; `_changed` and `_control_changed` are means.
    """
    by = ["operation", "setting"]
    cells = measured(table, [*by, *CELL], {name: trial.measure for name, trial in trials.items()})
    metrics: dict[str, float] = {"cells": float(len(cells.groupby(level=CELL)))}
    for key, row in cell_means(cells, by).iterrows():
        name = "/".join(key)
        metrics |= rate_metrics(name, row) | {f"{name}_lowest": row.lowest, f"{name}_highest": row.highest}
    if "changed" in table:
        for key, row in cell_means(rates(table, [*by, *CELL], "changed"), by).iterrows():
            name = "/".join(key)
            metrics |= known({f"{name}_changed": row.value, f"{name}_control_changed": row.matched})
    for key, row in cell_means(cells, [*by, "question"]).iterrows():
        metrics["/".join(key)] = row.value
    return metrics
