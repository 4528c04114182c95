"""How an experiment declares its trials (docs/experiments.md): plain records, free of torch, for Hydra."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from vlmscope.core.errors import UserError

OPERATIONS = ("exchange", "carry", "toward", "shift", "ablate", "level")
MODES = ("free", "frozen_attention", "direct", "generate")
MEASURES = ("hit", "changed", "recovered", "drop", "kl")


def check_measure(where: str, measure: str) -> None:
    """Raise a UserError when trials have no such column."""
    if measure not in MEASURES:
        raise UserError(f"{where}={measure}: no such measure; choose from {', '.join(MEASURES)}")


def measures_of(trial: Mapping[str, Any], setting: Mapping[str, Any]) -> list[str]:
    """What is counted of a trial in a setting, both as mappings; the first is the rate."""
    return list(setting["measures"]) or [trial["measure"]]


@dataclass
class TrialConfig:
    """What is done to features.

    Attributes:
        do: exchange one supernode for another, carry the donor's activations, move toward them, shift by the mean
            change of training pairs, ablate, or set to the mean level of training pairs, place by place.
        features: a set by name (a question, a supernode), "all", "each" set in turn (trials `<trial>/<set>`), or "own":
            those of each question, or the whole circuit that was given; null is the same.
        strength: level of what is raised or carried, in units of its own; a setting may give others. null takes, for
            each question, what a trial with `settle` settled.
        settle: strengths of which the least with most hits on the case set "validation" is taken.
        gate: of exchange and level: act in full from this share of the suppressed level; null acts everywhere.
        pooled: of carry: soft tokens get the donor's mean.
        last: of carry: only from the donor's last position to the last position; the two may differ in length.
        measure: what its rate counts: "hit" (the answer is the target), "changed", or the mean of "recovered", "drop"
            or "kl" (docs/experiments.md).
    """

    do: str
    features: str | None = None
    strength: float | None = 1.0
    settle: list[float] = field(default_factory=list)
    gate: float | None = None
    pooled: bool = False
    last: bool = False
    measure: str = "hit"

    def __post_init__(self) -> None:
        if self.do not in OPERATIONS:
            raise UserError(f"trials: do={self.do}: no such operation; choose from {', '.join(OPERATIONS)}")
        if self.gate is not None and self.gate <= 0:
            raise UserError(f"trials: gate={self.gate}: it must be above 0, or null for none")
        check_measure("trials: measure", self.measure)


@dataclass
class SettingConfig:
    """Where and how trials act; lists are gone through in every combination.

    Attributes:
        of: which trials; all when empty.
        cases: which case set.
        mode: free, frozen_attention, direct, or generate (token by token).
        positions: all, prompt (no generated tokens), no_last, roles (image, question, last ...), or each role by
            itself.
        layers: all, no_last, a layer, a range such as 0-3 and 4-; each layer by itself, or the ranges 0-each or each-.
        strength: instead of the trial's own.
        limit: at most so many features a layer (exchange) or in all.
        matched: draws of matched features.
        random_direction: draws of random directions of the same norm.
        first: at most so many cases of each question; all when null.
        measures: what is counted instead of the trial's own measure: hit, changed, recovered, drop or kl. The first is
            the rate; the means of the others are metrics too.
        new_tokens: length of generated answers, at most.
    """

    of: list[str] = field(default_factory=list)
    cases: str = "test"
    mode: list[str] = field(default_factory=lambda: ["free"])
    positions: list[str] = field(default_factory=lambda: ["all"])
    layers: list[str] = field(default_factory=lambda: ["all"])
    strength: list[float] = field(default_factory=list)
    limit: list[int] = field(default_factory=list)
    matched: int = 1
    random_direction: int = 0
    first: int | None = None
    measures: list[str] = field(default_factory=list)
    new_tokens: int = 6

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.mode if mode not in MODES]
        if unknown:
            raise UserError(f"settings: mode={unknown[0]}: no such mode; choose from {', '.join(MODES)}")
        for measure in self.measures:
            check_measure("settings: measures", measure)
        for layers in self.layers:
            if layers not in ("all", "no_last") and not re.fullmatch(r"\d+(-\d*|-each)?|each-?", layers):
                raise UserError(
                    f"settings: layers={layers}: write all, no_last, each, a layer or a range such as 0-3, 4- or 0-each"
                )
        for key in ("matched", "random_direction"):
            if getattr(self, key) < 0:
                raise UserError(f"settings: {key}={getattr(self, key)}: it counts draws; choose 0 or more")

    def combinations(self, strength: float | None) -> list[dict[str, Any]]:
        """Every combination of mode, positions, layers, strength and limit, for a trial of this strength."""
        axes = (self.mode, self.positions, self.layers, self.strength or [strength], self.limit or [None])
        return [
            dict(zip(("mode", "positions", "layers", "strength", "limit"), one, strict=True)) for one in product(*axes)
        ]


@dataclass
class MarkConfig:
    """One part of a report, drawn from the run folder's tables (docs/experiments.md).

    Attributes:
        mark: cards, bars, table, curve, matrix, heatmap, examples, features, picture, groups or text.
        title: over it.
        trials: which trials and settings, as "steer/main"; all when empty.
        x, by: columns of the table.
        y: the measure; that of each trial where it is null.
        says: words under the title; of "text" the paragraphs.
        top: how many features or examples.
        file: of "table", a Parquet file of the run folder that is shown as it is; of "picture", a pattern of names in
            figures/, such as faithfulness_*.
    """

    mark: str
    title: str = ""
    trials: list[str] = field(default_factory=list)
    x: str | None = None
    by: str | None = None
    y: str | None = None
    says: str = ""
    top: int = 8
    file: str | None = None
