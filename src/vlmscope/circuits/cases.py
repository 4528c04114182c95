"""Case sets: pictures of concepts under questions, counterfactual pairs, and pairs of prompts with whole answers.

Legend: B cases, T positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import torch
from PIL import Image

from vlmscope.circuits.config import CircuitConfig
from vlmscope.circuits.pairs import PairSubject, pair_subject
from vlmscope.core.errors import UserError
from vlmscope.core.records import ANSWER
from vlmscope.data.config import PairsConfig
from vlmscope.data.icons import Relation
from vlmscope.data.images import png_bytes
from vlmscope.data.inputs import Pair, load_pairs
from vlmscope.interventions.run import base_run, log_likelihoods, whole_answers, without_special
from vlmscope.interventions.trials import Cases
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import InputBatch, continued
from vlmscope.scope import Scope

_LOG = logging.getLogger(__name__)
TO_PICTURE, TO_TEXT = "text_to_picture", "picture_to_text"  # case sets of `crossed_cases`
Pictures = Callable[[str, str, int], Sequence[Image.Image]]  # concept, split, count


def answer_token(scope: Scope, word: str) -> int:
    """The id of an answer word, which must be one token."""
    tokenizer = scope.vlm.tokenizer
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(f"the answer {word!r} is not one token of this model: choose one that is")
    return int(ids[0])


def answer_tokens(scope: Scope, answer: str) -> tuple[int, ...]:
    """The ids of an answer of one or several tokens."""
    tokenizer = scope.vlm.tokenizer
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.unk_token_id in ids:
        raise UserError(f"the answer {answer!r} has a word that this model does not know: choose another")
    return tuple(map(int, ids))


@dataclass(frozen=True)
class Question:
    """A question, asked up to the first token that tells its answers apart.

    Answers of several tokens may begin alike ("a red ball", "a blue ball"): the model is given what all of them begin
    with, so that the next token decides, as it does for answers of one token.
    """

    prompt: str
    begin: tuple[int, ...]  # what all answers begin with
    answers: Mapping[str, tuple[int, ...]]  # name, such as a concept -> its answer from the deciding token on

    def token(self, name: str) -> int:
        """The deciding token of an answer."""
        return self.answers[name][0]

    @property
    def long(self) -> bool:
        """Whether some answer has several tokens, so that the first one alone does not make it right."""
        return bool(self.begin) or any(len(ids) > 1 for ids in self.answers.values())

    def inputs(self, scope: Scope, images: Sequence[Image.Image]) -> ModelInputs:
        """The question of some pictures, with the beginning of the answer; the last token is of role "last"."""
        asked = scope.inputs(self.prompt, images)
        if not self.begin:
            return asked
        whole = continued(scope.adapter, asked, self.begin, scope.vlm.tokenizer)
        roles = np.where(np.isin(whole.roles, ("last", ANSWER)), "special", whole.roles)
        roles[-1] = "last"
        return replace(whole, roles=roles)

    def whole(self, name: str) -> list[int]:
        """All tokens of an answer."""
        return [*self.begin, *self.answers[name]]


def ask(scope: Scope, prompt: str, answers: Mapping[str, str], where: str = "answers") -> Question:
    """The question with its `answers`, name -> words; equal answers are not told apart.

    Raises:
        UserError: a word that the model does not know, or an answer that another one begins with.
    """
    ids = {name: answer_tokens(scope, answer) for name, answer in answers.items()}
    distinct = set(ids.values())
    begin: tuple[int, ...] = ()
    if len(distinct) > 1:
        begin = next(iter(distinct))
        while any(each[: len(begin)] != begin for each in distinct):
            begin = begin[:-1]
        short = [name for name, each in ids.items() if each == begin]
        if short:
            raise UserError(
                f"{where}: another answer begins with {answers[short[0]]!r}, so no token tells them apart; reword one"
            )
    return Question(prompt, begin, {name: each[len(begin) :] for name, each in ids.items()})


def _answered(scope: Scope, inputs: Sequence[ModelInputs], answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """[n] bool, whether the greedy answer to each prompt begins with the tokens of an answer."""
    said = whole_answers(scope, inputs, max(map(len, answers)))
    right = [ids[: len(answer)] == list(answer) for (ids, _), answer in zip(said, answers, strict=True)]
    return torch.tensor(right, device=scope.adapter.device)


def concept_questions(scope: Scope, config: CircuitConfig) -> dict[str, Question]:
    """The questions of a circuit by name, with the answers of its concepts."""
    return {
        name: ask(scope, asked.prompt, asked.of(config.concepts), f"circuit.questions.{name}")
        for name, asked in config.questions.items()
    }


def bystanders(
    scope: Scope, name: str, question: str, inputs: Sequence[ModelInputs], ids: Sequence[str], target: int = -1
) -> Cases:
    """Prompts about something else, whatever the model answers; an answer `target` is a hit."""
    batch = scope.batch(list(inputs))
    base = base_run(scope, batch, ["free"])
    answer = base.logits.argmax(-1)
    return Cases(name, question, batch, base, answer, torch.full_like(answer, target), tuple(ids), inputs=tuple(inputs))


@dataclass(frozen=True)
class Asked:
    """Pictures of a concept under a question, and what the model answers."""

    concept: str
    name: str  # of the question
    question: Question
    images: Sequence[Image.Image]
    inputs: Sequence[ModelInputs]
    batch: InputBatch
    answers: torch.Tensor  # [B], the next token
    right: torch.Tensor  # [B] bool

    def cases(self, scope: Scope, name: str, kept: torch.Tensor, modes: Collection[str]) -> Cases:
        """A case set of the pictures in `kept` [B] bool, without target or donors."""
        rows = torch.nonzero(kept).flatten()
        numbers, batch = rows.tolist(), self.batch.select(rows)
        return Cases(
            name,
            self.name,
            batch,
            base_run(scope, batch, {*modes} - {"generate"}),
            self.answers[rows],
            torch.full_like(rows, -1),
            tuple(f"{self.concept} {row}" for row in numbers),
            inputs=tuple(self.inputs[row] for row in numbers),
            prompt=self.question.prompt,
            pngs=tuple(png_bytes(self.images[row], 128) for row in numbers),
            answer_ids=(self.question.answers[self.concept],) * len(numbers) if self.question.long else (),
        )

    def refusal(self, scope: Scope, answer: str) -> str:
        """Why too few of the pictures are cases, in one line."""
        kept = int(self.right.sum())
        return (
            f"{f'only {kept}' if kept else 'none'} of the {len(self.images)} pictures of {self.concept} is answered "
            f"{answer!r} to {self.question.prompt!r} (the model says: "
            f"{', '.join(_said(scope, self.question, self.images, self.answers))}): nothing to flip; give other "
            "pictures"
        )


def asked_about(scope: Scope, name: str, question: Question, concept: str, images: Sequence[Image.Image]) -> Asked:
    """Ask a question about each picture of a concept."""
    inputs = [question.inputs(scope, [image]) for image in images]
    batch = scope.batch(inputs)
    answers = scope.forward(batch).argmax(-1)
    right = answers == question.token(concept)
    if question.long:
        plain = [scope.inputs(question.prompt, [image]) for image in images]
        right &= _answered(scope, plain, [question.whole(concept)] * len(plain))
    return Asked(concept, name, question, images, inputs, batch, answers, right)


def _said(scope: Scope, question: Question, images: Sequence[Image.Image], answers: torch.Tensor) -> list[str]:
    """What the model says to a question, in words: its next tokens, or the beginning of longer answers."""
    if not question.long:
        return sorted({scope.vlm.tokenizer.decode([token]).strip() for token in answers.tolist()})
    length = len(question.begin) + max(map(len, question.answers.values()))
    asked = [scope.inputs(question.prompt, [image]) for image in images]
    return sorted({text for _, text in whole_answers(scope, asked, length)})


def _aimed(cases: Cases, question: Question, concept: str, **tags: str) -> Cases:
    """The cases with a concept's answer as the target, under tags."""
    whole = (question.answers[concept],) * len(cases.ids) if question.long else ()
    return replace(cases, target=torch.full_like(cases.answer, question.token(concept)), target_ids=whole, tags=tags)


def concept_cases(
    scope: Scope, config: CircuitConfig, pictures: Pictures, count: int, modes: Collection[str]
) -> list[Cases]:
    """The recipient's test pictures that are answered rightly, a case set per question; donors row by row."""
    recipient, donor = config.concepts
    images = pictures(recipient, "test", count)
    donor_images = pictures(donor, "test", max(len(images), 1))
    case_sets = []
    for name, question in concept_questions(scope, config).items():
        asked = asked_about(scope, name, question, recipient, images)
        if asked.right.sum() < config.least:
            raise UserError(asked.refusal(scope, config.questions[name].answers[recipient]))
        cases, rows = asked.cases(scope, "test", asked.right, modes), torch.nonzero(asked.right).flatten().tolist()
        donors = [question.inputs(scope, [donor_images[row % len(donor_images)]]) for row in rows]
        case_sets.append(replace(_aimed(cases, question, donor), donors=scope.batch(donors)))
    return case_sets


def matrix_cases(
    scope: Scope, config: CircuitConfig, pictures: Pictures, count: int, modes: Collection[str]
) -> tuple[dict[str, list[Cases]], dict[str, float]]:
    """Every ordered pair of concepts, tagged `recipient` and `donor`, under each question that tells them apart; and
    `base/<question>/<concept>/accuracy`.

    "test" are the recipients that are answered rightly, with donors row by row; "wrong" the donor's own pictures that
    are answered with the recipient's word; "third" all pictures of each concept outside the pair, under the first
    question. A hit is the donor's word. Where fewer than `config.least` are answered rightly, cells are left out.
    """
    images = {concept: pictures(concept, "test", count) for concept in config.concepts}
    sets: dict[str, list[Cases]] = {"test": [], "wrong": [], "third": []}
    accuracy: dict[str, float] = {}
    why = ""
    for number, (name, question) in enumerate(concept_questions(scope, config).items()):
        asked = {c: asked_about(scope, name, question, c, images[c]) for c in config.concepts if c in question.answers}
        accuracy |= {f"base/{name}/{c}/accuracy": float(each.right.double().mean()) for c, each in asked.items()}
        right = {}
        for concept, each in asked.items():
            if each.right.sum() >= config.least:
                right[concept] = each.cases(scope, "test", each.right, modes)
            else:
                why = each.refusal(scope, config.questions[name].answers[concept])
                _LOG.warning("left out: %s", why)
        outside = {}
        for concept, shown in images.items() if number == 0 else ():
            inputs = [question.inputs(scope, [image]) for image in shown]
            outside[concept] = bystanders(scope, "third", name, inputs, [f"{concept} {i}" for i in range(len(shown))])
        for recipient, donor in permutations(asked, 2):
            tags = {"recipient": recipient, "donor": donor}
            others = [cases for concept, cases in outside.items() if concept not in (recipient, donor)]
            sets["third"] += [_aimed(cases, question, donor, **tags) for cases in others]
            if question.token(recipient) == question.token(donor):
                continue
            if recipient in right:
                rows = torch.nonzero(asked[recipient].right).flatten().tolist()
                donors = asked[donor].batch.select([row % len(images[donor]) for row in rows])
                sets["test"].append(replace(_aimed(right[recipient], question, donor, **tags), donors=donors))
            wrong = asked[donor].answers == question.token(recipient)
            if wrong.any():
                cases = replace(asked[donor].cases(scope, "wrong", wrong, modes), answer_ids=())
                sets["wrong"].append(_aimed(cases, question, donor, **tags))
    if not sets["test"]:
        raise UserError(why or f"no question of {', '.join(config.questions)} tells two of circuit.concepts apart")
    return sets, accuracy


def pairs_by_question(config: PairsConfig, split: str) -> dict[str, list[Pair]]:
    """The pairs of a split by question. Of a question whose answer differs in some pairs, only those count."""
    groups: dict[str, list[Pair]] = {}
    for pair in load_pairs(config, split):
        groups.setdefault(pair.question, []).append(pair)
    return {name: [pair for pair in pairs if pair.moves] or pairs for name, pairs in groups.items()}


def subject_of_pairs(
    scope: Scope,
    question: str,
    pairs: Sequence[Pair],
    least: int,
    answerable: bool = True,
    modes: Collection[str] = ("free",),
) -> PairSubject:
    """Both sides of a question's pairs, run once (see `pair_subject`)."""
    asked = [ask_pair(scope, pair) for pair in pairs]
    if len({len(each.begin) for each, _ in asked}) > 1:
        raise UserError(
            f"question {question!r}: the two answers of some pairs differ from their first token on, those of others "
            "only later; give the pairs questions of their own"
        )

    def made(number: int) -> tuple[list[ModelInputs], torch.Tensor]:
        sides = [(each[number], (pair.original, pair.counterfactual)[number])
                 for each, pair in zip(asked, pairs, strict=True)]  # fmt: skip
        tokens = torch.tensor([each.token("") for each, _ in sides], device=scope.adapter.device)
        return [each.inputs(scope, side.images) for each, side in sides], tokens

    def whole(number: int) -> torch.Tensor:
        sides = [(pair.original, pair.counterfactual)[number] for pair in pairs]
        plain = [scope.inputs(side.prompt, side.images) for side in sides]
        return _answered(scope, plain, [each[number].whole("") for each in asked])

    (originals, tokens), (others, other_tokens) = made(0), made(1)
    right = (whole(0), whole(1)) if any(side.long for each in asked for side in each) else None
    return pair_subject(scope, question, originals, others, tokens, other_tokens, least, answerable, modes, right)


def told_apart_alike(scope: Scope, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs whose answers first differ at the token number at which most pairs' answers do."""
    begun = [len(ask_pair(scope, pair)[0].begin) for pair in pairs]
    usual = max(sorted(set(begun)), key=begun.count, default=0)
    kept = [pair for pair, length in zip(pairs, begun, strict=True) if length == usual]
    if len(kept) < len(pairs):
        left = len(pairs) - len(kept)
        _LOG.warning("question %r: %d of %d pairs are left out: another token tells their answers apart",
                     pairs[0].question, left, len(pairs))  # fmt: skip
    return kept


def ask_pair(scope: Scope, pair: Pair) -> tuple[Question, Question]:
    """The two sides of a pair as questions, whose answer is called ""."""
    both = {"original": pair.original.answer, "counterfactual": pair.counterfactual.answer}
    told = ask(scope, pair.original.prompt, both, f"pair {pair.id}")
    sides = zip((pair.original, pair.counterfactual), told.answers.values(), strict=True)
    first, second = (Question(side.prompt, told.begin, {"": ids}) for side, ids in sides)
    return first, second


def pair_cases(scope: Scope, subject: PairSubject, pairs: Sequence[Pair], name: str = "test") -> Cases:
    """The originals as recipients and the counterfactuals as donors; `pairs` are those that the subject chose from."""
    kept = [pairs[row] for row in subject.rows.tolist()]
    asked = [ask_pair(scope, pair) for pair in kept]
    long = any(side.long for each in asked for side in each)
    return Cases(
        name,
        subject.question,
        subject.batch,
        subject.base,
        subject.tokens,
        subject.other_tokens,
        tuple(pair.id for pair in kept),
        subject.other,
        subject.other_logits,
        inputs=tuple(subject.inputs),
        prompt=kept[0].original.prompt,
        pngs=tuple(_both_sides(pair) for pair in kept),
        answer_ids=tuple(each[0].answers[""] for each in asked) if long else (),
        target_ids=tuple(each[1].answers[""] for each in asked) if long else (),
    )


def of_one_length(inputs: Sequence[ModelInputs]) -> list[int]:
    """The rows whose prompts have the most usual length, which fit into one batch."""
    lengths = [len(each) for each in inputs]
    return [row for row, length in enumerate(lengths) if length == max(sorted(set(lengths)), key=lengths.count)]


def standing_for(recipient: ModelInputs, donor: ModelInputs) -> torch.Tensor:
    """[T] the donor's position for each of the recipient's, where one shows what the other names.

    Words that both have stand for themselves; soft tokens and the name's tokens, repeated so that both end together,
    for each other.
    """
    mine, theirs = recipient.input_ids, donor.input_ids
    first = next(n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    last = next(n for n, (a, b) in enumerate(zip(mine[::-1], theirs[::-1], strict=False)) if a != b)
    size, others = len(mine) - first - last, len(theirs) - first - last
    middle = [first + (place - size) % others for place in range(size)]
    return torch.tensor([*range(first), *middle, *range(len(theirs) - last, len(theirs))])


def crossed_cases(scope: Scope, cases: Cases, relation: Relation, answerable: bool = True) -> list[Cases]:
    """Cases of a relation's pairs (`inputs.relation_pairs`) that carry between picture and written name.

    "text_to_picture" has the counterfactual's written name as donor of the original's picture; "picture_to_text" the
    counterfactual's picture as donor of the original's written name; if `answerable`, where that is answered rightly.
    Names have the most usual number of tokens.
    """
    sides = [case.split(" to ") for case in cases.ids]

    def written(row: int, side: int) -> ModelInputs:
        begin = ask(scope, "", {concept: relation.answers[concept] for concept in sides[row]}).begin
        return Question(relation.asked(sides[row][side]), begin, {}).inputs(scope, [])

    names = [[written(row, side) for row in range(len(sides))] for side in (0, 1)]
    rows, others = (of_one_length(inputs) for inputs in names)
    donors = [names[1][row] for row in others]
    pictures = replace(cases.select(others), name=TO_PICTURE, donors=scope.batch(donors), donor_logits=None)
    crossed = [replace(pictures, donor_at=standing_for(cases.inputs[0], donors[0]))]
    texts, mine = [names[0][row] for row in rows], cases.select(rows)
    asked = bystanders(scope, TO_TEXT, cases.question, texts, mine.ids)
    at = standing_for(texts[0], cases.inputs[0])
    asked = replace(asked, target=mine.target, donors=mine.donors, donor_at=at)
    known = torch.nonzero(asked.answer == mine.answer).flatten().tolist() if answerable else range(len(rows))
    crossed += [asked.select(known)] * bool(known)
    return crossed


def _both_sides(pair: Pair) -> bytes:
    """Original and counterfactual in one picture, the original alone where they differ in height."""
    sides = [np.asarray(side.images[0]) for side in (pair.original, pair.counterfactual) if side.images]
    if not sides:
        return png_bytes(np.full((8, 8, 3), 255, np.uint8))
    same = len({side.shape[0] for side in sides}) == 1
    return png_bytes(np.concatenate(sides, 1) if same else sides[0], 256)


@dataclass(frozen=True)
class TextPair:
    """Two prompts of equal length and the model's whole answers to them, equally many tokens, of which some differ."""

    name: str
    sides: tuple[ModelInputs, ModelInputs]
    ids: tuple[list[int], list[int]]
    texts: tuple[str, str]
    png: bytes = b""

    def begun(self, scope: Scope, side: int, tokens: int) -> ModelInputs:
        """A side's prompt with the first tokens of its answer."""
        return continued(scope.adapter, self.sides[side], self.ids[side][:tokens], scope.vlm.tokenizer)


def text_pairs(
    scope: Scope,
    sides: Sequence[Sequence[ModelInputs]],
    right: Sequence[Sequence[str]],
    new_tokens: int,
    pngs: Sequence[bytes] = (),
) -> list[TextPair]:
    """The pairs of prompts `sides` [2][n] whose whole answers are `right` [2][n] on both sides, all equally long;
    `pngs` are n small pictures, for reports.
    """
    answers = [whole_answers(scope, inputs, new_tokens) for inputs in sides]
    pairs: list[TextPair] = []
    for row, ((ids, text), (other_ids, other_text)) in enumerate(zip(*answers, strict=True)):
        lengths = {len(ids), len(other_ids), len(pairs[0].ids[0]) if pairs else len(ids)}
        if (text, other_text) == (right[0][row], right[1][row]) and len(lengths) == 1:
            png = pngs[row] if pngs else b""
            prompts = sides[0][row], sides[1][row]
            pairs.append(TextPair(str(row), prompts, (ids, other_ids), (text, other_text), png))
    return pairs


def text_cases(scope: Scope, name: str, question: str, pairs: Sequence[TextPair], prompt: str = "") -> Cases:
    """The first sides; the second sides' whole answers are their targets.

    Generated answers are scored by the column `log_likelihood`, the mean per token in nats after the second side's
    prompt in the unedited model. It is high where the answer is both fluent and true of that side.
    """
    others = {pair.name: pair.sides[1] for pair in pairs}

    def score(ids: Sequence[str], answers: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        words = [without_special(scope.vlm.tokenizer, answer) for answer in answers]
        return {"log_likelihood": log_likelihoods(scope, [others[name] for name in ids], words)}

    cases = bystanders(scope, name, question, [pair.sides[0] for pair in pairs], list(others))
    texts, targets = zip(*(pair.texts for pair in pairs), strict=True)
    pngs = tuple(pair.png for pair in pairs)
    return replace(cases, texts=texts, target_texts=targets, score=score, prompt=prompt, pngs=pngs)
