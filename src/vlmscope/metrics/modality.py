"""Whether a feature belongs to pictures, to words, or to both, from how often it fires at positions of either kind.

A data set has many more positions of one kind than of the other, so counts are turned into rates first. With c_v
firings at V soft tokens and c_t firings at T text tokens, the modality index is the picture's share of the two rates,

    m = (c_v / V) / (c_v / V + c_t / T),        0: words alone, 1: soft tokens alone, 1/2: as often at either.

Given c = c_v + c_t, two Poisson counts leave c_v binomial with q = m V / (m V + (1 - m) T) (Przyborowski and Wilenski
1940), so an interval for q is one for m. Wilson's (1927) is taken, which stays inside [0, 1] and keeps its width at the
ends. Firings inside one input hang together: the interval counts each input as one firing, however often the feature
fires there, which errs to the wide side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLASSES = ("image", "text", "both", "unsettled", "rare", "dead")
_Z = 1.959963984540054  # two-sided 95 %


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
    fired_image: np.ndarray,
    fired_text: np.ndarray,
    inputs_fired: np.ndarray,
    n_image: int,
    n_text: int,
    least: int = 5,
    alone: float = 0.1,
) -> Modality:
    """Modality index, interval and class of each feature.

    Args:
        fired_image: [F] soft tokens at which it fires.
        fired_text: [F] text tokens at which it fires.
        inputs_fired: [F] inputs in which it fires.
        n_image: soft tokens in all.
        n_text: text tokens in all.
        least: inputs below which a feature is `rare`.
        alone: a feature is of one modality when its index is surely within `alone` of that end.

    Raises:
        ValueError: the data have no positions of one kind, so that nothing can be compared; or `alone` is not a share
            below one half.
    """
    if n_image < 1 or n_text < 1:
        raise ValueError(f"{n_image} soft tokens and {n_text} text tokens: a comparison needs both")
    if not 0 < alone < 0.5:
        raise ValueError(f"alone={alone}: choose a share between 0 and 0.5")
    image, text = np.asarray(fired_image, np.float64), np.asarray(fired_text, np.float64)
    inputs = np.asarray(inputs_fired)
    fires = image + text > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = image / (image + text)
    share_low, share_high = wilson_interval(share, np.where(fires, inputs, 1))

    def index(of: np.ndarray) -> np.ndarray:
        rate = of / n_image
        return np.where(fires, rate / (rate + (1 - of) / n_text), np.nan)

    low, high = index(share_low), index(share_high)
    kind = np.full(len(image), "unsettled", dtype=f"<U{max(map(len, CLASSES))}")
    kind[(low > alone) & (high < 1 - alone)] = "both"
    kind[low >= 1 - alone] = "image"
    kind[high <= alone] = "text"
    kind[inputs < least] = "rare"
    kind[~fires] = "dead"
    return Modality(index(share), low, high, kind)


def wilson_interval(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a binomial share [..] seen in n [..] >= 1 cases: low [..] and high [..]."""
    n = np.asarray(n, np.float64)
    middle = share + _Z**2 / (2 * n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return np.clip((middle - half) / scale, 0, 1), np.clip((middle + half) / scale, 0, 1)
