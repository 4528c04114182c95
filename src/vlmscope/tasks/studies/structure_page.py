"""report.html of task=structure: sizes, figures, and the largest clusters with their names and strongest examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmscope.core.intervention import FeatureExample
from vlmscope.core.records import FeatureId
from vlmscope.features.study.records import StudyFolder
from vlmscope.report.feature_page import FeatureRow, feature_sheet
from vlmscope.report.page import (
    Card,
    Cards,
    Figure,
    Percent,
    ReportPage,
    Section,
    Table,
    Text,
    Value,
    drawn,
    mapping_table,
)
from vlmscope.tasks.studies.examples import study_example
from vlmscope.tasks.studies.structure_tables import Structure, cluster_table

LISTED, PICTURED, EXAMPLES, IDS = 25, 8, 6, 4
KINDS = {"firing": "that fire together", "direction": "that write in a like direction"}
FIGURES = {
    "modality_by_layer": "How many features of each layer belong to soft tokens, to words, to both",
    "monosemanticity": "How alike the pictures are on which a feature fires, by layer and modality",
    "duplicates": "Share of live features with a near-parallel partner, by layer",
}


def write_page(folder: Path, study: StudyFolder, found: Structure, metrics: Mapping[str, float], model: str) -> None:
    """Draw figures/clusters.png and write report.html; the other figures have been drawn."""
    rows = cluster_table(found).to_pylist()
    of = {kind: sorted((row for row in rows if row["kind"] == kind), key=lambda row: -row["size"]) for kind in KINDS}
    by_layer = tuple(drawn(folder / "figures" / f"{name}.png", alt) for name, alt in FIGURES.items())
    sections: list[Section] = [headline(metrics), Figure("By layer", by_layer)]
    sheet = pictured(folder / "figures" / "clusters.png", study, of["firing"])
    if sheet:
        alt = "Inputs on which members are most active: " + "; ".join(row["name"] for row in of["firing"][:PICTURED])
        sections.append(Figure("The largest clusters of features that fire together", (drawn(sheet, alt),)))
    sections += [listed(f"Clusters of features {says}", of[kind]) for kind, says in KINDS.items()]
    page = ReportPage(
        title=f"Structure of {sum(study.info.n_features.values()):,} features",
        question="What do the features of all layers look like together: which belong to pictures or to words, which "
        "are double, which fire together?",
        summary=summary(metrics),
        sections=(*sections, go_on(folder, study), mapping_table("All numbers", dict(metrics), ("metric", "value"))),
        footer=f"vlmscope · {model} · {folder.name}",
    )
    page.write(folder / "report.html")


def go_on(folder: Path, study: StudyFolder) -> Text:
    """What a cluster can be used for."""
    return Text(
        "Go on",
        (
            "clusters.parquet has all clusters, structure.parquet a row a feature. A cluster can be a supernode: in a "
            f"circuit_spec, cluster: {{run: {folder}, cluster: 0, kind: firing}} (docs/circuits.md).",
        ),
        code=f"python run.py task=pages study.path={study.path} 'task.features=[L0/0]'",
    )


def summary(metrics: Mapping[str, float]) -> str:
    """The result in a sentence."""
    return (
        f"{metrics['clusters/firing/count']:.0f} clusters of features that fire together hold "
        f"{100 * metrics['clusters/firing/features_frac']:.0f} % of the features; features of both modalities are most "
        f"frequent in layer {metrics['modality/meeting_layer']:.0f}."
    )


def headline(metrics: Mapping[str, float]) -> Cards:
    """Monosemanticity beside its control, duplicates, clusters."""
    shuffled = metrics["monosemanticity/shuffled_median"]
    return Cards(
        "In short",
        (
            Card("monosemanticity, median", metrics["monosemanticity/median"], f"pictures shuffled: {shuffled:.3f}"),
            Card("write as another of their layer", Percent(metrics["duplicates/write_own_layer"]), "of live features"),
            Card("read and write as another", Percent(metrics["duplicates/both_own_layer"]), "of their layer"),
            Card(
                "clusters by firing",
                metrics["clusters/firing/count"],
                f"by direction: {metrics['clusters/direction/count']:.0f}",
            ),
        ),
    )


def listed(title: str, rows: list[dict[str, Any]]) -> Table:
    """The largest clusters, a row each."""
    table: tuple[tuple[Value, ...], ...] = tuple(
        (
            row["cluster"],
            row["name"] or "–",
            row["size"],
            f"{row['first_layer']} to {row['last_layer']}",
            None if row["modality_index"] is None else Percent(row["modality_index"]),
            ", ".join(spread(row["features"])[:IDS]),
        )
        for row in rows[:LISTED]
    )
    columns = ("cluster", "name", "features", "layers", "at soft tokens", "some of them")
    note = (
        f"The {len(table)} largest of {len(rows)}. At soft tokens: mean modality index, 0 % for words alone, 100 % for "
        "pictures alone."
    )
    return Table(title, columns, table, note=note)


def pictured(path: Path, study: StudyFolder, rows: list[dict[str, Any]]) -> Path | None:
    """The strongest example of some members of the largest clusters; None where no member has one."""
    sheet = []
    for row in rows[:PICTURED]:
        examples: list[FeatureExample] = []
        for name in spread(row["features"]):
            examples += [study_example(study, one) for one in study.feature(FeatureId.parse(name)).examples[:1]]
            if len(examples) == EXAMPLES:
                break
        if examples:
            where = f"{row['size']} features, layers {row['first_layer']} to {row['last_layer']}"
            sheet.append(FeatureRow(row["name"] or f"cluster {row['cluster']}", where, tuple(examples)))
    return feature_sheet(sheet, path, columns=EXAMPLES) if sheet else None


def spread(features: list[str]) -> list[str]:
    """All features, in an order whose first ones come from all over the cluster, and so from its layers."""
    step = max(1, len(features) // EXAMPLES)
    return [feature for first in range(step) for feature in features[first::step]]
