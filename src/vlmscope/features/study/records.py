"""Reading a study folder: records of features, their examples, and the items and pictures that these refer to.

study = StudyFolder("outputs/study/.../study")
record = study.feature(FeatureId(6, 512))                 # counts, histogram, logits, examples
for example in record.group("top"):
    view = study.view(example)                            # tokens, patches and their activations
    pictures = study.pictures(view.item)                  # opened anew, by reference
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
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
    Words,
    study_folder,
)
from vlmscope.features.study.items import (
    EXAMPLE_TABLE,
    EXAMPLES,
    FEATURE_TABLE,
    FEATURES,
    NAME,
    VERSION,
    StudyItems,
    read_table,
)


@dataclass(frozen=True)
class LayerTable:
    """All features of a layer as arrays; row f is feature f.

    Attributes:
        layer: which.
        fired: `[F, 3]` int64, active positions by `KINDS`.
        items_fired: `[F]` int64.
        activation_sum: `[F]` float64.
        activation_max: `[F]` float32.
        histogram: `[F, 3, BINS]` int64.
    """

    layer: int
    fired: np.ndarray
    items_fired: np.ndarray
    activation_sum: np.ndarray
    activation_max: np.ndarray
    histogram: np.ndarray

    @property
    def dead(self) -> np.ndarray:
        """`[F]` bool: never active in the study."""
        return self.items_fired == 0


class StudyFolder:
    """What `task=study` wrote."""

    def __init__(self, path: str | Path) -> None:
        """Read the head.

        Args:
            path: the folder with `study.json`, or the run folder around it.

        Raises:
            UserError: there is no finished study, or one of another version.
        """
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
        """Refuse a feature that the study does not have.

        Raises:
            UserError: no such layer, or no such feature in it.
        """
        if feature.layer not in self.info.n_features:
            raise UserError(f"{self.path} has no layer {feature.layer}; it has {', '.join(map(str, self.layers))}")
        if not 0 <= feature.index < self.info.n_features[feature.layer]:
            count = self.info.n_features[feature.layer]
            raise UserError(f"{self.path} has no feature {feature}: layer {feature.layer} has 0 to {count - 1}")

    def feature(self, feature: FeatureId) -> FeatureRecord:
        """One feature's record.

        Raises:
            UserError: the study does not have it, or a file is missing or damaged.
        """
        return next(self.features(feature.layer, [feature.index]))

    def features(self, layer: int, indices: list[int] | None = None) -> Iterator[FeatureRecord]:
        """Records of a layer's features, of all of them or in the order of `indices`.

        Raises:
            UserError: as `feature`.
        """
        for index in indices if indices is not None else [0]:
            self.check(FeatureId(layer, index))
        chosen = [("feature", "in", indices)] if indices is not None else None
        table = read_table(self._file(FEATURES, layer), FEATURE_TABLE, chosen)
        rows = {row["feature"]: row for row in table.to_pylist()}
        examples = read_table(self._file(EXAMPLES, layer), EXAMPLE_TABLE, chosen)
        of = examples["feature"].to_numpy()
        for index in indices if indices is not None else sorted(rows):
            first, last = np.searchsorted(of, [index, index + 1])
            yield _record(layer, rows[index], examples.slice(first, last - first))

    def layer(self, layer: int) -> LayerTable:
        """The statistics of all features of a layer.

        Raises:
            UserError: as `feature`.
        """
        self.check(FeatureId(layer, 0))
        table = read_table(self._file(FEATURES, layer), FEATURE_TABLE)

        def histogram(kind: str) -> np.ndarray:
            return table[f"histogram_{kind}"].combine_chunks().flatten().to_numpy().reshape(-1, BINS)

        return LayerTable(
            layer,
            np.stack([table[f"fired_{kind}"].to_numpy() for kind in KINDS], axis=1),
            table["items_fired"].to_numpy(),
            table["activation_sum"].to_numpy(),
            table["activation_max"].to_numpy(),
            np.stack([histogram(kind) for kind in KINDS], axis=1),
        )

    def examples(self, layer: int) -> pa.Table:
        """The table of all examples of a layer (`schema.EXAMPLE_TABLE`), by feature, group and rank.

        Raises:
            UserError: as `feature`.
        """
        self.check(FeatureId(layer, 0))
        return read_table(self._file(EXAMPLES, layer), EXAMPLE_TABLE)

    def example_items(self, layer: int, top: bool) -> tuple[np.ndarray, np.ndarray]:
        """Features and items [n] int64 of a layer's examples, by feature: the strongest, or those drawn at random.

        Raises:
            UserError: as `feature`.
        """
        table = self.examples(layer)
        wanted = (table["group"].to_numpy(zero_copy_only=False) == TOP) == top
        return table["feature"].to_numpy()[wanted].astype(np.int64), table["item"].to_numpy()[wanted]

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
        """The pictures of an item (PIL, RGB), read from the data again.

        Raises:
            UserError: the data are gone or are others than the study saw.
        """
        return self.items.pictures(item)

    def _file(self, pattern: str, layer: int) -> Path:
        return self.path / pattern.format(layer)


def _record(layer: int, row: dict[str, Any], examples: pa.Table) -> FeatureRecord:
    return FeatureRecord(
        FeatureId(layer, row["feature"]),
        {kind: row[f"fired_{kind}"] for kind in KINDS},
        row["items_fired"],
        row["activation_sum"],
        row["activation_max"],
        np.array([row[f"histogram_{kind}"] for kind in KINDS], dtype=np.int64),
        tuple(row["quantile_values"]),
        tuple(_example(one) for one in examples.to_pylist()),
        _words(row["top_tokens"], row["top_logits"]),
        _words(row["bottom_tokens"], row["bottom_logits"]),
    )


def _words(tokens: list[str], logits: list[float]) -> Words:
    return tuple(zip(tokens, logits, strict=True))


def _example(row: dict[str, Any]) -> StudyExample:
    return StudyExample(
        row["group"],
        row["rank"],
        row["activation"],
        row["item"],
        row["position"],
        np.array(row["positions"], dtype=np.uint16),
        np.array(row["levels"], dtype=np.uint8),
    )
