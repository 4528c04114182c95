"""Captured activations on disk, so that the model need not run twice on the same batch.

`<folder>/manifest.json` says what the activations depend on; `rank_00/batch_000000.safetensors` and so on hold a
captured batch each, as one rank keeps it: `layer_00.in`, `layer_00.out` [n, d] in the dtype of the cache, `is_image`
[n]. A file is written under another name and renamed, so what stands is whole: after a kill the next run goes on from
there, and one that needs more batches adds them. Legend: n tokens of the batch on the rank's host, d model width.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmscope.core.artifacts import atomic_path, read_json, remove_leftovers, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.origin import differences
from vlmscope.training.transcoder_data import LayerActivations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MANIFEST = "manifest.json"
_STALE = 3600  # seconds for which an unfinished file may be that of a run on another machine
_FORMAT = 1


@dataclass(frozen=True)
class CacheSettings:
    """Where activations are kept and in what; `data` says in words what batches hang on, `order` their order.

    `dtype` is one of `DTYPES`, None: the model's own, which changes no number.
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
        """Check what the cache was made with against `keys`, or write it down where there is no cache yet.

        Raises:
            UserError: something differs, by name, or the folder holds other things.
        """
        now = {"format": str(_FORMAT), **keys}
        file = self.folder / _MANIFEST
        if not file.is_file():
            if self.folder.exists() and any(one.name != self.part.name for one in self.folder.iterdir()):
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
                said = json.loads(file.metadata()["batch"])
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError):  # absent or damaged
            return None
        layers = sorted(int(name[6:-3]) for name in tensors if name.endswith(".in"))
        by_layer = {n: (tensors[f"layer_{n:02d}.in"], tensors[f"layer_{n:02d}.out"]) for n in layers}
        return LayerActivations(by_layer, tensors["is_image"], said["first"], said["joint"]), said["figures"]

    def rounded(self, activations: LayerActivations) -> LayerActivations:
        """What reading would give.

        Raises:
            UserError: the dtype cannot hold the activations.
        """
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, pair in activations.by_layer.items():
            x, y = (one.to(self.dtype) for one in pair)
            lost = any(bool((one.isfinite() & ~own.isfinite()).any()) for one, own in zip(pair, (x, y), strict=True))
            if lost:
                raise UserError(f"task.cache_dtype=float16 cannot hold the activations of layer {layer}; take bfloat16")
            found[layer] = (x, y)
        return LayerActivations(found, activations.is_image, activations.first, activations.joint)

    def write(self, number: int, activations: LayerActivations, figures: Mapping[str, float]) -> None:
        """Keep a batch in the cache's dtype (`rounded`), with the figures of the data up to it."""
        tensors = {"is_image": activations.is_image.contiguous()}
        for layer, (x, y) in activations.by_layer.items():
            tensors |= {f"layer_{layer:02d}.in": x.contiguous(), f"layer_{layer:02d}.out": y.contiguous()}
        said = {"first": activations.first, "joint": activations.joint, "figures": dict(figures)}
        with atomic_path(self.path(number), sum(t.nbytes for t in tensors.values())) as temporary:
            save_file(tensors, temporary, metadata={"batch": json.dumps(said)})

    def missing(self, batches: int) -> int:
        """How many of the first so many batches this rank has no file of."""
        return sum(not self.path(number).is_file() for number in range(batches))

    def free(self) -> int:
        """Bytes free where the cache is, or is to be."""
        place = next(one for one in (self.folder, *self.folder.resolve().parents) if one.exists())
        return shutil.disk_usage(place).free
