"""A mix of sources (`data.sources`) as batches that transcoders are trained and judged on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.data.mixing import ShuffledSource, TokenMix
    from vlmscope.data.samples import Share
    from vlmscope.models.loading import VLM
    from vlmscope.tasks.transcoders.batches import Source
    from vlmscope.training.batches import EncodedForward as Forward
    from vlmscope.training.batches import SampleEncoder


def mix_batches(cfg: AppConfig, load: Callable[[], VLM], run_dir: Path) -> tuple[VLM, Source]:
    """Batches of the mix, each source's share of the tokens as its weight says.

    Of several processes that train together each reads its own share of every source.

    Raises:
        UserError: a source is wrong, or has no sample for validation.
    """
    from vlmscope.core.origin import plain
    from vlmscope.data.mixing import Lane, TokenMix, fingerprint
    from vlmscope.tasks.origin import data_origin, model_origin
    from vlmscope.tasks.transcoders.batches import Source
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
