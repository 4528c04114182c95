"""Parts of an experiment's report, each drawn from the tables of a run folder as its mark says (docs/experiments.md).

A run folder has `trials.parquet` (one row per case, trial and control draw), and as far as the experiment makes them
`examples.parquet` (answers before and after), `evidence.parquet` (features of supernodes with examples), `circuits/`,
`graph.safetensors` and `figures/`. No model is needed: a report is drawn again from its folder in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import AnswerExample, CircuitFeature, Curve, FeatureExample, FlipRow, Rate, Supernode
from vlmscope.core.records import FeatureId, PatchBox
from vlmscope.metrics.causal import bootstrap_mean, bootstrap_rate
from vlmscope.metrics.table import CELL, cell_means, corrected, rates, worst
from vlmscope.report import figures
from vlmscope.report.experiment_figures import word_bars
from vlmscope.report.figures import share_matrices
from vlmscope.report.page import (
    Card,
    Cards,
    Examples,
    Features,
    Figure,
    Percent,
    Picture,
    Section,
    Table,
    Text,
    flip_table,
)
from vlmscope.report.style import label

AXES = ["positions", "layers", "strength", "limit"]  # of a setting, besides its mode
LISTED = 24  # members of a supernode in a report; all are in circuits/ of the run folder


class Declared(Protocol):
    """A mark, as `vlmscope.circuits.config.MarkConfig` declares it."""

    mark: str
    title: str
    trials: list[str]
    x: str | None
    by: str | None
    y: str | None
    says: str
    top: int
    file: str | None


@dataclass(frozen=True)
class Folder:
    """A run folder as marks read it: what the rate of each "operation/setting" counts, and the declared settings."""

    path: Path
    measures: Mapping[str, str] = field(default_factory=dict)
    settings: Collection[str] = ()

    def file(self, name: str) -> Path:
        """A file of the folder.

        Raises:
            UserError: the run has none of this name.
        """
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; a mark of the report shows it, and this run did not make it")
        return path

    @cached_property
    def trials(self) -> pd.DataFrame:
        """The table of all trials, and as `place` the setting with those of its axes that have several values."""
        path = self.file("trials.parquet")
        table: Any = pd.read_parquet(path)
        groups: Any = table.groupby(["operation", "setting"], sort=False)
        table["place"] = table.setting
        for axis in AXES:
            varies = groups[axis].transform("nunique", dropna=False) > 1
            table.loc[varies, "place"] += f", {axis} " + table.loc[varies, axis].astype(str)
        return table

    def chosen(self, names: Sequence[str]) -> pd.DataFrame:
        """The trials that "operation/setting" or "setting" names; all when there is no name.

        Raises:
            UserError: no trial is called so.
        """
        table: Any = self.trials
        if not names:
            return table
        keys = table.operation + "/" + table.setting
        wanted = keys.isin(names) | table.setting.isin(names)
        # A setting whose case set was empty, such as questions that stay, has no trial, and that is no mistake.
        missing = [n for n in names if n not in self.settings and not (keys.eq(n) | table.setting.eq(n)).any()]
        if missing:
            raise UserError(f"report: no trial {missing[0]!r}; there are {', '.join(dict.fromkeys(keys))}")
        return table[wanted]

    def rates(self, mark: Declared, by: Sequence[str], measure: str | None = None) -> pd.DataFrame:
        """Rates of the mark's trials by columns, each trial by its own measure unless one is given or marked.

        q-values are corrected over all of them together.

        Raises:
            UserError: the table has no such column.
        """
        table: Any = self.chosen(mark.trials)
        missing = [column for column in by if column not in table]
        if missing:
            raise UserError(f"report: trials have no column {missing[0]!r}; choose from {', '.join(table.columns)}")
        chosen = measure or mark.y
        if chosen is not None and chosen not in table:
            raise UserError(f"report: trials have no column {chosen!r}; choose from {', '.join(table.columns)}")
        trials = table.operation.str.partition("/")[0]  # "carry/name" is the trial `carry` with the features of a name
        measures = (trials + "/" + table.setting).map(lambda key: self.measures.get(key, "hit"))
        parts = [
            rates(part, by, chosen or str(own)) for (_, own), part in table.groupby(["operation", measures], sort=False)
        ]
        return corrected(pd.concat(parts))


def cards(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """The worst question of each trial as a headline number; of recipients and donors the mean over cells."""
    if "donor" in folder.trials:
        lowest = cell_means(folder.rates(mark, ["operation", "setting", *CELL]), ["operation", "setting"])
    else:
        found = folder.rates(mark, ["operation", "setting", "question"])
        lowest = worst(found, "question") if found.index.get_level_values("question").nunique() > 1 else found
    made = []
    key: Any
    for key, row in lowest.iterrows():
        operation, setting = key[:2]
        said = f"{label(operation)}: {label(setting)}"
        made.append(Card(said, _rate(row), "" if np.isnan(row.matched) else f"matched features: {row.matched:.0%}"))
    return [Cards(mark.title or "Result", tuple(made), mark.says)]


def bars(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """Rates by a column (the worst question is added to questions), a bar for each operation."""
    x = mark.x or "question"
    rows = flip_rows(folder, mark)
    if x != "question" and any(row.question == "worst" for row in rows):
        rows = [row for row in rows if row.question == "worst"]
    columns = {"question": lambda r: r.question, "mode": lambda r: r.mode, "setting": lambda r: r.scope}
    if x not in columns:
        raise UserError(f"report.{name}.x={x}: bars stand for {', '.join(columns)}; choose one, or mark: curve")
    drawn = figures.bars(rows, folder.path / "figures" / f"{name}.png", columns[x], mark.title or f"By {x}")
    return [Figure(mark.title or f"By {x}", (_picture(drawn, f"{mark.title}: rates by {x}"),), mark.says)]


def table(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """All rates with their controls, intervals and q-values; with `file` that table instead."""
    if mark.file is not None:
        found = pq.read_table(folder.file(mark.file))
        rows = tuple(tuple(row.values()) for row in found.to_pylist())
        return [Table(mark.title or label(name), tuple(map(label, found.column_names)), rows, mark.says)]
    return [flip_table(mark.title or "All rates", flip_rows(folder, mark), note=mark.says)]


def curve(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """A measure against a column, a line for each value of `by` and operation."""
    x, by = mark.x or "strength", mark.by or "question"
    found = folder.rates(mark, ["operation", by, x])
    operations = found.index.get_level_values("operation").unique()
    lines = []
    key: Any
    for key, of in found.groupby(level=["operation", by], sort=False):
        operation, series = key
        rows: Any = of.droplevel(["operation", by]).sort_index()
        called = str(series) if len(operations) == 1 else f"{label(operation)} {series}"
        at = rows.edited if x == "limit" else rows.index.map(_end) if x == "layers" else rows.index.astype(float)
        lines.append(Curve(called, *(tuple(map(float, one)) for one in (at, rows.value, rows.ci_low, rows.ci_high))))
        if rows.matched.notna().all():
            flat = tuple(map(float, rows.matched))
            lines.append(Curve(f"{called}, matched", tuple(map(float, at)), flat, flat, flat))
    path, share = folder.path / "figures" / f"{name}.png", mark.y in (None, "hit", "changed", "recovered")
    counted = "flip rate" if mark.y in (None, "hit") else label(mark.y)
    said = f"{counted}{' (%)' if share else ''}"
    xlabel = {"limit": "features edited (number)", "layers": "layer"}.get(x, label(x))
    if x == "limit":
        drawn = figures.feature_count_curve(lines, path, xlabel, said)
    else:
        drawn = figures.dose_response(lines, path, xlabel, said, percent=share)
    return [Figure(mark.title or f"Against {x}", (_picture(drawn, f"{mark.title} against {x}"),), mark.says)]


def matrix(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """Recipients against donors, a panel for each question, and the `top` lowest cells with their controls."""
    found = folder.rates(mark, ["operation", *CELL])
    names = sorted({*found.index.get_level_values("recipient"), *found.index.get_level_values("donor")})
    sections: list[Section] = []
    for operation, rows in found.groupby(level="operation", sort=False):
        panels = {
            label(str(question)): of.value.droplevel(["operation", "question"]).unstack().reindex(names, columns=names)
            for question, of in rows.groupby(level="question", sort=False)
        }
        drawn = share_matrices(names, panels, folder.path / "figures" / f"{name}_{operation}.png")
        alt = f"{label(str(operation))}: answers with the donor's word in per cent"
        title = f"{mark.title} {label(str(operation))}".strip()
        sections.append(Figure(title, (_picture(drawn, alt, True),), mark.says))
        lowest: Any = rows.sort_values("value", kind="stable").head(mark.top)
        lines = tuple(
            (recipient, donor, label(question), int(row.cases), _rate(row), *_control(row))
            for (_, question, recipient, donor), row in lowest.iterrows()
        )
        columns = ("recipient", "donor", "question", "cases", "rate", "matched features", "q")
        note = f"q is corrected over all cells shown; the mean of all {len(rows)} is {rows.value.mean():.0%}."
        sections.append(Table(f"{title}: lowest cells", columns, lines, note=note))
    return sections


def heatmap(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """A measure by layer and position, a panel for each question."""
    by, x = mark.by or "layers", mark.x or "positions"
    found: Any = folder.rates(mark, ["operation", "question", by, x])
    pictures = []
    key: Any
    for key, of in found.groupby(level=["operation", "question"], sort=False):
        cells = of.value.droplevel(["operation", "question"]).unstack(sort=False)
        said = f"{label(mark.y or 'hit')}, question: {key[1]}"
        path = folder.path / "figures" / f"{name}_{key[1]}.png"
        values, rows = np.round(cells.to_numpy(), 3) + 0.0, [str(row) for row in cells.index]
        figures.layer_role_heatmap(values, rows, list(cells.columns), path, said, label(x), label(by))
        pictures.append(_picture(path, said))
    return [Figure(mark.title or label(name), tuple(pictures), mark.says)]


def examples(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """Answers before and after, with pictures."""
    shown = read_records(folder.file("examples.parquet"), AnswerExample)
    return [Examples(mark.title or "Answers before and after", tuple(shown[: mark.top]), mark.says)]


def features(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """The features of each supernode, the strongest with pictures on which they fire."""
    rows = pq.read_table(folder.file("evidence.parquet")).to_pylist()
    sections: list[Section] = []
    for node in dict.fromkeys(row["supernode"] for row in rows):
        members = [_member(row) for row in rows if row["supernode"] == node]
        says = f"{mark.says} The {min(LISTED, len(members))} most influential of {len(members)}.".strip()
        listed = Supernode(node, tuple(members[:LISTED]))
        sections.append(Features(f"Features of {node}", listed, says, shown=mark.top))
    return sections


def picture(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """Figures that the run made: figures/<name>.png, or those whose names the pattern `file` fits."""
    title, pattern = mark.title or label(name), f"{mark.file or name}.png"
    paths = sorted((folder.path / "figures").glob(pattern))
    if not paths:
        return [Text(title, (f"This run has no figures/{pattern}.",))]
    return [Figure(title, tuple(_picture(path, label(path.stem), True) for path in paths), mark.says)]


def groups(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """Horizontal bars of the run's table <name>.parquet: the mean of `y` for each `x`, a bar for each value of `by`."""
    found: Any = pd.read_parquet(folder.path / f"{name}.parquet")
    x, by, y = mark.x or "name", mark.by or "series", mark.y or "value"
    mean = bootstrap_rate if found[y].dtype == bool else bootstrap_mean
    rows = {key: mean(of[y].to_numpy()) for key, of in found.groupby([by, x], sort=False)}
    names = list(dict.fromkeys(found[x]))
    series = {label(str(one)): [rows.get((one, at)) for at in names] for one in dict.fromkeys(found[by])}
    drawn = word_bars(names, series, folder.path / "figures" / f"{name}.png", f"{label(y)} (%)")
    return [Figure(mark.title or label(name), (_picture(drawn, f"{mark.title}: {label(y)}"),), mark.says)]


def text(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """Paragraphs."""
    return [Text(mark.title or label(name), tuple(part for part in mark.says.split("\n\n") if part))]


MARKS: dict[str, Callable[[Folder, str, Any], list[Section]]] = {
    one.__name__: one for one in (cards, bars, table, curve, matrix, heatmap, examples, features, picture, groups, text)
}


def sections_of(folder: Folder, marks: Mapping[str, Any]) -> list[Section]:
    """All sections of a report in the order of its marks, which `check_marks` accepts."""
    sections: list[Section] = []
    for name, mark in marks.items():
        sections += MARKS[mark.mark](folder, name, mark)
    return sections


def check_marks(marks: Mapping[str, Any], trials: Mapping[str, Sequence[str]], more: bool = False) -> None:
    """Refuse marks that could not be drawn, before anything is run.

    Args:
        marks: of the report.
        trials: setting -> the trials that it runs.
        more: the experiment's own analysis makes further trials, whose names are not known before.

    Raises:
        UserError: no such mark, or one of a trial or setting that is not declared.
    """
    names = {f"{trial}/{setting}" for setting, of in trials.items() for trial in of} | set(trials)
    for name, mark in marks.items():
        if mark.mark not in MARKS:
            raise UserError(f"report.{name}.mark={mark.mark}: no such mark; choose from {', '.join(MARKS)}")
        for one in mark.trials:
            if one not in names and not more:
                raise UserError(f"report.{name}.trials: {one!r} is not declared; there are {', '.join(sorted(names))}")


def flip_rows(folder: Folder, mark: Declared) -> list[FlipRow]:
    """Rates of the mark's trials as rows of the table of results, the worst question after those of each trial.

    Of a trial that counts changed answers, `rate` are its hits all the same.
    """
    by = ["operation", "setting", "place", "mode", "question"]
    found, hits, also = (folder.rates(mark, by, measure) for measure in (None, "hit", "changed"))
    rows: list[FlipRow] = []
    key: Any
    for key, group in found.groupby(level=by[:-1], sort=False):
        operation, setting, place, mode = map(str, key)
        counted = mark.y or folder.measures.get(f"{operation}/{setting}", "hit")
        shown, moved = (part.loc[group.index] for part in (hits if counted == "changed" else found, also))
        for at, question in enumerate(group.index.get_level_values("question")):
            q = None if np.isnan(group.q.iloc[at]) else float(group.q.iloc[at])
            both = _rate(shown.iloc[at]), _rate(moved.iloc[at])
            size = int(group.edited.iloc[at])
            rows.append(FlipRow(operation, mode, str(question), place, both[0], size, both[1], None, q))
        if len(group) > 1:
            low = int(np.argmin(group["value"]))
            both = [
                _rate(part.iloc[low].where(part.columns != "matched", part.matched.max())) for part in (shown, moved)
            ]
            size = int(group.edited.iloc[low])
            rows.append(FlipRow(operation, mode, "worst", place, both[0], size, both[1]))
    return rows


def _rate(row: Any) -> Rate:
    control = None if np.isnan(row.matched) else float(row.matched)
    return Rate(float(row.value), float(row.ci_low), float(row.ci_high), int(row.cases), control)


def _end(layers: str) -> float:
    """The end of a range of layers that is not an end of the model: 3 of "0-3", "3-" and "3"."""
    first, _, last = layers.partition("-")
    return float(last or first)


def _control(row: Any) -> tuple[Percent | None, float | None]:
    """The control's rate and q, where there was a control."""
    return (None, None) if np.isnan(row.matched) else (Percent(float(row.matched)), float(row.q))


def _picture(path: Path, alt: str, wide: bool = False) -> Picture:
    return Picture(path.read_bytes(), alt, alt, wide)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A Parquet file of rows, as the mark "table" shows one."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary)


def write_records(path: Path, records: Sequence[Any]) -> None:
    """Dataclass records as a Parquet file, a column for each field."""
    write_rows(path, [_plain(asdict(record)) for record in records])


def read_records(path: Path, kind: type[Any]) -> list[Any]:
    """The records of `write_records`; nested lists come back as JSON had them."""
    return [kind(**{key: _tuples(value) for key, value in row.items()}) for row in pq.read_table(path).to_pylist()]


def _plain(value: Any) -> Any:
    """Pairs of words and numbers, which no Arrow list can mix, as JSON text."""
    return {k: json.dumps(v) if isinstance(v, tuple | list) else v for k, v in value.items()}


def _tuples(value: Any) -> Any:
    if isinstance(value, str) and value[:1] == "[":
        return tuple(tuple(one) if isinstance(one, list) else one for one in json.loads(value))
    return value


def _member(row: Mapping[str, Any]) -> CircuitFeature:
    return CircuitFeature(
        FeatureId.parse(row["feature"]),
        row["role"],
        row["contrast"],
        row["influence"],
        tuple(_example(one) for one in row["examples"]),
        _tuples(row["top_logits"]),
        _tuples(row["bottom_logits"]),
        row["label"],
    )


def _example(row: Mapping[str, Any]) -> FeatureExample:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return FeatureExample(**{**values, "patch_boxes": tuple(PatchBox(*box) for box in row["patch_boxes"])})


def write_evidence(path: Path, nodes: Sequence[Supernode]) -> None:
    """`evidence.parquet`: a row for each feature of each supernode."""
    rows = [
        {
            "supernode": node.name,
            "feature": str(member.feature),
            "role": member.role,
            "contrast": member.contrast,
            "influence": member.influence,
            "label": member.label,
            "top_logits": json.dumps(member.top_logits),
            "bottom_logits": json.dumps(member.bottom_logits),
            "examples": [
                {**asdict(one), "patch_boxes": [list(box) for box in one.patch_boxes]} for one in member.examples
            ],
        }
        for node in nodes
        for member in node.features
    ]
    write_rows(path, rows)
