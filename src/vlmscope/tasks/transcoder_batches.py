"""The batches that transcoders are trained and judged on: from the data that `data=` chose, or a mix of sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vlmscope.config import AppConfig
from vlmscope.core.artifacts import folder_digest, plain
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.data.folder import JsonLines, load_folder
from vlmscope.data.mixing import Lane, ShuffledSource, TokenMix, fingerprint, keeps, open_source
from vlmscope.data.orrery.dataset import ScenePool
from vlmscope.data.orrery.scenes import KINDS
from vlmscope.data.packing import chat_batch
from vlmscope.data.samples import WHOLE, Share
from vlmscope.models.conversations import encode
from vlmscope.models.loading import VLM
from vlmscope.tasks.load_check import speaks_orrery
from vlmscope.tasks.wiring import data_origin, model_origin
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
from vlmscope.training.ranks import joint_sum, own_share


class Source(NamedTuple):
    """Training batches by number, validation batches, what resuming must find unchanged (None: nothing), and figures
    of the data so far.
    """

    train: Callable[[int], Batch]
    val: Sequence[Batch]
    settings: str | None
    figures: Callable[[], Mapping[str, float]] = dict


def batches_for(cfg: AppConfig, load: Callable[[], VLM], run_dir: Path) -> tuple[VLM, Source]:
    """The model and its data; the data is looked at before the model is loaded, which takes longer.

    `run_dir` is where a mix keeps its states, from which it goes on.
    """
    if cfg.data.sources:
        return _mix_batches(cfg, load, run_dir)
    makers = {"orrery": _orrery_batches, "folder": _folder_batches}
    if cfg.data.name not in makers:
        raise UserError(
            f"data={cfg.data.name}: transcoders are trained on {' or '.join(makers)}, or a mix (docs/data.md)"
        )
    return makers[cfg.data.name](cfg, load)


def _orrery_batches(cfg: AppConfig, load: Callable[[], VLM]) -> tuple[VLM, Source]:
    """Scenes of each kind with one question each, for Orrery's own processor."""
    if cfg.data.path is None:
        raise UserError("data.path is not set: give the folder with Orrery's shards (task=build_data writes them)")
    train, val = (ScenePool(Path(cfg.data.path), split) for split in ("train", "val"))
    vlm = load()
    if not speaks_orrery(vlm):
        raise UserError(f"data=orrery has words for Orrery alone, not for {vlm.name}; choose data=folder data.path=...")
    soft = int(vlm.processor.image_seq_length)

    def batch(step: int) -> Batch:
        scenes = train.batch(cfg.seed, step, cfg.task.batch)
        return chat_batch(scenes, vlm.tokenizer, soft, generator(cfg.seed, "chat", step))

    val_batches = [
        chat_batch(val.scenes(kind, cfg.task.val_scenes), vlm.tokenizer, soft, generator(cfg.seed, "val", kind))
        for kind in KINDS
    ]
    return vlm, Source(batch, val_batches, None)


def _folder_batches(cfg: AppConfig, load: Callable[[], VLM]) -> tuple[VLM, Source]:
    """The user's own conversations, captions and texts, in the model's own chat template."""
    if not cfg.data.path:
        raise UserError("data.path is not set: give the folder with train.jsonl (layout: docs/bring_your_own.md)")
    task = cfg.task
    train, val = load_folder(cfg.data.path, cfg.data.val_share, cfg.seed)
    vlm = load()
    for part in (train, val):
        _check_pictures(vlm, part)
    forwards = partial(encode, vlm, max_tokens=task.max_tokens)
    batch = ConversationBatches(train, forwards, task.tokens_per_batch, cfg.seed)
    settings = f"{task.tokens_per_batch} tokens a batch, {task.max_tokens} an example"
    return vlm, Source(batch, ValidationBatches(val[: task.val_examples], forwards), settings)


def _check_pictures(vlm: VLM, lines: JsonLines) -> None:
    """Refuse at once, not when its turn comes, an example that the model cannot take."""
    for number, line in enumerate(lines.lines):
        if line.n_images and not vlm.adapter.has_vision:
            raise UserError(f"{lines.origin(number)}: it has pictures, and {vlm.name} takes none; leave it out")
        if not line.n_images and vlm.adapter.needs_pictures:
            raise UserError(f"{lines.origin(number)}: it has no picture, and {vlm.name} needs one; leave it out")


def _mix_batches(cfg: AppConfig, load: Callable[[], VLM], run_dir: Path) -> tuple[VLM, Source]:
    """Batches of the mix, each source's share of the tokens as its weight says.

    Of several processes that train together each reads its own share of every source.
    """
    data, task, share = cfg.data, cfg.task, own_share()
    if task.max_tokens < 2:
        raise UserError(f"task.max_tokens={task.max_tokens}: a mix needs at least 2")
    train = {name: _streams(cfg, name, validation=False, share=share) for name in data.sources}
    val = {name: _streams(cfg, name, validation=True, share=WHOLE) for name in data.sources}
    vlm = load()
    encoder = partial(SampleEncoder, vlm, min(data.context, task.max_tokens), task.max_tokens)

    def make() -> TokenMix[list[EncodedForward]]:
        return TokenMix({name: Lane(source.weight, train[name](), encoder()) for name, source in data.sources.items()})

    settings = (
        f"{fingerprint(data.sources)}, {task.tokens_per_batch} tokens a batch, {task.max_tokens} an example, "
        f"{data.context} a text, shuffled by {data.shuffle}, {data.val_share} held out"
    )
    if share.total > 1:  # another number of processes reads in another order, and cannot go on
        settings += f", read by {share.total} processes"
    # A state holds tokens: it is of one tokenizer and of the files that were read.
    known = f"{settings}, {plain(model_origin(cfg, weights=False) | data_origin(cfg))}"
    states = run_dir / "data_states.json"
    batches = MixBatches(make, task.tokens_per_batch, states, known, cfg.trainer.resume, share, joint_sum)
    held = mix_validation({name: (stream(), encoder()) for name, stream in val.items()}, task.val_examples)
    return vlm, Source(batches, held, settings, batches.figures)


def _streams(cfg: AppConfig, name: str, validation: bool, share: Share) -> Callable[[], ShuffledSource]:
    """What opens a new stream of a share of a source's samples, for training or for validation."""
    data, config = cfg.data, cfg.data.sources[name]
    source = open_source(name, config, config.val_split if validation else None, data.max_bad_shards)
    keep = keeps(config, data.val_share, validation)
    buffer, repeat = (1, False) if validation else (data.shuffle, config.repeat)
    return lambda: ShuffledSource(source, share, buffer, cfg.seed, repeat, keep)


def cache_settings(cfg: AppConfig, settings: str | None) -> CacheSettings | None:
    """The cache that `task.cache` names, if any; `settings` is what resuming must find unchanged about the data."""
    task, data = cfg.task, cfg.data
    if task.cache is None:
        return None
    words = [data.name, settings or f"{dict(sorted(task.batch.items()))}"]
    if not data.sources:
        words.append(f"{data.val_share:g} held out")
    paths = [data.path, *(source.path for source in data.sources.values())]
    words += [f"files {folder_digest(path)}" for path in dict.fromkeys(paths) if path is not None]
    return CacheSettings(Path(task.cache), task.cache_dtype, ", ".join(words), f"seed {cfg.seed}")
