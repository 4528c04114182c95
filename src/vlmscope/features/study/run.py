"""A study from beginning to end: the pass over one part of the data, and the files made of all parts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmscope.core.errors import UserError
from vlmscope.core.origin import flat, folder_digest, refuse_other
from vlmscope.core.study import KINDS, MANIFEST, StudyInfo
from vlmscope.data.numbered import NumberedRows
from vlmscope.data.share import WHOLE, Share
from vlmscope.data.source_config import SourceConfig
from vlmscope.data.sources import open_source
from vlmscope.features.logit_lens import layer_logits
from vlmscope.features.study.config import StudyConfig
from vlmscope.features.study.files import totals, write_study
from vlmscope.features.study.inputs import InputMaker
from vlmscope.features.study.layer_tables import Logits
from vlmscope.features.study.part import StudyPart
from vlmscope.features.study.records import StudyFolder
from vlmscope.features.study.study_pass import StudyPass
from vlmscope.models.fingerprints import model_fingerprint
from vlmscope.scope import Scope

HOW = ("path", "checkpoint_every", "forward_tokens", "max_skipped")  # settings that change nothing in the files


@dataclass(frozen=True)
class PassTimes:
    """Seconds of this process since it started or went on.

    Attributes:
        all: of the whole pass, reading and checkpoints included.
        own: of what a plain pass over the same inputs would not do: codes, sorting, checkpoints.
    """

    all: float
    own: float

    @property
    def ratio(self) -> float:
        """The pass against the plain pass."""
        return self.all / max(self.all - self.own, 1e-9)


def run_part(
    scope: Scope,
    rows: NumberedRows,
    part: StudyPart,
    config: StudyConfig,
    after_batch: Callable[[int], None] = lambda _rows: None,
) -> PassTimes:
    """Go through one part of the data, from the state that is there; at the end there is a finished one.

    Args:
        scope: the model and its transcoders.
        rows: the data, at the beginning.
        part: where states are.
        config: what is kept.
        after_batch: called with the rows gone through.

    Raises:
        UserError: too many rows cannot be used, or the data cannot be read.
    """
    began, saving = time.perf_counter(), 0.0
    seen = StudyPass(scope, config.top, config.samples, config.window)
    make = InputMaker(scope.vlm, config.max_tokens, config.max_skipped)
    if part.state is not None:
        part.load(seen)
        rows.load(part.state["rows"])
        make.skipped = dict(part.state["skipped"])
        make.known = {key for table in part.geometries() for key in table["geometry"].to_pylist()}
    records, batches = [], 0

    def save(finished: bool) -> None:
        nonlocal saving
        start = time.perf_counter()
        more = {"finished": finished, "skipped": make.skipped, "rows": rows.state(), "bad_shards": rows.bad_shards}
        part.save(seen, records, make.geometries, more)
        records.clear()
        make.geometries.clear()
        saving += time.perf_counter() - start

    if not part.finished:
        share = f" {rows.share.index + 1}/{rows.share.total}" if rows.share.total > 1 else ""
        with tqdm(desc=f"study{share}", unit="row", total=rows.size(), initial=rows.done) as bar:
            for batch in rows:
                inputs = make(batch)
                seen.add(inputs, config.forward_tokens)
                records += [one.record for one in inputs]
                batches += 1
                if batches % config.checkpoint_every == 0:
                    save(finished=False)
                bar.update(rows.done - bar.n)
                after_batch(rows.done)
        save(finished=True)
    total = time.perf_counter() - began
    return PassTimes(total, seen.own_seconds + saving)


def study_parts(study: Path, total: int, origin: Mapping[str, Any]) -> list[StudyPart]:
    """The finished parts of all processes.

    Raises:
        UserError: one is missing or not finished, or there was no item in any.
    """
    parts = [StudyPart(study, Share(index, total), origin) for index in range(total)]
    for index, part in enumerate(parts):
        if not part.finished:
            raise UserError(f"part {index + 1} of {total} of {study} is not finished; go on with trainer.resume=true")
    if not sum(part.state["items"] for part in parts if part.state is not None):
        raise UserError("no row of the data could be used; see the warnings above and check data=")
    return parts


def finished_study(study: Path, origin: Mapping[str, Any]) -> StudyFolder | None:
    """The study that is there already; None where it is not finished.

    Raises:
        UserError: it is of another origin.
    """
    if not (study / MANIFEST).is_file():
        return None
    done = StudyFolder(study)
    refuse_other(str(study), done.info.origin or None, origin)
    shutil.rmtree(study / "parts", ignore_errors=True)  # left by a kill at the very end
    return done


def finish(
    study: Path,
    scope: Scope,
    parts: Sequence[StudyPart],
    config: StudyConfig,
    data: Mapping[str, Any],
) -> StudyFolder:
    """Write the files of a study whose parts are all finished.

    Args:
        study: the folder.
        scope: the model and its transcoders.
        parts: of all processes.
        config: what was kept.
        data: `StudyInfo.data`.
    """
    found = totals(parts)
    vlm, about = scope.vlm, scope.transcoders.config
    settings = {key: value for key, value in asdict(config).items() if key not in HOW}
    kind = {"name": about.model_name, "activation": about.activation, "k": about.k}
    info = StudyInfo(
        vlm.name,
        {**kind, "cross_layer": scope.transcoders.cross_layer},
        scope.transcoders.widths,
        {**data, "bad_shards": found["bad_shards"]},
        settings,
        found["items"],
        found["rows"],
        dict(zip(KINDS, found["positions"], strict=True)),
        found["skipped"],
        parts[0].origin,
    )

    def logits(layer: int) -> Logits | None:
        count = min(config.logits, vlm.adapter.vocab_size)
        return layer_logits(scope, layer, count) if count else None

    write_study(study, parts, info, config, logits, lambda number: vlm.tokenizer.decode([number]))
    return StudyFolder(study)


def study_alone(
    study: Path,
    scope: Scope,
    sources: Mapping[str, SourceConfig],
    config: StudyConfig,
    max_bad_shards: int = 0,
) -> StudyFolder:
    """A whole study by this process, gone on with if it was begun.

    Args:
        study: the folder; when it holds a finished study, that is read.
        scope: the model and its transcoders.
        sources: the data.
        config: what is kept.
        max_bad_shards: corrupt shards that are left out at most.

    Raises:
        UserError: as `run_part`, or the folder holds a study of other settings.
    """
    opened = {name: (one.weight, open_source(name, one, None, max_bad_shards, False)) for name, one in sources.items()}
    data = {
        "name": "",
        "split": None,
        "limit": config.limit,
        "max_bad_shards": max_bad_shards,
        "sources": {name: asdict(one) for name, one in sources.items()},
    }
    kept = {key: value for key, value in asdict(config).items() if key not in HOW}
    origin = {
        "model": f"{scope.vlm.name} {model_fingerprint(scope.vlm.model)}",
        "transcoders": f"{scope.transcoders.config} {model_fingerprint(scope.transcoders)}",
        **flat("data", data),
        **{f"data.sources.{name}.files": folder_digest(one.path) for name, one in sources.items() if one.path},
        **flat("study", kept),
    }
    done = finished_study(study, origin)
    if done is not None:
        return done
    part = StudyPart(study, WHOLE, origin)
    run_part(scope, NumberedRows(opened, config.batch_size, WHOLE, config.limit), part, config)
    return finish(study, scope, study_parts(study, 1, origin), config, data)
