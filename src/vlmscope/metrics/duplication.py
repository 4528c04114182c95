"""How often layers say the same twice: features whose directions are nearly parallel to one of another layer.

The paper (arXiv 2602.20330) names features duplicated across layers as a limit of transcoders of single layers. A
feature's direction is the sum of its decoder rows over all layers that it writes to, so that the figure means the same
for sets of single layers and cross-layer ones. By chance no pair comes near: the largest of a million cosines between
random vectors of width 128 is about 0.43.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

COSINE = 0.8  # from here on two directions count as one
_SAMPLE = 2048  # features of a layer that are compared with all of the other layers


def duplicated_fraction(
    directions: Mapping[int, Tensor], alive: Mapping[int, Tensor], cosine: float = COSINE, sample: int = _SAMPLE
) -> dict[int, float]:
    """Layer -> share of its live features with a near-parallel live feature in some other layer.

    Args:
        directions: layer -> [F, d]; widths F may differ.
        alive: layer -> [F] bool; features that never fire count neither way.
        cosine: least cosine of a pair, counted with its sign.
        sample: at most so many features of a layer, the first ones, are looked at; they are compared with all.

    Returns:
        Nothing for a layer without a live feature.
    """
    units = {n: functional.normalize(rows[alive[n]].float(), dim=1) for n, rows in directions.items()}
    found = {}
    for layer, rows in units.items():
        mine = rows[:sample]
        if not len(mine):
            continue
        best = mine.new_full((len(mine),), -1.0)
        for other, theirs in units.items():
            if other != layer and len(theirs):
                best = torch.maximum(best, (mine @ theirs.to(mine.device).T).amax(1))
        found[layer] = float((best >= cosine).double().mean())
    return found
