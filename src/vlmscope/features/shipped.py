"""The labelled study that comes with a model and its transcoders: made small, and found by their weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlmscope.core.artifacts import atomic_folder, files_digest, read_json, shipped, write_json
from vlmscope.core.study import MANIFEST, TOP, item_hash
from vlmscope.features import study_files as files
from vlmscope.features.item_facts import study_facts
from vlmscope.features.labels import FOLDER, Label, read_labels, set_path, write_labels
from vlmscope.features.study_files import StudyFolder, read_table, write_table
from vlmscope.features.study_tables import ranks
from vlmscope.transcoders.formats import ANY, Choice, open_set

_ROWS = 2048  # of a group of a table: one feature is read without the others


def weights_digest(model: str | Path) -> str:
    """Digest of the weights in a model's folder."""
    return files_digest(sorted(Path(model).glob("*.safetensors")))


def set_files(folder: str | Path, form: str = "auto", choice: Choice = ANY) -> list[Path]:
    """The weights of a transcoder set and the files of its settings."""
    folder = Path(folder)
    layers = {layer.path for layer in open_set(folder, form, choice).layers.values()}
    folders = {folder, *(path.parent for path in layers)}
    settings = {file for part in folders for file in part.glob("*.*") if file.suffix in (".json", ".yaml")}
    return sorted(layers | settings)


def shipped_study(model: str | Path, transcoders: str | Path, form: str = "auto", choice: Choice = ANY) -> Path | None:
    """The study folder in `assets/` of exactly these folders' weights; None without one.

    A retrained set has other weights, so that it is not called by the labels of the old one.
    """
    for manifest in sorted(shipped("assets").glob(f"*_study/{MANIFEST}")):
        head = read_json(manifest)
        if head["model"] != Path(model).name:  # spares others the reading of large weights
            continue
        same = head["origin"]["model.weights"] == weights_digest(model)
        if same and head["origin"]["transcoder.files"] == files_digest(set_files(transcoders, form, choice)):
            return manifest.parent
    return None


def small_copy(study: StudyFolder, place: Path, keep: int) -> StudyFolder:
    """A copy with the `keep` strongest and half as many drawn examples of each feature, `keep` logits and all labels.

    Drawn are the items of smallest hash, as in the whole study, so that the draw stays a fair one. Logits and scores
    have three digits.
    """
    with atomic_folder(place) as folder:
        used: set[int] = set()
        for layer in study.layers:
            examples = _kept(study.examples(layer), keep)
            used.update(examples["item"].to_pylist())
            write_table(folder / files.layer_table(files.EXAMPLES, layer), examples, _ROWS)
            features = read_table(study.path / files.layer_table(files.FEATURES, layer), files.FEATURE_TABLE)
            write_table(folder / files.layer_table(files.FEATURES, layer), _with_logits(features, keep))
        items = study.items.table
        write_table(folder / files.ITEMS, items.filter(np.isin(study.items.ids, sorted(used))), _ROWS)
        for name in (files.GEOMETRY, files.VOCABULARY):
            shutil.copyfile(study.path / name, folder / name)
        for path in sorted((study.path / FOLDER).glob("*.parquet")):
            labels = [(feature, _rounded(label)) for feature, label in read_labels(path).items()]
            write_labels(set_path(folder, path.stem), labels)
        head = read_json(study.path / MANIFEST)
        for key, count in (("top", keep), ("samples", keep // 2), ("logits", keep)):
            head["settings"][key] = min(count, head["settings"][key])
        write_json(folder / MANIFEST, head)
        study_facts(StudyFolder(folder))  # kept in the folder, which may be read-only where it is used
    return StudyFolder(place)


def _kept(examples: pa.Table, keep: int) -> pa.Table:
    top = examples["group"].to_numpy(zero_copy_only=False) == TOP
    feature, rank = examples["feature"].to_numpy(), examples["rank"].to_numpy()
    order = np.lexsort((np.where(top, rank, item_hash(examples["item"].to_numpy())), ~top, feature))
    place = ranks(feature[order].astype(np.int64) * 2 + ~top[order])  # among the feature's examples of one kind
    table = examples.take(np.sort(order[place < np.where(top[order], keep, keep // 2)]))
    # Ranks count within a group, of which some examples are gone.
    groups = np.unique(table["group"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    rank = ranks(table["feature"].to_numpy().astype(np.int64) * 1000 + groups)
    return table.set_column(table.schema.get_field_index("rank"), "rank", pa.array(rank, pa.int32()))


def _with_logits(features: pa.Table, count: int) -> pa.Table:
    for name in ("top", "bottom"):
        tokens = [row[:count] for row in features[f"{name}_tokens"].to_pylist()]
        logits = [np.float16(row[:count]).astype(np.float32) for row in features[f"{name}_logits"].to_pylist()]
        for column, values in ((f"{name}_tokens", tokens), (f"{name}_logits", logits)):
            place = features.schema.get_field_index(column)
            features = features.set_column(place, column, pa.array(values, features.schema.field(column).type))
    return features


def _rounded(label: Label) -> Label:
    values = {key: float(f"{value:.3g}") for key, value in vars(label).items() if isinstance(value, float)}
    return replace(label, **values)  # pyright: ignore[reportArgumentType]
