"""`task=trace task.rows=FILE`: a graph for every row, each in a folder of its own that is complete or absent.

Layout of the run folder: `rows/<id>/` holds what a single trace writes and `row.json`; `graphs.jsonl` has a line a
finished row (id, folder, prompt, images, metrics). A killed run goes on with `trainer.resume=true`; the index is then
made anew from the folders, so that half a line does no harm.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.core.errors import NoRoom, UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.data.inputs import PromptRow
    from vlmscope.models.base import ModelInputs
    from vlmscope.models.loading import VLM
    from vlmscope.scope import Scope
    from vlmscope.tasks.registry import RunContext

_LOG = logging.getLogger(__name__)
INDEX, ROWS, ROW = "graphs.jsonl", "rows", "row.json"


def trace_rows(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Trace the rows of `task.rows` that have no folder yet.

    Returns:
        The mean of every metric over the rows that have it; how many rows are traced, were there already, are skipped.

    Raises:
        UserError: before any work when a row cannot be used, or the folder holds other rows.
    """
    from tqdm import tqdm

    from vlmscope.data.inputs import read_rows
    from vlmscope.tasks.wiring import load_model, load_scope

    if cfg.prompt is not None or cfg.image is not None:
        raise UserError("task.rows= brings its own prompts and pictures; leave out prompt= and image=")
    folder = _start(context.run_dir / ROWS, resume=cfg.trainer.resume)
    rows, bad = read_rows(cfg.task.rows)
    _refuse(cfg, [str(row) for row in bad])
    origin = _origin(cfg, context.overrides)
    done = {row.id: record for row in rows if (record := _finished(folder / row.id, row, origin)) is not None}
    vlm = load_model(cfg)
    left = [row for row in rows if row.id not in done]
    usable, refused = _usable(vlm, left)
    _refuse(cfg, refused)
    scope = load_scope(cfg, vlm, context.overrides)
    skipped = len(bad) + len(refused)
    with (context.run_dir / INDEX).open("w", encoding="utf-8") as index:
        index.writelines(_line(record) for record in done.values())
        index.flush()
        for row in tqdm(usable, desc="trace", unit="row", initial=len(done), total=len(done) + len(usable)):
            try:
                done[row.id] = _trace(cfg, scope, row, folder, origin)
            except NoRoom as error:  # no bad row
                raise NoRoom(f"{error}; trainer.resume=true with hydra.run.dir={context.run_dir} resumes") from error
            except UserError as error:
                if not cfg.task.skip_bad:
                    raise UserError(
                        f"{row.origin}: {error}; task.skip_bad=true leaves such rows out, and trainer.resume=true "
                        f"with hydra.run.dir={context.run_dir} goes on"
                    ) from error
                _LOG.warning("skipped %s: %s", row.origin, error)
                skipped += 1
                continue
            index.write(_line(done[row.id]))
            index.flush()
    return _means([done[row.id] for row in rows if row.id in done], len(rows) - len(left), skipped, context.run_dir)


def _start(folder: Path, *, resume: bool) -> Path:
    """The folder of the rows."""
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise UserError(f"{folder} holds rows already; add trainer.resume=true to go on, or choose a new hydra.run.dir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse(cfg: AppConfig, bad: Sequence[str]) -> None:
    """Say which rows are bad: one line that stops all, or with `task.skip_bad` a warning each."""
    if not bad:
        return
    if not cfg.task.skip_bad:
        more = f" (and {len(bad) - 1} more bad rows)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; correct the file, or leave such rows out with task.skip_bad=true")
    for row in bad:
        _LOG.warning("skipped %s", row)


def _origin(cfg: AppConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything that a row's graph depends on besides the row, by name."""
    from vlmscope.core.artifacts import flat, plain
    from vlmscope.tasks.wiring import model_origin, study_digest, transcoder_origin

    # The two that are left out change memory and time.
    attribution = {k: v for k, v in asdict(cfg.attribution).items() if k not in ("batch_size", "memory_gb")}
    labels = cfg.attribution.labels
    if labels is not None:
        attribution["labels"] = study_digest(labels)
    task = {"task.figure": cfg.task.figure, "task.head_edges": cfg.task.head_edges, "seed": cfg.seed}
    found = model_origin(cfg) | transcoder_origin(cfg, overrides) | flat("attribution", attribution) | task
    return plain(found)


def _row_words(row: PromptRow) -> dict[str, Any]:
    return {"id": row.id, "prompt": row.prompt, "images": [str(image) for image in row.images]}


def _pictures_digest(row: PromptRow) -> str:
    from vlmscope.core.artifacts import files_digest

    return files_digest(map(Path, row.images))


def _finished(folder: Path, row: PromptRow, origin: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of a row that was traced before; None when it was not.

    Raises:
        UserError: the folder is of another row, or of other settings, another model or other transcoders.
    """
    from vlmscope.core.artifacts import read_json, refuse_other

    if not folder.is_dir():
        return None
    record = read_json(folder / ROW)
    advice = "choose a new hydra.run.dir, or remove it"
    refuse_other(f"{row.origin}: {folder}", record.get("origin"), origin, advice)
    same = {key: record.get(key) for key in _row_words(row)} == _row_words(row)
    if not same or record.get("pictures") != _pictures_digest(row):
        raise UserError(f"{row.origin}: {folder} was traced with another prompt or other pictures; {advice}")
    return record


def _usable(vlm: VLM, rows: Sequence[PromptRow]) -> tuple[list[PromptRow], list[str]]:
    """The rows that the model takes, and a line for each that it does not."""
    from tqdm import tqdm

    good, bad = [], []
    for row in tqdm(rows, desc="checking rows", unit="row", delay=2.0):
        try:
            _inputs(vlm, row)
            good.append(row)
        except UserError as error:
            bad.append(f"{row.origin}: {error}")
    return good, bad


def _inputs(vlm: VLM, row: PromptRow) -> tuple[ModelInputs, list[Any]]:
    from vlmscope.data.images import open_images

    pictures = open_images(row.images)
    return vlm.prepare(row.prompt, pictures), pictures


def _trace(cfg: AppConfig, scope: Scope, row: PromptRow, folder: Path, origin: dict[str, Any]) -> dict[str, Any]:
    from vlmscope.core.artifacts import atomic_folder, write_json
    from vlmscope.tasks.tracing.one import trace_into

    inputs, pictures = _inputs(scope.vlm, row)
    with atomic_folder(folder / row.id) as half:
        metrics = trace_into(half, cfg, scope, inputs, pictures, row.id)
        record = {**_row_words(row), "folder": f"{ROWS}/{row.id}", "metrics": metrics}
        record |= {"origin": origin, "pictures": _pictures_digest(row)}
        write_json(half / ROW, record)
    return record


def _line(record: dict[str, Any]) -> str:
    return (
        json.dumps(
            {key: value for key, value in record.items() if key not in ("origin", "pictures")}, ensure_ascii=False
        )
        + "\n"
    )


def _means(records: Sequence[dict[str, Any]], resumed: int, skipped: int, run_dir: Path) -> dict[str, float]:
    from vlmscope.core.artifacts import write_text

    if not records:
        raise UserError(f"no row could be traced ({skipped} skipped); run.log in {run_dir} says why of each")
    write_text(run_dir / INDEX, "".join(map(_line, records)))  # in the order of the rows
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    values = {name: [r["metrics"][name] for r in records if name in r["metrics"]] for name in names}
    print(f"  {len(records)} rows traced ({resumed} of them before), {skipped} skipped")
    counts = {"rows/traced": len(records), "rows/resumed": resumed, "rows/skipped": skipped}
    return {name: sum(found) / len(found) for name, found in values.items()} | {k: float(v) for k, v in counts.items()}
