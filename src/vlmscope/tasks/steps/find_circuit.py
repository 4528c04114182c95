"""`circuits.contrast` with the holder that the other steps pass around."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vlmscope.attribution.trace import Trace
from vlmscope.circuits import contrast
from vlmscope.core.records import FeatureId
from vlmscope.features.readouts import RoleMeans

if TYPE_CHECKING:
    from PIL import Image

    from vlmscope.tasks.steps.bench import Bench


def concept_means(
    bench: Bench, train: Mapping[str, Sequence[Image.Image]], prompts: Mapping[str, str]
) -> dict[str, dict[str, RoleMeans]]:
    """`contrast.concept_means`."""
    return contrast.concept_means(bench.scope, train, prompts)


def concept_influence(
    bench: Bench, train: Mapping[str, Sequence[Image.Image]], prompts: Mapping[str, str], graphs: int
) -> tuple[dict[str, dict[FeatureId, float]], list[Trace], list[float]]:
    """`contrast.concept_influence`."""
    return contrast.concept_influence(bench.scope, train, prompts, graphs, bench.cfg.attribution)
