"""Parts of an experiment's report, each drawn from the tables of a run folder as its mark says (docs/experiments.md).

A run folder has `trials.parquet` (one row per case, trial and control draw), and as far as the experiment makes them
`examples.parquet` (answers before and after), `evidence.parquet` (features of supernodes with examples), `circuits/`,
`graph.safetensors` and `figures/`. No model is needed: a report is drawn again from its folder in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
from vlmscope.core.records import FeatureId, PatchBox
from vlmscope.core.results import AnswerExample, CircuitFeature, Curve, FeatureExample, FlipRow, Rate, Supernode
from vlmscope.metrics.rates import CELL, NO_CONTROL, cell_means, corrected, rate_of, rates, worst
from vlmscope.report import page
from vlmscope.report.anatomy import anatomy_sections
from vlmscope.report.figures import (
    CONTROL,
    dose_response,
    label,
    layer_role_heatmap,
    rate_bars,
    share_matrices,
    word_bars,
)

AXES = ["positions", "layers", "strength", "limit"]  # of a setting, besides its mode
CLAIMS_NOTE = (
    "A claim is shown when it holds on every question; the row has the question that decides. Rules: docs/circuits.md, "
    "What an experiment may claim."
)
LISTED = 24  # members of a supernode in a report; all are in circuits/ of the run folder


class Mark(Protocol):
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
    """A run folder as marks read it, and the measure that the rate of each "operation/setting" counts."""

    path: Path
    measures: Mapping[str, str] = field(default_factory=dict)
    counted: dict[Any, pd.DataFrame] = field(default_factory=dict)  # rates so far, which several marks show

    def file(self, name: str) -> Path:
        """A file of the folder, which the run must have made."""
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; a mark of the report shows it, and this run did not make it")
        return path

    def figure(self, name: str) -> Path:
        """The path of a figure."""
        return self.path / "figures" / f"{name}.png"

    @cached_property
    def trials(self) -> pd.DataFrame:
        """The table of all trials, and as `place` the setting with those of its axes that have several values."""
        table: Any = pd.read_parquet(self.file("trials.parquet"))
        groups: Any = table.groupby(["operation", "setting"], sort=False)
        table["place"] = table.setting
        for axis in AXES:
            varies = groups[axis].transform("nunique", dropna=False) > 1
            table.loc[varies, "place"] += f", {axis} " + table.loc[varies, axis].astype(str)
        return table

    def chosen(self, names: Sequence[str]) -> pd.DataFrame:
        """The trials that "operation/setting" or "setting" names, if it has any cases; all when there is no name."""
        table: Any = self.trials
        if not names:
            return table
        keys = table.operation + "/" + table.setting
        return table[keys.isin(names) | table.setting.isin(names)]

    def rates(self, mark: Mark, by: Sequence[str], measure: str | None = None) -> pd.DataFrame:
        """Rates of the mark's trials by columns, each trial by its own measure unless one is given or marked.

        q-values are corrected over all of them together.
        """
        table: Any = self.chosen(mark.trials)
        chosen = measure or mark.y
        for column in [*by, *([chosen] if chosen else [])]:
            if column not in table:
                raise UserError(f"report: trials have no column {column!r}; choose from {', '.join(table.columns)}")
        trials = table.operation.str.partition("/")[0]  # "carry/name" is the trial `carry` with the features of a name
        measures = (trials + "/" + table.setting).map(lambda key: self.measures.get(key, "hit"))
        parts = []
        for key, part in table.groupby(["operation", measures], sort=False):
            wanted = (tuple(mark.trials), tuple(by), key, counted := chosen or str(key[1]))
            if wanted not in self.counted:
                self.counted[wanted] = rates(part, by, counted)
            parts.append(self.counted[wanted])
        return corrected(pd.concat(parts))


def cards(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """The worst question of each trial as a headline number; of recipients and donors the mean over cells."""

    def lowest(measure: str | None) -> Any:
        if "donor" in folder.trials:
            return cell_means(folder.rates(mark, ["operation", "setting", *CELL], measure), ["operation", "setting"])
        return worst(folder.rates(mark, ["operation", "setting", "question"], measure))

    moved: Any = lowest("changed") if "changed" in folder.trials else None
    headlines = []
    key: Any
    for key, row in lowest(None).iterrows():
        details = [] if "rank" not in row or row.reason == NO_CONTROL else [ranked(row)]
        if moved is not None:
            least = moved.loc[key]
            beside = "" if np.isnan(least.matched) else f" (matched features: {page.percent(least.matched)})"
            details.append(f"answers changed at all: {page.percent(least.value)}{beside}")
        headlines.append(page.Card(f"{label(key[0])}: {label(key[1])}", _rate(row), "; ".join(details)))
    return [page.Cards(mark.title or "Result", tuple(headlines), mark.says)]


def bars(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """Rates by a column (the worst question is added to questions), a bar for each operation."""
    x, title = mark.x or "question", mark.title or f"By {mark.x or 'question'}"
    categories = {"question": "question", "mode": "mode", "setting": "scope"}
    if x not in categories:
        raise UserError(f"report.{name}.x={x}: bars stand for {', '.join(categories)}; choose one, or mark: curve")
    rows = flip_rows(folder, mark)
    if x != "question" and any(row.question == "worst" for row in rows):
        rows = [row for row in rows if row.question == "worst"]
    series: dict[str, dict[str, FlipRow]] = {}
    for row in rows:
        by_category, category = series.setdefault(row.method, {}), getattr(row, categories[x])
        if category in by_category:
            raise ValueError(f"two rows for {row.method}, {category} in {title!r}")
        by_category[category] = row
    groups = list(dict.fromkeys(getattr(row, categories[x]) for row in rows))
    notes = []
    for group in groups:
        counts = sorted({values[group].n_features for values in series.values() if group in values})
        notes.append(f"({counts[0]}{f'/{counts[-1]}' if len(counts) > 1 else ''} features)")
    cases = sorted({row.rate.cases for row in rows})
    spread = f"{cases[0]}" if len(cases) == 1 else f"{cases[0]} to {cases[-1]}"
    rates_of = {method: [values[g].rate if g in values else None for g in groups] for method, values in series.items()}
    heading = f"{title}\nn = {spread} cases"
    path = rate_bars(groups, rates_of, folder.figure(name), heading, "flip rate (% of cases)", notes=notes)
    return [page.Figure(title, (page.drawn(path, f"{mark.title}: rates by {x}"),), mark.says)]


def table(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """All rates with their controls, intervals and q-values; with `file` that table instead."""
    if mark.file is not None:
        contents = pq.read_table(folder.file(mark.file))
        rows = tuple(tuple(row.values()) for row in contents.to_pylist())
        return [page.Table(mark.title or label(name), tuple(map(label, contents.column_names)), rows, mark.says)]
    return [flip_table(mark.title or "All rates", flip_rows(folder, mark), mark.says)]


def claims(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """What the experiment may claim: the run's claims.parquet, with the numbers that decide."""
    found = pd.read_parquet(folder.file("claims.parquet"))
    if mark.trials:
        keys = found.operation + "/" + found.setting
        found = found[keys.isin(mark.trials) | found.setting.isin(mark.trials) | found.operation.isin(mark.trials)]
    if found.empty:
        none = "No trial of this run stands beside controls or baselines in a setting of one place and one strength."
        return [page.Text(mark.title or "What this shows", (none,))]
    rows = []
    row: Any
    for row in found.itertuples():
        judged = not np.isnan(row.value)
        rate = Rate(row.value, row.ci_low, row.ci_high, int(row.cases)) if judged else None
        other = None if np.isnan(row.other) else page.Percent(row.other)
        words = (
            f"{label(row.operation)}: {label(row.setting)}",
            label(row.claim),
            "shown" if row.shown else "not shown",
        )
        rows.append((*words, rate, label(row.decided_by) or None, other, row.question or None, row.reason or None))
    columns = ("trial", "claim", "", "rate, 95 % interval", "decided by", "there", "question", "why not")
    strong = frozenset(number for number, shown in enumerate(found.shown) if shown)
    return [page.Table(mark.title or "What this shows", columns, tuple(rows), mark.says, CLAIMS_NOTE, strong)]


def flip_table(title: str, rows: Sequence[FlipRow], note: str = "") -> page.Table:
    """Flip rates with intervals next to their controls, in the order given; rows for everything at once stand out.

    Changed answers, ranks among control draws and q-values have columns where any row has them.
    """

    def control(rate: Rate | None) -> page.Percent | None:
        return None if rate is None or rate.control is None else page.Percent(rate.control)

    counted, tested = any(row.changed for row in rows), any(row.rank for row in rows)
    columns = ["method", "mode", "question", "where", "features", "flip rate, 95 % interval", CONTROL]
    columns += ["answer changed, 95 % interval", "changed, control"] if counted else []
    columns += ["rank among draws", "q"] if tested else []
    values = []
    for row in rows:
        cells: list[page.Value] = [label(row.method), label(row.mode), label(row.question), label(row.scope)]
        cells += [row.n_features, row.rate, control(row.rate)]
        cells += [row.changed, control(row.changed)] if counted else []
        cells += [row.rank or None, row.q] if tested else []
        values.append((*cells, row.rate.cases))
    strong = frozenset(number for number, row in enumerate(rows) if row.question == "worst" and row.scope == "all")
    return page.Table(title, (*columns, "cases"), tuple(values), note=note, strong=strong)


def curve(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """A measure against the column `x`, a line for each value of `by` and operation; with `file` of that table."""
    if mark.file is not None:
        return _table_curve(folder, name, mark)
    x, by = mark.x or "strength", mark.by or "question"
    measured = folder.rates(mark, ["operation", by, x])
    operations = measured.index.get_level_values("operation").unique()
    lines = []
    key: Any
    for key, group in measured.groupby(level=["operation", by], sort=False):
        operation, series = key
        rows: Any = group.droplevel(["operation", by]).sort_index()
        title = str(series) if len(operations) == 1 else f"{label(operation)} {series}"
        values = rows.edited if x == "limit" else rows.index.map(_end) if x == "layers" else rows.index.astype(float)
        columns = (values, rows.value, rows.ci_low, rows.ci_high)
        lines.append(Curve(title, *(tuple(map(float, column)) for column in columns)))
        if rows.matched.notna().all():
            lines.append(Curve.line(f"{title}, matched", values, rows.matched))
    share = x == "limit" or mark.y in (None, "hit", "changed", "recovered")
    counted = "flip rate" if mark.y in (None, "hit") else label(mark.y)
    xlabel = {"limit": "features edited (number)", "layers": "layer"}.get(x, label(x))
    ylabel = f"{counted}{' (%)' if share else ''}"
    path = dose_response(lines, folder.figure(name), xlabel, ylabel, percent=share, log_x=x == "limit")
    return [page.Figure(mark.title or f"Against {x}", (page.drawn(path, f"{mark.title} against {x}"),), mark.says)]


def _means(data: Any, by: str, x: str, y: str) -> dict[Any, Rate]:
    """(value of `by`, value of `x`) -> the mean of `y` with its interval, where there is one."""
    known = data.dropna(subset=[y]).groupby([by, x], sort=False)
    return {key: rate_of(group[y].to_numpy()) for key, group in known}


def _table_curve(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """The mean of `y` of a table for each `x`, a line for each `by`; and that of the column `<y>_control`, if any."""
    data: Any = pd.read_parquet(folder.file(mark.file or ""))
    x, by, y = mark.x or "layer", mark.by or "series", mark.y or "value"
    parts = [(data, y)]
    if f"{y}_control" in data:
        parts.append((data.assign(**{by: "control"}), f"{y}_control"))
    lines = []
    for part, column in parts:
        rates = _means(part, by, x, column)
        for series in dict.fromkeys(value for value, _ in rates):
            places = sorted(place for value, place in rates if value == series)
            lines.append(Curve.of(label(str(series)), places, [rates[series, place] for place in places]))
    share = data[y].dtype == bool
    ylabel = f"{label(y)}{' (%)' if share else ''}"
    path = dose_response(lines, folder.figure(name), label(x), ylabel, percent=share)
    alt = f"{mark.title}: {label(y)} against {label(x)}"
    return [page.Figure(mark.title or label(name), (page.drawn(path, alt),), mark.says)]


def matrix(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """Recipients against donors, a panel for each question, and the `top` lowest cells with their controls."""
    cells = folder.rates(mark, ["operation", *CELL])
    names = sorted({*cells.index.get_level_values("recipient"), *cells.index.get_level_values("donor")})
    sections: list[page.Section] = []
    for operation, rows in cells.groupby(level="operation", sort=False):
        panels = {
            label(str(question)): rates.value.droplevel(["operation", "question"])
            .unstack()
            .reindex(names, columns=names)
            for question, rates in rows.groupby(level="question", sort=False)
        }
        path = share_matrices(names, panels, folder.figure(f"{name}_{operation}"))
        alt = f"{label(str(operation))}: answers with the donor's word in per cent"
        title = f"{mark.title} {label(str(operation))}".strip()
        sections.append(page.Figure(title, (page.drawn(path, alt, True),), mark.says))
        lowest: Any = rows.sort_values("value", kind="stable").head(mark.top)
        lines = []
        for (_, question, recipient, donor), row in lowest.iterrows():
            control = (
                (None, ranked(row) or None)
                if np.isnan(row.matched)
                else (page.Percent(float(row.matched)), ranked(row))
            )
            lines.append((recipient, donor, label(question), int(row.cases), _rate(row), *control))
        columns = ("recipient", "donor", "question", "cases", "rate", "matched features", "rank among draws")
        note = f"The mean of all {len(rows)} cells is {rows.value.mean():.0%}."
        sections.append(page.Table(f"{title}: lowest cells", columns, tuple(lines), note=note))
    return sections


def heatmap(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """A measure by layer and position, a panel for each question."""
    by, x = mark.by or "layers", mark.x or "positions"
    measured: Any = folder.rates(mark, ["operation", "question", by, x])
    pictures = []
    key: Any
    for key, group in measured.groupby(level=["operation", "question"], sort=False):
        cells = group.value.droplevel(["operation", "question"]).unstack(sort=False)
        caption = f"{label(mark.y or 'hit')}, question: {key[1]}"
        # The sum turns -0, which would print its sign, into 0.
        values, rows = np.round(cells.to_numpy(), 3) + 0.0, [str(row) for row in cells.index]
        path = folder.figure(f"{name}_{key[1]}")
        layer_role_heatmap(values, rows, list(cells.columns), path, caption, label(x), label(by))
        pictures.append(page.drawn(path, caption))
    return [page.Figure(mark.title or label(name), tuple(pictures), mark.says)]


def examples(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """Answers before and after, with pictures."""
    rows = pq.read_table(folder.file("examples.parquet")).to_pylist()
    shown = tuple(AnswerExample(**{key: _tuples(value) for key, value in row.items()}) for row in rows[: mark.top])
    return [page.Examples(mark.title or "Answers before and after", shown, mark.says)]


def features(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """The features of each supernode, the strongest with pictures on which they fire."""
    rows = pq.read_table(folder.file("evidence.parquet")).to_pylist()
    sections: list[page.Section] = []
    for node in dict.fromkeys(row["supernode"] for row in rows):
        members = [row for row in rows if row["supernode"] == node]
        listed = Supernode(node, tuple(map(_member, members[:LISTED])))
        says = f"{mark.says} The {len(listed.features)} most influential of {len(members)}.".strip()
        sections.append(page.Features(f"Features of {node}", listed, says, shown=mark.top))
    return sections


def picture(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """Figures that the run made: figures/<name>.png, or those whose names the pattern `file` fits."""
    title, pattern = mark.title or label(name), f"{mark.file or name}.png"
    paths = sorted((folder.path / "figures").glob(pattern))
    if not paths:
        return [page.Text(title, (f"This run has no figures/{pattern}.",))]
    return [page.Figure(title, tuple(page.drawn(path, label(path.stem), True) for path in paths), mark.says)]


def groups(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """Horizontal bars of a table, <name>.parquet unless `file` names it: the mean of `y` for each `x`, a bar for each
    value of `by`.
    """
    data: Any = pd.read_parquet(folder.file(mark.file or f"{name}.parquet"))
    x, by, y = mark.x or "name", mark.by or "series", mark.y or "value"
    if data.empty:
        return [page.Text(mark.title or label(name), ("The table has no rows.",))]
    rows = _means(data, by, x, y)
    names = list(dict.fromkeys(data[x]))
    series = {label(str(value)): [rows.get((value, word)) for word in names] for value in dict.fromkeys(data[by])}
    path = word_bars(names, series, folder.figure(name), f"{label(y)} (%)")
    return [page.Figure(mark.title or label(name), (page.drawn(path, f"{mark.title}: {label(y)}"),), mark.says)]


def anatomy(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """What remains without MLPs and attention, from anatomy.parquet: the overview and its figure."""
    data: Any = pd.read_parquet(folder.file("anatomy.parquet"))
    return anatomy_sections(data, folder.figure("anatomy"), mark.title or "Anatomy", mark.says)


def text(folder: Folder, name: str, mark: Mark) -> list[page.Section]:
    """Paragraphs."""
    return [page.Text(mark.title or label(name), tuple(part for part in mark.says.split("\n\n") if part))]


MARKS: dict[str, Callable[[Folder, str, Any], list[page.Section]]] = {
    mark.__name__: mark
    for mark in (cards, claims, bars, table, curve, matrix, heatmap, examples, features, picture, groups, anatomy, text)
}


def sections_of(folder: Folder, marks: Mapping[str, Mark]) -> list[page.Section]:
    """All sections of a report in the order of its marks, which `check_marks` accepts."""
    sections: list[page.Section] = []
    for name, mark in marks.items():
        if mark.trials and mark.mark != "claims" and folder.chosen(mark.trials).empty:
            sections.append(
                page.Text(mark.title or label(name), (f"This run has no case of {', '.join(mark.trials)}.",))
            )
        else:
            sections += MARKS[mark.mark](folder, name, mark)
    return sections


def check_marks(marks: Mapping[str, Mark], trials: Mapping[str, Sequence[str]], more: bool = False) -> None:
    """Refuse marks that could not be drawn, before anything is run.

    Args:
        marks: of the report.
        trials: setting -> the trials that it runs.
        more: the experiment's own analysis makes further trials, whose names are not known before.
    """
    names = set(trials) | {f"{trial}/{setting}" for setting, declared in trials.items() for trial in declared}
    for name, mark in marks.items():
        if mark.mark not in MARKS:
            raise UserError(f"report.{name}.mark={mark.mark}: no such mark; choose from {', '.join(MARKS)}")
        unknown = [] if more else [trial for trial in mark.trials if trial not in names]
        if unknown:
            known = ", ".join(sorted(names))
            raise UserError(f"report.{name}.trials: {unknown[0]!r} is not declared; there are {known}")


def flip_rows(folder: Folder, mark: Mark) -> list[FlipRow]:
    """Rates of the mark's trials as rows of the table of results, the worst question after those of each trial.

    The `rate` of a trial that counts changed answers is that of its hits.
    """
    by = ["operation", "setting", "place", "mode", "question"]
    measured, hits, changes = (folder.rates(mark, by, measure) for measure in (None, "hit", "changed"))
    rows: list[FlipRow] = []
    key: Any
    for key, group in measured.groupby(level=by[:-1], sort=False):
        operation, setting, place, mode = map(str, key)
        counted = mark.y or folder.measures.get(f"{operation}/{setting}", "hit")
        shown, moved = (part.loc[group.index] for part in (hits if counted == "changed" else measured, changes))
        for number, question in enumerate(group.index.get_level_values("question")):
            row: Any = group.iloc[number]
            rate, changed, size = _rate(shown.iloc[number]), _rate(moved.iloc[number]), int(row.edited)
            q = None if np.isnan(row.q) else float(row.q)
            rows.append(FlipRow(operation, mode, str(question), place, rate, size, changed, ranked(row), q))
        if len(group) > 1:
            # The worst question stands against the strongest control of all questions.
            low = int(np.argmin(group["value"]))
            rate, changed = (
                _rate(part.iloc[low].where(part.columns != "matched", part.matched.max())) for part in (shown, moved)
            )
            row = worst(group).iloc[0]
            rows.append(FlipRow(operation, mode, "worst", place, rate, int(row.edited), changed, ranked(row)))
    return rows


def ranked(row: Any) -> str:
    """The rank of a row of `rates` among its draws, such as "1 of 31", or why it has none; "" without controls."""
    if row.reason:
        return "" if row.reason == NO_CONTROL else str(row.reason)
    return f"{int(row['rank'])} of {int(row.draws) + 1}"


def _rate(row: Any) -> Rate:
    control = None if np.isnan(row.matched) else float(row.matched)
    return Rate(float(row.value), float(row.ci_low), float(row.ci_high), int(row.cases), control)


def _end(layers: str) -> float:
    """The end of a range of layers that is not an end of the model: 3 of "0-3", "3-" and "3"."""
    first, _, last = layers.partition("-")
    return float(last or first)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a Parquet file, which the mark "table" can show."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary)


def write_records(path: Path, records: Sequence[Any]) -> None:
    """Write dataclass records as a Parquet file, a column for each field.

    Pairs of words and numbers, which no Arrow list can mix, are JSON text.
    """
    rows = [asdict(record) for record in records]
    write_rows(path, [{k: json.dumps(v) if isinstance(v, tuple | list) else v for k, v in row.items()} for row in rows])


def _tuples(value: Any) -> Any:
    """Undo the JSON of `write_records`."""
    if isinstance(value, str) and value[:1] == "[":
        return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in json.loads(value))
    return value


def write_evidence(path: Path, nodes: Sequence[Supernode]) -> None:
    """Write `evidence.parquet`: a row for each feature of each supernode."""
    rows = []
    for node in nodes:
        for member in node.features:
            shown = [{**asdict(e), "patch_boxes": [list(box) for box in e.patch_boxes]} for e in member.examples]
            words = {key: json.dumps(getattr(member, key)) for key in ("top_logits", "bottom_logits")}
            plain = {key: getattr(member, key) for key in ("role", "contrast", "influence", "label")}
            rows.append({"supernode": node.name, "feature": str(member.feature), **plain, **words, "examples": shown})
    write_rows(path, rows)


def _member(row: Mapping[str, Any]) -> CircuitFeature:
    examples = []
    for example in row["examples"]:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in example.items()}
        boxes = tuple(PatchBox(*box) for box in example["patch_boxes"])
        examples.append(FeatureExample(**{**values, "patch_boxes": boxes}))
    top, bottom = _tuples(row["top_logits"]), _tuples(row["bottom_logits"])
    feature = FeatureId.parse(row["feature"])
    return CircuitFeature(
        feature, row["role"], row["contrast"], row["influence"], tuple(examples), top, bottom, row["label"]
    )
