"""The files of a study folder (docs/study.md) and reading them: features, their examples, items and pictures.

study = StudyFolder("outputs/study/.../study")
record = study.feature(FeatureId(6, 512))                 # counts, histogram, logits, examples
for example in record.group("top"):
    view = study.view(example)                            # tokens, patches and their activations
    pictures = study.pictures(view.item)                  # opened anew, by reference

All tables are Parquet, written atomically and always with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmscope.core.artifacts import atomic_path, read_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, FeatureId, PatchBox, layer_key
from vlmscope.core.study import (
    BINS,
    KINDS,
    MANIFEST,
    TOP,
    ExampleView,
    FeatureRecord,
    StudyExample,
    StudyInfo,
    StudyItem,
    study_folder,
)
from vlmscope.data.config import SourceConfig
from vlmscope.data.images import decode_image
from vlmscope.data.mixing import open_source, row_of
from vlmscope.data.samples import Source

NAME, VERSION = "vlmscope-study", 1
FEATURES, EXAMPLES = "features", "examples"  # folders with a table per layer
ITEMS, GEOMETRY, VOCABULARY = "items.parquet", "geometry.parquet", "vocabulary.parquet"

_STRINGS, _FLOATS, _INTEGERS = pa.list_(pa.string()), pa.list_(pa.float32()), pa.list_(pa.int32())
FEATURE_TABLE = pa.schema(
    {"feature": pa.int32(), "items_fired": pa.int64()}
    | {f"fired_{kind}": pa.int64() for kind in KINDS}
    | {"activation_sum": pa.float64(), "activation_max": pa.float32()}
    | {f"histogram_{kind}": pa.list_(pa.int64(), BINS) for kind in KINDS}
    | {"quantile_values": _FLOATS, "top_tokens": _STRINGS, "top_logits": _FLOATS}
    | {"bottom_tokens": _STRINGS, "bottom_logits": _FLOATS}
)
EXAMPLE_TABLE = pa.schema(
    {"feature": pa.int32(), "group": pa.string(), "rank": pa.int32(), "activation": pa.float32(), "item": pa.int64()}
    | {"position": pa.int32(), "positions": pa.list_(pa.uint16()), "levels": pa.list_(pa.uint8())}
)
ITEM_TABLE = pa.schema(
    {"item": pa.int64(), "source": pa.string(), "row": pa.int64(), "part": pa.int32(), "origin": pa.string()}
    | {"digest": pa.string(), "users": _STRINGS, "assistants": _STRINGS, "text": pa.string(), "n_pictures": pa.int32()}
    | {"token_ids": _INTEGERS, "kinds": pa.list_(pa.uint8()), "geometry": pa.string()}
)
GEOMETRY_TABLE = pa.schema(
    {"geometry": pa.string(), "pictures": _INTEGERS, "boxes": pa.list_(pa.float64())}
    | {"rows": _INTEGERS, "columns": _INTEGERS}
)
VOCABULARY_TABLE = pa.schema({"id": pa.int32(), "token": pa.string()})


def layer_table(folder: str, layer: int) -> str:
    """The file of a layer's table in a study."""
    return f"{folder}/{layer_key(layer)}.parquet"


def write_table(path: Path, table: pa.Table, rows_per_group: int | None = None) -> None:
    """Write a whole table."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, rows_per_group, compression="zstd")


def read_table(path: Path, schema: pa.Schema, filters: list | None = None) -> pa.Table:
    """Read a table, or the rows that filters leave.

    Raises:
        UserError: it is missing, not Parquet, or of another layout.
    """
    if not path.is_file():
        raise UserError(f"no {path}; the study is not complete: run task=study again with trainer.resume=true")
    try:
        table = pq.ParquetFile(path).read() if filters is None else pq.read_table(path, filters=filters)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}; run task=study again") from error
    if table.schema.names != schema.names:
        raise UserError(
            f"{path} has the columns {', '.join(table.schema.names)}; it is not of a study of version {VERSION}; run "
            "the task that wrote it again"
        )
    return table


def open_sources(data: Mapping[str, Any]) -> dict[str, tuple[float, Source]]:
    """The sources of a study (`StudyInfo.data`) with their weights.

    Raises:
        UserError: one is not there, empty, or of another schema.
    """
    configs = {name: SourceConfig(**settings) for name, settings in data["sources"].items()}
    most = data["max_bad_shards"]
    return {name: (config.weight, open_source(name, config, None, most)) for name, config in configs.items()}


def geometry_row(key: str, boxes: list[list[PatchBox]]) -> dict[str, Any]:
    """A row of `GEOMETRY_TABLE` from the boxes of each picture's soft tokens."""
    grids = []
    for picture in boxes:
        tops, lefts = (list(dict.fromkeys(getattr(box, side) for box in picture)) for side in ("top", "left"))
        row_by_row = [(box.top, box.left) for box in picture] == [(top, left) for top in tops for left in lefts]
        grids.append((len(tops), len(lefts)) if row_by_row else (0, 0))
    return {
        "geometry": key,
        "pictures": [number for number, picture in enumerate(boxes) for _ in picture],
        "boxes": [number for picture in boxes for box in picture for number in box],
        "rows": [rows for rows, _ in grids],
        "columns": [columns for _, columns in grids],
    }


class StudyItems:
    """`items[id]`, and the pictures of an item. Tables are read once, pictures at every call."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        """Read the tables of a study's folder; `data` (`StudyInfo.data`) says how to read pictures."""
        self.folder, self.data = folder, data
        self.table = read_table(folder / ITEMS, ITEM_TABLE)
        self.ids = self.table["item"].to_numpy()
        words = read_table(folder / VOCABULARY, VOCABULARY_TABLE)
        self.words: dict[int, str] = dict(zip(words["id"].to_pylist(), words["token"].to_pylist(), strict=True))
        rows = read_table(folder / GEOMETRY, GEOMETRY_TABLE).to_pylist()
        self.geometries: dict[str, dict[str, Any]] = {row["geometry"]: row for row in rows}
        self._sources: dict[str, Source] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: int) -> StudyItem:
        place = int(np.searchsorted(self.ids, item))
        if place == len(self.ids) or self.ids[place] != item:
            raise UserError(f"{self.folder / ITEMS} has no item {item}; the files are not of one study, run it again")
        row = self.table.slice(place, 1).to_pylist()[0]
        geometry = self.geometries[row["geometry"]]
        return StudyItem(
            row["item"], row["source"], row["row"], row["part"], row["origin"], row["digest"],
            tuple(Exchange(*turn) for turn in zip(row["users"], row["assistants"], strict=True)),
            row["text"], row["n_pictures"],
            np.array(row["token_ids"], dtype=np.int64),
            tuple(self.words[token] for token in row["token_ids"]),
            np.array(row["kinds"], dtype=np.uint8),
            np.array(geometry["pictures"], dtype=np.int64),
            self.boxes(row["geometry"]),
            tuple(zip(geometry["rows"], geometry["columns"], strict=True)),
        )  # fmt: skip

    def boxes(self, geometry: str) -> tuple[PatchBox, ...]:
        """The boxes of the soft tokens of an item's pictures."""
        numbers = self.geometries[geometry]["boxes"]
        return tuple(PatchBox(*numbers[i : i + 4]) for i in range(0, len(numbers), 4))

    def pictures(self, item: StudyItem) -> tuple[Any, ...]:
        """PIL pictures of an item; see `StudyFolder.pictures`."""
        if not item.n_pictures:
            return ()
        sample = row_of(self.source(item.source), item.row)
        if sample.digest().hex() != item.digest:
            raise UserError(f"{item.origin}: not what the study saw; give the data that it was made of")
        return tuple(decode_image(data, f"{item.origin}: picture {n}") for n, data in enumerate(sample.images, start=1))

    def source(self, name: str) -> Source:
        """One of the study's sources, opened again."""
        if name not in self._sources:
            settings = {name: self.data["sources"][name]}
            self._sources[name] = open_sources({**self.data, "sources": settings})[name][1]
        return self._sources[name]


@dataclass(frozen=True)
class LayerTable:
    """All features of a layer as arrays; row f is feature f."""

    fired: np.ndarray  # `[F, 3]` int64, active positions by `KINDS`
    items_fired: np.ndarray  # `[F]` int64
    activation_max: np.ndarray  # `[F]` float32

    @property
    def dead(self) -> np.ndarray:
        """`[F]` bool: never active in the study."""
        return self.items_fired == 0


class StudyFolder:
    """The output of `task=study`. Methods raise a `UserError` for features it does not have, and for damaged files."""

    def __init__(self, path: str | Path) -> None:
        """Read the head of a study in `path`, the folder with `study.json` or the run folder around it."""
        self.path = study_folder(path)
        head = read_json(self.path / MANIFEST)
        if not isinstance(head, dict) or head.get("format") != NAME or head.get("version") != VERSION:
            raise UserError(f"{self.path / MANIFEST} is not a study of version {VERSION}; run task=study again")
        fields = {key: value for key, value in head.items() if key not in ("format", "version")}
        widths = {int(layer): count for layer, count in fields.pop("n_features").items()}
        self.info = StudyInfo(**fields, n_features=widths)

    @property
    def layers(self) -> list[int]:
        """The layers that were studied, ascending."""
        return sorted(self.info.n_features)

    def check(self, feature: FeatureId) -> None:
        """Refuse a feature that the study does not have."""
        if feature.layer not in self.info.n_features:
            raise UserError(f"{self.path} has no layer {feature.layer}; it has {', '.join(map(str, self.layers))}")
        if not 0 <= feature.index < self.info.n_features[feature.layer]:
            count = self.info.n_features[feature.layer]
            raise UserError(f"{self.path} has no feature {feature}: layer {feature.layer} has 0 to {count - 1}")

    def feature(self, feature: FeatureId) -> FeatureRecord:
        """One feature's record."""
        return next(self.features(feature.layer, [feature.index]))

    def features(self, layer: int, indices: list[int] | None = None) -> Iterator[FeatureRecord]:
        """Records of a layer's features, of all of them or in the order of `indices`."""
        indices = list(range(self.info.n_features[layer])) if indices is None else indices
        for index in indices:
            self.check(FeatureId(layer, index))
        filters = [("feature", "in", indices)]
        table = read_table(self.path / layer_table(FEATURES, layer), FEATURE_TABLE, filters)
        rows = {row["feature"]: row for row in table.to_pylist()}
        examples = read_table(self.path / layer_table(EXAMPLES, layer), EXAMPLE_TABLE, filters)
        feature_column = examples["feature"].to_numpy()
        for index in indices:
            first, last = np.searchsorted(feature_column, [index, index + 1])
            yield _record(layer, rows[index], examples.slice(first, last - first))

    def layer(self, layer: int) -> LayerTable:
        """The counts of all features of a layer."""
        self.check(FeatureId(layer, 0))
        table = read_table(self.path / layer_table(FEATURES, layer), FEATURE_TABLE)
        fired = np.stack([table[f"fired_{kind}"].to_numpy() for kind in KINDS], axis=1)
        return LayerTable(fired, table["items_fired"].to_numpy(), table["activation_max"].to_numpy())

    def examples(self, layer: int) -> pa.Table:
        """The table of all examples of a layer (`EXAMPLE_TABLE`), by feature, group and rank."""
        self.check(FeatureId(layer, 0))
        return read_table(self.path / layer_table(EXAMPLES, layer), EXAMPLE_TABLE)

    def example_items(self, layer: int, top: bool) -> tuple[np.ndarray, np.ndarray]:
        """Features and items [n] int64 of a layer's examples, by feature: the strongest, or those drawn at random."""
        table = self.examples(layer)
        in_group = (table["group"].to_numpy(zero_copy_only=False) == TOP) == top
        return table["feature"].to_numpy()[in_group].astype(np.int64), table["item"].to_numpy()[in_group]

    @cached_property
    def items(self) -> StudyItems:
        """Every item that an example refers to, `items[id]`."""
        return StudyItems(self.path, self.info.data)

    def view(self, example: StudyExample) -> ExampleView:
        """An example with its item."""
        item = self.items[example.item]
        length = len(item.token_ids)
        return ExampleView(example, item, example.activations(length), example.dense_levels(length))

    def pictures(self, item: StudyItem) -> tuple[Any, ...]:
        """The pictures of an item (PIL, RGB), read from the data again; these must be those that the study saw."""
        return self.items.pictures(item)


def _record(layer: int, row: dict[str, Any], examples: pa.Table) -> FeatureRecord:
    dtypes = {"positions": np.uint16, "levels": np.uint8}
    shown = [
        {**example, **{name: np.array(example[name], dtype) for name, dtype in dtypes.items()}}
        for example in examples.drop_columns("feature").to_pylist()
    ]
    return FeatureRecord(
        FeatureId(layer, row["feature"]),
        {kind: row[f"fired_{kind}"] for kind in KINDS},
        row["items_fired"],
        row["activation_sum"],
        row["activation_max"],
        np.array([row[f"histogram_{kind}"] for kind in KINDS], dtype=np.int64),
        tuple(row["quantile_values"]),
        tuple(StudyExample(**example) for example in shown),
        tuple(zip(row["top_tokens"], row["top_logits"], strict=True)),
        tuple(zip(row["bottom_tokens"], row["bottom_logits"], strict=True)),
    )
