"""Published activation statistics as a study: of each feature the tokens on which it is strongest (docs/study.md).

The layout is that of the paper's code (schema `circuit-tracer-activation-stats-v1`): `manifest.json` names the model,
a file `stats/layer_XX.safetensors` for each layer and the files `inputs/part-XXXXX.parquet`. A layer lists features in
order (`feature_ids [n]`, `firing_counts [n]`, `slot_counts [n]`) and, one feature after another, the tokens kept
(`top_values`, `input_ids`, `token_positions` [sum of slot_counts]). An input has `input_id`, `example_id`, `text`,
`token_ids`, `token_mask`, `token_type_ids` (1 for soft tokens, or null) and `image_references`, pointers to pictures
whose bytes are not published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from vlmscope.core.artifacts import built_from, open_tensors, read_json, write_json, write_text
from vlmscope.core.errors import UserError
from vlmscope.core.hub import FilePatterns, fetch, is_commit, is_hub_id
from vlmscope.core.records import PatchBox
from vlmscope.core.study import BINS, IMAGE, KINDS, LEVELS, MANIFEST, TEXT, StudyInfo, bin_edges
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import open_source, row_of
from vlmscope.features import study_files as files
from vlmscope.features.config import StudyConfig
from vlmscope.features.readouts import layer_logits
from vlmscope.features.study import PARTS
from vlmscope.features.study_files import StudyFolder, geometry_row, write_table
from vlmscope.features.study_tables import UNIT, Pairs, layer_tables
from vlmscope.scope import Scope

pc: Any = pyarrow.compute  # its functions are made when it is imported: no types
SCHEMA, HEAD = "circuit-tracer-activation-stats-v1", "manifest.json"
COUNTS = "published_counts.parquet"  # how often each feature fires: the study's own counts are of the kept tokens
_FILES = FilePatterns((HEAD, "stats/*.safetensors", "inputs/*.parquet"))
_SOURCE, _LINES = "published", "train.jsonl"
_PADDING = len(KINDS)


def statistics_folder(path: str, revision: str | None) -> Path:
    """The folder of published statistics, fetched from the hub at a commit if `path` is a hub id."""
    if not Path(path).is_dir() and is_hub_id(path):
        if revision is None or not is_commit(revision):
            raise UserError(f"no folder {path}; to fetch it from the hub add study.revision=<commit, 40 hex digits>")
        advice = f"run `hf download {path} --revision {revision} --local-dir FOLDER` and give study.published=FOLDER"
        return fetch(path, revision, _FILES, lambda why: UserError(f"no folder {path}, and {why}: {advice}"))
    if not (Path(path) / HEAD).is_file():
        raise UserError(f"no {HEAD} in {path}; study.published names a folder of activation statistics, or a hub id")
    return Path(path)


def published_study(study: Path, source: Path, scope: Scope, config: StudyConfig) -> StudyFolder:
    """Write published statistics as a study; one that is there already is read.

    Raises:
        UserError: they are incomplete, of another schema, or of another model or set than `scope`.
    """
    if (study / MANIFEST).is_file():
        return StudyFolder(study)
    head = read_json(source / HEAD)
    if not isinstance(head, dict) or head.get("schema") != SCHEMA:
        raise UserError(f"{source / HEAD}: its schema is not {SCHEMA}, the only one that is read")
    with built_from(source, "folder of activation statistics", "fetch it again"):
        return _write(study, source, head, scope, config)


def _write(study: Path, source: Path, head: Mapping[str, Any], scope: Scope, config: StudyConfig) -> StudyFolder:
    name, widths, token = str(head["model_name"]), scope.transcoders.widths, scope.vlm.tokenizer.decode
    if Path(name).name != Path(scope.vlm.name).name:
        raise UserError(f"{source} has the statistics of {name}, this model is {scope.vlm.name}; choose the other one")
    inputs = [source / each["filename"] for each in head["inputs"]]
    kinds, begins = _kinds(inputs)
    layers, shown, counts = {int(each["layer"]): source / each["filename"] for each in head["layers"]}, set(), []
    for layer, path in sorted(layers.items()):
        state, fired = _layer(path, layer, widths.get(layer, 0), kinds, begins)
        logits = layer_logits(scope, layer, min(config.logits, scope.adapter.vocab_size)) if config.logits else None
        most = max(int(state["items_fired"].max(initial=0)), 1)
        settings = replace(config, top=most, samples=0)
        features, examples = layer_tables([state], widths[layer], settings, logits, lambda number: token([number]))
        write_table(study / files.layer_table(files.FEATURES, layer), features)
        write_table(study / files.layer_table(files.EXAMPLES, layer), examples, 2048)
        shown |= set(state["item"].tolist())
        index = np.flatnonzero(fired)
        columns = {
            "layer": np.full(len(index), layer, np.int32),
            "feature": index.astype(np.int32),
            "tokens": fired[index],
        }
        counts.append(pa.table(columns))
    write_table(study / COUNTS, pa.concat_tables(counts))
    _write_items(study, [row for path in inputs for row in _rows(path, shown)], source, token)
    about = scope.transcoders.config
    info = StudyInfo(
        model=scope.vlm.name,
        transcoders={"name": about.model_name, "activation": about.activation, "k": about.k, "cross_layer": False},
        n_features={layer: widths[layer] for layer in sorted(layers)},
        data={"name": _SOURCE, "split": None, "limit": None, "max_bad_shards": 0,
              "sources": {_SOURCE: asdict(SourceConfig(path=str(study.absolute())))}},
        settings={"schema": SCHEMA, "tokens": head.get("processor_tokens"), "logits": config.logits},
        items=len(begins) - 1,
        rows=len(begins) - 1,
        positions=dict(zip(KINDS, np.bincount(kinds[kinds < len(KINDS)], minlength=len(KINDS)).tolist(), strict=True)),
    )  # fmt: skip
    write_json(study / MANIFEST, {"format": files.NAME, "version": files.VERSION, **asdict(info)})
    return StudyFolder(study)


def _kinds(inputs: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The kinds of all inputs' tokens, [N] uint8 (`_PADDING` where masked), and where each input begins, [inputs + 1].

    Inputs are numbered 0, 1, 2, .. over the files.
    """
    parts, lengths = [np.zeros(0, np.uint8)], [np.zeros(1, np.int64)]
    for path in inputs:
        table = pq.read_table(path, columns=["token_ids", "token_mask", "token_type_ids"]).combine_chunks()
        count, typed = (
            pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy() for name in ("token_ids", "token_type_ids")
        )
        kinds = np.full(count.sum(), TEXT, np.uint8)
        kinds[np.repeat(typed > 0, count)] = np.where(
            pc.list_flatten(table["token_type_ids"]).to_numpy() == 1, IMAGE, TEXT
        )
        kinds[~pc.list_flatten(table["token_mask"]).to_numpy(zero_copy_only=False)] = _PADDING
        parts.append(kinds)
        lengths.append(count.astype(np.int64))
    return np.concatenate(parts), np.cumsum(np.concatenate(lengths))


def _layer(
    path: Path, layer: int, width: int, kinds: np.ndarray, begins: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A layer's kept tokens as `LayerStudy.state` has them, and on how many tokens each feature fired, [F]."""
    names = ("feature_ids", "slot_counts", "firing_counts", "input_ids", "token_positions", "top_values")
    with open_tensors(path, "pt") as file:
        ids, slots, fired, item, position, value = (file.get_tensor(name).double().numpy() for name in names)
    ids, slots, item, position = (array.astype(np.int64) for array in (ids, slots, item, position))
    if len(ids) and not 0 <= ids.max() < width:
        raise UserError(f"{path.name} has a feature {ids.max()}, layer {layer} of this set {width}; it is another set")
    feature = np.repeat(ids, slots)
    order = np.lexsort((position, item, feature))
    order = order[value[order] > 0]
    feature, item, position, value = (array[order] for array in (feature, item, position, value))
    # A pair is a feature with an input, of which several tokens may be kept.
    first = np.flatnonzero((np.diff(feature, prepend=-1) != 0) | (np.diff(item, prepend=-1) != 0))
    count = np.diff(np.append(first, len(feature)))
    peak = np.maximum.reduceat(value, first) if len(first) else value
    at_peak = np.flatnonzero(value == np.repeat(peak, count))
    place = position[at_peak[np.searchsorted(at_peak, first)]]
    levels = np.maximum(np.rint(LEVELS * value / np.repeat(peak, count)), 1).astype(np.uint8)
    pairs = Pairs(feature[first].astype(np.int32), item[first] * PARTS, peak.astype(np.float32),
                  place.astype(np.int32), count, position.astype(np.uint16), levels)  # fmt: skip
    histogram = np.zeros((width, len(KINDS), BINS), np.int64)
    bins = np.clip(np.searchsorted(bin_edges(), value, side="right") - 1, 0, BINS - 1)
    np.add.at(histogram, (feature, kinds[begins[item] + position], bins), 1)
    counts = {"histogram": histogram, "sums": np.rint(np.bincount(feature, value, width) / UNIT).astype(np.int64)}
    everywhere = np.zeros(width, np.int64)
    everywhere[ids] = fired.astype(np.int64)
    return {**counts, "items_fired": np.bincount(pairs.feature, minlength=width), **vars(pairs)}, everywhere


def _rows(path: Path, shown: Collection[int]) -> Iterator[dict[str, Any]]:
    """The inputs of a file that some feature's example refers to."""
    table = pq.read_table(path)
    wanted = pa.array([item // PARTS for item in shown], pa.int64())
    yield from table.filter(pc.is_in(table["input_id"].cast(pa.int64()), value_set=wanted)).to_pylist()


def _write_items(
    study: Path, rows: Sequence[Mapping[str, Any]], source: Path, token: Callable[[list[int]], str]
) -> None:
    """Items, geometries and vocabulary, and `train.jsonl`, from which pictures are opened that are there as files."""
    items, geometries, lines, ids = [], {}, [], set[int]()
    for number, row in enumerate(rows):
        length = int(np.flatnonzero(row["token_mask"])[-1]) + 1  # padding follows
        kinds = np.where(np.array(row["token_type_ids"] or [0] * length)[:length] == 1, IMAGE, TEXT).astype(np.uint8)
        pointers = row["image_references"] or []
        boxes = _boxes(int((kinds == IMAGE).sum()), len(pointers))
        key = repr([len(picture) for picture in boxes])
        geometries.setdefault(key, geometry_row(key, boxes))
        # A pointer's last part only: a foreign table must not name files elsewhere.
        places = [(source / "pictures" / Path(str(pointer)).name).absolute() for pointer in pointers]
        pictures = [str(place) for place in places if place.is_file()] if all(map(Path.is_file, places)) else []
        lines.append(json.dumps({"images": pictures, "text": row["text"] or "-"}))
        ids.update(row["token_ids"][:length])
        items.append(
            {"item": row["input_id"] * PARTS, "source": _SOURCE, "row": number, "part": 0, "digest": "", "users": [],
             "origin": ", ".join([str(row["example_id"]), *map(str, pointers)]), "assistants": [], "text": row["text"],
             "n_pictures": len(pictures), "token_ids": row["token_ids"][:length], "kinds": kinds, "geometry": key}
        )  # fmt: skip
    write_text(study / _LINES, "\n".join(lines) + "\n")
    opened = open_source(_SOURCE, SourceConfig(path=str(study)))
    for item in items:
        item["digest"] = row_of(opened, item["row"]).digest().hex() if item["n_pictures"] else ""
    items.sort(key=lambda item: item["item"])
    words = [{"id": number, "token": token([number])} for number in sorted(ids)]
    write_table(study / files.ITEMS, pa.Table.from_pylist(items, files.ITEM_TABLE), 1024)
    write_table(study / files.GEOMETRY, pa.Table.from_pylist([*geometries.values()], files.GEOMETRY_TABLE))
    write_table(study / files.VOCABULARY, pa.Table.from_pylist(words, files.VOCABULARY_TABLE))


def _boxes(soft: int, pictures: int) -> list[list[PatchBox]]:
    """What each picture's soft tokens cover: a square grid, row by row, or the whole picture where they form none."""
    pictures = pictures if pictures and soft % pictures == 0 else min(soft, 1)
    side = isqrt(soft // max(pictures, 1))
    cells = [PatchBox(x / side, y / side, (x + 1) / side, (y + 1) / side) for y in range(side) for x in range(side)]
    return [cells if side**2 * pictures == soft else [PatchBox(0, 0, 1, 1)] * (soft // pictures)] * pictures
