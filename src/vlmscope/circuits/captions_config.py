"""Settings of what is done with generated sentences: a plain record, free of torch, so that Hydra can register it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError


@dataclass
class CaptionsConfig:
    """Where a caption's words come from, and steering while a caption is generated (docs/circuits.md).

    Attributes:
        prompt: what is asked.
        kinds: kinds of scenes whose captions are traced.
        graphs: captions of each kind that are traced.
        conflicts: captions of each kind that are begun beside another scene's picture.
        swaps: name -> [change, original's word, counterfactual's word] of the pairs (see `pairs`) that are steered from
            one to the other.
        features: how many are chosen for each word that differs, those of most estimated effect.
        steps: inputs at which gradients are taken for the estimate.
        train: pairs on which features are chosen and levels taken.
        test: pairs whose captions are steered.
        validation: further pairs on which the strength is chosen, where it is left open.
        strength: levels in units of the mean change between the two sides; 1 is the counterfactual's own mean. None
            takes the least of `strengths` that makes most validation captions right.
        strengths: points of the curve.
        gate: act at each layer and position only as far as the original's features are active there, in full from this
            share of their level; null acts everywhere.
        others: pictures of each other kind of scene that are steered too, to see what else changes.
        max_new_tokens: after so many a caption is cut off.
        seed: of all scenes.
    """

    prompt: str = "describe this image in detail ."
    kinds: list[str] = field(default_factory=lambda: ["planets", "digits", "shapes", "hands"])
    graphs: int = 10
    conflicts: int = 60
    swaps: dict[str, list[str]] = field(default_factory=dict)
    features: int = 100
    steps: int = 5
    train: int = 40
    test: int = 40
    validation: int = 20
    strength: float | None = None
    strengths: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
    gate: float | None = 0.25
    others: int = 20
    max_new_tokens: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("graphs", "conflicts", "features", "steps", "train", "test", "validation", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"captions.{key}={getattr(self, key)}: it must be at least 1")
        if not self.strengths:
            raise UserError("captions.strengths is empty: give at least one, such as [1.0]")
        if self.gate is not None and self.gate <= 0:
            raise UserError(f"captions.gate={self.gate}: it must be above 0, or null for none")
        for name, swap in self.swaps.items():
            if len(swap) != 3:
                raise UserError(f"captions.swaps.{name}={list(swap)}: write [change, original, counterfactual]")
