"""The batches that transcoders are trained and judged on, from the data that `data=` chose."""

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
    from vlmscope.models.loading import VLM
    from vlmscope.training.batches import Batch


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
        from vlmscope.tasks.transcoders.mix_batches import mix_batches

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
