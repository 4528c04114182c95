"""Pairs of right captions, to steer from one to the other: is a caption changed as one, in every word that depends?

Features are chosen for each word that differs in training pairs; what is captioned are test pairs, and other pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.analyses.bench import Bench
from vlmscope.analyses.measures import captions_of
from vlmscope.circuits.cases import TextPair, bystanders, text_cases, text_pairs
from vlmscope.circuits.config import SIDES
from vlmscope.circuits.experiment import Declared, text_level
from vlmscope.core.errors import UserError
from vlmscope.data.images import png_bytes
from vlmscope.data.orrery.dataset import pictures, scene_pairs
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.interventions.run import log_likelihoods
from vlmscope.metrics.rates import bootstrap_mean, rates, share_rate


@dataclass
class Settings:
    """A swap is [change, original's word, counterfactual's]; word_features count for a word, others for a kind."""

    prompt: str
    kinds: list[str]
    swaps: dict[str, list[str]]
    pairs: dict[str, int]
    others: int
    word_features: int
    steps: int
    new_tokens: int


def check(cfg: Any) -> None:
    """Refuse swaps that no pair has, before the model is loaded."""
    for name, swap in cfg.analysis["swaps"].items():
        if len(swap) != 3:
            raise UserError(f"analysis.swaps.{name}={list(swap)}: write [change, original, counterfactual]")
        scene_pairs(swap[0], "train", 1, cfg.seed, *swap[1:])


def pairs_of(bench: Bench, swap: str, split: str) -> list[TextPair]:
    """Pairs that are captioned rightly on both sides; base/<swap>/accuracy is the share of those asked for last."""
    (change, *words), count = bench.analysis.swaps[swap], bench.analysis.pairs[split]
    scenes = scene_pairs(change, split, count, bench.cfg.seed, *words)
    shown = [pictures([getattr(pair, side) for pair in scenes]) for side in SIDES]
    sides = [bench.inputs(bench.recorded(split, f"{swap} {split} {side}", images), bench.analysis.prompt)
             for side, images in zip(SIDES, shown, strict=True)]  # fmt: skip
    right = list(zip(*(pair.captions for pair in scenes), strict=True))
    pairs = text_pairs(bench.scope, sides, right, bench.analysis.new_tokens, [png_bytes(image) for image in shown[0]])
    if len(pairs) < 2:
        raise UserError(f"analysis.swaps.{swap}: {len(pairs)} of {count} pairs are captioned rightly on both sides")
    bench.metrics |= share_rate(np.arange(count) < len(pairs)).metrics(f"base/{swap}/accuracy")
    return pairs


def declare(bench: Bench) -> Declared:
    """Swaps as questions: validation and test pairs, and pictures whose caption does not have the original's word."""
    settings, scope = bench.analysis, bench.scope
    cases: dict[str, list] = {"validation": [], "test": [], "others": []}
    levels = {}
    for swap, (_, word, _) in settings.swaps.items():
        level = levels[swap] = text_level(scope, pairs_of(bench, swap, "train"), settings.word_features, settings.steps)
        bench.metrics[f"base/{swap}/features"] = float(sum(map(len, level.features.values())))
        cases["validation"].append(text_cases(scope, "val", swap, pairs_of(bench, swap, "val")))
        pairs = pairs_of(bench, swap, "test")
        cases["test"].append(text_cases(scope, "test", swap, pairs, settings.prompt))
        for side, name in enumerate(SIDES):
            unedited = log_likelihoods(scope, [pair.sides[1] for pair in pairs], [pair.ids[side] for pair in pairs])
            bench.metrics |= bootstrap_mean(unedited).metrics(f"log_likelihood/{swap}/{name}")
        for kind in settings.kinds:
            scenes = [make_scene("test", kind, i, bench.cfg.seed) for i in range(4 * settings.others)]
            fit = [s for s in scenes if not any(w.startswith(word) for w in s.answer("caption").split())]
            if others := captions_of(bench, settings.prompt, fit[: settings.others], settings.new_tokens):
                unrelated = bystanders(scope, kind, swap, [c.inputs for c in others], [c.scene.key for c in others])
                cases["others"].append(replace(unrelated, texts=tuple(caption.text for caption in others)))
    return Declared(cases, lambda t, c, _: replace(levels[c.question], gate=t.gate))


def analyse(bench: Bench) -> dict[str, float]:
    """log_likelihood/<swap>/<condition>: of the steered captions and of those under the controls."""
    steered: Any = pd.read_parquet(bench.run_dir / "trials.parquet").query("setting == 'main'")
    metrics: dict[str, float] = {}
    for swap, row in rates(steered, ["question"], "log_likelihood").iterrows():
        conditions = row.rename({"value": "steered"}).reindex(["steered", "matched", "random_direction"]).dropna()
        metrics |= {f"log_likelihood/{swap}/{name}": float(value) for name, value in conditions.items()}
    return metrics
