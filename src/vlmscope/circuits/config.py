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
    """How a circuit of two concepts is chosen by contrast.

    Attributes:
        concepts: the recipient of interventions, then the donor; of more than two each is turned into each other, with
            a circuit for each pair.
        third: a concept that belongs to neither, to see what the donor's circuit does to it.
        questions: asked of every picture.
        pictures: training pictures a concept.
        graphs: attribution graphs a concept and question; a feature counts only if it has influence in one.
        per_layer: features a layer and concept.
        least: rightly answered test pictures of a recipient; fewer are no result.
        seed: of the pictures.
    """

    concepts: list[str]
    questions: dict[str, QuestionConfig]
    third: str | None = None
    pictures: int = 40
    graphs: int = 1
    per_layer: int = 16
    least: int = 1
    seed: int = 0

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
    """How features are chosen on counterfactual pairs, and which pairs count (docs/circuits.md).

    Attributes:
        circuit: folder of a saved circuit, instead of features chosen on training pairs.
        features: how many are chosen for each question, those of most estimated effect.
        steps: inputs at which gradients are taken for the estimate.
        answerable: only pairs count that are answered rightly on both sides; false takes all.
        least: fewer pairs than this give no interval, and an error.
        scenes: training and held-out scenes on which analyses look at what features say.
        transfer: pairs of each split that are grouped by another fact.
    """

    circuit: str | None = None
    features: int = 300
    steps: int = 5
    answerable: bool = True
    least: int = 10
    scenes: list[int] = field(default_factory=lambda: [1500, 700])
    transfer: int = 240

    def __post_init__(self) -> None:
        check_least("interchange", self, features=1, steps=1, least=2, transfer=1)
        if len(self.scenes) != 2 or min(self.scenes) < 1:
            raise UserError(f"interchange.scenes={list(self.scenes)}: give two counts, training and held-out scenes")


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
        check_choice("trials.do", self.do, OPERATIONS)
        check_choice("trials.measure", self.measure, MEASURES)
        if self.gate is not None and self.gate <= 0:
            raise UserError(f"trials: gate={self.gate}: it must be above 0, or null for none")


@dataclass
class SettingConfig:
    """Where and how trials act; lists are run in every combination.

    Attributes:
        of: which trials; all when empty.
        cases: which case set.
        mode: free, frozen_attention, direct, or generate (token by token).
        positions: all, prompt (no generated tokens), no_last, roles (image, question, last ...), or each role in turn.
        layers: all, no_last, a layer, a range such as 0-3 and 4-; each layer in turn, or the ranges 0-each or each-.
        strength: instead of the trial's own.
        limit: at most so many features a layer (exchange) or in all.
        matched: draws of matched features.
        random_direction: draws of random directions of the same norm.
        first: at most so many cases of each question; all when null.
        measures: what is counted instead of the trial's own measure. The first is the rate; the means of the others
            are metrics too.
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
