"""Settings of circuits, of trials on them and of their report (docs/experiments.md): records, free of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from vlmscope.core.errors import UserError, check_choice, check_least

OPERATIONS = ("exchange", "carry", "toward", "shift", "ablate", "level")
TRIAL_MODES = ("free", "frozen_attention", "direct", "generate")
MEASURES = ("hit", "changed", "recovered", "drop", "kl")
AXES = ("mode", "positions", "layers", "strength", "limit")  # of a setting; lists of them are combined


@dataclass
class QuestionConfig:
    """A question and, for each concept, the word that answers it."""

    prompt: str
    answers: dict[str, str]


@dataclass
class CircuitConfig:
    """How a circuit of two concepts is chosen by contrast; of more, each is turned into each."""

    concepts: list[str]  # the recipient of interventions, then the donor
    questions: dict[str, QuestionConfig]  # asked of every picture
    third: str | None = None  # belongs to neither: what does the donor's circuit do to it?
    pictures: int = 40  # training pictures a concept
    graphs: int = 1  # a concept and question; a feature counts only if it has influence in one
    per_layer: int = 16  # features a layer and concept
    least: int = 1  # rightly answered test pictures of a recipient; fewer are no result
    seed: int = 0  # of the pictures

    def __post_init__(self) -> None:
        if len(self.concepts) < 2 or len(set(self.concepts)) < len(self.concepts):
            raise UserError(f"circuit.concepts={list(self.concepts)}: a contrast needs two different concepts")
        for name, question in self.questions.items():
            missing = [c for c in self.concepts if c not in question.answers]
            if missing:
                raise UserError(f"circuit.questions.{name}.answers lacks {', '.join(missing)}")
            first, second = (question.answers[concept] for concept in self.concepts[:2])
            if first == second and len(self.concepts) == 2:
                raise UserError(
                    f"{' and '.join(self.concepts)} are both {first!r} to circuit.questions.{name}: no answer could "
                    f"flip; leave the question out with '~circuit.questions.{name}'"
                )
        if self.third in self.concepts:
            raise UserError(f"circuit.third={self.third} is one of circuit.concepts; choose another, or null")
        check_least("circuit", self, pictures=1, graphs=1, per_layer=1, least=1)


@dataclass
class InterventionConfig:
    """Test cases: `pictures` of a concept, and `unrelated` scenes of each other kind (0 leaves these out)."""

    pictures: int = 100
    unrelated: int = 25

    def __post_init__(self) -> None:
        check_least("intervention", self, pictures=1, unrelated=0)


@dataclass
class InterchangeConfig:
    """How features are chosen on counterfactual pairs, and which pairs count (docs/circuits.md)."""

    circuit: str | None = None  # folder of a saved circuit, instead of features chosen on training pairs
    features: int = 300  # chosen for each question, those of most estimated effect
    steps: int = 5  # inputs at which gradients are taken for the estimate
    answerable: bool = True  # only pairs count that are answered rightly on both sides
    least: int = 10  # fewer pairs give no interval, and an error
    scenes: list[int] = field(default_factory=lambda: [1500, 700])  # training, held-out: what do features say of them?
    transfer: int = 240  # pairs of each split that are grouped by another fact

    def __post_init__(self) -> None:
        check_least("interchange", self, features=1, steps=1, least=2, transfer=1)
        if len(self.scenes) != 2 or min(self.scenes) < 1:
            raise UserError(f"interchange.scenes={list(self.scenes)}: give two counts, training and held-out scenes")


@dataclass
class TrialConfig:
    """What is done to features.

    `do`: exchange one supernode for another, carry the donor's activations, move toward them, shift by the mean change
    of training pairs, ablate, or set to the mean level of training pairs, place by place.
    """

    do: str
    features: str | None = None  # a question or supernode, "all", "each" in turn, or "own": the question's; null too
    strength: float | None = 1.0  # of what is raised or carried, in its own level; null takes what was settled
    settle: list[float] = field(default_factory=list)  # of these, the least with most hits on "validation" cases
    gate: float | None = None  # act in full from this share of the suppressed level; null acts everywhere
    pooled: bool = False  # of carry: soft tokens get the donor's mean
    last: bool = False  # of carry: last position to last position alone; the two may differ in length
    measure: str = "hit"  # what its rate counts

    def __post_init__(self) -> None:
        check_choice("trials.do", self.do, OPERATIONS)
        check_choice("trials.measure", self.measure, MEASURES)
        if self.gate is not None and self.gate <= 0:
            raise UserError(f"trials: gate={self.gate}: it must be above 0, or null for none")


@dataclass
class SettingConfig:
    """Where and how trials act; lists are run in every combination (docs/experiments.md)."""

    of: list[str] = field(default_factory=list)  # trials; all when empty
    cases: str = "test"  # the case set
    mode: list[str] = field(default_factory=lambda: ["free"])
    positions: list[str] = field(default_factory=lambda: ["all"])  # or prompt, no_last, a role, each
    layers: list[str] = field(default_factory=lambda: ["all"])  # or no_last, 3, 0-3, 4-, each, 0-each, each-
    strength: list[float] = field(default_factory=list)  # instead of the trial's own
    limit: list[int] = field(default_factory=list)  # features a layer (exchange) or in all
    matched: int = 1  # draws of matched features
    random_direction: int = 0  # draws of random directions of the same norm
    first: int | None = None  # cases of each question; all when null
    measures: list[str] = field(default_factory=list)  # instead of the trial's; the first is the rate
    new_tokens: int = 6  # length of generated answers, at most

    def __post_init__(self) -> None:
        for mode in self.mode:
            check_choice("settings.mode", mode, TRIAL_MODES)
        for measure in self.measures:
            check_choice("settings.measures", measure, MEASURES)
        for layers in self.layers:
            if layers not in ("all", "no_last") and not re.fullmatch(r"\d+(-\d*|-each)?|each-?", layers):
                raise UserError(
                    f"settings: layers={layers}: write all, no_last, each, a layer or a range such as 0-3, 4- or 0-each"
                )
        check_least("settings", self, matched=0, random_direction=0)

    def combinations(self, strength: float | None) -> list[dict[str, Any]]:
        """Every combination of `AXES`, for a trial of this strength."""
        values = (self.mode, self.positions, self.layers, self.strength or [strength], self.limit or [None])
        return [dict(zip(AXES, combination, strict=True)) for combination in product(*values)]


@dataclass
class MarkConfig:
    """One part of a report, drawn from the run folder's tables (docs/experiments.md)."""

    mark: str  # cards, bars, table, curve, matrix, heatmap, examples, features, picture, groups or text
    title: str = ""
    trials: list[str] = field(default_factory=list)  # trials and settings, as "steer/main"; all when empty
    x: str | None = None  # columns of the table: x, by
    by: str | None = None
    y: str | None = None  # the measure; that of each trial where it is null
    says: str = ""  # words under the title; of "text" the paragraphs
    top: int = 8  # features or examples
    file: str | None = None  # a Parquet file (table), or a pattern of names in figures/ (picture)
