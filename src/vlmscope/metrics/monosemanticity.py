"""How alike the pictures are on which a feature fires: the monosemanticity score (Pach et al., arXiv 2504.02821).

For unit embeddings e_i of the pictures and activations a_i >= 0 of the feature, the mean cosine of pairs, each weighted
by the product of its activations. The sum over pairs is a square, so no pair is ever formed:

    sum over i != j of a_i a_j e_i . e_j      |sum_i a_i e_i|^2 - sum_i a_i^2
    ------------------------------------  =  -------------------------------
         sum over i != j of a_i a_j            (sum_i a_i)^2 - sum_i a_i^2

Linear in the number of pictures. It has no unit and does not change when all activations are scaled, all embeddings
are rotated, pictures change places, or pictures on which the feature is silent are added.

Legend: N pictures, d width of an embedding, F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse


def unit_embeddings(embeddings: np.ndarray, centre: bool = True) -> np.ndarray:
    """Embeddings [N, d] scaled to length 1, float64; with `centre`, after their mean was taken away.

    The embeddings of one model lie in a narrow cone, which lifts every cosine; without their mean, pictures that have
    nothing in common score about 0. An embedding of length 0 stays 0.
    """
    rows = np.asarray(embeddings, np.float64)
    if centre:
        rows = rows - rows.mean(0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def monosemanticity(embeddings: np.ndarray, activations: np.ndarray | Any) -> np.ndarray:
    """The score of every feature.

    Args:
        embeddings: [N, d], rows of length 1.
        activations: [N, F] >= 0, an array or a SciPy sparse one.

    Returns:
        [F] float64, at most 1; nan for a feature that fires on fewer than two pictures, for which there is no pair.

    Raises:
        ValueError: another number of embeddings than of pictures, or a negative activation.
    """
    weights: Any = sparse.csc_array(activations, dtype=np.float64)
    if weights.shape[0] != len(embeddings):
        raise ValueError(f"{len(embeddings)} embeddings for {weights.shape[0]} pictures")
    if weights.nnz and weights.data.min() < 0:
        raise ValueError("activations must not be negative")
    weights.eliminate_zeros()
    squares = weights.power(2).sum(0)
    total = np.square(np.asarray(weights.sum(0)))
    resultant = np.square(weights.T @ np.asarray(embeddings, np.float64)).sum(1)
    fires = np.diff(weights.indptr) >= 2
    # Two activations of which one is lost in rounding beside the other leave no weight on any pair.
    pairs = np.where(fires, total - squares, 0.0)
    score = np.divide(resultant - squares, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
    return np.minimum(score, 1.0)
