"""Activations of the model for training: captured by batch number, streamed by step.

The model's forward costs more than a step of all transcoders, and tokens of one batch resemble each other. So the last
`pool_batches` captured batches are kept, a new one replaces the oldest every `steps_per_batch` steps, and a step draws
its tokens from all of them. The draw depends only on the step: a resumed run captures the pool again and continues with
the same tokens. With both settings at 1 every step uses exactly its own batch.

Shapes: n tokens of the batch on the rank's host, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset

from vlmscope.core.artifacts import (
    plain,
)
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.data.config import DataConfig
from vlmscope.data.mixing import Lane, ShuffledSource, TokenMix, fingerprint, keeps, open_source
from vlmscope.data.orrery.dataset import ScenePool, scene_shards
from vlmscope.data.samples import WHOLE, Share
from vlmscope.data.tables import JsonLines, load_folder
from vlmscope.models.base import Stack
from vlmscope.models.batching import encode
from vlmscope.models.loading import VLM
from vlmscope.training.batches import (
    Batch,
    ConversationBatches,
    LayerActivations,
    MixBatches,
    SampleEncoder,
    ValidationBatches,
    chat_batch,
    joined_activations,
    mix_validation,
)
from vlmscope.training.config import BatchConfig, TranscoderTrainingConfig
from vlmscope.training.evaluation import speaks_orrery
from vlmscope.training.ranks import Ranks, joint_sum, own_share

Load = Callable[[], VLM]


class Captures:
    """The activations of batch number 0, 1, ... on this rank.

    All ranks must call for number n at the same point of their work.
    """

    def __init__(self, stack: Stack, batch_of: Callable[[int], Batch], ranks: Ranks | None = None) -> None:
        self.stack, self.batch_of = stack, batch_of
        self.ranks = ranks if ranks is not None else Ranks.single(stack.n_layers)

    def __call__(self, number: int) -> LayerActivations:
        """One captured batch."""
        return self.ranks.collect(self.stack, self.batch_of(number))


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
        sizes = [batch.n_tokens for batch in pool.values()]
        rng = generator(self.config.trainer.seed, "activation_pool", step)
        chosen = torch.from_numpy(rng.choice(sum(sizes), pool[newest].n_tokens, replace=False)).sort().values
        parts, offset = [], 0
        for batch, size in zip(pool.values(), sizes, strict=True):
            rows = chosen[(chosen >= offset) & (chosen < offset + size)] - offset
            parts.append(batch.rows(rows.to(batch.is_image.device)))
            offset += size
        return joined_activations(parts)


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

    def make() -> TokenMix:
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
    source = open_source(name, config, config.val_split if validation else None, data.max_bad_shards)
    keep = keeps(config, data.val_share, validation)
    buffer, repeat = (1, False) if validation else (data.shuffle, config.repeat)
    return lambda: ShuffledSource(source, share, buffer, seed, repeat, keep)
