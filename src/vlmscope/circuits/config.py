"""Settings of circuits (of concepts, declared, discovered), of trials and of their report; free of torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from vlmscope.core.errors import UserError, check_choice, check_least
from vlmscope.core.records import ANSWER, ROLES, FeatureId, PatchBox, Positions
from vlmscope.core.results import MODES
from vlmscope.data.orrery.scenes import with_facts

OPERATIONS = ("exchange", "carry", "toward", "shift", "ablate", "level")
TRIAL_MODES = ("free", "frozen_attention", "direct", "generate")
MEASURES = ("hit", "changed", "recovered", "drop", "kl")
_ANY = ("exchange", "carry", "toward", "shift", "ablate")
BASELINES = {  # name -> the operations that it is defined of (`circuits.baselines`)
    "without_writers": _ANY,
    "only_writers": _ANY,
    "other_writers": _ANY,
    "complement": ("carry", "toward", "ablate"),
    "unconfirmed": _ANY,
    "difference_of_means": ("exchange", "carry", "toward", "shift"),
    "before_readable": _ANY,
}
OUTSIDE = ("other_writers", "complement", "unconfirmed")  # baselines that need features that the trial does not edit
AXES = ("mode", "positions", "layers", "strength", "limit")  # of a setting; lists of them are combined


@dataclass
class QuestionConfig:
    """A question and, for each concept, the word that answers it; `answers_from` takes a fact of Orrery's planets."""

    prompt: str
    answers: dict[str, str] = field(default_factory=dict)
    answers_from: str | None = None

    def __post_init__(self) -> None:
        self.answers = with_facts(self.answers, "answers_from", self.answers_from)

    def of(self, concepts: Sequence[str]) -> dict[str, str]:
        """The answers of those of the concepts that it is asked of."""
        return {concept: self.answers[concept] for concept in concepts if concept in self.answers}


@dataclass
class CircuitConfig:
    """How a circuit of two concepts is chosen by contrast; of more, each is turned into each.

    Of more than two, a question may have answers of some alone, of which it is asked.
    """

    concepts: list[str]  # the recipient of interventions, then the donor
    questions: dict[str, QuestionConfig]  # asked of every picture
    third: str | None = None  # belongs to neither: what does the donor's circuit do to it?
    pictures: int = 40  # training pictures per concept
    graphs: int = 1  # per concept and question; a feature counts only if it has influence in one
    # features per layer, concept and question at each position role; nothing is edited at the roles that have none
    per_layer: dict[str, int] = field(default_factory=lambda: {"image": 64, "last": 16})
    least: int = 1  # rightly answered test pictures of a recipient; fewer are an error
    seed: int = 0  # of the pictures

    def __post_init__(self) -> None:
        if len(self.concepts) < 2 or len(set(self.concepts)) < len(self.concepts):
            raise UserError(f"circuit.concepts={list(self.concepts)}: a contrast needs two different concepts")
        for name, question in self.questions.items():
            missing = [c for c in self.concepts if c not in question.answers]
            if len(self.concepts) - len(missing) < 2:
                where = f"circuit.questions.{name}.answers"
                raise UserError(f"{where} lacks {', '.join(missing)}; add it there, or choose other circuit.concepts")
            first, second, *_ = question.of(self.concepts).values()
            if first == second and len(self.concepts) == 2:
                raise UserError(
                    f"{' and '.join(self.concepts)} are both {first!r} to circuit.questions.{name}: no answer could "
                    f"flip; leave the question out with '~circuit.questions.{name}'"
                )
        unasked = [c for c in self.concepts if not any(c in question.answers for question in self.questions.values())]
        if unasked and self.questions:
            raise UserError(
                f"circuit.concepts: no question has an answer of {', '.join(unasked)}; add one, or leave it out"
            )
        if self.third in self.concepts:
            raise UserError(f"circuit.third={self.third} is one of circuit.concepts; choose another, or null")
        for role in self.per_layer:
            check_choice("circuit.per_layer", role, ROLES)
        if min(self.per_layer.values(), default=0) < 0 or not any(self.per_layer.values()):
            raise UserError(
                f"circuit.per_layer={dict(self.per_layer)}: give a role with features, such as {{last: 24}}"
            )
        check_least("circuit", self, pictures=1, graphs=1, least=1)


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
    # of exchange: act in full where the suppressed concept is so much more active than the raised one, in shares of
    # their levels; of level: from this share of the suppressed level; null acts everywhere
    gate: float | None = None
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
    limit: list[int] = field(default_factory=list)  # features per layer (exchange) or in all
    matched: int = 1  # draws of matched features
    random_direction: int = 0  # draws of random directions of the same norm
    draws_on: int | None = None  # cases of each question that the draws run on, the first; all when null
    baselines: list[str] = field(default_factory=list)  # variants of the trials, run once each (`BASELINES`)
    baselines_on: int | None = None  # and that they run on
    first: int | None = None  # cases of each question; all when null
    measures: list[str] = field(default_factory=list)  # instead of the trial's; the first is the rate
    new_tokens: int = 6  # length of generated answers, at most

    def __post_init__(self) -> None:
        for mode in self.mode:
            check_choice("settings.mode", mode, TRIAL_MODES)
        for measure in self.measures:
            check_choice("settings.measures", measure, MEASURES)
        for baseline in self.baselines:
            check_choice("settings.baselines", baseline, tuple(BASELINES))
        for layers in self.layers:
            if layers not in ("all", "no_last") and not re.fullmatch(r"\d+(-\d*|-each)?|each-?", layers):
                raise UserError(
                    f"settings: layers={layers}: write all, no_last, each, a layer or a range such as 0-3, 4- or 0-each"
                )
        check_least("settings", self, matched=0, random_direction=0, draws_on=1, baselines_on=1)

    def combinations(self, strength: float | None) -> list[dict[str, Any]]:
        """Every combination of `AXES`, for a trial of this strength."""
        values = (self.mode, self.positions, self.layers, self.strength or [strength], self.limit or [None])
        return [dict(zip(AXES, combination, strict=True)) for combination in product(*values)]


def baselines_of(trial: TrialConfig, setting: SettingConfig) -> list[str]:
    """Those of a setting's baselines that are defined of a trial."""
    every = trial.features == "all"
    return [name for name in setting.baselines if trial.do in BASELINES[name] and not (every and name in OUTSIDE)]


def check_baselines(trials: Mapping[str, TrialConfig], settings: Mapping[str, SettingConfig]) -> None:
    """Refuse a baseline that is defined of none of its setting's trials."""
    for key, setting in settings.items():
        mine = [trials[name] for name in setting.of or trials if name in trials]
        for baseline in setting.baselines:
            if not any(baseline in baselines_of(trial, setting) for trial in mine):
                raise UserError(
                    f"settings.{key}.baselines: {baseline} is defined of none of the setting's trials; it needs do: "
                    f"{' or '.join(BASELINES[baseline])}{', of chosen features' * (baseline in OUTSIDE)}"
                )


@dataclass
class MarkConfig:
    """One part of a report, drawn from the run folder's tables (docs/experiments.md)."""

    # cards, claims, bars, table, curve, matrix, heatmap, examples, features, picture, groups, anatomy or text
    mark: str
    title: str = ""
    trials: list[str] = field(default_factory=list)  # trials and settings, as "steer/main"; all when empty
    x: str | None = None  # columns of the table: x, by
    by: str | None = None
    y: str | None = None  # the measure; that of each trial where it is null
    says: str = ""  # words under the title; of "text" the paragraphs
    top: int = 8  # features or examples
    file: str | None = None  # a Parquet file (table, curve, groups), or a pattern of names in figures/ (picture)


SELECTORS = ("ids", "label", "contrast", "influence")
AUTO = "auto"  # a supernode that is to be named after its features
SOFT, TEXT, OTHER, ERRORS, BIASES = "soft tokens", "question", "other features", "errors", "biases"
PATCHES, BELOW = "patches", "tower features"  # of graphs that begin at the patches
# What edges of a circuit may come from besides supernodes.
SURROUNDINGS = (SOFT, PATCHES, TEXT, BELOW, OTHER, ERRORS, BIASES)
ANSWER_PREFIX = "answer: "
SIDES = ("original", "counterfactual")
RUNS = ("free", "frozen_attention")
METHODS = ("graph", "eap_ig", "greedy", "activation", "random")
_NAME = re.compile(r"[\w-][\w. -]{0,59}")
_FOLDER = re.compile(r"[\w-][\w.-]{0,59}", re.ASCII)


def _refuse(mistaken: bool, message: str) -> None:
    if mistaken:
        raise UserError(message)


@dataclass
class InputSetConfig:
    """Prompts with pictures: every prompt is asked of every picture."""

    concept: str | None = None  # pictures of a planet of Orrery's
    images: list[str] = field(default_factory=list)  # the user's own files instead
    prompts: list[str] = field(default_factory=list)  # when empty, the run's `prompt=` or the spec's `inputs.prompts`
    pictures: int = 20  # of the concept

    def check(self, where: str) -> None:
        """Refuse a set with two kinds of pictures, or with no inputs."""
        _refuse(self.concept is not None and bool(self.images), f"{where}: give a concept or images, not both")
        nothing = self.concept is None and not self.images and not self.prompts
        _refuse(nothing, f"{where}: it names no inputs; give a concept, images, or prompts for text alone")
        check_least(where, self, pictures=1)

    def __str__(self) -> str:
        what = self.concept or (f"{len(self.images)} images" if self.images else "text")
        return f"{what}: {'; '.join(self.prompts)}" if self.prompts else what


@dataclass
class ContrastConfig:
    """Features that are more active on one set of inputs than on another."""

    of: InputSetConfig | None = None
    against: InputSetConfig | None = None
    pairs: str | None = None  # instead of both, the side of `pairs=` where they are active: original or counterfactual
    confirmed: bool = False  # keep only features with influence on the answer in a graph of the run's own inputs

    def check(self, where: str) -> None:
        """Refuse a contrast without two different sets of inputs."""
        if self.pairs is not None:
            more = self.of is not None or self.against is not None
            _refuse(more, f"{where}: pairs brings both sets of inputs; leave out of and against")
            check_choice(f"{where}.pairs", self.pairs, SIDES)
            return
        if self.of is None or self.against is None:
            raise UserError(f"{where}: a contrast needs two sets of inputs; give of and against, or pairs")
        self.of.check(f"{where}.of")
        self.against.check(f"{where}.against")
        same = self.of == self.against
        _refuse(same, f"{where}: of and against are the same inputs, so nothing differs; change one")

    def __str__(self) -> str:
        if self.pairs is None:
            return f"contrast of {self.of} with {self.against}"
        (other,) = {*SIDES} - {self.pairs}
        return f"contrast of the pairs' {self.pairs}s with their {other}s"


@dataclass
class LabelConfig:
    """Features of a study whose label has all words of `query`."""

    study: str
    query: str


@dataclass
class InfluenceConfig:
    """Features with the most influence in an attribution graph.

    With `share`, as many as hold this share of the influence of all features at the supernode's positions and of its
    layers, instead of its `count`.
    """

    run: str | None = None  # run folder of a task=trace; the graphs of the run's own inputs when None
    target: str | None = None  # the answer that counts, as the graph names it; the most probable one when None
    share: float | None = None


@dataclass
class PositionsConfig:
    """Where in a prompt a supernode acts: the union of positions by role (special, image, question, last, answer)
    and of the soft tokens whose own part of the picture overlaps a box (left, top, right, bottom as fractions of it).
    """

    roles: list[str] = field(default_factory=list)
    box: list[float] = field(default_factory=list)

    def check(self, where: str) -> None:
        """Refuse positions that are empty or not in a picture."""
        box = self.box
        for role in self.roles:
            check_choice(f"{where}.roles", role, (*ROLES, ANSWER))
        _refuse(not box and not self.roles, f"{where} is empty; give roles, a box, or leave it out")
        inside = len(box) == 4 and all(0 <= x <= 1 for x in box) and box[0] < box[2] and box[1] < box[3]
        form = "give left, top, right and bottom as fractions 0 to 1 of the picture, such as [0.25,0.25,0.75,0.75]"
        _refuse(bool(box) and not inside, f"{where}.box={list(box)}: {form}")
        advice = "the role image takes every soft token, so the box says nothing; leave one out"
        _refuse(bool(box) and "image" in self.roles, f"{where}: {advice}")


@dataclass
class SupernodeConfig:
    """A supernode, whose features are chosen in exactly one of four ways.

    The `name`, instead of the supernode's key, may be "auto": from labels, or the words that its features write.
    Contrast and influence are measured at the supernode's `positions`, everywhere when None.
    """

    ids: list[str] = field(default_factory=list)  # such as L3/1242
    label: LabelConfig | None = None
    contrast: ContrastConfig | None = None
    influence: InfluenceConfig | None = None
    name: str | None = None
    count: int = 12  # at most so many features (but `ids`, and `influence` with a `share`)
    layers: list[int] = field(default_factory=list)  # the first and the last that features may be of
    positions: PositionsConfig | None = None

    @property
    def where(self) -> Positions | None:
        """The positions as a record."""
        if self.positions is None:
            return None
        box = PatchBox(*self.positions.box) if self.positions.box else None
        return Positions(tuple(self.positions.roles), box)

    def layer_range(self, layers: Sequence[int]) -> list[int]:
        """Of these layers, those that features may be of."""
        return [i for i in layers if not self.layers or self.layers[0] <= i <= self.layers[1]]

    def check(self, where: str) -> None:
        """Refuse a supernode with no selector or several, and settings that make no sense."""
        selectors = [name for name in SELECTORS if getattr(self, name)]
        what = f"{' and '.join(selectors)} are given" if selectors else "nothing chooses its features"
        _refuse(len(selectors) != 1, f"{where}: {what}; give exactly one of {', '.join(SELECTORS)}")
        check_least(where, self, count=1)
        ordered = not self.layers or (len(self.layers) == 2 and 0 <= self.layers[0] <= self.layers[1])
        _refuse(not ordered, f"{where}.layers={list(self.layers)}: give the first and the last layer, as in [2,5]")
        for text in self.ids:
            try:
                FeatureId.parse(text)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
        for key in ("positions", "contrast"):
            if (part := getattr(self, key)) is not None:
                part.check(f"{where}.{key}")
        share = None if self.influence is None else self.influence.share
        bad = share is not None and not 0 < share <= 1
        _refuse(bad, f"{where}.influence.share={share}: it is a share; choose a number above 0 and at most 1")
        empty = self.label is not None and not self.label.query.strip()
        _refuse(empty, f"{where}.label.query is empty; give words of a label, as in query: red planet")


@dataclass
class CircuitSpecConfig:
    """A circuit, declared (docs/circuits.md)."""

    name: str = "circuit"  # of the folder under `circuits/`
    path: str | None = None  # the user's own YAML file with these keys, instead of an option of the group
    inputs: InputSetConfig | None = None  # traced when the run has no `prompt=`, `image=` or `task.rows=`
    supernodes: dict[str, SupernodeConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bad = _FOLDER.fullmatch(self.name) is None
        _refuse(bad, f"circuit_spec.name={self.name}: it names a folder; use letters, digits, - and _")
        if self.inputs is not None:
            self.inputs.check("circuit_spec.inputs")
        names = [node.name or key for key, node in self.supernodes.items() if node.name != AUTO]
        for key, node in self.supernodes.items():
            name = node.name if node.name and node.name != AUTO else key
            bad = name in SURROUNDINGS or name.startswith(ANSWER_PREFIX) or _NAME.fullmatch(name) is None
            advice = f"use letters, digits, spaces, - and _, and none of {', '.join(SURROUNDINGS)}"
            _refuse(bad, f"circuit_spec.supernodes: {name!r} cannot be a supernode's name; {advice}")
            twice = names.count(name) > 1
            _refuse(twice, f"circuit_spec.supernodes: two are called {name!r}; give each a name of its own")
            node.check(f"circuit_spec.supernodes.{key}")


@dataclass
class DiscoveryConfig:
    """How a circuit is searched on training pairs and judged on test pairs (docs/circuits.md)."""

    question: str | None = None  # of the pairs; every question whose answer differs when None
    keep: float = 0.8  # the share of the logit difference that the circuit must keep
    methods: list[str] = field(default_factory=lambda: list(METHODS))  # rankings whose curves are drawn
    modes: list[str] = field(default_factory=lambda: list(RUNS))
    graphs: int = 10  # training pairs whose two sides are traced
    steps: int = 5  # inputs between the two sides at which gradients are taken
    edge_nodes: int = 200  # features that get their incoming edges, those of most effect
    edge_pairs: int = 20  # pairs of each split on which circuits of edges are run; 0 leaves edges out
    draws: int = 3  # of matched random circuits
    minimality: int = 40  # members that are dropped one by one; 0 leaves that out
    threshold: float = 0.001  # members whose loss of faithfulness is below this are pruned
    resamples: int = 50  # bootstrap resamples of the pairs for stability
    seed: int = 0  # of everything random

    def __post_init__(self) -> None:
        bad = not 0.0 < self.keep <= 1.0
        _refuse(bad, f"discovery.keep={self.keep}: it is a share; choose a number above 0 and up to 1")
        for key, known in (("methods", METHODS), ("modes", RUNS)):
            values = getattr(self, key)
            for value in values or [""]:
                check_choice(f"discovery.{key}", value, known)
        check_least("discovery", self, graphs=1, steps=1, edge_nodes=1, edge_pairs=0, draws=1, minimality=0)
        check_least("discovery", self, resamples=2)


@dataclass
class EditConfig:
    """Keys of both tasks.

    `from_graph` takes features from a trace instead of naming them: its graph.safetensors or its run folder; the `top`
    most influential ones on its most probable answer. `circuit` takes those of a saved circuit (`/run/circuits/name`),
    or of some of its `supernodes`, at their positions. `mode` is free, frozen_attention, direct or all. `controls` says
    how often each control is drawn (0: none), `new_tokens` how long answers may be.
    """

    from_graph: str | None = None
    circuit: str | None = None
    supernodes: list[str] = field(default_factory=list)
    top: int = 20
    mode: str = "free"
    controls: int = 5
    new_tokens: int = 24

    def __post_init__(self) -> None:
        check_choice("task.mode", self.mode, (*MODES, "all"))
        check_least("task", self, top=1, controls=0, new_tokens=1)

    @property
    def runs(self) -> dict[str, Any]:
        """Arguments of `run_edit`."""
        return {"modes": modes_of(self.mode), "controls": self.controls, "new_tokens": self.new_tokens}


def modes_of(mode: str) -> tuple[str, ...]:
    """The modes to run, the strongest last; "all" means all three."""
    return MODES if mode == "all" else (mode,)
