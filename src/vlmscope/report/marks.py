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
from vlmscope.metrics.table import rates, worst
from vlmscope.report import figures
from vlmscope.report.figures import share_matrices
from vlmscope.report.page import Card, Cards, Examples, Features, Figure, Picture, Section, Text, flip_table
from vlmscope.report.style import label

AXES = ["operation", "setting", "mode", "positions", "layers", "strength", "limit"]


class Declared(Protocol):
    """A mark, as `vlmscope.circuits.trial_config.MarkConfig` declares it."""

    mark: str
    title: str
    trials: list[str]
    x: str | None
    by: str | None
    y: str | None
    says: str
    top: int


@dataclass(frozen=True)
class Folder:
    """A run folder as marks read it: what each operation's rate counts, and the settings that the run declared."""

    path: Path
    measures: Mapping[str, str] = field(default_factory=dict)
    settings: Collection[str] = ()

    @cached_property
    def trials(self) -> pd.DataFrame:
        """The table of all trials."""
        return pd.read_parquet(self.path / "trials.parquet")

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
        """Rates of the mark's trials by columns, each operation by its own measure unless one is given or marked."""
        table = self.chosen(mark.trials)
        parts = [
            rates(part, by, measure or mark.y or self.measures.get(str(operation).partition("/")[0], "hit"))
            for operation, part in table.groupby("operation", sort=False)
        ]
        return pd.concat(parts)


def cards(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """The worst question of each trial as a headline number."""
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
    drawn = figures.bars(rows, folder.path / "figures" / f"{name}.png", columns[x], mark.title or f"By {x}")
    return [Figure(mark.title or f"By {x}", (_picture(drawn, f"{mark.title}: rates by {x}"),), mark.says)]


def table(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """All rates with their controls, intervals and q-values."""
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
        at = rows.edited if x == "limit" else rows.index.astype(float)
        lines.append(Curve(called, *(tuple(map(float, one)) for one in (at, rows.value, rows.ci_low, rows.ci_high))))
        if rows.matched.notna().all():
            flat = tuple(map(float, rows.matched))
            lines.append(Curve(f"{called}, matched", tuple(map(float, at)), flat, flat, flat))
    path, share = folder.path / "figures" / f"{name}.png", mark.y in (None, "hit", "changed", "recovered")
    said = f"{label(mark.y or 'hit')}{' (%)' if share else ''}"
    if x == "limit":
        drawn = figures.feature_count_curve(lines, path, label(x), said)
    else:
        drawn = figures.dose_response(lines, path, label(x), said, percent=share)
    return [Figure(mark.title or f"Against {x}", (_picture(drawn, f"{mark.title} against {x}"),), mark.says)]


def matrix(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """Recipients against donors, a panel for each question."""
    found = folder.rates(mark, ["operation", "question", "recipient", "donor"])
    names = sorted({*found.index.get_level_values("recipient"), *found.index.get_level_values("donor")})
    sections: list[Section] = []
    for operation, rows in found.groupby(level="operation", sort=False):
        panels = {
            label(str(question)): of.value.droplevel(["operation", "question"]).unstack().reindex(names, columns=names)
            for question, of in rows.groupby(level="question", sort=False)
        }
        drawn = share_matrices(names, panels, folder.path / "figures" / f"{name}_{operation}.png")
        alt = f"{label(str(operation))}: answers with the donor's word in per cent"
        sections.append(
            Figure(f"{mark.title} {label(str(operation))}".strip(), (_picture(drawn, alt, True),), mark.says)
        )
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
    shown = read_records(folder.path / "examples.parquet", AnswerExample)
    return [Examples(mark.title or "Answers before and after", tuple(shown[: mark.top]), mark.says)]


def features(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """The features of each supernode, the strongest with pictures on which they fire."""
    rows = pq.read_table(folder.path / "evidence.parquet").to_pylist()
    sections: list[Section] = []
    for node in dict.fromkeys(row["supernode"] for row in rows):
        members = tuple(_member(row) for row in rows if row["supernode"] == node)
        sections.append(Features(f"Features of {node}", Supernode(node, members), mark.says, shown=mark.top))
    return sections


def picture(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """A figure that the run made: figures/<name>.png."""
    path = folder.path / "figures" / f"{name}.png"
    return [Figure(mark.title or label(name), (_picture(path, mark.title or label(name), True),), mark.says)]


def text(folder: Folder, name: str, mark: Declared) -> list[Section]:
    """Paragraphs."""
    return [Text(mark.title or label(name), tuple(part for part in mark.says.split("\n\n") if part))]


MARKS: dict[str, Callable[[Folder, str, Any], list[Section]]] = {
    one.__name__: one for one in (cards, bars, table, curve, matrix, heatmap, examples, features, picture, text)
}


def sections_of(folder: Folder, marks: Mapping[str, Any]) -> list[Section]:
    """All sections of a report in the order of its marks.

    Raises:
        UserError: no such mark, or one that names a trial that the run does not have.
    """
    sections: list[Section] = []
    for name, mark in marks.items():
        if mark.mark not in MARKS:
            raise UserError(f"report.{name}.mark={mark.mark}: no such mark; choose from {', '.join(MARKS)}")
        sections += MARKS[mark.mark](folder, name, mark)
    return sections


def flip_rows(folder: Folder, mark: Declared) -> list[FlipRow]:
    """Rates of the mark's trials as rows of the table of results, the worst question after those of each trial."""
    by = ["operation", "setting", "mode", "question"]
    found = folder.rates(mark, by)
    also = folder.rates(mark, by, "changed")
    rows: list[FlipRow] = []
    key: Any
    for key, group in found.groupby(level=by[:3], sort=False):
        operation, setting, mode = map(str, key)
        lines: list[Any] = [
            (str(at), *both)
            for at, *both in zip(
                group.index.get_level_values("question"),
                group.itertuples(),
                also.loc[group.index].itertuples(),
                strict=True,
            )
        ]
        if len(lines) > 1:
            low, moved = (worst(part.loc[group.index], "question").iloc[0] for part in (found, also))
            lines.append(("worst", low, moved))
        for question, row, moved in lines:
            q = None if np.isnan(row.q) or question == "worst" else float(row.q)
            rows.append(FlipRow(operation, mode, question, setting, _rate(row), int(row.edited), _rate(moved), None, q))
    return rows


def _rate(row: Any) -> Rate:
    control = None if np.isnan(row.matched) else float(row.matched)
    return Rate(float(row.value), float(row.ci_low), float(row.ci_high), int(row.cases), control)


def _picture(path: Path, alt: str, wide: bool = False) -> Picture:
    return Picture(path.read_bytes(), alt, alt, wide)


def write_records(path: Path, records: Sequence[Any]) -> None:
    """Dataclass records as a Parquet file, a column for each field."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist([_plain(asdict(record)) for record in records]), temporary)


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
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
