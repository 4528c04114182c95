"""The batches that transcoders are trained and judged on: from the data that `data=` chose, or a mix of sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from vlmscope.config import AppConfig
    from vlmscope.core.records import Sample
    from vlmscope.data.folder import JsonLines
    from vlmscope.data.mixing import ShuffledSource, TokenMix
    from vlmscope.data.samples import Share
    from vlmscope.models.loading import VLM
    from vlmscope.training.batches import Batch, SampleEncoder
    from vlmscope.training.batches import EncodedForward as Forward


def _none() -> dict[str, float]:
    return {}


class Source(NamedTuple):
    """Training batches by number, validation batches, what resuming must find unchanged (None: nothing), and figures
    of the data so far.
    """

    train: Callable[[int], Batch]
    val: Sequence[Batch]
    settings: str | None
    figures: Callable[[], Mapping[str, float]] = _none


def batches_for(cfg: AppConfig, load: Callable[[], VLM], run_dir: Path) -> tuple[VLM, Source]:
    """The model and its data; the data is looked at before the model is loaded, which takes longer.

    `run_dir` is where a mix keeps its states, from which it goes on.

    Raises:
        UserError: the data is not there or has a mistake.
    """
    if cfg.data.sources:
        return mix_batches(cfg, load, run_dir)
    makers = {"orrery": orrery_batches, "folder": folder_batches}
    if cfg.data.name not in makers:
        raise UserError(
            f"data={cfg.data.name}: transcoders are trained on {' or '.join(makers)}, or a mix (docs/data.md)"
        )
    return makers[cfg.data.name](cfg, load)


def orrery_batches(cfg: AppConfig, load: Callable[[], VLM]) -> tuple[VLM, Source]:
    """Scenes of each kind with one question each, for Orrery's own processor."""
    from vlmscope.core.records import generator
    from vlmscope.data.orrery.dataset import ScenePool
    from vlmscope.data.orrery.scenes import KINDS, vocabulary
    from vlmscope.data.samples import chat_batch

    if cfg.data.path is None:
        raise UserError("data.path is not set: give the folder with Orrery's shards (task=build_data writes them)")
    train, val = (ScenePool(Path(cfg.data.path), split) for split in ("train", "val"))
    vlm = load()
    if not {"<image_soft_token>", *vocabulary()} <= vlm.tokenizer.get_vocab().keys():
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


def folder_batches(cfg: AppConfig, load: Callable[[], VLM]) -> tuple[VLM, Source]:
    """The user's own conversations, captions and texts, in the model's own chat template."""
    from vlmscope.data.folder import load_folder
    from vlmscope.models.conversations import encode
    from vlmscope.training.batches import ConversationBatches, ValidationBatches

    if not cfg.data.path:
        raise UserError("data.path is not set: give the folder with train.jsonl (layout: docs/bring_your_own.md)")
    task = cfg.task
    train, val = load_folder(cfg.data.path, cfg.data.val_share, cfg.seed)
    vlm = load()
    for part in (train, val):
        check_pictures(vlm, part)

    def forwards(sample: Sample) -> list[dict[str, Tensor]]:
        return encode(vlm, sample, task.max_tokens)

    batch = ConversationBatches(train, forwards, task.tokens_per_batch, cfg.seed)
    settings = f"{task.tokens_per_batch} tokens a batch, {task.max_tokens} an example"
    return vlm, Source(batch, ValidationBatches(val[: task.val_examples], forwards), settings)


def check_pictures(vlm: VLM, lines: JsonLines) -> None:
    """Refuse at once, not when its turn comes, an example that the model cannot take.

    Raises:
        UserError: pictures for a model that takes none, or none for one that needs them; with the line.
    """
    adapter = vlm.adapter
    for number, line in enumerate(lines.lines):
        if line.n_images and not adapter.has_vision:
            raise UserError(f"{lines.origin(number)}: it has pictures, and {vlm.name} takes none; leave it out")
        if not line.n_images and adapter.needs_pictures:
            raise UserError(f"{lines.origin(number)}: it has no picture, and {vlm.name} needs one; leave it out")


def mix_batches(cfg: AppConfig, load: Callable[[], VLM], run_dir: Path) -> tuple[VLM, Source]:
    """Batches of the mix, each source's share of the tokens as its weight says.

    Of several processes that train together each reads its own share of every source.

    Raises:
        UserError: a source is wrong, or has no sample for validation.
    """
    from vlmscope.core.origin import plain
    from vlmscope.data.mixing import Lane, TokenMix, fingerprint
    from vlmscope.tasks.origin import data_origin, model_origin
    from vlmscope.training.batches import MixBatches, MixValidation
    from vlmscope.training.ranks import joint_sum, own_share

    data, task, share = cfg.data, cfg.task, own_share()
    train = {name: streams(cfg, name, validation=False, share=share) for name in data.sources}
    val = {name: streams(cfg, name, validation=True) for name in data.sources}
    vlm = load()

    def make() -> TokenMix[list[Forward]]:
        return TokenMix(
            {name: Lane(source.weight, train[name](), encoder(cfg, vlm)) for name, source in data.sources.items()}
        )

    settings = (
        f"{fingerprint(data.sources)}, {task.tokens_per_batch} tokens a batch, {task.max_tokens} an example, "
        f"{data.context} a text, shuffled by {data.shuffle}, {data.val_share} held out"
    )
    if share.total > 1:  # another number of processes reads in another order, and cannot go on
        settings += f", read by {share.total} processes"
    states = run_dir / "data_states.json"
    # A state holds tokens: it is of one tokenizer and of the files that were read.
    known = f"{settings}, {plain(model_origin(cfg, weights=False) | data_origin(cfg))}"
    batches = MixBatches(make, task.tokens_per_batch, states, known, cfg.trainer.resume, share, joint_sum)
    held = MixValidation({name: (one(), encoder(cfg, vlm)) for name, one in val.items()}, task.val_examples)
    return vlm, Source(batches, held, settings, batches.figures)


def streams(cfg: AppConfig, name: str, validation: bool, share: Share | None = None) -> Callable[[], ShuffledSource]:
    """What opens a new stream of a source's samples, for training or for validation; a `share` of it, or all.

    Raises:
        UserError: the source is wrong, or not there.
    """
    from vlmscope.data.mixing import ShuffledSource, keeps, open_source
    from vlmscope.data.samples import WHOLE

    data, config = cfg.data, cfg.data.sources[name]
    source = open_source(name, config, config.val_split if validation else None, data.max_bad_shards)
    keep = keeps(config, data.val_share, validation)
    buffer, repeat = (1, False) if validation else (data.shuffle, config.repeat)
    return lambda: ShuffledSource(source, share or WHOLE, buffer, cfg.seed, repeat, keep)


def encoder(cfg: AppConfig, vlm: VLM) -> SampleEncoder:
    """What makes forwards of samples for a model.

    Raises:
        UserError: texts cannot be joined, since the tokenizer has no token for it.
    """
    from vlmscope.data.packing import TokenPacker
    from vlmscope.models.conversations import encode, ends_of_text, sequence_forward, text_ids
    from vlmscope.training.batches import SampleEncoder

    eos, bos = ends_of_text(vlm.tokenizer)
    if cfg.task.max_tokens < 2:
        raise UserError(f"task.max_tokens={cfg.task.max_tokens}: a mix needs at least 2")
    return SampleEncoder(
        lambda sample: encode(vlm, sample, cfg.task.max_tokens),
        lambda text: text_ids(vlm, text),
        lambda ids: sequence_forward(vlm, ids),
        TokenPacker(eos, min(cfg.data.context, cfg.task.max_tokens), bos),
    )
