"""How often layers say the same twice: features whose directions are nearly parallel to one of another layer.

The paper (arXiv 2602.20330) names features duplicated across layers as a limit of transcoders of single layers. A
feature's direction is the sum of its decoder rows over all layers that it writes to, through the weights of the norm
after each MLP, so that the figure means the same for sets of single layers and cross-layer ones. By chance no pair
comes near: the largest of a million cosines between random vectors of width 128 is about 0.43.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

COSINE = 0.8  # from here on two directions count as one
_SAMPLE = 2048  # features of a layer that are compared with all of the other layers


@torch.no_grad()
def duplicated_fraction(
    directions: Mapping[int, Tensor],
    alive: Mapping[int, Tensor],
    cosine: float = COSINE,
    sample: int = _SAMPLE,
    device: torch.device | str = "cpu",
) -> dict[int, float]:
    """Layer -> share of its live features with a near-parallel live feature in some other layer.

    Args:
        directions: layer -> [F, d]; widths F may differ.
        alive: layer -> [F] bool; features that never fire count neither way.
        cosine: least cosine of a pair, counted with its sign.
        sample: at most so many features of a layer, the first ones, are looked at; they are compared with all.
        device: where it is computed, a whole layer at a time.

    Returns:
        Nothing for a layer without a live feature.
    """

    def units(layer: int, most: int | None = None) -> Tensor:
        return functional.normalize(directions[layer][alive[layer]][:most].to(device).float(), dim=1)

    mine = {layer: units(layer, sample) for layer in directions}
    best = {layer: rows.new_full((len(rows),), -1.0) for layer, rows in mine.items()}
    for other in directions:
        theirs = units(other)
        for layer, rows in mine.items():
            if other != layer and len(theirs):
                best[layer] = torch.maximum(best[layer], (rows @ theirs.T).amax(1))
    return {layer: float((found >= cosine).double().mean()) for layer, found in best.items() if len(found)}
