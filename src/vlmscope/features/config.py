"""Settings of feature studies and of the search for cross-modal features, free of torch so that Hydra can read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vlmscope.core.errors import UserError, check_choice, check_least
from vlmscope.data.orrery.scenes import with_facts

MOST_TOKENS = 65_535  # positions are stored in two bytes
# Settings that say how a study is made, not what is in it: a study may be resumed with others.
_NOT_DECISIVE = ("path", "published", "revision", "checkpoint_every", "forward_tokens", "max_skipped")
PLACEHOLDER = "{concept}"
SOURCES = ("planets", "digits", "colours")


@dataclass
class StudyConfig:
    """Settings of a feature study (docs/study.md).

    `path` is a finished study (its run folder) that is read instead of making one; `published` a folder of published
    activation statistics, or a hub id at the commit `revision`, of which one is made without running the model.
    `split` null takes that of each source (of Orrery's scenes, validation), `limit` null all rows.
    Of every feature the `top` strongest items are kept
    and `samples` drawn ones, cut into `quantiles` groups by activation; of each item the activations within `window`
    text tokens of the peak; and the `logits` tokens that the feature raises, and lowers, most. Inputs are cut off at
    `max_tokens`. Rows are read and sorted by shape in batches of `batch_size`, at most `forward_tokens` tokens go
    through the model at once, and a state to resume from is written every `checkpoint_every` batches. More than
    `max_skipped` unusable rows (damaged pictures, no text) end the study.
    """

    path: str | None = None
    published: str | None = None
    revision: str | None = None
    split: str | None = None
    limit: int | None = 20_000
    top: int = 20
    samples: int = 20
    quantiles: int = 4
    window: int = 32
    logits: int = 10
    max_tokens: int = 1024
    batch_size: int = 256
    forward_tokens: int = 8192
    max_skipped: int = 100
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        check_least("study", self, limit=1, top=1, samples=0, quantiles=1, window=0, logits=0, max_tokens=2)
        check_least("study", self, batch_size=1, forward_tokens=1, max_skipped=0, checkpoint_every=1)
        if self.max_tokens > MOST_TOKENS:
            raise UserError(f"study.max_tokens={self.max_tokens}: at most {MOST_TOKENS}")

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what a study's files hold."""
        return {key: value for key, value in asdict(self).items() if key not in _NOT_DECISIVE}


@dataclass
class CrossQuestion:
    """One fact asked twice: about a `picture`, which alone shows the concept, and in a `text` that has `{concept}`.

    `answers` has the word that answers it by concept, `words` what stands for a concept in the text where that is not
    its name ("dust" for mars); `answers_from` and `words_from` take a fact of Orrery's planets (name, colour or cover)
    for those that are not named. `second` is the second digit in pictures of digits; drawn when None.
    """

    picture: str
    text: str
    answers: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    answers_from: str | None = None
    words_from: str | None = None
    second: str | None = None

    def __post_init__(self) -> None:
        self.answers = with_facts(self.answers, "answers_from", self.answers_from)
        self.words = with_facts(self.words, "words_from", self.words_from)

    def asked_in_text(self, concept: str) -> str:
        """The text question about a concept."""
        return self.text.replace(PLACEHOLDER, self.words.get(concept, concept))


@dataclass
class CrossModalConfig:
    """Settings of the search for features shared by pictures and words (docs/structure.md).

    `concepts` are named as in the text questions. The pictures of `source` show planets, two digits of which the
    concept is the first, or shapes of a colour: `pictures` per concept to look on, `test_pictures` (test split) for the
    causal tests. Each is patched from, and ablated with the features of, `others` drawn concepts (all when None). A
    feature prefers a concept when it fires on the share `fires` of its pictures and its mean there is `ratio` times
    that on the others; the pictures' concepts are shuffled in `permutations` orders, and single features are held to
    the false discovery rate `q`.
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
        check_choice("cross_modal.source", self.source, SOURCES)
        for name, question in self.questions.items():
            where = f"cross_modal.questions.{name}"
            missing = [concept for concept in self.concepts if concept not in question.answers]
            named = [concept for concept in self.concepts if concept in question.picture.split()]
            if missing:
                raise UserError(f"{where}.answers lacks {', '.join(missing)}")
            if PLACEHOLDER not in question.text:
                raise UserError(f"{where}.text={question.text!r} lacks {PLACEHOLDER}")
            if named:
                raise UserError(f"{where}.picture names {named[0]}: the picture alone must show it")
        check_least("cross_modal", self, pictures=1, test_pictures=1, permutations=1, others=1)
        if self.ratio <= 1 or not 0 < self.fires <= 1 or not 0 < self.q < 1:
            raise UserError("cross_modal: ratio must be above 1, fires a share up to 1, and q a share below 1")
