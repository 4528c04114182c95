"""Maps over patches for every soft token of a prompt's pictures, and for a feature by its activations on them.

Legend: P tokens of a tile, S soft tokens of a picture.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations.vision import TileAttention, VisionAttention, capture_vision_attention
from vlmscope.attention.config import WhereConfig
from vlmscope.attention.rollout import mixed_layer, pool_rows, similarity, soft_token_rollout
from vlmscope.core.patches import PictureMap, TileMap, TokenMaps, TokenTile
from vlmscope.models.base import ModelInputs
from vlmscope.models.loading import VLM
from vlmscope.models.patches import PicturePatches


def token_maps(vlm: VLM, inputs: ModelInputs, config: WhereConfig) -> dict[str, list[TokenMaps]]:
    """Rollout and similarity of every soft token, from one forward of the tower.

    Of the attention only the last layers' is kept, and of each only one matrix `[P, P]` a tile.

    Args:
        vlm: the model with its processor, in evaluation mode.
        inputs: what `vlm.prepare` made of the prompt.
        config: settings of the rollout.

    Returns:
        "rollout" and "similarity": one record a picture.

    Raises:
        UserError: the model or the prompt has no pictures, or the tower's attention cannot be recorded.
    """
    config.check()
    n_layers = len(vlm.adapter.vision_attention()) if vlm.adapter.has_vision else 0
    layers = range(max(n_layers - config.last_layers, 0), n_layers)
    reduce = partial(mixed_layer, share=config.head_share, identity=config.identity)
    captured = capture_vision_attention(vlm, inputs, layers, reduce, states=True)
    return {
        "rollout": _maps(captured, "rollout", config.pool),
        "similarity": _maps(captured, "similarity", config.pool),
    }


def _maps(captured: VisionAttention, kind: str, pool: str) -> list[TokenMaps]:
    found = []
    for number, picture in enumerate(captured.pictures):
        every = torch.from_numpy(picture.pooling.toarray())
        tiles, on_class, first = [], np.zeros(len(every)), 0
        for tile in picture.tiles:
            pooling = every[:, first : first + len(tile.tile)]
            first += len(tile.tile)
            rows = _rows(tile, pooling, kind, pool).double().numpy(force=True)
            tokens = torch.nonzero(pooling.any(1))[:, 0].numpy()
            n_class, shape = tile.tile.n_class, (tile.tile.rows, tile.tile.columns)
            on_class += rows[:, :n_class].sum(1)
            tiles.append(TokenTile(tile.tile.boxes, tokens, rows[tokens, n_class:].reshape(-1, *shape)))
        found.append(TokenMaps(kind, number, tiles, on_class))
    return found


def _rows(tile: TileAttention, pooling: Tensor, kind: str, pool: str) -> Tensor:
    """`[S, P]`, what soft tokens take from one tile."""
    if kind == "rollout":
        layers = [tile.patterns[layer] for layer in sorted(tile.patterns)]
        return soft_token_rollout(layers, pooling.to(layers[0]), pool)
    assert tile.states is not None, "the states were not captured"
    return pool_rows(similarity(tile.states), pooling.to(tile.states), pool)


def own_map(activations: np.ndarray, patches: PicturePatches, picture: int, target: str) -> PictureMap:
    """A feature's own activation on the soft tokens, shared out among the patches that go into each.

    Args:
        activations: `[S]`, on the picture's soft tokens.
        patches: the picture in the tower.
        picture: its number in the prompt.
        target: name of the feature.

    Returns:
        A map that sums to the activations, those of soft tokens of no patch apart.
    """
    shared = patches.pooling.T @ activations.astype(np.float64)
    tiles, on_class, first = [], 0.0, 0
    for tile in patches.tiles:
        part = shared[first : first + len(tile)]
        first += len(tile)
        on_class += float(part[: tile.n_class].sum())
        tiles.append(TileMap(tile.boxes, part[tile.n_class :].reshape(tile.rows, tile.columns)))
    empty = patches.pooling.sum(axis=1) == 0
    remainder = {"class_token": on_class, "no_patch": float(activations[empty].sum())}
    remainder = {name: value for name, value in remainder.items() if value}
    return PictureMap(target, picture, tiles, float(activations.sum()), remainder)


def on_pictures(values: np.ndarray, inputs: ModelInputs) -> list[np.ndarray]:
    """What lies on each picture's soft tokens, of `values [T]` at all positions."""
    return [values[inputs.image_index == picture] for picture in range(len(inputs.sizes))]
