"""Settings of the search for features that pictures and words share: plain records, so that Hydra can register them."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError

PLACEHOLDER = "{concept}"
SOURCES = ("planets", "digits", "colours")


@dataclass
class CrossQuestion:
    """One fact asked twice.

    Attributes:
        picture: the question beside a picture, which must not name the concept.
        text: the same without a picture, with `{concept}` where the concept is named.
        answers: concept -> the word that answers it.
        words: concept -> what stands for it in the text, where that is not its name: "dust" for mars.
        second: of pictures of digits, the second digit; drawn when None.
    """

    picture: str
    text: str
    answers: dict[str, str]
    words: dict[str, str] = field(default_factory=dict)
    second: str | None = None

    def asked_in_text(self, concept: str) -> str:
        """The question in words."""
        return self.text.replace(PLACEHOLDER, self.words.get(concept, concept))


@dataclass
class CrossModalConfig:
    """Which concepts, how they are asked for, and what counts as shared (docs/structure.md).

    Attributes:
        concepts: names, as they stand in the text questions.
        questions: name -> question.
        source: what the pictures show: planets, two digits of which the concept is the first, or shapes of a colour.
        pictures: training pictures a concept.
        test_pictures: unseen pictures a concept for the causal tests.
        others: other concepts, drawn, from which each is patched and whose features are ablated with it; all when None.
        ratio: a feature prefers a concept when its mean there is at least so many times that on the others.
        fires: least share of a concept's pictures on which it must fire.
        permutations: orders in which the pictures' concepts are shuffled.
        q: false discovery rate of single features.
        seed: of pictures, permutations and controls.
    """

    concepts: list[str]
    questions: dict[str, CrossQuestion]
    source: str = "planets"
    pictures: int = 40
    test_pictures: int = 20
    others: int | None = None
    ratio: float = 2.0
    fires: float = 0.5
    permutations: int = 1000
    q: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if len(set(self.concepts)) < 3 or len(set(self.concepts)) != len(self.concepts):
            raise UserError(f"cross_modal.concepts={list(self.concepts)}: give three or more different ones")
        if self.source not in SOURCES:
            raise UserError(f"cross_modal.source={self.source}: choose one of {', '.join(SOURCES)}")
        for name, question in self.questions.items():
            missing = [concept for concept in self.concepts if concept not in question.answers]
            if missing:
                raise UserError(f"cross_modal.questions.{name}.answers lacks {', '.join(missing)}")
            if PLACEHOLDER not in question.text:
                raise UserError(f"cross_modal.questions.{name}.text={question.text!r} lacks {PLACEHOLDER}")
            named = [concept for concept in self.concepts if concept in question.picture.split()]
            if named:
                raise UserError(
                    f"cross_modal.questions.{name}.picture names {named[0]}: the picture alone must show it"
                )
        for key in ("pictures", "test_pictures", "permutations"):
            if getattr(self, key) < 1:
                raise UserError(f"cross_modal.{key}={getattr(self, key)}: it must be at least 1")
        if self.others is not None and self.others < 1:
            raise UserError(f"cross_modal.others={self.others}: it counts concepts; choose 1 or more, or null for all")
        if self.ratio <= 1 or not 0 < self.fires <= 1 or not 0 < self.q < 1:
            raise UserError("cross_modal: ratio must be above 1, fires a share up to 1, and q a share below 1")
