"""Features of the vision tower carried from pictures of Mars to those of the same scenes with Earth, or ablated.

What they write is added to the MLP outputs of the tower, patch by patch, with nothing frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vlmscope.core.records import generator
from vlmscope.data.orrery.dataset import scene_pairs
from vlmscope.metrics.rates import share_rate
from vlmscope.models.base import VisionStack

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

_CHUNK = 50  # pictures per forward


@dataclass
class Settings:
    """Pairs to choose on and to test on; numbers of `features`, and draws of controls."""

    chosen_on: int
    tested: int
    features: list[int]
    draws: int


def logits_of(bench: Bench, images: list[np.ndarray], prompt: str) -> Tensor:
    """Logits [n, V] at the last position."""
    return torch.cat([bench.scope.forward(bench.scope.batch(bench.inputs(images[i : i + _CHUNK], prompt)))
                      for i in range(0, len(images), _CHUNK)]).double()  # fmt: skip


@contextmanager
def watching(stack: VisionStack, change: Callable[[int, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """`change(layer, x, y) -> y` of every MLP of the tower, [B, N, d] each."""
    with ExitStack() as opened:
        for layer in range(stack.n_layers):
            hook = lambda _m, args, y, layer=layer: change(layer, args[0], y)  # noqa: E731
            opened.callback(stack.mlp(layer).register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def codes(bench: Bench, images: list[np.ndarray], prompt: str) -> list[Tensor]:
    """Activations [n, N, F] of the tower's features per layer."""
    tower, found = bench.scope.tower, {}
    assert tower is not None

    def keep(layer: int, x: Tensor, y: Tensor) -> Tensor:
        code = tower[layer].encode(x)
        dense = x.new_zeros(*x.shape[:2], tower[layer].config.n_features)
        found.setdefault(layer, []).append(dense.scatter_(-1, code.indices, code.values))
        return y

    with watching(VisionStack(bench.scope.adapter), keep):
        logits_of(bench, images, prompt)
    return [torch.cat(parts) for parts in found.values()]


def analyse(bench: Bench) -> dict[str, float]:
    """Write carried.parquet; metrics `tower/<edit>/<features>`: answers that follow, or for ablation, that are left."""
    own, tower, prompt = bench.analysis, bench.scope.tower, "what planet is this ?"
    assert tower is not None
    rows, metrics, sides = [], {}, {}
    for split, count in (("train", own.chosen_on), ("test", own.tested)):
        pairs = scene_pairs("planet", split, count, bench.cfg.seed, "mars", "earth")
        scenes = [getattr(pair, side).image for side in ("original", "counterfactual") for pair in pairs]
        bench.recorded(split, f"planet {split}", scenes)
        sides[split] = scenes[:count], scenes[count:]
    before, after = (codes(bench, images, prompt) for images in sides["train"])
    norms = [tower[layer].W_dec.norm(dim=1) for layer in tower.layers]
    written = [(b - a).abs().sum(1).mean(0) * n for a, b, n in zip(before, after, norms, strict=True)]
    flat, width = torch.cat(written), len(written[0])
    before, after = (codes(bench, images, prompt) for images in sides["test"])
    tokens = {word: bench.token(word) for word in ("mars", "earth")}
    whole = [after[n] - before[n] for n in range(len(before))]
    for count in [*own.features, len(flat)]:
        chosen = torch.zeros_like(flat)
        chosen[flat.argsort(descending=True)[:count]] = 1
        masks = chosen.split(width)
        for kind in ("carried", "ablated", "all others carried"):
            source = [-a for a in before] if kind == "ablated" else whole
            keep = [1 - m for m in masks] if kind.startswith("all") else masks
            moves = [(s * m) @ tower[n].W_dec for n, (s, m) in enumerate(zip(source, keep, strict=True))]
            for draw in range(-1, own.draws if kind != "all others carried" else 0):
                control = "" if draw < 0 else "random direction"
                added = moves if draw < 0 else [_turned(move, bench.cfg.seed, n, draw) for n, move in enumerate(moves)]
                logits = edited(bench, sides["test"][0], prompt, added)
                answers = logits.argmax(-1)
                gap = (logits[:, tokens["earth"]] - logits[:, tokens["mars"]]).mean()
                rows.append({"features": count, "edit": kind, "control": control, "draw": draw, "gap": float(gap),
                             "mars": float((answers == tokens["mars"]).double().mean()),
                             "earth": float((answers == tokens["earth"]).double().mean())})  # fmt: skip
                if draw < 0:
                    hits = (answers == tokens["earth"]) if kind != "ablated" else answers != tokens["mars"]
                    metrics |= share_rate(hits.numpy()).metrics(f"tower/{kind.replace(' ', '_')}/{count}")
    bench.write_table("carried", pd.DataFrame(rows))
    return metrics


@torch.no_grad()
def edited(bench: Bench, images: list[np.ndarray], prompt: str, added: list[Tensor]) -> Tensor:
    """Logits [n, V] with something added to the MLP outputs [n, N, d] of each layer of the tower."""
    done = [0] * len(added)  # pictures that each layer has seen

    def change(layer: int, _x: Tensor, y: Tensor) -> Tensor:
        done[layer] += len(y)
        return y + added[layer][done[layer] - len(y) : done[layer]]

    with watching(VisionStack(bench.scope.adapter), change):
        return logits_of(bench, images, prompt)


def _turned(move: Tensor, seed: int, *keys: int) -> Tensor:
    """As long a change of every token in a random direction."""
    noise = torch.from_numpy(generator(seed, "turned", *keys).standard_normal(tuple(move.shape))).to(move)
    return noise / noise.norm(dim=-1, keepdim=True) * move.norm(dim=-1, keepdim=True)
