"""Queries on tables of causal trials (`trials.parquet`): rates with intervals, controls and corrected p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd

from vlmscope.metrics.causal import benjamini_hochberg, bootstrap_mean, bootstrap_rate, paired_p


def rates(table: pd.DataFrame, by: Sequence[str], measure: str = "hit") -> pd.DataFrame:
    """A measure (a column) of each group of trials, rows of `run_trials`, with its interval, controls and p-value.

    Where a case occurs several times, the bootstrap draws whole cases.

    Returns:
        Indexed by `by`: `value`, `ci_low`, `ci_high` (bootstrap, 95 %), `cases`, `edited` features, `matched` and
        `random_direction` (means over all draws, NaN without one), `p` (exact, one-sided, paired with the first matched
        draw) and `q` (corrected over all rows, Benjamini and Hochberg); p and q only of shares.
    """
    found: dict[Any, dict[str, float]] = {}
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
        found[key if len(by) > 1 else key[0]] = row
    return corrected(indexed(found, by))


def indexed(found: dict[Any, dict[str, float]], by: Sequence[str]) -> Any:
    """Rows by key as a frame whose index has the levels `by`."""
    rows: Any = pd.DataFrame.from_dict(found, orient="index")
    rows.index = pd.MultiIndex.from_tuples(rows.index, names=by) if len(by) > 1 else rows.index.rename(by[0])
    return rows


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
    found: dict[Any, dict[str, float]] = {}
    groups = cast(Any, rows.groupby(level=list(by), sort=False))
    for key, cells in groups:
        pairs = ["-".join(sorted(pair)) for pair in cells.reset_index()[["recipient", "donor"]].to_numpy()]
        mean = bootstrap_rate(cells.value.to_numpy(), groups=pairs)
        found[key if len(by) > 1 else key[0]] = {
            "value": mean.value, "ci_low": mean.ci_low, "ci_high": mean.ci_high, "cases": mean.cases,
            "edited": cells.edited.max(), "matched": cells.matched.mean(),
            "random_direction": cells.random_direction.mean(), "lowest": cells.value.min(),
            "highest": cells.value.max(),
            "significant": (cells.q < ALPHA).mean() if cells.q.notna().any() else np.nan,
        }  # fmt: skip
    return indexed(found, by)


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
    (the worst question) alone; several places are in the table. Further measures of a setting are means over its cases:
    `steer/unrelated_kl`.
    """
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
