"""The batches that transcoders are trained and judged on: from the data that `data=` chose, or a mix of sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vlmscope.core.artifacts import folder_digest, plain
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.data.config import DataConfig
from vlmscope.data.folder import JsonLines, load_folder
from vlmscope.data.mixing import Lane, ShuffledSource, TokenMix, fingerprint, keeps, open_source
from vlmscope.data.orrery.dataset import ScenePool
from vlmscope.data.orrery.scenes import KINDS
from vlmscope.data.packing import chat_batch
from vlmscope.data.samples import WHOLE, Share
from vlmscope.models.conversations import encode
from vlmscope.models.loading import VLM
from vlmscope.training.batches import (
    Batch,
    ConversationBatches,
    EncodedForward,
    MixBatches,
    SampleEncoder,
    ValidationBatches,
    mix_validation,
)
from vlmscope.training.captures import CacheSettings
from vlmscope.training.config import BatchConfig
from vlmscope.training.evaluation import speaks_orrery
from vlmscope.training.ranks import joint_sum, own_share


class Source(NamedTuple):
    """Training batches by number, validation batches, what resuming must find unchanged (None: nothing), and figures
    of the data so far.
    """

    train: Callable[[int], Batch]
    val: Sequence[Batch]
    settings: str | None
    figures: Callable[[], Mapping[str, float]] = dict


Load = Callable[[], VLM]


def batches_for(
    data: DataConfig,
    settings: BatchConfig,
    seed: int,
    load: Load,
    states: Path,
    origin: Callable[[], Mapping[str, Any]],
    resume: bool,
) -> tuple[VLM, Source]:
    """The model and its data; the data is looked at before the model is loaded, which takes longer.

    A mix keeps its states in the file `states`, and with `resume` goes on from those of the same `origin`.
    """
    if data.sources:
        return _mix_batches(data, settings, seed, load, states, origin, resume)
    makers = {"orrery": _orrery_batches, "folder": _folder_batches}
    if data.name not in makers:
        raise UserError(f"data={data.name}: transcoders are trained on {' or '.join(makers)}, or a mix (docs/data.md)")
    return makers[data.name](data, settings, seed, load)


def _orrery_batches(data: DataConfig, settings: BatchConfig, seed: int, load: Load) -> tuple[VLM, Source]:
    """Scenes of each kind with one question each, for Orrery's own processor."""
    if data.path is None:
        raise UserError("data.path is not set: give the folder with Orrery's shards (task=build_data writes them)")
    train, val = (ScenePool(Path(data.path), split) for split in ("train", "val"))
    vlm = load()
    if not speaks_orrery(vlm):
        raise UserError(f"data=orrery has words for Orrery alone, not for {vlm.name}; choose data=folder data.path=...")
    soft = int(vlm.processor.image_seq_length)

    def batch(step: int) -> Batch:
        scenes = train.batch(seed, step, settings.batch)
        return chat_batch(scenes, vlm.tokenizer, soft, generator(seed, "chat", step))

    val_batches = [
        chat_batch(val.scenes(kind, settings.val_scenes), vlm.tokenizer, soft, generator(seed, "val", kind))
        for kind in KINDS
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
    """Refuse at once, not when its turn comes, an example that the model cannot take."""
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
    """Batches of the mix, each source's share of the tokens as its weight says.

    Of several processes that train together each reads its own share of every source.
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
    if share.total > 1:  # another number of processes reads in another order, and cannot go on
        words += f", read by {share.total} processes"
    # A state holds tokens: it is of one tokenizer and of the files that were read.
    known = f"{words}, {plain(origin())}"
    batches = MixBatches(make, settings.tokens_per_batch, states, known, resume, share, joint_sum)
    held = mix_validation({name: (stream(), encoder()) for name, stream in val.items()}, settings.val_examples)
    return vlm, Source(batches, held, words, batches.figures)


def _streams(data: DataConfig, name: str, seed: int, validation: bool, share: Share) -> Callable[[], ShuffledSource]:
    """What opens a new stream of a share of a source's samples, for training or for validation."""
    config = data.sources[name]
    source = open_source(name, config, config.val_split if validation else None, data.max_bad_shards)
    keep = keeps(config, data.val_share, validation)
    buffer, repeat = (1, False) if validation else (data.shuffle, config.repeat)
    return lambda: ShuffledSource(source, share, buffer, seed, repeat, keep)


def cache_settings(data: DataConfig, settings: BatchConfig, seed: int, known: str | None) -> CacheSettings | None:
    """The cache that `task.cache` names, if any; `known` is what resuming must find unchanged about the data."""
    if settings.cache is None:
        return None
    words = [data.name, known or f"{dict(sorted(settings.batch.items()))}"]
    if not data.sources:
        words.append(f"{data.val_share:g} held out")
    paths = [data.path, *(source.path for source in data.sources.values())]
    words += [f"files {folder_digest(path)}" for path in dict.fromkeys(paths) if path is not None]
    return CacheSettings(Path(settings.cache), settings.cache_dtype, ", ".join(words), f"seed {seed}")
