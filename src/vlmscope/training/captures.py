"""Activations of the model for training: captured by batch number, cached on disk, streamed by step.

Cache: `<folder>/manifest.json` records what the activations depend on; `rank_00/batch_000000.safetensors` and so on
hold one captured batch each, with the layers of one rank: `layer_00.in`, `layer_00.out` [n, d] in the dtype of the
cache, `is_image` [n]. Files are written under another name and renamed, so each one is complete: after a kill the next
run continues from there, and a run that needs more batches adds them.

Stream: the model's forward costs more than a step of all transcoders, and tokens of one batch resemble each other. So
the last `pool_batches` captured batches are kept, a new one replaces the oldest every `steps_per_batch` steps, and a
step draws its tokens from all of them. The draw depends only on the step: a resumed run captures the pool again and
continues with the same tokens. With both settings at 1 every step uses exactly its own batch.

Shapes: n tokens of the batch on the rank's host, d model width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import IterableDataset

from vlmscope.core.artifacts import (
    atomic_path,
    differences,
    folder_digest,
    plain,
    read_json,
    remove_leftovers,
    write_json,
)
from vlmscope.core.errors import UserError
from vlmscope.core.hub import gb
from vlmscope.core.records import generator
from vlmscope.data.config import DataConfig
from vlmscope.data.mixing import Lane, ShuffledSource, TokenMix, fingerprint, keeps, open_source
from vlmscope.data.orrery.dataset import ScenePool, scene_shards
from vlmscope.data.samples import WHOLE, Share
from vlmscope.data.tables import JsonLines, load_folder
from vlmscope.models.base import Adapter
from vlmscope.models.batching import encode
from vlmscope.models.checkpoint import model_fingerprint, tensors_fingerprint
from vlmscope.models.loading import VLM
from vlmscope.training.batches import (
    Batch,
    ConversationBatches,
    EncodedForward,
    LayerActivations,
    MixBatches,
    OwnPart,
    SampleEncoder,
    ValidationBatches,
    chat_batch,
    forwards,
    joined_activations,
    mix_validation,
)
from vlmscope.training.config import BatchConfig, TranscoderTrainingConfig
from vlmscope.training.evaluation import speaks_orrery
from vlmscope.training.ranks import Ranks, joint_sum, own_share

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MANIFEST = "manifest.json"
_STALE = 3600  # seconds during which another machine's run may still be writing an unfinished file
_FORMAT = 1

Load = Callable[[], VLM]


@dataclass(frozen=True)
class CacheSettings:
    """Folder and dtype of cached activations (None: the model's dtype, which changes no number).

    `data` describes what the batches depend on, `order` what their order depends on.
    """

    folder: Path
    dtype: str | None = None
    data: str = ""
    order: str = ""


class ActivationCache:
    """The cached batches of one rank."""

    def __init__(self, folder: Path, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.part = Path(folder), Path(folder) / f"rank_{rank:02d}"
        self.dtype, self.device = dtype, device
        remove_leftovers(self.part, older_than=_STALE)

    def agree(self, keys: Mapping[str, str]) -> None:
        """Compare `keys` with those of the cache, or write them if there is no cache yet; UserError if they differ."""
        now = {"format": str(_FORMAT), **keys}
        file = self.folder / _MANIFEST
        if not file.is_file():
            if self.folder.exists() and any(path.name != self.part.name for path in self.folder.iterdir()):
                raise UserError(f"task.cache={self.folder} has no {_MANIFEST} and holds other files; choose another")
            write_json(file, now)
            return
        changed = differences(read_json(file), now)
        if changed:
            raise UserError(
                f"task.cache={self.folder} was made with another {'; another '.join(changed)}; restore it, or choose "
                "another folder"
            )

    def path(self, number: int) -> Path:
        """The file of a batch."""
        return self.part / f"batch_{number:06d}.safetensors"

    def read(self, number: int) -> tuple[LayerActivations, dict[str, float]] | None:
        """A batch and the figures of the data up to it; None if it is absent or damaged."""
        try:
            with safe_open(self.path(number), "pt", device=str(self.device)) as file:
                record = json.loads(file.metadata()["batch"])
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError):
            return None
        layers = sorted(int(name[6:-3]) for name in tensors if name.endswith(".in"))
        by_layer = {n: (tensors[f"layer_{n:02d}.in"], tensors[f"layer_{n:02d}.out"]) for n in layers}
        return LayerActivations(by_layer, tensors["is_image"], record["first"], record["joint"]), record["figures"]

    def rounded(self, activations: LayerActivations) -> LayerActivations:
        """Activations in the cache's dtype, the same as `read` returns them."""
        by_layer: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, pair in activations.by_layer.items():
            x, y = (side.to(self.dtype) for side in pair)
            if any(bool((side.isfinite() & ~new.isfinite()).any()) for side, new in zip(pair, (x, y), strict=True)):
                raise UserError(f"task.cache_dtype=float16 cannot hold the activations of layer {layer}; take bfloat16")
            by_layer[layer] = (x, y)
        return replace(activations, by_layer=by_layer)

    def write(self, number: int, activations: LayerActivations, figures: Mapping[str, float]) -> None:
        """Write a batch that is in the cache's dtype (`rounded`), with the figures of the data up to it."""
        tensors = {"is_image": activations.is_image.contiguous()}
        for layer, (x, y) in activations.by_layer.items():
            tensors |= {f"layer_{layer:02d}.in": x.contiguous(), f"layer_{layer:02d}.out": y.contiguous()}
        record = {"first": activations.first, "joint": activations.joint, "figures": dict(figures)}
        with atomic_path(self.path(number)) as temporary:
            save_file(tensors, temporary, metadata={"batch": json.dumps(record)})


class Captures:
    """The activations of batch number 0, 1, ... on this rank; with `epoch_batches` the first ones repeat.

    They come from the cache on disk if it has them, else from the model, and then go into the cache. All ranks must
    call for number n at the same point of their work.
    """

    def __init__(
        self,
        adapter: Adapter,
        batch_of: Callable[[int], Batch],
        ranks: Ranks | None = None,
        epoch_batches: int | None = None,
        data_figures: Callable[[], Mapping[str, float]] = dict,
        cache: ActivationCache | None = None,
    ) -> None:
        self.adapter, self.batch_of, self.epoch_batches, self.cache = adapter, batch_of, epoch_batches, cache
        self.ranks = ranks if ranks is not None else Ranks.single(adapter.n_layers)
        self._data_figures = data_figures
        self._newest: tuple[int, Mapping[str, float]] = (-1, {})

    def __call__(self, number: int) -> LayerActivations:
        """One captured batch, in the dtype of the cache if there is one."""
        if self.epoch_batches is not None:
            number %= self.epoch_batches
        if self.cache is None:
            return self.ranks.collect(self.adapter, self.batch_of(number))
        cached = self.cache.read(number)
        if joint_sum([float(cached is None)])[0]:  # some rank lacks it, and all must take part in capturing
            cached = None
        if cached is None:
            captured = self.cache.rounded(self.ranks.collect(self.adapter, self.batch_of(number)))
            cached = captured, dict(self._data_figures())
            self.cache.write(number, *cached)
        self._newest = max(self._newest, (number, cached[1]), key=lambda pair: pair[0])
        return cached[0]

    def figures(self) -> Mapping[str, float]:
        """Figures of the data up to the furthest batch, whether captured or cached."""
        return self._data_figures() if self.cache is None else self._newest[1]


def open_captures(
    adapter: Adapter,
    batch_of: Callable[[int], Batch],
    config: TranscoderTrainingConfig,
    ranks: Ranks,
    settings: CacheSettings | None,
    data_figures: Callable[[], Mapping[str, float]],
) -> Captures:
    """The captures of a run; with `settings`, check the cache and print its size."""
    epoch = config.recipe.epoch_batches
    if settings is None:
        return Captures(adapter, batch_of, ranks, epoch, data_figures)
    dtype = _DTYPES.get(settings.dtype or "", adapter.dtype)
    cache = ActivationCache(settings.folder, ranks.rank, dtype, adapter.device)
    if ranks.main:
        first, layout = batch_of(0), ranks.layout
        masks = [forward.get("attention_mask", forward["input_ids"] >= 0) for forward in forwards(first)]
        tokens = sum(int(mask.sum()) for mask in masks)
        cache.agree(
            {
                "model": model_fingerprint(adapter.model),
                "hook_points": f"mlp_in to mlp_out of layers 0 to {layout.n_layers - 1}, width {adapter.d_model}",
                "dtype": str(dtype).removeprefix("torch."),
                "data": settings.data,
                "order": f"{settings.order}, batch 0 is {tensors_fingerprint(forwards(first))} of {tokens} tokens",
                "processes": f"{layout.world}, {layout.per_host} a host",
            }
        )
        # Each rank has only its own part of a mix.
        joint = tokens * layout.world if isinstance(first, OwnPart) else tokens
        _check_room(cache, config.batches, layout.n_layers, adapter.d_model, joint)
    ranks.barrier()
    return Captures(adapter, batch_of, ranks, epoch, data_figures, cache)


def _check_room(cache: ActivationCache, batches: int, layers: int, width: int, tokens: int) -> None:
    """Print the size of the cache, estimated from its first batch; UserError if it does not fit the disk."""
    token_bytes = 2 * width * cache.dtype.itemsize
    batch_bytes = token_bytes * layers * tokens
    needed = batch_bytes * sum(not cache.path(number).is_file() for number in range(batches))
    existing = next(path for path in (cache.folder, *cache.folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    size = (
        f"{gb(batch_bytes * batches)} ({token_bytes:,} bytes a token and layer x {layers} layers x {tokens:,} tokens x "
        f"{batches:,} batches)"
    )
    if needed > free:
        raise UserError(
            f"task.cache={cache.folder} would take {size}, {gb(needed)} of it still to be written, and {gb(free)} are "
            "free there; choose another folder, task.cache_dtype=bfloat16, or a smaller task.epoch_batches"
        )
    print(f"cache of activations: {size}, {gb(needed)} of it to be written; {gb(free)} are free", flush=True)


class ActivationStream(IterableDataset[LayerActivations]):
    """Activations for the steps from `first()` to the last."""

    def __init__(
        self,
        capture: Callable[[int], LayerActivations],
        config: TranscoderTrainingConfig,
        first: Callable[[], int],
    ) -> None:
        self.capture, self.config, self.first = capture, config, first

    def __iter__(self) -> Iterator[LayerActivations]:
        recipe = self.config.recipe
        pool: dict[int, LayerActivations] = {}
        for step in range(self.first(), self.config.trainer.max_steps):
            newest = step // recipe.steps_per_batch
            numbers = range(max(0, newest - recipe.pool_batches + 1), newest + 1)
            pool = {n: pool[n] if n in pool else self.capture(n) for n in numbers}
            yield pool[newest] if recipe.pool_batches == 1 else self._draw(pool, newest, step)

    def _draw(self, pool: dict[int, LayerActivations], newest: int, step: int) -> LayerActivations:
        """As many tokens as the newest batch has, without repeats, from all batches of the pool."""
        sizes = [batch.joint_tokens for batch in pool.values()]
        rng = generator(self.config.trainer.seed, "activation_pool", step)
        chosen = torch.from_numpy(rng.choice(sum(sizes), pool[newest].joint_tokens, replace=False)).sort().values
        parts, offset = [], 0
        for batch, size in zip(pool.values(), sizes, strict=True):
            # The draw is over the tokens of all hosts; take those that are here.
            first = offset + batch.first
            rows = chosen[(chosen >= first) & (chosen < first + batch.n_tokens)] - first
            parts.append(batch.rows(rows.to(batch.is_image.device)))
            offset += size
        return replace(joined_activations(parts), joint=len(chosen))


class Source(NamedTuple):
    """Training batches by number, validation batches, and figures of the data so far.

    `settings` describes the data; a run resumes only with the same (None: not compared).
    """

    train: Callable[[int], Batch]
    val: Sequence[Batch]
    settings: str | None
    figures: Callable[[], Mapping[str, float]] = dict


def batches_for(
    data: DataConfig,
    settings: BatchConfig,
    seed: int,
    load: Load,
    states: Path,
    origin: Callable[[], Mapping[str, Any]],
    resume: bool,
) -> tuple[VLM, Source]:
    """The model and its data; the data are checked before the model is loaded, which takes longer.

    A mix keeps its states in the file `states`, and with `resume` continues from those of the same `origin`.
    """
    if data.sources:
        return _mix_batches(data, settings, seed, load, states, origin, resume)
    makers = {"orrery": _orrery_batches, "folder": _folder_batches}
    if data.name not in makers:
        raise UserError(f"data={data.name}: transcoders are trained on {' or '.join(makers)}, or a mix (docs/data.md)")
    return makers[data.name](data, settings, seed, load)


def _orrery_batches(data: DataConfig, settings: BatchConfig, seed: int, load: Load) -> tuple[VLM, Source]:
    """Scenes of each kind with one question each, for Orrery's own processor."""
    folder = scene_shards(data.path)
    train, val = (ScenePool(folder, split, tuple(data.scenes)) for split in ("train", "val"))
    vlm = load()
    if not speaks_orrery(vlm, data.scenes):
        raise UserError(
            f"data: these scenes have words that {vlm.name} lacks; choose data=orrery for the first Orrery, "
            "data=folder data.path=... for another model"
        )
    soft = int(vlm.processor.image_seq_length)
    counts = {kind: count for kind, count in settings.batch.items() if kind in data.scenes}

    def batch(step: int) -> Batch:
        scenes = train.batch(seed, step, counts)
        return chat_batch(scenes, vlm.tokenizer, soft, generator(seed, "chat", step))

    val_batches = [
        chat_batch(val.scenes(kind, settings.val_scenes), vlm.tokenizer, soft, generator(seed, "val", kind))
        for kind in data.scenes
    ]
    return vlm, Source(batch, val_batches, None)


def _folder_batches(data: DataConfig, settings: BatchConfig, seed: int, load: Load) -> tuple[VLM, Source]:
    """The user's own conversations, captions and texts, in the model's own chat template."""
    if not data.path:
        raise UserError("data.path is not set: give the folder with train.jsonl (layout: docs/bring_your_own.md)")
    train, val = load_folder(data.path, data.val_share, seed)
    vlm = load()
    for part in (train, val):
        _check_pictures(vlm, part)
    forwards = partial(encode, vlm, max_tokens=settings.max_tokens)
    batch = ConversationBatches(train, forwards, settings.tokens_per_batch, seed)
    words = f"{settings.tokens_per_batch} tokens a batch, {settings.max_tokens} an example"
    return vlm, Source(batch, ValidationBatches(val[: settings.val_examples], forwards), words)


def _check_pictures(vlm: VLM, lines: JsonLines) -> None:
    """UserError for an example that the model cannot take, before training instead of at its turn."""
    for number, line in enumerate(lines.lines):
        if line.n_images and not vlm.adapter.has_vision:
            raise UserError(f"{lines.origin(number)}: it has pictures, and {vlm.name} takes none; leave it out")
        if not line.n_images and vlm.adapter.needs_pictures:
            raise UserError(f"{lines.origin(number)}: it has no picture, and {vlm.name} needs one; leave it out")


def _mix_batches(
    data: DataConfig,
    settings: BatchConfig,
    seed: int,
    load: Load,
    states: Path,
    origin: Callable[[], Mapping[str, Any]],
    resume: bool,
) -> tuple[VLM, Source]:
    """Batches of the mix, with tokens in proportion to the sources' weights.

    Processes that train together each read their own share of every source.
    """
    share = own_share()
    if settings.max_tokens < 2:
        raise UserError(f"task.max_tokens={settings.max_tokens}: a mix needs at least 2")
    train = {name: _streams(data, name, seed, validation=False, share=share) for name in data.sources}
    val = {name: _streams(data, name, seed, validation=True, share=WHOLE) for name in data.sources}
    vlm = load()
    encoder = partial(SampleEncoder, vlm, min(data.context, settings.max_tokens), settings.max_tokens)

    def make() -> TokenMix[list[EncodedForward]]:
        return TokenMix({name: Lane(source.weight, train[name](), encoder()) for name, source in data.sources.items()})

    words = (
        f"{fingerprint(data.sources)}, {settings.tokens_per_batch} tokens a batch, {settings.max_tokens} an example, "
        f"{data.context} a text, shuffled by {data.shuffle}, {data.val_share} held out"
    )
    if share.total > 1:  # the order depends on the number of processes, so a run resumes only with the same
        words += f", read by {share.total} processes"
    # A state holds tokens, so it is valid only for the same tokenizer and files.
    known = f"{words}, {plain(origin())}"
    batches = MixBatches(make, settings.tokens_per_batch, states, known, resume, share, joint_sum)
    held = mix_validation({name: (stream(), encoder()) for name, stream in val.items()}, settings.val_examples)
    return vlm, Source(batches, held, words, batches.figures)


def _streams(data: DataConfig, name: str, seed: int, validation: bool, share: Share) -> Callable[[], ShuffledSource]:
    """A function that opens a new stream of a share of a source's samples, for training or for validation."""
    config = data.sources[name]
    source = open_source(name, config, config.val_split if validation else None)
    keep = keeps(config, data.val_share, validation)
    buffer, repeat = (1, False) if validation else (data.shuffle, config.repeat)
    return lambda: ShuffledSource(source, share, buffer, seed, repeat, keep)


def cache_settings(data: DataConfig, settings: BatchConfig, seed: int, known: str | None) -> CacheSettings | None:
    """Settings of the cache in the folder `task.cache`, if any; `known` is the data's `Source.settings`."""
    if settings.cache is None:
        return None
    words = [data.name, known or f"{dict(sorted(settings.batch.items()))}"]
    if not data.sources:
        words.append(f"{data.val_share:g} held out")
    paths = [data.path, *(source.path for source in data.sources.values())]
    words += [f"files {folder_digest(path)}" for path in dict.fromkeys(paths) if path is not None]
    return CacheSettings(Path(settings.cache), settings.cache_dtype, ", ".join(words), f"seed {seed}")
