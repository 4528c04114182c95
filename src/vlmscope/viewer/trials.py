"""Trials of an experiment as the workbench shows them: rates with intervals, controls and baselines, and claims."""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from vlmscope.config.catalog import first_comment
from vlmscope.core.artifacts import read_yaml, shipped
from vlmscope.core.errors import UserError
from vlmscope.metrics.rates import CASE, CONTROLS, draws_of, measures_of, rates
from vlmscope.viewer.safety import Refused

TABLE, CLAIMS = "trials.parquet", "claims.parquet"
_ONCE = threading.Lock()
_BY = ("setting", "baseline", "mode", "layers", "positions", "strength", "question")
_NONE = {"baseline": "", "mode": "", "layers": "", "positions": "", "strength": None, "question": ""}


def trials_body(folder: Path, name: str) -> dict[str, Any]:
    """Rates of every trial, setting, place and question of a run, and its table of claims."""
    path = folder / TABLE
    if not path.is_file():
        raise Refused(f"{name[:200]} has no {TABLE}", 404)
    with _ONCE:  # two tabs wait for one computation
        return _body(folder, name, path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _body(folder: Path, name: str, changed: int) -> dict[str, Any]:
    """As above, kept while the table does not change."""
    table = _read(folder / TABLE)
    missing = sorted({"operation", "setting", "control", "draw", "features"} - set(table))
    if missing:
        raise UserError(f"{name}/{TABLE} is not a table of trials: it lacks {', '.join(missing)}")
    settings = read_yaml(folder / "config.yaml")
    settings = settings if isinstance(settings, dict) else {}
    rows = []
    for (operation, setting), part in table.groupby(["operation", "setting"], sort=False):
        rows += _rows(part, str(operation), _measures(settings, str(operation), str(setting), part))
    title = str(settings.get("name") or name)
    claims = _claims(_read(folder / CLAIMS)) if (folder / CLAIMS).is_file() else []
    return {"id": name, "title": title, "hypothesis": _hypothesis(title), "rows": rows, "claims": claims}


def _read(path: Path) -> Any:
    """A table; pandas' own types say less than is known of it."""
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path.name}: {str(error).splitlines()[0]}") from error


def _measures(settings: dict[str, Any], operation: str, setting: str, table: Any) -> list[str]:
    """What the experiment counts of a trial in a setting; hits where its configuration does not tell."""
    try:
        named = measures_of(settings["trials"][operation], settings["settings"][setting])
    except (KeyError, TypeError):
        named = ["hit"]
    return [name for name in named if name in table and table[name].notna().any()]


def _rows(table: Any, operation: str, measures: list[str]) -> list[dict[str, Any]]:
    by = [column for column in _BY if column in table]
    out = []
    for measure in measures:
        # The table is wide, and every selection of rows copies all its columns.
        read = [*by, *CASE, measure, "control", "draw", "features", "weak", "moved", "displacement"]
        narrow = table[[column for column in dict.fromkeys(read) if column in table]]
        found = rates(narrow, by, measure)
        groups = dict(iter(narrow.groupby(by, sort=False, dropna=False)))
        for key, row in found.iterrows():
            place = _NONE | {"trial": operation, "measure": measure} | dict(zip(by, _plain(key), strict=True))
            own = {
                "control": "",
                "rate": _number(row["value"]),
                "low": _number(row.ci_low),
                "high": _number(row.ci_high),
            }
            if own["rate"] is None:
                continue
            out.append({**place, **own, "n": int(row.cases), "draws": 0})
            for control in CONTROLS:
                draws = draws_of(groups[key], measure, control).means
                if len(draws):
                    spread = {"rate": float(draws.mean()), "low": float(draws.min()), "high": float(draws.max())}
                    out.append({**place, "control": control, **spread, "n": int(row.cases), "draws": len(draws)})
    return out


def _plain(key: Any) -> tuple[Any, ...]:
    """A key of pandas as plain values; NaN is None."""
    values = key if isinstance(key, tuple) else (key,)
    return tuple(_number(value) if isinstance(value, float) else value for value in values)


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _claims(table: Any) -> list[dict[str, Any]]:
    rows = []
    for row in table.to_dict("records"):
        of = {"value": "value", "low": "ci_low", "high": "ci_high", "other": "other", "p": "p"}
        numbers = {key: _number(row.get(column)) for key, column in of.items()}
        words = {key: str(row.get(key) or "") for key in ("claim", "question", "decided_by", "reason")}
        rows.append({"trial": str(row["operation"]), **words, "shown": bool(row["shown"]), **numbers})
    return rows


def _hypothesis(experiment: str) -> str:
    """The first comment of a shipped experiment's YAML: what it asks."""
    file = shipped("conf/experiment") / f"{Path(experiment).name}.yaml"
    return first_comment(file) if file.is_file() else ""
