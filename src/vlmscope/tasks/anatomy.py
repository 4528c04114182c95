"""Anatomy: how much of each answer remains without MLPs or attention, by layers and position role (docs/anatomy.md)."""

from __future__ import annotations

from vlmscope.analyses.anatomy import anatomy, default_questions, metrics_of
from vlmscope.config import AppConfig
from vlmscope.config.wiring import is_default, load_model, load_scope, names_transcoders
from vlmscope.core.errors import UserError
from vlmscope.data.inputs import read_rows, row_questions
from vlmscope.report.anatomy import anatomy_sections, console, summary
from vlmscope.report.marks import write_rows
from vlmscope.report.page import ReportPage
from vlmscope.tasks.settings import AnatomySettings, RunContext


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write anatomy.parquet, figures/anatomy.png and report.html."""
    task: AnatomySettings = cfg.task
    if cfg.prompt is not None or cfg.image is not None:
        raise UserError("task=anatomy averages over cases; leave out prompt= and image=, or put them into task.rows=")
    cfg.attribution.check()
    rows, bad = ([], []) if task.rows is None else read_rows(task.rows)
    if bad:
        raise UserError(f"{bad[0]}; correct the file")

    vlm = load_model(cfg)
    asked = row_questions(rows) if rows else default_questions(vlm, task.cases, cfg.seed)
    questions = {name: sides[: task.cases] for name, sides in asked.items()}
    scope, known = None, is_default(vlm) or cfg.model.family is not None or names_transcoders(context.overrides)
    if task.graphs and known:
        scope = load_scope(cfg, vlm, context.overrides)
    elif task.graphs:
        print("no graphs: transcoder= names no set for this model")
    table = anatomy(vlm, questions, task.parts, scope, task.graphs, cfg.attribution, cfg.seed)
    write_rows(context.run_dir / "anatomy.parquet", table.to_dict("records"))
    print(f"{console(table)}\n{summary(table)}")
    page = ReportPage(
        title=f"Anatomy of {vlm.name}",
        question="How much of each answer needs MLPs, and where? A graph of MLP features can explain no more.",
        summary=summary(table),
        sections=tuple(anatomy_sections(table, context.run_dir / "figures" / "anatomy.png", "What remains")),
        footer=f"vlmscope · {vlm.name} · {context.run_dir.name}",
    )
    page.write(context.run_dir / "report.html")
    return metrics_of(table)
