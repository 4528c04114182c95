"""Steer while a caption is generated, with a KV cache: do all the right words change together, and only they?

Features are chosen, and their levels taken, on training pairs of pictures that differ in one fact, whose captions the
model gives rightly on both sides. On test pairs the original's caption is generated with the features at the
counterfactual's mean level, or past it, at every prompt position and every word; how far is settled on validation
pairs. Right is the caption of the counterfactual picture.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vlmscope.circuits.caption_pairs import Levels, levels_of, prompt_only, word_features
from vlmscope.circuits.effects import in_scope
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Curve, Rate
from vlmscope.core.records import control_draws
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import Scene
from vlmscope.interventions.edits import Plan, at_positions
from vlmscope.interventions.named import by_layer, matched_features, mean_activations, random_directions
from vlmscope.interventions.run import editing
from vlmscope.metrics.causal import bootstrap_mean, bootstrap_rate
from vlmscope.tasks.steps.caption_swaps import Swap, generated, likelihoods, right_pairs, score
from vlmscope.tasks.steps.intervene import make_curve, rate_metrics

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

STEERED = "steered"
SCOPES = ("no_last_layer", "prompt_only", "role_image")


@dataclass
class SwapResult:
    """What came out: condition -> generated texts, and the measures of each.

    `measures[condition]` has `all_right` (the caption is the counterfactual's), `right_words` and `kept_words` (shares
    of a caption's words) and, where measured, `log_likelihood` in nats a token, given the counterfactual's picture.
    """

    swap: Swap
    n_features: int
    strength: float
    texts: dict[str, list[str]] = field(default_factory=dict)
    measures: dict[str, dict[str, Rate]] = field(default_factory=dict)
    curve: list[Curve] = field(default_factory=list)
    others: dict[str, Rate] = field(default_factory=dict)
    others_ungated: dict[str, Rate] = field(default_factory=dict)


def run(bench: Bench) -> None:
    """Leaves a `SwapResult` for each swap in `bench.records`; metrics under caption_steer/."""
    config = bench.cfg.captions
    if not config.swaps:
        raise UserError("captions.swaps is empty: name one, such as '+captions.swaps={x: [planet, mars, earth]}'")
    results = []
    for name, (change, original, counterfactual) in config.swaps.items():
        swap = (change, original, counterfactual)
        train, validation, test = (right_pairs(bench, name, swap, split) for split in ("train", "val", "test"))
        results.append(steer(bench, train, validation, test, original))
    for result in results:
        bench.metrics |= swap_metrics(result)
    rows = {result.swap.name: result.texts for result in results}
    write_json(bench.run_dir / "caption_steering.json", {"texts": rows})
    bench.records["caption_steering"] = results


def steer(bench: Bench, train: Swap, validation: Swap, test: Swap, original: str) -> SwapResult:
    """Choose features, take levels, settle the strength, and generate under every condition."""
    config, scope = bench.cfg.captions, bench.scope
    chosen = word_features(scope, train.pairs, config.features, config.steps)
    if not chosen:
        raise UserError(f"captions.swaps.{test.name}: no word differs in every training pair's captions")
    features = by_layer(scope.transcoders, [feature for some in chosen.values() for feature in some])
    levels = levels_of(scope, train.pairs, features)
    strength = settled(bench, validation, levels) if config.strength is None else config.strength
    plan = levels.plan(strength, config.gate)
    result = SwapResult(test, sum(len(found) for found in features.values()), strength)
    inputs = [pair.original for pair in test.pairs]
    for name, scoped in scoped_plans(plan, inputs[0].roles, scope.adapter.n_layers).items():
        record(bench, result, name, editing(scope, scoped), likely=name == STEERED)
    if config.gate is not None:
        record(bench, result, "without_gate", editing(scope, levels.plan(strength)), likely=True)
    add_controls(bench, result, train, plan)
    for condition, side in (("counterfactual's own", 1), ("original's", 0)):
        ids = [[*pair.ids[side]] for pair in test.pairs]
        result.measures[condition] = {"log_likelihood": bootstrap_mean(likelihoods(bench, test, ids))}
    rates = []
    for one in sorted(config.strengths):
        context = editing(scope, levels.plan(one, config.gate))
        rates.append(score(test, generated(bench, inputs, context)[1])["all_right"])
    result.curve = [make_curve(test.name.replace("_", " "), sorted(config.strengths), rates)]
    result.others = others_changed(bench, plan, original)
    if config.gate is not None:
        result.others_ungated = others_changed(bench, levels.plan(strength), original)
    return result


def settled(bench: Bench, validation: Swap, levels: Levels) -> float:
    """The least strength at which most validation captions are right."""
    config = bench.cfg.captions
    inputs = [pair.original for pair in validation.pairs]
    strengths = sorted(config.strengths)
    rates = []
    for strength in strengths:
        context = editing(bench.scope, levels.plan(strength, config.gate))
        rates.append(score(validation, generated(bench, inputs, context)[1])["all_right"].value)
    return strengths[int(np.argmax(rates))]


def scoped_plans(plan: Plan, roles: np.ndarray, n_layers: int) -> dict[str, Plan]:
    """The steering everywhere, without the last layer, in the prompt alone, and at the picture alone."""
    only = prompt_only(plan)
    picture = at_positions(only, torch.from_numpy(roles == "image"))
    without = in_scope(plan, "no_last_layer", roles, n_layers - 1)
    return {STEERED: plan, "no_last_layer": without, "prompt_only": only, "role_image": picture}


def add_controls(bench: Bench, result: SwapResult, train: Swap, plan: Plan) -> None:
    """As many features alike in layer and mean activation, at their own levels; and random directions of equal norm.

    Matched features are steered without a gate, which only makes the control stronger. Every draw counts as cases of
    its own, so intervals are over pairs and draws.
    """
    scope = bench.scope
    batches = [scope.batch([side(pair) for pair in train.pairs])
               for side in (lambda p: p.original, lambda p: p.counterfactual)]  # fmt: skip
    means = mean_activations(scope, batches, scope.transcoders.layers)
    contexts: dict[str, list[AbstractContextManager[None]]] = {"matched features": [], "random direction": []}
    for seed in control_draws(bench.cfg.seed, bench.intervention.controls):
        drawn = matched_features(plan, means, seed)
        others = {layer: edit.features for layer, edit in drawn.items()}
        own = levels_of(scope, train.pairs, others)
        control = own.plan(result.strength, None)
        contexts["matched features"].append(editing(scope, control))
        contexts["random direction"].append(random_directions(scope, plan, seed))
    for name, some in contexts.items():
        record(bench, result, name, *some, likely=True)


def record(bench: Bench, result: SwapResult, name: str, *contexts: AbstractContextManager[None], likely: bool) -> None:
    """Generate under contexts, one after another, and keep the texts of the first and the measures of all."""
    swap = result.swap
    inputs = [pair.original for pair in swap.pairs]
    ids, texts = [], []
    for context in contexts:
        found, said = generated(bench, inputs, context)
        ids, texts = [*ids, *found], [*texts, *said]
    result.texts[name] = texts[: len(inputs)]
    result.measures[name] = score(swap, texts)
    if likely:
        result.measures[name]["log_likelihood"] = bootstrap_mean(likelihoods(bench, swap, ids))


def others_changed(bench: Bench, plan: Plan, original: str) -> dict[str, Rate]:
    """Kind of scene -> the share of captions of pictures without the original's word that the steering changes."""
    config = bench.cfg.captions
    found: dict[str, Rate] = {}
    for kind in config.kinds if config.others else ():
        scenes = [make_scene("test", kind, index, config.seed) for index in range(4 * config.others)]
        some = [Image.fromarray(s.image) for s in scenes if s.image is not None and not names(s, original)]
        inputs = bench.inputs(some[: config.others], config.prompt)
        if not inputs:
            continue
        _, before = generated(bench, inputs)
        _, after = generated(bench, inputs, editing(bench.scope, plan))
        found[kind] = bootstrap_rate([a != b for a, b in zip(before, after, strict=True)])
    return found


def names(scene: Scene, word: str) -> bool:
    """Whether a scene's right caption has a word, or its plural."""
    caption = next((q.answer for q in scene.questions if q.group == "caption"), "")
    return any(said == word or said.startswith(word) for said in caption.split())


def swap_metrics(result: SwapResult) -> dict[str, float]:
    """`caption_steer/<swap>/<condition>/<measure>` with intervals; the matched features' rate is the control."""
    metrics = {f"caption_steer/{result.swap.name}/features": float(result.n_features)}
    metrics |= rate_metrics(f"caption_steer/{result.swap.name}/captions_right", result.swap.accuracy)
    for condition, measures in result.measures.items():
        for measure, rate in measures.items():
            key = condition.replace("'", "").replace(" ", "_")
            metrics |= rate_metrics(f"caption_steer/{result.swap.name}/{key}/{measure}", rate)
    metrics[f"caption_steer/{result.swap.name}/strength"] = result.strength
    for form, others in (("others", result.others), ("others_ungated", result.others_ungated)):
        for kind, rate in others.items():
            metrics |= rate_metrics(f"caption_steer/{result.swap.name}/{form}/{kind}/changed_rate", rate)
    return metrics
