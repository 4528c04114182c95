"""A study from beginning to end: one process's part, the pass over it, and the files of all parts.

The files of a study from its finished parts: the same bytes however the data were divided.

One process's part of a study on disk: states from which it goes on, and the records of the items that it has seen.

`parts/<i>_of_<n>/`: `checkpoint_<k>/layer_<ll>.safetensors`, complete or absent; `state.json`, which names the last
checkpoint and replaces the one before it in one step; `items_<k>.parquet` and `geometry_<k>.parquet`, what was seen
between two checkpoints.

"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from vlmscope.core.artifacts import atomic_folder, load_tensors, read_json, save_tensors, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.origin import flat, folder_digest, plain, refuse_other
from vlmscope.core.study import KINDS, MANIFEST, StudyInfo
from vlmscope.data.config import SourceConfig
from vlmscope.data.folder import NumberedRows
from vlmscope.data.mixing import open_source
from vlmscope.data.samples import WHOLE, Share
from vlmscope.features.readouts import layer_logits
from vlmscope.features.study.config import StudyConfig
from vlmscope.features.study.forwards import InputMaker, StudyPass
from vlmscope.features.study.items import (
    EXAMPLES,
    FEATURES,
    GEOMETRY,
    GEOMETRY_TABLE,
    ITEM_TABLE,
    ITEMS,
    NAME,
    ROWS_A_GROUP,
    VERSION,
    VOCABULARY,
    VOCABULARY_TABLE,
    read_table,
    table_writer,
    write_table,
)
from vlmscope.features.study.records import StudyFolder
from vlmscope.features.study.tables import LayerTables, Logits, layer_tables
from vlmscope.models.fingerprints import model_fingerprint
from vlmscope.scope import Scope

_LOG = logging.getLogger(__name__)
_ITEMS_A_GROUP = 1024


def write_study(
    study: Path,
    parts: Sequence[StudyPart],
    info: StudyInfo,
    config: StudyConfig,
    logits: Callable[[int], Logits | None],
    token: Callable[[int], str],
) -> None:
    """Write all tables, `study.json` last, and remove the parts.

    Args:
        study: the folder.
        parts: all of them, finished.
        info: the head.
        config: what was kept.
        logits: of a layer's features; None to leave them out.
        token: the string of an id.
    """
    items: set[int] = set()
    for layer, width in sorted(info.n_features.items()):
        found: LayerTables = layer_tables([part.layer(layer) for part in parts], width, config, logits(layer), token)
        write_table(study / FEATURES.format(layer), found.features)
        write_table(study / EXAMPLES.format(layer), found.examples, ROWS_A_GROUP)
        items.update(found.items.tolist())
    _write_items(study, parts, np.array(sorted(items), dtype=np.int64), token)
    write_json(study / MANIFEST, {"format": NAME, "version": VERSION, **json.loads(json.dumps(asdict(info)))})
    shutil.rmtree(study / "parts")


def _write_items(study: Path, parts: Sequence[StudyPart], wanted: np.ndarray, token: Callable[[int], str]) -> None:
    """Items that examples refer to, with their geometries and tokens."""
    known, ids = pa.array(wanted), set()
    shapes: set[str] = set()
    with table_writer(study / ITEMS, ITEM_TABLE) as writer:
        tables = [_chosen(part.items(), "item", known) for part in parts]
        for table in _regrouped(_in_order(tables), writer):
            ids.update(pc.unique(pc.list_flatten(table["token_ids"])).to_pylist())  # pyright: ignore[reportAttributeAccessIssue]
            shapes.update(table["geometry"].to_pylist())
    rows = {}
    for part in parts:
        for table in _chosen(part.geometries(), "geometry", pa.array(sorted(shapes), pa.string())):
            rows |= {row["geometry"]: row for row in table.to_pylist()}
    write_table(study / GEOMETRY, pa.Table.from_pylist([rows[key] for key in sorted(rows)], GEOMETRY_TABLE))
    words = [{"id": number, "token": token(number)} for number in sorted(ids)]
    write_table(study / VOCABULARY, pa.Table.from_pylist(words, VOCABULARY_TABLE))


def _chosen(tables: Iterable[pa.Table], column: str, values: pa.Array) -> Iterator[pa.Table]:
    for table in tables:
        yield table.filter(pc.is_in(table[column], value_set=values))  # pyright: ignore[reportAttributeAccessIssue]


def _in_order(streams: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Rows of several streams of tables, each by id, as one by id; of each no more than a table is in memory."""
    held: list[pa.Table | None] = [_next(stream) for stream in streams]
    while any(table is not None for table in held):
        # What comes later has larger ids than this.
        bound = min(table["item"][-1].as_py() for table in held if table is not None)
        ready = []
        for place, table in enumerate(held):
            if table is None:
                continue
            count = int(np.searchsorted(table["item"].to_numpy(), bound, side="right"))
            ready.append(table.slice(0, count))
            held[place] = table.slice(count) if count < len(table) else _next(streams[place])
        yield pa.concat_tables(ready).sort_by("item")


def _next(stream: Iterator[pa.Table]) -> pa.Table | None:
    return next((table for table in stream if len(table)), None)


def _regrouped(tables: Iterator[pa.Table], writer: pq.ParquetWriter) -> Iterator[pa.Table]:
    """Write tables in groups of one size, whatever theirs is, so that files are the same; each group is yielded."""
    rest: list[pa.Table] = []

    def write(table: pa.Table) -> pa.Table:
        whole = table.combine_chunks()
        writer.write_table(whole, _ITEMS_A_GROUP)
        return whole

    for one in tables:
        table = pa.concat_tables([*rest, one])
        full = len(table) // _ITEMS_A_GROUP * _ITEMS_A_GROUP
        for start in range(0, full, _ITEMS_A_GROUP):
            yield write(table.slice(start, _ITEMS_A_GROUP))
        rest = [table.slice(full)]
    if rest and len(rest[0]):
        yield write(rest[0])


def totals(parts: Sequence[StudyPart]) -> dict[str, Any]:
    """What all parts together went through: items, rows, positions by kind and skipped rows by source."""
    states = [part.state for part in parts if part.state is not None]
    skipped: dict[str, int] = {}
    for state in states:
        for name, count in state["skipped"].items():
            skipped[name] = skipped.get(name, 0) + count
    positions = np.sum([state["positions"] for state in states], axis=0).tolist()
    rows = sum(states[0]["rows"]["taken"].values())  # every part counts all
    return {
        "items": sum(state["items"] for state in states),
        "rows": rows,
        "positions": positions,
        "skipped": dict(sorted(skipped.items())),
        "bad_shards": states[0]["bad_shards"],
    }


_STATE = "state.json"


class StudyPart:
    """The folder of one part."""

    def __init__(self, study: Path, share: Share, origin: Mapping[str, Any]) -> None:
        """Read the state, if there is one.

        Args:
            study: the study's folder.
            share: which part.
            origin: what decides the study, by name (`vlmscope.core.origin`).

        Raises:
            UserError: the folder has a state of another origin, or parts of another number of processes.
        """
        parts = study / "parts"
        self.folder, self.origin = parts / f"{share.index}_of_{share.total}", plain(origin)
        others = [one.name for one in parts.glob("*_of_*") if not one.name.endswith(f"_of_{share.total}")]
        if others:
            raise UserError(
                f"{study} was begun by {others[0].rpartition('_')[2]} processes, this is one of {share.total}; start "
                "as many as then, or choose a new hydra.run.dir"
            )
        path = self.folder / _STATE
        self.state: dict[str, Any] | None = read_json(path) if path.is_file() else None
        if self.state is not None:
            refuse_other(str(study), self.state.get("origin"), origin)

    @property
    def finished(self) -> bool:
        """Whether its data have ended."""
        return self.state is not None and self.state["finished"]

    def save(
        self, seen: StudyPass, records: list[dict[str, Any]], geometries: list[dict[str, Any]], more: dict[str, Any]
    ) -> None:
        """Write a state.

        Args:
            seen: counts and examples so far.
            records: of items since the last state; `geometries` likewise.
            geometries: rows of the table of geometries.
            more: JSON values; "finished" among them.
        """
        number = 0 if self.state is None else self.state["checkpoint"] + 1
        write_table(self.folder / f"items_{number}.parquet", pa.Table.from_pylist(records, ITEM_TABLE))
        write_table(self.folder / f"geometry_{number}.parquet", pa.Table.from_pylist(geometries, GEOMETRY_TABLE))
        place = self.folder / f"checkpoint_{number}"
        if place.is_dir():  # of a run that was killed before it was named
            shutil.rmtree(place)
        with atomic_folder(place) as folder:
            for layer, study in seen.layers.items():
                save_tensors(folder / _layer(layer), study.state())
        counts = {"items": seen.items, "positions": seen.positions.tolist()}
        self.state = {"origin": self.origin, "checkpoint": number, **counts, **more}
        write_json(self.folder / _STATE, self.state, indent=None)
        for old in self.folder.glob("checkpoint_*"):
            if old.name != f"checkpoint_{number}":
                shutil.rmtree(old)

    def load(self, into: StudyPass) -> None:
        """Take up the state."""
        assert self.state is not None
        for layer, study in into.layers.items():
            study.load(self.layer(layer))
        into.items, into.positions = self.state["items"], np.array(self.state["positions"], dtype=np.int64)

    def layer(self, layer: int) -> dict[str, np.ndarray]:
        """The arrays of `LayerStudy.state`."""
        assert self.state is not None
        return load_tensors(self.folder / f"checkpoint_{self.state['checkpoint']}" / _layer(layer))[0]

    def items(self) -> Iterator[pa.Table]:
        """Tables of the items seen, by id."""
        for number in self._numbers():
            yield read_table(self.folder / f"items_{number}.parquet", ITEM_TABLE)

    def geometries(self) -> Iterator[pa.Table]:
        """Tables of where soft tokens lie."""
        for number in self._numbers():
            yield read_table(self.folder / f"geometry_{number}.parquet", GEOMETRY_TABLE)

    def _numbers(self) -> range:
        return range(0 if self.state is None else self.state["checkpoint"] + 1)


def _layer(layer: int) -> str:
    return f"layer_{layer:02d}.safetensors"


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
