"""Quality of a dictionary of features: reconstruction, duplicates, monosemanticity, modality.

*FVU* = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2, the mean taken over the tokens that are counted: a reconstruction
that only knows the mean of a subset (image tokens, say) has an FVU of 1 there. One that only knows which token stands
at a position is already good about that mean. So there is also the FVU *about each token's own mean*: y deviates from
the mean over the positions with the same token, and that reconstruction has an FVU of 1. A token that is seen once is
its own mean and is left out. Soft tokens are all one token.

*Duplicates* (a limit of transcoders of single layers, arXiv 2602.20330): a feature's direction is the sum of its
decoder rows over all layers that it writes to, through the weights of the norm after each MLP. By chance no pair comes
near: the largest of a million cosines between random vectors of width 128 is about 0.43.

*Monosemanticity* (Pach et al., arXiv 2504.02821): for unit embeddings e_i of pictures and activations a_i >= 0 of a
feature, the mean cosine of pairs, each weighted by the product of its activations, without ever forming a pair:

    sum over i != j of a_i a_j e_i . e_j      |sum_i a_i e_i|^2 - sum_i a_i^2
    ------------------------------------  =  -------------------------------
         sum over i != j of a_i a_j            (sum_i a_i)^2 - sum_i a_i^2

*Modality*: a data set has many more positions of one kind than of the other, so counts are turned into rates. With c_v
firings at V soft tokens and c_t firings at T text tokens, the index is the picture's share of the two rates,

    m = (c_v / V) / (c_v / V + c_t / T),        0: words alone, 1: soft tokens alone, 1/2: as often at either.

Given c = c_v + c_t, two Poisson counts leave c_v binomial with q = m V / (m V + (1 - m) T) (Przyborowski and Wilenski
1940), so an interval for q is one for m. Wilson's (1927) is taken, which stays inside [0, 1] and keeps its width at the
ends. Firings inside one input are correlated: the interval counts each input as one firing, which makes it too wide
rather than too narrow.

Legend: N tokens or pictures, d width, k slots for active features, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from vlmscope.metrics.rates import wilson_interval


def fvu(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Fraction of variance unexplained of [N, d] against [N, d], a scalar; nan when the target does not vary."""
    residual = (target - reconstruction).square().sum()
    return residual / (target - target.mean(0)).square().sum()


@dataclass
class FvuAccumulator:
    """FVU over a stream of batches, in float64, by Chan's parallel update of mean and deviations."""

    count: int = 0
    residual: float = 0.0
    deviations: float = 0.0
    mean: Tensor | None = field(default=None, repr=False)

    def update(self, target: Tensor, reconstruction: Tensor) -> None:
        """Add a batch: [N, d], [N, d]. An empty batch changes nothing."""
        n = target.shape[0]
        if n == 0:
            return
        y = target.double()
        mean = y.mean(0)
        self.residual += float((y - reconstruction.double()).square().sum())
        self.deviations += float((y - mean).square().sum())
        if self.mean is None:
            self.count, self.mean = n, mean
            return
        total = self.count + n
        shift = mean - self.mean
        self.deviations += float(shift.square().sum()) * self.count * n / total
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def compute(self) -> float:
        """The FVU so far; nan without tokens or when the target does not vary."""
        return self.residual / self.deviations if self.deviations > 0 else math.nan


class TokenFvuAccumulator:
    """FVU about each token's own mean over a stream of batches, in float64, by Chan's update for each token.

    Memory: d numbers for each token that was seen, on the CPU.
    """

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}  # token -> its row in the tables
        self.count, self.residual, self.deviations = (torch.zeros(0, dtype=torch.float64) for _ in range(3))
        self.mean: Tensor | None = None

    def update(self, tokens: Tensor, target: Tensor, reconstruction: Tensor) -> None:
        """Add a batch: the token at each position [N] int64, [N, d], [N, d]. An empty batch changes nothing."""
        if len(tokens) == 0:
            return
        seen, number, count = tokens.unique(return_inverse=True, return_counts=True)
        y = target.double()

        def by_token(values: Tensor) -> Tensor:
            return values.new_zeros(len(seen), *values.shape[1:]).index_add_(0, number, values)

        mean = by_token(y) / count[:, None]
        residual = by_token((y - reconstruction.double()).square().sum(1)).cpu()
        deviations = by_token((y - mean[number]).square().sum(1)).cpu()
        n, mean = count.double().cpu(), mean.cpu()
        rows = torch.tensor([self.rows.setdefault(token, len(self.rows)) for token in seen.tolist()])
        new = len(self.rows) - len(self.count)
        more = functional.pad
        self.count, self.residual, self.deviations = (
            more(table, (0, new)) for table in (self.count, self.residual, self.deviations)
        )
        self.mean = mean.new_zeros(new, mean.shape[1]) if self.mean is None else more(self.mean, (0, 0, 0, new))
        before, shift = self.count[rows], mean - self.mean[rows]
        total = before + n
        self.residual[rows] += residual
        self.deviations[rows] += deviations + shift.square().sum(1) * before * n / total
        self.mean[rows] += shift * (n / total)[:, None]
        self.count[rows] = total

    def compute(self, among: Callable[[int], bool] = lambda token: True) -> float:
        """The FVU over the tokens that `among` accepts; nan without one that varies."""
        chosen = torch.tensor([among(token) for token in self.rows], dtype=torch.bool) & (self.count > 1)
        deviations = float(self.deviations[chosen].sum())
        return float(self.residual[chosen].sum()) / deviations if deviations > 0 else math.nan


def firing_counts(indices: Tensor, values: Tensor, n_features: int) -> Tensor:
    """At how many tokens each feature is active: indices [.., k] int64, values [.., k] -> [F] int64."""
    return torch.bincount(indices[values > 0].flatten(), minlength=n_features)


def dead_fraction(counts: Tensor) -> float:
    """Share of features [F] that never fired."""
    return float((counts == 0).double().mean())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean -log p(label) in nats: logits [N, V], labels [N] int64 -> scalar, computed in float32 or better."""
    return functional.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels)


COSINE = 0.8  # from here on two directions count as one
_SAMPLE = 2048  # features of a layer that are compared with one other layer at a time


@torch.no_grad()
def nearest_cosines(
    directions: Mapping[int, Sequence[Tensor]],
    alive: Mapping[int, Tensor],
    own_layer: bool,
    device: torch.device | str = "cpu",
    sample: int | None = None,
    block: int = _SAMPLE,
) -> dict[int, Tensor]:
    """Layer -> [n] float32, the cosine of each of its n live features, or the first `sample` of them, and the nearest
    live partner, in its own layer alone or in all the others; -1 without one.

    `directions` has for each layer one or several [F, d]; with several (what a feature writes, what it reads) a pair is
    as parallel as the least of its cosines. `alive` is by layer [F] bool; `block` features of a layer are compared with
    one other layer at a time.
    """

    def units(layer: int, most: int | None = None) -> list[Tensor]:
        return [functional.normalize(r[alive[layer]][:most].to(device).float(), dim=1) for r in directions[layer]]

    mine = {layer: units(layer, sample) for layer in directions}
    nearest = {layer: tables[0].new_full((len(tables[0]),), -1.0) for layer, tables in mine.items()}
    for other in directions:
        theirs = units(other)
        for layer, best in nearest.items() if len(theirs[0]) else ():
            if (layer == other) != own_layer:
                continue
            for start in range(0, len(best), block):
                rows = slice(start, start + block)
                cosines = torch.stack([a[rows] @ b.T for a, b in zip(mine[layer], theirs, strict=True)]).amin(0)
                if own_layer:  # a feature is no partner of itself
                    cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -1.0
                best[rows] = torch.maximum(best[rows], cosines.amax(1))
    return {layer: best.cpu() for layer, best in nearest.items()}


def duplicated_fraction(
    directions: Mapping[int, Tensor], alive: Mapping[int, Tensor], device: torch.device | str = "cpu"
) -> dict[int, float]:
    """Layer -> share of its (first 2,048) live features with a live feature of at least `COSINE` in some other layer; a
    layer without a live one is left out. `directions`: layer -> [F, d].
    """
    tables = {layer: [rows] for layer, rows in directions.items()}
    nearest = nearest_cosines(tables, alive, False, device, _SAMPLE)
    return {layer: float((best >= COSINE).double().mean()) for layer, best in nearest.items() if len(best)}


def unit_embeddings(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings [N, d] without their mean, scaled to length 1, float64.

    The embeddings of one model lie in a narrow cone, which lifts every cosine; without their mean, pictures that have
    nothing in common score about 0. An embedding of length 0 stays 0.
    """
    rows = np.asarray(embeddings, np.float64)
    rows = rows - rows.mean(0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def monosemanticity(embeddings: np.ndarray, activations: np.ndarray | Any) -> np.ndarray:
    """[F] float64, at most 1: the score of every feature; nan where it fires on fewer than two pictures.

    `embeddings` [N, d], rows of length 1; `activations` [N, F] >= 0, an array or a SciPy sparse one.
    """
    weights: Any = sparse.csc_array(activations, dtype=np.float64)
    weights.eliminate_zeros()
    squares = weights.power(2).sum(0)
    total = np.square(np.asarray(weights.sum(0)))
    resultant = np.square(weights.T @ np.asarray(embeddings, np.float64)).sum(1)
    fires = np.diff(weights.indptr) >= 2
    # Two activations of which one is lost in rounding next to the other leave no weight on any pair.
    pairs = np.where(fires, total - squares, 0.0)
    score = np.divide(resultant - squares, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return np.minimum(score, 1.0)


CLASSES = ("image", "text", "both", "unsettled", "rare", "dead")
FEWEST = 5  # inputs below which a feature is rare
ALONE = 0.1  # a feature is of one modality when its index is surely within so much of that end


@dataclass(frozen=True)
class Modality:
    """Modality of F features.

    Attributes:
        index: [F] float64, m; nan for a feature that never fires.
        low, high: [F] float64, the 95 % interval of m; nan likewise.
        kind: [F], of `CLASSES`: `image` or `text` when the interval lies beyond the threshold, `both` when it lies
            between the two thresholds, else `unsettled`; `rare` below the least number of inputs, `dead` without one.
    """

    index: np.ndarray
    low: np.ndarray
    high: np.ndarray
    kind: np.ndarray


def modality(
    fired_image: np.ndarray, fired_text: np.ndarray, inputs_fired: np.ndarray, n_image: int, n_text: int
) -> Modality:
    """Modality index, interval and class of each feature, from the numbers [F] of soft tokens, of text tokens and of
    inputs at which it fires, and those of all soft tokens and all text tokens, at least one of each.
    """
    image, text = np.asarray(fired_image, np.float64), np.asarray(fired_text, np.float64)
    inputs = np.asarray(inputs_fired)
    fires = image + text > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = image / (image + text)
    share_low, share_high = wilson_interval(share, np.where(fires, inputs, 1))

    def index(part: np.ndarray) -> np.ndarray:
        rate = part / n_image
        return np.where(fires, rate / (rate + (1 - part) / n_text), np.nan)

    low, high = index(share_low), index(share_high)
    kind = np.full(len(image), "unsettled", dtype=f"<U{max(map(len, CLASSES))}")
    # Later kinds override earlier ones.
    kind[(low > ALONE) & (high < 1 - ALONE)] = "both"
    kind[low >= 1 - ALONE] = "image"
    kind[high <= ALONE] = "text"
    kind[inputs < FEWEST] = "rare"
    kind[~fires] = "dead"
    return Modality(index(share), low, high, kind)
