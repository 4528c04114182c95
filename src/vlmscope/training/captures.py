"""Activations of the model for training: captured by batch number, cached on disk, streamed by step.

Cache: `<folder>/manifest.json` says what the activations depend on; `rank_00/batch_000000.safetensors` and so on hold a
captured batch each, as one rank keeps it: `layer_00.in`, `layer_00.out` [n, d] in the dtype of the cache, `is_image`
[n]. A file is written under another name and renamed, so what stands is whole: after a kill the next run goes on from
there, and one that needs more batches adds them.

Stream: the model's forward costs more than a step of all transcoders, and tokens of one batch resemble each other. So
the last `pool_batches` captured batches are kept, a new one replaces the oldest every `steps_per_batch` steps, and a
step draws its tokens from all of them. The draw depends on the step alone: a resumed run captures the pool anew and
goes on with the same tokens. With both settings at 1 every step sees exactly its own batch.

Shapes: n tokens of the batch on the rank's host, d model width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import IterableDataset

from vlmscope.core.artifacts import atomic_path, differences, read_json, remove_leftovers, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.hub import gb
from vlmscope.core.records import generator
from vlmscope.models.base import Adapter
from vlmscope.models.placement import model_fingerprint, tensors_fingerprint
from vlmscope.training.batches import Batch, LayerActivations, OwnPart, forwards, joined_activations
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.ranks import Ranks, joint_sum

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MANIFEST = "manifest.json"
_STALE = 3600  # seconds for which an unfinished file may be that of a run on another machine
_FORMAT = 1


@dataclass(frozen=True)
class CacheSettings:
    """Where activations are kept, and in which dtype (None: the model's own, which changes no number).

    `data` says in words what the batches depend on, `order` what their order depends on.
    """

    folder: Path
    dtype: str | None = None
    data: str = ""
    order: str = ""


class ActivationCache:
    """The batches of one rank."""

    def __init__(self, folder: Path, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.folder, self.part = Path(folder), Path(folder) / f"rank_{rank:02d}"
        self.dtype, self.device = dtype, device
        remove_leftovers(self.part, older_than=_STALE)

    def agree(self, keys: Mapping[str, str]) -> None:
        """Check what the cache was made with against `keys`, or write it down where there is no cache yet."""
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
        """A batch and the figures of the data up to it; None where the cache has no whole one."""
        try:
            with safe_open(self.path(number), "pt", device=str(self.device)) as file:
                record = json.loads(file.metadata()["batch"])
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError):  # absent or damaged
            return None
        layers = sorted(int(name[6:-3]) for name in tensors if name.endswith(".in"))
        by_layer = {n: (tensors[f"layer_{n:02d}.in"], tensors[f"layer_{n:02d}.out"]) for n in layers}
        return LayerActivations(by_layer, tensors["is_image"], record["first"], record["joint"]), record["figures"]

    def rounded(self, activations: LayerActivations) -> LayerActivations:
        """Activations in the cache's dtype, as reading would give them."""
        rounded: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, pair in activations.by_layer.items():
            x, y = (side.to(self.dtype) for side in pair)
            if any(bool((side.isfinite() & ~own.isfinite()).any()) for side, own in zip(pair, (x, y), strict=True)):
                raise UserError(f"task.cache_dtype=float16 cannot hold the activations of layer {layer}; take bfloat16")
            rounded[layer] = (x, y)
        return replace(activations, by_layer=rounded)

    def write(self, number: int, activations: LayerActivations, figures: Mapping[str, float]) -> None:
        """Keep a batch in the cache's dtype (`rounded`), with the figures of the data up to it."""
        tensors = {"is_image": activations.is_image.contiguous()}
        for layer, (x, y) in activations.by_layer.items():
            tensors |= {f"layer_{layer:02d}.in": x.contiguous(), f"layer_{layer:02d}.out": y.contiguous()}
        record = {"first": activations.first, "joint": activations.joint, "figures": dict(figures)}
        with atomic_path(self.path(number)) as temporary:
            save_file(tensors, temporary, metadata={"batch": json.dumps(record)})


class Captures:
    """The activations of batch number 0, 1, ... on this rank; with `epoch_batches` the first so many again and again.

    From the cache on disk where it has them, else from the model, which fills the cache. Number n is asked for by every
    rank at the same point of its work.
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
            captured = self.cache.rounded(self.ranks.collect(self.adapter, self.batch_of(number)))
            kept = captured, dict(self._data_figures())
            self.cache.write(number, *kept)
        self._newest = max(self._newest, (number, kept[1]), key=lambda pair: pair[0])
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
    """The captures of a run; where a cache is asked for, it is checked, and its size is printed."""
    epoch = config.recipe.epoch_batches
    if settings is None:
        return Captures(adapter, batch_of, ranks, epoch, data_figures)
    dtype = _DTYPES.get(settings.dtype or "", adapter.dtype)
    cache = ActivationCache(settings.folder, ranks.rank, dtype, adapter.device)
    if ranks.main:
        first, layout = batch_of(0), ranks.layout
        tokens = sum(int(one.get("attention_mask", one["input_ids"] >= 0).sum()) for one in forwards(first))
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
        _check_room(cache, config.batches, layout.n_layers, adapter.d_model, joint)
    ranks.barrier()
    return Captures(adapter, batch_of, ranks, epoch, data_figures, cache)


def _check_room(cache: ActivationCache, batches: int, layers: int, width: int, tokens: int) -> None:
    """Print how large the cache will be, from the tokens of its first batch; refuse what does not fit the disk."""
    token_bytes = 2 * width * cache.dtype.itemsize
    batch_bytes = token_bytes * layers * tokens
    needed = batch_bytes * sum(not cache.path(number).is_file() for number in range(batches))
    place = next(path for path in (cache.folder, *cache.folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
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
    """Activations of the steps from `first()` to the last."""

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
            wanted = range(max(0, newest - recipe.pool_batches + 1), newest + 1)
            pool = {n: pool[n] if n in pool else self.capture(n) for n in wanted}
            yield pool[newest] if recipe.pool_batches == 1 else self._draw(pool, newest, step)

    def _draw(self, pool: dict[int, LayerActivations], newest: int, step: int) -> LayerActivations:
        """As many tokens as the newest batch has, without repeats, from all batches of the pool."""
        sizes = [batch.joint_tokens for batch in pool.values()]
        rng = generator(self.config.trainer.seed, "activation_pool", step)
        chosen = torch.from_numpy(rng.choice(sum(sizes), pool[newest].joint_tokens, replace=False)).sort().values
        parts, offset = [], 0
        for batch, size in zip(pool.values(), sizes, strict=True):
            # Of the tokens drawn from all hosts, those that are here.
            first = offset + batch.first
            rows = chosen[(chosen >= first) & (chosen < first + batch.n_tokens)] - first
            parts.append(batch.rows(rows.to(batch.is_image.device)))
            offset += size
        return replace(joined_activations(parts), joint=len(chosen))
