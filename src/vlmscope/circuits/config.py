"""Settings of circuits and interventions: plain records, free of torch, so that Hydra can register them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError


@dataclass
class QuestionConfig:
    """A question and, for each concept, the word that answers it."""

    prompt: str
    answers: dict[str, str]


@dataclass
class CircuitConfig:
    """How a circuit of two concepts is found.

    Attributes:
        concepts: two concepts, of which the first is the recipient of interventions and the second the donor; of more,
            each is turned into each other, with a circuit for each pair.
        third: a concept that belongs to neither, to see what the donor's circuit does to it.
        questions: name -> question, all asked of every picture.
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
        for key in ("pictures", "graphs", "per_layer", "least"):
            if getattr(self, key) < 1:
                raise UserError(f"circuit.{key}={getattr(self, key)}: it must be at least 1")


@dataclass
class InterventionConfig:
    """What is done with the circuit and how it is judged.

    Attributes:
        strength: steering level of the raised concept, in units of its own mean activation.
        gate: steer each layer and position only as far as the recipient's features are active there, in full from this
            share of their mean; null steers everything, whatever it shows.
        patch_strength: factor of the donor's activations when patching.
        pictures: test pictures.
        scopes: where to act besides everywhere: no_last_layer, no_last_position, role_<role>.
        modes: direct, frozen_attention, free.
        controls: seeds of the matched random features and of the random directions.
        unrelated: scenes of each other kind, to see how specific the intervention is; 0 leaves that out.
        examples: pictures shown before and after in the report.
    """

    strength: float = 3.0
    gate: float | None = 0.5
    patch_strength: float = 3.0
    pictures: int = 100
    scopes: list[str] = field(default_factory=lambda: ["no_last_layer", "no_last_position"])
    modes: list[str] = field(default_factory=lambda: ["direct", "frozen_attention", "free"])
    controls: int = 2
    unrelated: int = 25
    examples: int = 6

    def __post_init__(self) -> None:
        known = ("direct", "frozen_attention", "free")
        for mode in self.modes:
            if mode not in known:
                raise UserError(f"intervention.modes: no mode {mode!r}; choose from {', '.join(known)}")
        for scope in self.scopes:
            if scope not in ("no_last_layer", "no_last_position") and not scope.startswith("role_"):
                raise UserError(
                    f"intervention.scopes: no scope {scope!r}; no_last_layer, no_last_position, role_<role>"
                )
        if self.gate is not None and self.gate <= 0:
            raise UserError(f"intervention.gate={self.gate}: it must be above 0, or null for none")
        for key in ("pictures", "controls", "examples"):
            if getattr(self, key) < 1:
                raise UserError(f"intervention.{key}={getattr(self, key)}: it must be at least 1")
