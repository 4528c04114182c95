"""Names of metrics and curves, for the steps that are not trials yet."""

from vlmscope.core.intervention import Curve, Rate

make_curve = Curve.of


def rate_metrics(key: str, rate: Rate) -> dict[str, float]:
    """`Rate.metrics` of `key`."""
    return rate.metrics(key)
