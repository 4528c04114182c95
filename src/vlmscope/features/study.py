"""A feature study: one pass over data for all features of all layers, its resumable parts, its files and its examples.

Rows of data become inputs of the model (`InputMaker`), each with the record by which it is found again. `StudyPass`
runs the model and hands every layer's codes to its `LayerStudy`. Each process goes through one part of the data and
writes states to `parts/<i>_of_<n>/`: `checkpoint_<k>/layer_<ll>.safetensors`, complete or absent; `state.json`, which
names the last checkpoint and replaces the one before it in one step; `items_<k>.parquet` and `geometry_<k>.parquet`,
what was seen between two checkpoints. `finish` makes the study's files of all parts: the same bytes however the data
were divided. `study_examples` and `top_examples` give the inputs on which features are most active, of a study or of
chosen prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from tqdm import tqdm

from vlmscope.activations import watching_mlp_inputs
from vlmscope.core.artifacts import (
    atomic_folder,
    flat,
    folder_digest,
    load_tensors,
    plain,
    read_json,
    refuse_other,
    save_tensors,
    write_json,
)
from vlmscope.core.errors import UserError
from vlmscope.core.records import Document, FeatureId, PatchBox
from vlmscope.core.results import FeatureExample
from vlmscope.core.study import ANSWER, IMAGE, KINDS, LEVELS, MANIFEST, TEXT, TOP, StudyInfo
from vlmscope.data.config import SourceConfig
from vlmscope.data.images import png_bytes
from vlmscope.data.mixing import NumberedRow, NumberedRows
from vlmscope.data.samples import WHOLE, RawSample, Share
from vlmscope.features import study_files as files
from vlmscope.features.config import MOST_TOKENS, StudyConfig
from vlmscope.features.readouts import layer_logits
from vlmscope.features.study_files import StudyFolder, geometry_row, open_sources, read_table, write_table
from vlmscope.features.study_tables import LayerStudy, Tokens, layer_tables, tower_positions
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import LOSS_MASK, by_shape, encode, joined
from vlmscope.models.checkpoint import model_fingerprint
from vlmscope.models.loading import VLM
from vlmscope.scope import Scope

_LOG = logging.getLogger(__name__)
PARTS = 256  # inputs of one row at most, so that an id is row and part
_GATHERED = 64 << 20  # bytes of activations of all layers that wait at most, besides those of one forward
_EXAMPLES_PER_GROUP = 2048  # what some dozens of features have, so that one feature is read quickly
_ITEMS_PER_GROUP = 1024
_STATE = "state.json"
_CLASS, CLASS_TOKEN = -1, "[class]"  # id and word of a vision tower's class tokens


@dataclass(frozen=True)
class StudyInput:
    """One input of the model."""

    id: int  # row number * `PARTS` + part
    tensors: dict[str, Tensor]  # arguments of the model's forward, batch size 1
    kinds: np.ndarray  # `[T]` uint8 of `core.study.KINDS`
    record: dict[str, Any]  # its row of the table of items
    # `[T]`, of a vision tower: which of the tokens that these inputs give it are the item's positions; None: all
    tokens: np.ndarray | None = None


class InputMaker:
    """Makes inputs of rows, counts unusable rows, and collects the geometries of soft tokens.

    For a vision tower (`site`) an item is the pictures of a row with all words about them: its positions are the
    patches, picture by picture and row by row, and class tokens; rows without a picture are none.
    """

    def __init__(self, vlm: VLM, max_tokens: int, max_skipped: int, site: str = "decoder") -> None:
        """Cut inputs off at `max_tokens`; allow `max_skipped` unusable rows."""
        self.vlm, self.max_tokens, self.max_skipped, self.site = vlm, max_tokens, max_skipped, site
        self.geometries: list[dict[str, Any]] = []  # new rows of the table
        self.known: set[str] = set()  # keys of all geometries so far
        self.skipped: Counter[str] = Counter()  # by source

    def __call__(self, rows: Sequence[NumberedRow]) -> list[StudyInput]:
        """The inputs of a batch of rows, in order; a `UserError` when more than `max_skipped` rows cannot be used."""
        inputs: list[StudyInput] = []
        for row in rows:
            try:
                inputs += self._inputs(row)
            except UserError as error:
                self.skipped[row.source] += 1
                if self.skipped.total() > self.max_skipped:
                    raise UserError(
                        f"{self.skipped.total()} rows of the data cannot be used, the last: {error}; mend the data, or "
                        f"raise study.max_skipped={self.max_skipped}"
                    ) from error
                if self.skipped[row.source] == 1:
                    _LOG.warning("%s; such rows of %s are left out and counted", error, row.source)
        return inputs

    def _inputs(self, row: NumberedRow) -> list[StudyInput]:
        raw = row.read()
        sample = raw.opened()
        sizes = [] if isinstance(sample, Document) else [picture.size for picture in sample.images]
        forwards = encode(self.vlm, sample, self.max_tokens)
        if self.site == "tower":
            forwards = forwards[: len(sizes) > 0]  # several exchanges are about the same pictures
        if len(forwards) > PARTS:
            raise UserError(f"{raw.origin}: {len(forwards)} inputs of one row, at most {PARTS}; divide it")
        return [self._input(row, part, raw, sizes, forward) for part, forward in enumerate(forwards)]

    def _input(
        self, row: NumberedRow, part: int, raw: RawSample, sizes: Sequence[tuple[int, int]], forward: dict[str, Tensor]
    ) -> StudyInput:
        adapter = self.vlm.adapter
        ids, tokens = forward["input_ids"][0].numpy(force=True), None
        tensors = {name: tensor for name, tensor in forward.items() if name != LOSS_MASK}
        if self.site == "tower":
            tokens, kinds, boxes = tower_positions(self.vlm, tensors, sizes)
            soft = adapter.soft_token_id()
            assert soft is not None, "a tower without soft tokens"
            ids = np.where(kinds == IMAGE, soft, _CLASS)
        else:
            kinds = np.full(len(ids), TEXT, dtype=np.uint8)
            if raw.exchanges:
                kinds[forward[LOSS_MASK][0].numpy(force=True)] = ANSWER
            kinds[ids == adapter.soft_token_id()] = IMAGE
            boxes = adapter.soft_token_boxes(tensors, sizes, getattr(self.vlm.processor, "image_processor", None))
        soft, expected = int((kinds == IMAGE).sum()), sum(map(len, boxes))
        if soft != expected:
            raise UserError(
                f"{raw.origin}: {soft} soft tokens where the model's pictures have {expected}; use the processor that "
                "was saved with the model"
            )
        number = row.number * PARTS + part
        record = {
            "item": number,
            "source": row.source,
            "row": row.source_row,
            "part": part,
            "origin": raw.origin,
            "digest": raw.digest().hex(),
            "users": [turn.user for turn in raw.exchanges],
            "assistants": [turn.assistant for turn in raw.exchanges],
            "text": raw.text,
            "n_pictures": len(sizes),
            "token_ids": ids.astype(np.int32),
            "kinds": kinds,
            "geometry": self._geometry(boxes),
        }
        return StudyInput(number, tensors, kinds, record, tokens)

    def _geometry(self, boxes: list[list[PatchBox]]) -> str:
        # The number of boxes of each picture too: two pictures may have the boxes of one.
        numbers = np.array([box for picture in boxes for box in picture], dtype=np.float64)
        key = hashlib.sha256(repr([len(picture) for picture in boxes]).encode() + numbers.tobytes()).hexdigest()[:16]
        if key not in self.known:
            self.known.add(key)
            self.geometries.append(geometry_row(key, boxes))
        return key


class StudyPass:
    """Counts and kept examples of all layers."""

    def __init__(self, scope: Scope, n: int, m: int, window: int, only: Mapping[int, Tensor] | None = None) -> None:
        """Keep n strongest and m drawn items per feature; `only`: layer -> features [F'], all of them when None."""
        self.scope = scope
        self.stack, self.transcoders = scope.stack, scope.layers
        selected = dict.fromkeys(scope.layers) if only is None else dict(sorted(only.items()))
        self.layers = {  # by the layers of features' ids
            layer: LayerStudy(self.transcoders[layer].config.n_features, n, m, window, scope.adapter.device, features)
            for layer, features in selected.items()
        }
        self.positions = np.zeros(len(KINDS), dtype=np.int64)  # counted so far, as `items` are
        self.items, self.own_seconds = 0, 0.0  # seconds without the model's forwards
        self.forwards: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # ids, kinds, valid positions
        self.waiting: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

    @torch.no_grad()
    def add(self, inputs: Sequence[StudyInput], forward_tokens: int) -> None:
        """Run the model on inputs; their activations are encoded when enough wait, and at the end."""
        for group in grouped(inputs, forward_tokens):
            tensors, kinds = joined([item.tensors for item in group]), np.stack([item.kinds for item in group])
            mask = tensors.get("attention_mask") if group[0].tokens is None else None
            valid = np.ones(kinds.shape, dtype=bool) if mask is None else mask.bool().numpy(force=True)
            layers = [layer - self.scope.first_layer for layer in self.layers]
            take = partial(self._take, valid, [item.tokens for item in group])
            with watching_mlp_inputs(self.stack, layers, take):
                if self.scope.transcoders.site == "tower":
                    self.stack.run(tensors)
                else:
                    self.scope.adapter.next_logits(tensors)  # refuses logits that overflow
            self.forwards.append((np.array([item.id for item in group]), kinds, valid))
            self.positions += np.bincount(kinds[valid], minlength=len(KINDS))
            self.items += len(group)
            if sum(x.nbytes for waiting in self.waiting.values() for x in waiting) > _GATHERED:
                self.settle()
        self.settle()

    def _take(self, valid: np.ndarray, tokens: Sequence[np.ndarray | None], layer: int, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2)  # towers may join the pictures of a batch
        keep = np.flatnonzero(valid)
        if tokens[0] is not None:
            each = len(rows) // len(tokens)
            keep = np.concatenate([number * each + one for number, one in enumerate(tokens) if one is not None])
        whole = tokens[0] is None and len(keep) == len(rows)
        self.waiting[self.scope.first_layer + layer].append(rows if whole else rows[keep])

    def settle(self) -> None:
        """Encode and count the activations that wait: batches of small forwards cost less than each one alone."""
        if not self.forwards:
            return
        start = time.perf_counter()
        ids = np.concatenate([ids for ids, _, _ in self.forwards])
        kinds = [row for _, kinds, _ in self.forwards for row in kinds]
        valid = [row for _, _, valid in self.forwards for row in valid]
        tokens = Tokens(ids, kinds, valid, self.scope.adapter.device)
        for layer, study in self.layers.items():
            x = self.waiting.pop(layer)
            study.add(self.transcoders[layer].encode(x[0] if len(x) == 1 else torch.cat(x)), tokens)
            self.waiting[layer] = []
        self.forwards = []
        self.own_seconds += time.perf_counter() - start


def grouped(inputs: Sequence[StudyInput], forward_tokens: int) -> Iterator[list[StudyInput]]:
    """Inputs for one forward each: of one shape and number of positions, at most `forward_tokens` tokens."""
    for group in by_shape([item.tensors for item in inputs]):
        lengths = [len(inputs[i].kinds) for i in group]  # a tower's differ where pictures are padded
        for length in dict.fromkeys(lengths):
            alike, size = [i for i, one in zip(group, lengths, strict=True) if one == length], forward_tokens // length
            for start in range(0, len(alike), max(1, size)):
                yield [inputs[i] for i in alike[start : start + max(1, size)]]


class StudyPart:
    """The folder of one part, with its last state (None before the first)."""

    def __init__(self, study: Path, share: Share, origin: Mapping[str, Any]) -> None:
        """Read the state, if there is one.

        The folder `study` must have parts of this number of processes, and a state of this `origin`: what decides the
        study, by name.
        """
        parts = study / "parts"
        self.folder, self.origin = parts / f"{share.index}_of_{share.total}", plain(origin)
        others = [path.name for path in parts.glob("*_of_*") if not path.name.endswith(f"_of_{share.total}")]
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
        """Whether all rows of this part are done."""
        return self.state is not None and self.state["finished"]

    def save(
        self, seen: StudyPass, records: list[dict[str, Any]], geometries: list[dict[str, Any]], progress: dict[str, Any]
    ) -> None:
        """Write a state: counts and examples so far, the records and geometries since the last one, and JSON values."""
        number = 0 if self.state is None else self.state["checkpoint"] + 1
        write_table(self.folder / f"items_{number}.parquet", pa.Table.from_pylist(records, files.ITEM_TABLE))
        write_table(self.folder / f"geometry_{number}.parquet", pa.Table.from_pylist(geometries, files.GEOMETRY_TABLE))
        place = self.folder / f"checkpoint_{number}"
        if place.is_dir():  # of a run that was killed before it wrote the state's name
            shutil.rmtree(place)
        with atomic_folder(place) as folder:
            for layer, study in seen.layers.items():
                save_tensors(folder / f"layer_{layer:02d}.safetensors", study.state())
        # Only this names the new checkpoint: a run that is killed before resumes from the old one.
        counts = {"items": seen.items, "positions": seen.positions.tolist()}
        self.state = {"origin": self.origin, "checkpoint": number, **counts, **progress}
        write_json(self.folder / _STATE, self.state, indent=None)
        for old in self.folder.glob("checkpoint_*"):
            if old != place:
                shutil.rmtree(old)

    def load(self, into: StudyPass) -> None:
        """Resume from the state."""
        assert self.state is not None
        for layer, study in into.layers.items():
            study.load(self.layer(layer))
        into.items, into.positions = self.state["items"], np.array(self.state["positions"], dtype=np.int64)

    def layer(self, layer: int) -> dict[str, np.ndarray]:
        """The arrays of one layer, as `LayerStudy.state` gives them."""
        assert self.state is not None
        folder = self.folder / f"checkpoint_{self.state['checkpoint']}"
        return load_tensors(folder / f"layer_{layer:02d}.safetensors")[0]

    def tables(self, name: str, schema: pa.Schema) -> Iterator[pa.Table]:
        """Tables of "items", by id, or "geometry", one for each state that was written."""
        for number in range(0 if self.state is None else self.state["checkpoint"] + 1):
            yield read_table(self.folder / f"{name}_{number}.parquet", schema)


def run_part(
    scope: Scope,
    rows: NumberedRows,
    part: StudyPart,
    config: StudyConfig,
    after_batch: Callable[[int], None] = lambda _rows: None,
) -> tuple[float, float]:
    """Study one part of the data, from its last state on, and write a finished state.

    `after_batch` is called with the number of rows done. Returns the seconds of this process, and their ratio
    to those of a plain pass, without codes, sorting and checkpoints.
    """
    started, saving = time.perf_counter(), 0.0
    seen = StudyPass(scope, config.top, config.samples, config.window)
    make = InputMaker(scope.vlm, config.max_tokens, config.max_skipped, scope.transcoders.site)
    if part.state is not None:
        part.load(seen)
        rows.load(part.state["rows"])
        make.skipped.update(part.state["skipped"])
        tables = part.tables("geometry", files.GEOMETRY_TABLE)
        # Geometries that earlier states wrote are not written again.
        make.known = {key for table in tables for key in table["geometry"].to_pylist()}
    records: list[dict[str, Any]] = []

    def save(finished: bool) -> None:
        nonlocal saving
        start = time.perf_counter()
        progress = {"finished": finished, "skipped": make.skipped, "rows": rows.state(), "bad_shards": rows.bad_shards}
        part.save(seen, records, make.geometries, progress)
        records.clear()
        make.geometries.clear()
        saving += time.perf_counter() - start

    if not part.finished:
        share = f" {rows.share.index + 1}/{rows.share.total}" if rows.share.total > 1 else ""
        with tqdm(desc=f"study{share}", unit="row", total=rows.size(), initial=rows.done) as bar:
            for number, batch in enumerate(rows, start=1):
                inputs = make(batch)
                seen.add(inputs, config.forward_tokens)
                records += [item.record for item in inputs]
                if number % config.checkpoint_every == 0:
                    save(finished=False)
                bar.update(rows.done - bar.n)
                after_batch(rows.done)
        save(finished=True)
    total = time.perf_counter() - started
    return total, total / max(total - seen.own_seconds - saving, 1e-9)


def study_parts(study: Path, total: int, origin: Mapping[str, Any]) -> list[StudyPart]:
    """The parts of all processes; a `UserError` where one is not finished, or there was no item in any."""
    parts = [StudyPart(study, Share(index, total), origin) for index in range(total)]
    for index, part in enumerate(parts):
        if not part.finished:
            raise UserError(
                f"part {index + 1} of {total} of {study} is not finished; resume it with trainer.resume=true"
            )
    if not sum(part.state["items"] for part in parts if part.state is not None):
        raise UserError("no row of the data could be used; see the warnings above and check data=")
    return parts


def finished_study(study: Path, origin: Mapping[str, Any]) -> StudyFolder | None:
    """The finished study in a folder, which must be of the same origin; None where there is none."""
    if not (study / MANIFEST).is_file():
        return None
    done = StudyFolder(study)
    refuse_other(str(study), done.info.origin or None, origin)
    shutil.rmtree(study / "parts", ignore_errors=True)  # left by a kill at the very end
    return done


def finish(
    study: Path, scope: Scope, parts: Sequence[StudyPart], config: StudyConfig, data: Mapping[str, Any]
) -> StudyFolder:
    """Write the files of a study whose parts are all finished, `study.json` last, and remove the parts."""
    vlm, about = scope.vlm, scope.transcoders.config
    states = [part.state for part in parts if part.state is not None]
    skipped = sum((Counter(state["skipped"]) for state in states), Counter[str]())
    positions = np.sum([state["positions"] for state in states], axis=0).tolist()
    kind = {"name": about.model_name, "activation": about.activation, "k": about.k}
    info = StudyInfo(
        model=vlm.name,
        transcoders={**kind, "cross_layer": scope.transcoders.cross_layer},
        n_features=scope.widths,
        data={**data, "bad_shards": states[0]["bad_shards"]},
        settings=config.decisive(),
        items=sum(state["items"] for state in states),
        rows=sum(states[0]["rows"]["taken"].values()),  # every part counts all
        positions=dict(zip(KINDS, positions, strict=True)),
        skipped=dict(sorted(skipped.items())),
        origin=parts[0].origin,
    )

    def token(number: int) -> str:
        return CLASS_TOKEN if number == _CLASS else vlm.tokenizer.decode([number])

    # A feature of the vision tower writes to no logit directly.
    count = min(config.logits, vlm.adapter.vocab_size) * (scope.transcoders.site == "decoder")
    shown_items: set[int] = set()
    for layer, width in sorted(info.n_features.items()):
        logits = layer_logits(scope, layer, count) if count else None
        features, examples = layer_tables([part.layer(layer) for part in parts], width, config, logits, token)
        write_table(study / files.layer_table(files.FEATURES, layer), features)
        write_table(study / files.layer_table(files.EXAMPLES, layer), examples, _EXAMPLES_PER_GROUP)
        shown_items.update(pc.unique(examples["item"]).to_pylist())  # pyright: ignore[reportAttributeAccessIssue]
    _write_items(study, parts, shown_items, token)
    head = {"format": files.NAME, "version": files.VERSION, **asdict(info)}
    write_json(study / MANIFEST, json.loads(json.dumps(head)))
    shutil.rmtree(study / "parts")
    return StudyFolder(study)


def _write_items(study: Path, parts: Sequence[StudyPart], shown_items: set[int], token: Callable[[int], str]) -> None:
    """Write the items that examples refer to, by id, with their geometries and tokens."""
    known = pa.array(sorted(shown_items), pa.int64())
    chosen = [
        table.filter(pc.is_in(table["item"], value_set=known))  # pyright: ignore[reportAttributeAccessIssue]
        for part in parts
        for table in part.tables("items", files.ITEM_TABLE)
    ]
    items = pa.concat_tables(chosen).sort_by("item").combine_chunks()
    write_table(study / files.ITEMS, items, _ITEMS_PER_GROUP)
    tables = [table for part in parts for table in part.tables("geometry", files.GEOMETRY_TABLE)]
    geometries = {row["geometry"]: row for table in tables for row in table.to_pylist()}
    used = [geometries[key] for key in sorted(set(items["geometry"].to_pylist()))]
    write_table(study / files.GEOMETRY, pa.Table.from_pylist(used, files.GEOMETRY_TABLE))
    ids = pc.unique(pc.list_flatten(items["token_ids"])).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    words = [{"id": number, "token": token(number)} for number in sorted(ids)]
    write_table(study / files.VOCABULARY, pa.Table.from_pylist(words, files.VOCABULARY_TABLE))


def data_record(
    sources: Mapping[str, SourceConfig], config: StudyConfig, max_bad_shards: int = 0, name: str = ""
) -> dict[str, Any]:
    """`StudyInfo.data`: the sources of a study, and the settings by which its pictures are opened again."""
    settings = {key: asdict(source) for key, source in sources.items()}
    head = {"name": name, "split": config.split, "limit": config.limit, "max_bad_shards": max_bad_shards}
    return {**head, "sources": settings}


def make_study(
    study: Path, scope: Scope, data: Mapping[str, Any], config: StudyConfig, origin: Mapping[str, Any]
) -> StudyFolder:
    """Make a study of `data_record` in this process, or resume it; a finished one in the folder is read.

    A `UserError` when the folder holds a study of another origin.
    """
    done = finished_study(study, origin)
    if done is not None:
        return done
    rows = NumberedRows(open_sources(data), config.batch_size, WHOLE, config.limit)
    run_part(scope, rows, StudyPart(study, WHOLE, origin), config)
    return finish(study, scope, study_parts(study, 1, origin), config, data)


def study_alone(study: Path, scope: Scope, sources: Mapping[str, SourceConfig], config: StudyConfig) -> StudyFolder:
    """`make_study` from sources, with the fingerprints of model and transcoders and the files' digests as origin."""
    data = data_record(sources, config)
    origin = {
        "model": f"{scope.vlm.name} {model_fingerprint(scope.vlm.model)}",
        "transcoders": f"{scope.transcoders.config} {model_fingerprint(scope.transcoders)}",
        **flat("data", data),
        **{f"data.sources.{key}.files": folder_digest(source.path) for key, source in sources.items() if source.path},
        **flat("study", config.decisive()),
    }
    return make_study(study, scope, data, config, origin)


_SIDE = 512  # pixels of the longer edge of a study's picture


def study_examples(study: StudyFolder, feature: FeatureId, count: int) -> tuple[FeatureExample, ...]:
    """The `count` strongest examples of a study, with their pictures."""
    examples = []
    for example in study.feature(feature).group(TOP)[:count]:
        view = study.view(example)
        pictures = study.pictures(view.item)
        tokens, activations = view.window()
        first = view.item.pictures == 0  # figures show one picture
        boxes = tuple(box for box, shown in zip(view.item.patch_boxes, first.tolist(), strict=True) if shown)
        png = png_bytes(pictures[0], _SIDE) if pictures else None
        patches, words = tuple(view.patch_activations[first].tolist()), tuple(activations.tolist())
        examples.append(FeatureExample(example.activation, view.item.caption, png, boxes, patches, tokens, words))
    return tuple(examples)


@dataclass(frozen=True)
class CaptionedPrompt:
    """A prompt to show: its inputs, a caption, and its picture as PNG (None for text alone)."""

    inputs: ModelInputs
    caption: str
    image_png: bytes | None


@torch.no_grad()
def top_examples(
    scope: Scope,
    features: Sequence[FeatureId],
    items: Sequence[CaptionedPrompt],
    count: int = 6,
    forward_tokens: int = 8192,
) -> dict[FeatureId, tuple[FeatureExample, ...]]:
    """The `count` items on which each feature is most active at any position, strongest first; ties keep their order.

    A feature that never fires gets no example. Activations below the peak are good to 1/510 of it, as in a study.

    Raises:
        UserError: the transcoders do not have one of the features.
    """
    by_layer: dict[int, list[int]] = {}
    for feature in dict.fromkeys(features):
        width = scope.at(feature.layer).widths.get(feature.layer, 0)
        if feature.index >= width:
            raise UserError(f"feature {feature}: its layer has {width} features")
        by_layer.setdefault(feature.layer, []).append(feature.index)
    if len({layer < 0 for layer in by_layer}) > 1:  # of the tower and of the decoder
        sides = [[feature for feature in features if (feature.layer < 0) == below] for below in (True, False)]
        both = [top_examples(scope, side, items, count, forward_tokens) for side in sides]
        return {feature: both[feature.layer >= 0][feature] for feature in features}
    scope = scope.at(min(by_layer, default=0))
    only = {layer: torch.tensor(indices) for layer, indices in by_layer.items()}
    study = StudyPass(scope, count, 0, MOST_TOKENS, only)
    places = [_places(scope, item.inputs) for item in items]
    inputs = [
        StudyInput(i, item.inputs.tensors, place.kinds, {}, place.tokens)
        for i, (item, place) in enumerate(zip(items, places, strict=True))
        if len(place.kinds)
    ]
    study.add(inputs, forward_tokens)
    examples: dict[FeatureId, list[FeatureExample]] = {feature: [] for feature in features}
    for layer, indices in by_layer.items():
        study.layers[layer].settle()
        pairs = study.layers[layer].kept  # by feature, strongest first
        ends = np.cumsum(pairs.count)
        for row in range(len(pairs)):
            number, entries = int(pairs.item[row]), slice(ends[row] - pairs.count[row], ends[row])
            acts = np.zeros(len(places[number].kinds), dtype=np.float32)
            acts[pairs.positions[entries]] = pairs.levels[entries] * (pairs.peak[row] / LEVELS)
            acts[pairs.position[row]] = pairs.peak[row]
            example = _example(items[number], places[number], acts)
            examples[FeatureId(layer, indices[pairs.feature[row]])].append(example)
    return {feature: tuple(shown) for feature, shown in examples.items()}


class _Places(NamedTuple):
    """The positions of a prompt that a scope's transcoders see: kinds, numbers in a tower, boxes, and words."""

    kinds: np.ndarray
    tokens: np.ndarray | None
    boxes: Sequence[PatchBox | None]
    words: Sequence[str]


def _places(scope: Scope, inputs: ModelInputs) -> _Places:
    if scope.transcoders.site == "decoder":
        return _Places(np.where(inputs.is_image, IMAGE, TEXT), None, inputs.patch_boxes, inputs.tokens)
    if not inputs.sizes:
        return _Places(np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.int64), (), ())
    tokens, kinds, boxes = tower_positions(scope.vlm, inputs.tensors, inputs.sizes)
    flat: list[PatchBox | None] = [None] * len(kinds)
    for position, box in zip(np.flatnonzero(kinds == IMAGE).tolist(), (b for one in boxes for b in one), strict=True):
        flat[position] = box
    return _Places(kinds, tokens, flat, [CLASS_TOKEN] * len(kinds))


def _example(item: CaptionedPrompt, places: _Places, acts: np.ndarray) -> FeatureExample:
    soft = np.flatnonzero(places.kinds == IMAGE).tolist()
    text = np.flatnonzero(places.kinds != IMAGE).tolist()
    return FeatureExample(
        activation=float(acts.max()),
        caption=item.caption,
        image_png=item.image_png,
        patch_boxes=tuple(box for i in soft if (box := places.boxes[i]) is not None),
        patch_activations=tuple(acts[soft].tolist()),
        tokens=tuple(places.words[i] for i in text),
        token_activations=tuple(acts[text].tolist()),
    )
