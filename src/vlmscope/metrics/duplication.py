"""How often layers say the same twice: features whose directions are nearly parallel to one of another layer.

The paper (arXiv 2602.20330) names features duplicated across layers as a limit of transcoders of single layers. A
feature's direction is the sum of its decoder rows over all layers that it writes to, through the weights of the norm
after each MLP, so that the figure means the same for sets of single layers and cross-layer ones. By chance no pair
comes near: the largest of a million cosines between random vectors of width 128 is about 0.43.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Twin:
    """For every feature of a layer its nearest live partner in another layer, or in its own.

    Attributes:
        cosine: [F] float32, of directions; -1 without a partner and for a dead feature.
        layer: [F] int64, of the partner, -1 without one.
        index: [F] int64, likewise.
    """

    cosine: Tensor
    layer: Tensor
    index: Tensor


@torch.no_grad()
def nearest_twins(
    directions: Mapping[int, Sequence[Tensor]],
    alive: Mapping[int, Tensor],
    own_layer: bool,
    device: torch.device | str = "cpu",
    block: int = _SAMPLE,
) -> dict[int, Twin]:
    """The most nearly parallel live partner of every live feature.

    Args:
        directions: layer -> one or several [F, d]; with several (what a feature writes, what it reads) a pair is as
            parallel as the least of its cosines.
        alive: layer -> [F] bool.
        own_layer: look for partners in the feature's own layer alone; else in all the other layers.
        device: where it is computed.
        block: features of a layer that are compared with one other layer at a time.
    """
    units = {
        layer: [functional.normalize(one.to(device).float(), dim=1) for one in of] for layer, of in directions.items()
    }
    found: dict[int, Twin] = {}
    for layer, mine in units.items():
        count = len(mine[0])
        best = mine[0].new_full((count,), -1.0)
        where, which = (torch.full((count,), -1, dtype=torch.int64, device=device) for _ in range(2))
        for other in [layer] if own_layer else [one for one in units if one != layer]:
            dead = ~alive[other].to(device)
            for start in range(0, count, block):
                rows = slice(start, min(start + block, count))
                pairs = [one[rows] @ two.T for one, two in zip(mine, units[other], strict=True)]
                cosines = torch.stack(pairs).amin(0)
                cosines[:, dead] = -1.0
                if own_layer:
                    cosines[torch.arange(len(cosines)), torch.arange(rows.start, rows.stop)] = -1.0
                value, partner = cosines.max(1)
                better = value > best[rows]
                best[rows] = torch.where(better, value, best[rows])
                where[rows] = torch.where(better, torch.full_like(partner, other), where[rows])
                which[rows] = torch.where(better, partner, which[rows])
        gone = ~alive[layer].to(device)
        best[gone], where[gone], which[gone] = -1.0, -1, -1
        found[layer] = Twin(best.cpu(), where.cpu(), which.cpu())
    return found
