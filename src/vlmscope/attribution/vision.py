"""Contributions of a picture's patches to a target, through projector, pooling and vision tower.

With the tower frozen as `vlmscope.models.attention` does it, what the soft tokens write is `J e + c`, e the patch
embeddings without bias. A target reads it by G (`vlmscope.attribution.adjoint`), so patch p contributes
`(G J)_p . (e_p - e0_p)` for a baseline e0: one backward pass per target. c is computed separately, by running the
frozen tower forwards at e = 0, so that the check `edge = patches + remainder` can fail. A feature's targets are its
pre-activations wherever it is active on soft tokens; their sum is one affine function, so one pass covers all.

`patches.safetensors` holds maps over patches as small float16 grids, each relative to its own largest absolute value
(its `scale` in the record), so that float16 has all its digits.
Legend: B targets, N patch embeddings, d_v their width, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from vlmscope.attribution.adjoint import Readers, target_readers
from vlmscope.attribution.targets import feature_at
from vlmscope.core.artifacts import built_from, load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.graph import PictureMap, TileMap
from vlmscope.core.records import FeatureId, PatchBox
from vlmscope.models.attention import frozen_vision
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.batching import Entering, entering
from vlmscope.models.boxes import PicturePatches, tower_kind
from vlmscope.models.loading import VLM
from vlmscope.replacement import PatchEmbedding, ReplacementModel

FORMAT, VERSION = "vlmscope.patches", "1"


@dataclass(frozen=True)
class VisionPath:
    """The vision path of one prompt, ready for any number of targets."""

    inputs: ModelInputs  # the prompt
    pictures: list[PicturePatches]  # patches of each picture
    rule: str  # "frozen" or "gradient"
    patches: Tensor  # `[N, d_v]`, the patch embeddings without bias; a leaf
    # position embeddings and class tokens by name, each with its place in the graph
    constants: dict[str, tuple[Tensor, GradientEdge]]
    written: Entering  # what the tower writes into the decoder, with its graph
    at_zero: Entering | None  # the same from the frozen tower at patch embeddings of 0; None for "gradient"

    def maps(self, readers: Readers, names: Sequence[str], baseline: str = "grey") -> list[PictureMap]:
        """One map per target and picture, from the readers and names of B targets.

        A patch counts against a `baseline`: "grey", a picture of the processor's mean colour (pixels 0 after
        normalisation), or "mean", the mean patch of its own picture.
        """
        maps = []
        for number, name in enumerate(names):
            for picture in range(len(self.pictures)):
                # Only this picture's soft tokens are read.
                mask = torch.from_numpy(self.inputs.image_index == picture).to(readers.embeddings.device)[:, None]
                reader = Readers(readers.embeddings[number, None] * mask, readers.injections[number, None] * mask)
                maps.append(self._map(reader, name, picture, baseline))
        return maps

    def _map(self, reader: Readers, name: str, picture: int, baseline: str) -> PictureMap:
        edge = _read(reader, self.written)
        leaves = [self.patches, *(edge for _, edge in self.constants.values())]
        grads = torch.autograd.grad(edge, leaves, retain_graph=True, materialize_grads=True)
        total = float(edge.detach())
        gradient, patches = grads[0].double(), self.patches.detach().double()
        inside = np.concatenate([tile.patches for tile in self.pictures[picture].tiles])
        base = torch.zeros_like(patches)
        if baseline == "mean":
            base[:] = patches[inside].mean(0)
        values = (gradient * (patches - base)).sum(-1).numpy(force=True)
        rest = (gradient * patches).sum(-1).numpy(force=True)
        remainder = {
            "baseline": float((gradient * base).sum(-1).numpy(force=True)[inside].sum()),
            "padding": float(rest.sum() - rest[inside].sum()),
        }
        if self.at_zero is None:
            remainder["nonlinear"] = total - float(rest.sum())
        else:
            for (constant, (value, _)), grad in zip(self.constants.items(), grads[1:], strict=True):
                remainder[constant] = float((grad.double() * value.detach().double()).sum())
            known = sum(remainder[constant] for constant in self.constants)
            remainder["bias"] = float(_read(reader, self.at_zero)) - known
        tiles = [
            TileMap(tile.boxes, values[tile.patches].reshape(tile.rows, tile.columns))
            for tile in self.pictures[picture].tiles
        ]
        return PictureMap(name, picture, tiles, total, remainder)


def _read(reader: Readers, written: Entering) -> Tensor:
    """The value that one target reads from what the tower writes."""
    total = (reader.embeddings[0].to(written.embeddings.dtype) * written.embeddings[0]).sum()
    if written.injections is not None:
        total = total + (reader.injections[0].to(written.injections.dtype) * written.injections[0]).sum()
    return total


def vision_path(vlm: VLM, inputs: ModelInputs, rule: str = "frozen") -> VisionPath:
    """Run the vision path of a prompt once with gradients, and, frozen, once more at patch embeddings of 0.

    The rule is "frozen" (complete) or "gradient" (the plain gradient, for comparison).

    Raises:
        UserError: the prompt has no picture.
    """
    if not inputs.sizes:
        raise UserError("the prompt has no picture, so there are no patches; give one with image=")
    adapter = vlm.adapter
    pictures = adapter.picture_patches(inputs.tensors, inputs.sizes, vlm.processor.image_processor)
    tower = adapter.vision_tower()
    module = tower.get_submodule(tower_kind(tower).patches)
    leaf = PatchEmbedding(module)
    at_zero = None
    with ExitStack() as stack:
        constants = stack.enter_context(_additive(adapter))
        stack.callback(module.register_forward_hook(leaf).remove)
        stack.enter_context(torch.enable_grad())
        frozen = stack.enter_context(frozen_vision(adapter) if rule == "frozen" else nullcontext())
        written = entering(adapter, [inputs])
        patches = leaf.values
        assert patches is not None, "the tower did not embed its patches where it should"
        if frozen is not None:
            leaf.values = torch.zeros_like(patches, requires_grad=True)
            with frozen.replaying():
                zero = entering(adapter, [inputs])
            injections = None if zero.injections is None else zero.injections.detach()
            at_zero = Entering(zero.embeddings.detach(), None, injections)
    return VisionPath(inputs, pictures, rule, patches, constants, written, at_zero)


@contextmanager
def _additive(adapter: Adapter) -> Iterator[dict[str, tuple[Tensor, GradientEdge]]]:
    """The tower's position embeddings and class tokens, by name, with gradients switched on inside."""
    tower = adapter.vision_tower()
    kind = tower_kind(tower)
    parameters = {
        name: tower.get_parameter(path)
        for name, path in (("position", kind.positions), ("class_token", kind.class_token))
        if path
    }
    # Offloaded weights are other tensors while the tower runs: they count as "bias".
    parameters = {name: parameter for name, parameter in parameters.items() if parameter.device.type != "meta"}
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        # The edges of the graph stay valid after the weights' flags are restored.
        yield {name: (parameter, get_gradient_edge(parameter)) for name, parameter in parameters.items()}
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def feature_path_maps(
    replacement: ReplacementModel,
    path: VisionPath,
    features: Sequence[FeatureId],
    effect: str = "total",
    baseline: str = "grey",
) -> dict[FeatureId, list[PictureMap]]:
    """One map per feature and picture: contributions of patches to the feature's sum over all soft tokens.

    Each feature must be active on a soft token. The effect is "total" (active features of earlier layers respond) or
    "direct".
    """
    soft = np.flatnonzero(replacement.inputs.is_image)
    maps = {}
    for feature in features:
        targets = feature_at(replacement, feature, soft)
        readers = target_readers(replacement, targets, total=effect == "total", summed=True)
        maps[feature] = path.maps(readers, [str(feature)], baseline)
    return maps


def save_maps(path: str | Path, maps: Sequence[PictureMap]) -> list[dict[str, Any]]:
    """Write the grids, atomically; returns a record per map, with the names of its grids and their boxes."""
    arrays: dict[str, np.ndarray] = {}
    records = []
    for number, picture_map in enumerate(maps):
        tiles = []
        for tile_number, tile in enumerate(picture_map.tiles):
            name, scale = f"map_{number}_{tile_number}", float(np.abs(tile.values).max(initial=0.0))
            arrays[name] = (tile.values / (scale or 1.0)).astype(np.float16)
            tiles.append({"grid": name, "scale": scale, "boxes": [list(box) for box in tile.boxes]})
        fields = ("target", "picture", "edge", "from_patches", "remainder", "residual")
        records.append({name: getattr(picture_map, name) for name in fields} | {"tiles": tiles})
    save_tensors(path, arrays, {"format": FORMAT, "version": VERSION})
    return records


def load_maps(path: str | Path, records: Sequence[Mapping[str, Any]]) -> list[PictureMap]:
    """Read what `save_maps` wrote, to float16's accuracy, with the records that it returned.

    `graph.json` holds the records under `vlmscope.patches.maps`.
    """
    arrays, metadata = load_tensors(path)
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} holds no maps over patches of this layout; trace again with attribution.patches=true")
    with built_from(path, "file of maps", "trace again with attribution.patches=true"):
        maps = []
        for record in records:
            tiles = []
            for tile in record["tiles"]:
                boxes = [PatchBox(*box) for box in tile["boxes"]]
                tiles.append(TileMap(boxes, arrays[tile["grid"]].astype(float) * tile["scale"]))
            maps.append(PictureMap(record["target"], record["picture"], tiles, record["edge"], record["remainder"]))
        return maps
