"""A range for a number from repeated seeds, wide enough for another seed and too narrow for a broken build."""

import math
from collections.abc import Sequence

SHARE_FLOOR = 0.03  # of a share: what 100 cases without a single failure leave open at 95 % (the rule of three)
VALUE_FLOOR = 0.05  # of any other number, relative to its mean
RULE = (
    "lowest and highest value over the seeds, widened on both sides by the larger of the spread between the seeds and "
    "the half-width of the 95 % interval of any seed; of a number without an interval, by the spread or "
    f"{SHARE_FLOOR:g} of a share, {VALUE_FLOOR:.0%} of the mean of anything else; shares stay within 0 and 1; rounded "
    "outwards to two decimals (three digits)"
)


def half_width(value: float, low: float, high: float) -> float:
    """The longer side of an interval around a value."""
    return max(value - low, high - value, 0.0)


def suggested_range(values: Sequence[float], half_widths: Sequence[float], share: bool) -> tuple[float, float]:
    """The range by `RULE`.

    Args:
        values: one a seed.
        half_widths: of the intervals of those that have one.
        share: whether the number is a share of cases.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a range needs finite values: {list(values)}")
    low, high = min(values), max(values)
    floor = SHARE_FLOOR if share else VALUE_FLOOR * abs(sum(values) / len(values))
    margin = max([*(half_widths or [floor]), high - low])
    if share:
        return _outwards(max(low - margin, 0.0), -1, 2), _outwards(min(high + margin, 1.0), 1, 2)
    size = max(abs(low - margin), abs(high + margin))
    decimals = 2 - math.floor(math.log10(size)) if size else 2
    return _outwards(low - margin, -1, decimals), _outwards(high + margin, 1, decimals)


def _outwards(value: float, sign: int, decimals: int) -> float:
    """Rounded up for sign 1, down for -1; what float arithmetic alone moved past a decimal does not count."""
    scaled = round(value * 10.0**decimals, 6)
    return round((math.ceil(scaled) if sign > 0 else math.floor(scaled)) / 10.0**decimals, max(decimals, 0))
