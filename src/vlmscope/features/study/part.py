"""One process's part of a study on disk: states from which it goes on, and the records of the items that it has seen.

`parts/<i>_of_<n>/`: `checkpoint_<k>/layer_<ll>.safetensors`, complete or absent; `state.json`, which names the last
checkpoint and replaces the one before it in one step; `items_<k>.parquet` and `geometry_<k>.parquet`, what was seen
between two checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlmscope.core.artifacts import atomic_folder, load_tensors, read_json, save_tensors, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.origin import plain, refuse_other
from vlmscope.data.share import Share
from vlmscope.features.study.schema import GEOMETRY_TABLE, ITEM_TABLE, read_table, write_table
from vlmscope.features.study.study_pass import StudyPass

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
