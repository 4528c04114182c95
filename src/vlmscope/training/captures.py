"""Captured batches by number: from the cache on disk where it has them, else from the model, which fills the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlmscope.core.errors import UserError
from vlmscope.core.hub import gb
from vlmscope.models.base import Adapter
from vlmscope.models.fingerprints import model_fingerprint, tensors_fingerprint
from vlmscope.training.activation_cache import DTYPES, ActivationCache, CacheSettings
from vlmscope.training.process_group import joint_sum
from vlmscope.training.ranks import Ranks
from vlmscope.training.transcoder_config import TranscoderTrainingConfig
from vlmscope.training.transcoder_data import Batch, LayerActivations, OwnPart, forwards


class Captures:
    """The activations of batch number 0, 1, ... on this rank; with `epoch_batches` the first so many again and again.

    Number n is asked for by every rank at the same point of its work.
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
        """One captured batch, in the dtype of the cache where there is one."""
        if self.epoch_batches is not None:
            number %= self.epoch_batches
        if self.cache is None:
            return self.ranks.collect(self.adapter, self.batch_of(number))
        kept = self.cache.read(number)
        if joint_sum([float(kept is None)])[0]:  # a rank lacks it, and all must take part in capturing
            kept = None
        if kept is None:
            found = self.cache.rounded(self.ranks.collect(self.adapter, self.batch_of(number)))
            kept = found, dict(self._data_figures())
            self.cache.write(number, *kept)
        self._newest = max(self._newest, (number, kept[1]), key=lambda one: one[0])
        return kept[0]

    def figures(self) -> Mapping[str, float]:
        """What is to be logged about the data up to the furthest batch, whoever captured it."""
        return self._data_figures() if self.cache is None else self._newest[1]


def open_captures(
    adapter: Adapter,
    batch_of: Callable[[int], Batch],
    config: TranscoderTrainingConfig,
    ranks: Ranks,
    settings: CacheSettings | None,
    data_figures: Callable[[], Mapping[str, float]],
) -> Captures:
    """The captures of a run, with its cache opened, and its size said, where one is asked for.

    Raises:
        UserError: the cache is of something else, or does not fit the disk.
    """
    if settings is None:
        return Captures(adapter, batch_of, ranks, config.epoch_batches, data_figures)
    dtype = DTYPES.get(settings.dtype or "", adapter.dtype)
    cache = ActivationCache(settings.folder, ranks.rank, dtype, adapter.device)
    if ranks.main:
        first = batch_of(0)
        tokens = sum(int(one.get("attention_mask", one["input_ids"] >= 0).sum()) for one in forwards(first))
        layout = ranks.layout
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
        # Of a mix each rank has its own part.
        joint = tokens * layout.world if isinstance(first, OwnPart) else tokens
        _check_room(cache, config, layout.n_layers, adapter.d_model, joint)
    ranks.barrier()
    return Captures(adapter, batch_of, ranks, config.epoch_batches, data_figures, cache)


def _check_room(cache: ActivationCache, config: TranscoderTrainingConfig, layers: int, width: int, tokens: int) -> None:
    """Say how large the cache will be, from the tokens of its first batch.

    Raises:
        UserError: what is still to be written does not fit the disk.
    """
    a_token = 2 * width * cache.dtype.itemsize
    batches = config.batches
    each = a_token * layers * tokens
    needed, free = each * cache.missing(batches), cache.free()
    said = (
        f"{gb(each * batches)} ({a_token:,} bytes a token and layer x {layers} layers x {tokens:,} tokens x "
        f"{batches:,} batches)"
    )
    if needed > free:
        raise UserError(
            f"task.cache={cache.folder} would take {said}, {gb(needed)} of it still to be written, and {gb(free)} are "
            "free there; choose another folder, task.cache_dtype=bfloat16, or a smaller task.epoch_batches"
        )
    print(f"cache of activations: {said}, {gb(needed)} of it to be written; {gb(free)} are free", flush=True)
