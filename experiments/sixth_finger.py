"""Is a sixth finger seen in the vision tower and lost later? What one more finger adds to the count that can be read.

Counts are read at each stage by ridge regression on hands of one to five fingers (mean over patches or soft tokens, and
the last position), and what one more finger adds is measured on pairs that differ in that finger alone.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vlmscope.data.orrery.dataset import pictures, scene_pairs
from vlmscope.data.orrery.scenes import NUMBERS
from vlmscope.metrics.decoding import linear_prediction
from vlmscope.metrics.rates import bootstrap_mean, share_rate
from vlmscope.models.base import VisionStack

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

_CHUNK = 50  # pictures per forward


@dataclass
class Settings:
    """`hands` of each count to learn the readout on, and pairs on which it is `tested`."""

    hands: int
    tested: int


def logits_of(bench: Bench, images: list[np.ndarray], prompt: str) -> Tensor:
    """Logits [n, V] at the last position."""
    return torch.cat([bench.scope.forward(bench.scope.batch(bench.inputs(images[i : i + _CHUNK], prompt)))
                      for i in range(0, len(images), _CHUNK)]).double()  # fmt: skip


def analyse(bench: Bench) -> dict[str, float]:
    """Write fingers.parquet; metrics `tower/gap/<fingers>/<stage>`, `tower/more/...` and `tower/says/<fingers>`."""
    own, prompt = bench.analysis, "how many fingers are there ?"
    pairs = {low: scene_pairs("fingers", "test", own.tested, bench.cfg.seed, NUMBERS[low]) for low in (4, 5)}
    train = pictures(pair.original for low in range(1, 6)
                     for pair in scene_pairs("fingers", "train", own.hands, bench.cfg.seed, NUMBERS[low]))  # fmt: skip
    bench.recorded("train", "fingers train", train)
    seen, numbers = states(bench, train, prompt), np.repeat(np.arange(1.0, 6.0), own.hands)
    rows, metrics = [], {}
    for low, tested in pairs.items():
        sides = [pictures(getattr(pair, side) for pair in tested) for side in ("original", "counterfactual")]
        bench.recorded("test", f"fingers {low} test", sides[0] + sides[1])
        first, second = (states(bench, images, prompt) for images in sides)
        for stage, (name, values) in enumerate(seen.items()):
            one, other = (linear_prediction(values, numbers[:, None], part[name])[:, 0] for part in (first, second))
            gap, more = bootstrap_mean(other - one), share_rate(other > one)
            step = f"{NUMBERS[low]} to {NUMBERS[low + 1]}"
            metrics |= gap.metrics(f"tower/gap/{low + 1}/{name}") | more.metrics(f"tower/more/{low + 1}/{name}")
            row = {"stage": stage, "name": name, "step": step, "gap": gap.value, "low": gap.ci_low, "high": gap.ci_high}
            rows.append(row | {"more": more.value, "read": float(other.mean())})
        said = logits_of(bench, sides[1], prompt).argmax(-1)
        metrics |= share_rate((said == bench.token(NUMBERS[low + 1])).numpy()).metrics(f"tower/says/{low + 1}")
    bench.write_table("fingers", pd.DataFrame(rows))
    return metrics


@torch.no_grad()
def states(bench: Bench, images: list[np.ndarray], prompt: str) -> dict[str, np.ndarray]:
    """Streams at each stage [n, d]: the mean over patches or soft tokens, and the last position."""
    adapter, found = bench.scope.adapter, {}
    places = {f"tower_{n}": layer for n, layer in enumerate(VisionStack(adapter).layers)}
    places |= {f"decoder_{n}": adapter.decoder().layers[n] for n in range(adapter.n_layers)}
    for first in range(0, len(images), _CHUNK):
        inputs = bench.inputs(images[first : first + _CHUNK], prompt)
        with ExitStack() as opened:
            for name, module in places.items():

                def keep(_m: Any, _a: Any, output: Any, name: str = name, soft: Any = inputs[0].is_image) -> None:
                    x = output[0] if isinstance(output, tuple) else output
                    parts = {name: x} if name.startswith("tower") else {f"soft_{name}": x[:, soft]}
                    for place, part in parts.items():
                        found.setdefault(place, []).append(part.mean(1))
                    if name.startswith("decoder"):
                        found.setdefault(f"last_{name}", []).append(x[:, -1])

                opened.callback(module.register_forward_hook(keep).remove)
            adapter.next_logits({key: torch.cat([one.tensors[key] for one in inputs]) for key in inputs[0].tensors})
    order = sorted(found, key=lambda name: ("tower", "soft", "last").index(name.partition("_")[0]))
    return {name: torch.cat(found[name]).numpy() for name in order}
