"""Attention rollout of a vision tower (Abnar and Zuidema 2020), as Yang et al. (arXiv 2602.20330) use it.

Of each layer the patterns of the most focused heads (lowest entropy) are averaged to A; with the residual stream as
`B = rownorm(A + I)` the rollout over layers 1..n is `R = B_n ... B_1`, where R[i, j] says how much of token j's state
before the first of them is in token i's after the last. Its rows are pooled to soft tokens. The paper's "similarity"
variant takes no attention at all: it pools the rows of the cosine similarity between the tower's last states.

The paper's text has the last 4 layers and 30 % of the heads, its code pools by the maximum over a soft token's patches.
Legend: H heads, P tokens of a tile (class tokens, then patches row by row), S soft tokens, d_v width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def head_entropy(pattern: Tensor) -> Tensor:
    """The entropy of each head's rows in nats, averaged over queries: `[H, P, P]` -> `[H]`."""
    return torch.special.entr(pattern).sum(-1).mean(-1)


def focused_heads(pattern: Tensor, share: float) -> Tensor:
    """The heads of lowest entropy, most focused first; of equal heads the first.

    Args:
        pattern: `[H, P, P]`, rows summing to 1.
        share: of the heads, in (0, 1]; at least one is kept, and halves are rounded to the even number.

    Returns:
        int64 indices.
    """
    count = max(1, round(share * len(pattern)))
    return torch.argsort(head_entropy(pattern), stable=True)[:count]


def mixed_layer(pattern: Tensor, share: float, identity: bool = True) -> Tensor:
    """One layer's mixing of tokens: `[H, P, P]` -> `[P, P]`, rows summing to 1.

    Args:
        pattern: attention probabilities.
        share: of the heads, by `focused_heads`.
        identity: whether the residual stream counts as much as the attention.
    """
    mean = pattern[focused_heads(pattern, share)].mean(0)
    if identity:
        mean = mean + torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    return mean / mean.sum(-1, keepdim=True)


def rollout(layers: Sequence[Tensor], start: Tensor | None = None) -> Tensor:
    """The product of layers' mixings, first layer first: `[P, P]` each -> `[P, P]`.

    Args:
        layers: at least one.
        start: rows `[n, P]` to be taken through the layers, last layer first, instead of every token's.
    """
    product = start
    for mixing in reversed(layers):
        product = mixing if product is None else product @ mixing
    assert product is not None, "a rollout of no layers"
    return product


def pool_rows(matrix: Tensor, pooling: Tensor, reduce: str) -> Tensor:
    """Rows of a matrix over tokens pooled to soft tokens: `[P, P]` -> `[S, P]`.

    Args:
        matrix: a row for every token.
        pooling: `[S, P]`, how much of each token goes into each soft token, in the matrix's dtype.
        reduce: "mean" (weighted as the model pools) or "max" (over the tokens that go in at all).
    """
    if reduce == "mean":
        return pooling @ matrix
    out = torch.zeros_like(pooling)
    for row, weights in enumerate(pooling):
        inside = torch.nonzero(weights)[:, 0]
        if len(inside):
            out[row] = matrix[inside].amax(0)
    return out


def soft_token_rollout(layers: Sequence[Tensor], pooling: Tensor, reduce: str) -> Tensor:
    """`pool_rows(rollout(layers), pooling, reduce)`; for the mean by way of S rows instead of P.

    Args:
        layers: mixings `[P, P]`, first layer first.
        pooling: `[S, P]`.
        reduce: "mean" or "max".

    Returns:
        `[S, P]`; with "mean" the row of a soft token of patches sums to 1.
    """
    if reduce == "mean":
        return rollout(layers, pooling)
    return pool_rows(rollout(layers), pooling, reduce)


def similarity(states: Tensor) -> Tensor:
    """Cosine similarity between tokens' states: `[P, d_v]` -> `[P, P]`, in -1..1."""
    unit = torch.nn.functional.normalize(states, dim=-1)
    return unit @ unit.T
