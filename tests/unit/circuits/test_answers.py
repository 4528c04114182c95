"""Answers of several tokens: what they share is given, the token that tells them apart decides, all of it is right."""

from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

import vlmscope
from vlmscope.analyses.edits import Fixed
from vlmscope.circuits.cases import ask, concept_cases, matrix_cases, pair_cases, subject_of_pairs
from vlmscope.circuits.config import CircuitConfig, QuestionConfig
from vlmscope.core.errors import UserError
from vlmscope.data.inputs import Pair, Side
from vlmscope.data.orrery.dataset import concept_scenes, pictures
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.interventions.run import whole_answers
from vlmscope.interventions.trials import Setting, Trial, run_trials

PROMPT = "describe this image in detail ."
ANSWERS = {word: f"a hand with {word} fingers ." for word in ("three", "five")}


@pytest.fixture(scope="module")
def scope() -> Any:
    return vlmscope.load(check=False)


@pytest.fixture(scope="module")
def hands() -> dict[str, list[Image.Image]]:
    found: dict[str, list[Image.Image]] = {word: [] for word in ANSWERS}
    for number in range(400):
        scene = make_scene("test", "hands", number)
        if (shown := found.get(scene.answer("fingers"))) is not None and len(shown) < 2 and scene.image is not None:
            shown.append(Image.fromarray(scene.image))
        if all(len(shown) == 2 for shown in found.values()):
            break
    return found


def test_the_next_token_after_what_answers_share_is_that_of_the_whole_answer(scope: Any, hands: Any) -> None:
    question, tokenizer = ask(scope, PROMPT, ANSWERS), scope.vlm.tokenizer
    assert tokenizer.decode(question.begin) == "a hand with" and question.long
    assert tokenizer.decode([question.token("three")]) == "three"
    shown = [picture for pictures in hands.values() for picture in pictures]
    begun = [question.inputs(scope, [picture]) for picture in shown]
    plain = [scope.inputs(PROMPT, [picture]) for picture in shown]
    place = len(question.begin)
    said = [ids[place] for ids, _ in whole_answers(scope, plain, place + 1)]
    assert scope.forward(scope.batch(begun)).argmax(-1).tolist() == said
    roles = begun[0].roles.tolist()
    assert len(roles) == len(plain[0]) + place and roles.count("last") == 1 and roles[-1] == "last"
    one = ask(scope, PROMPT, {"a": "three", "b": "five"})
    assert one.begin == () and not one.long and len(one.inputs(scope, shown[:1])) == len(plain[0])


def check_outcomes(scope: Any, cases: Any) -> None:
    """Without an edit whole answers stay; with the answer as the target each is a hit, whatever `new_tokens` is."""
    swapped = replace(cases, target=cases.answer, target_ids=cases.answer_ids)
    setting = Setting(mode="generate", matched=0, new_tokens=1)
    table = run_trials(scope, [Trial("none", Fixed({}), [each], [setting]) for each in (cases, swapped)])
    assert not table.changed.any() and table.hit.tolist() == [False] * len(cases.ids) + [True] * len(cases.ids)


def test_concepts_are_asked_what_they_have_answers_of_and_wrong_answers_are_cases(
    scope: Any, hands: Any, caplog
) -> None:
    mars = [Image.fromarray(picture) for picture in pictures(concept_scenes("mars", "test", 2))]
    shown = hands | {"mars": mars, "earth": mars}  # so that the earth is called mars
    asked = {"planet": "what planet is this ?", "fingers": "how many fingers are there ?"}
    named = {"planet": ("mars", "earth"), "fingers": ANSWERS}
    questions = {name: QuestionConfig(asked[name], {word: word for word in named[name]}) for name in asked}
    config = CircuitConfig([*shown], questions)
    sets, accuracy = matrix_cases(scope, config, lambda concept, _, n: shown[concept][:n], 2, {"free"})
    right = {f"base/fingers/{word}/accuracy": 1.0 for word in ANSWERS}
    assert accuracy == right | {"base/planet/mars/accuracy": 1.0, "base/planet/earth/accuracy": 0.0}
    cells = [(cases.question, *cases.tags.values()) for cases in sets["test"]]
    assert cells == [("planet", "mars", "earth"), ("fingers", "three", "five"), ("fingers", "five", "three")]
    (wrong,) = sets["wrong"]
    assert (wrong.tags, wrong.ids) == ({"recipient": "mars", "donor": "earth"}, ("earth 0", "earth 1"))
    decoded = [scope.vlm.tokenizer.decode([token]) for token in (wrong.answer[0], wrong.target[0])]
    assert decoded == ["mars", "earth"]
    assert "left out: none of the 2 pictures of earth is answered 'earth'" in caplog.text


def test_cases_of_concepts_and_of_pairs_count_whole_answers(scope: Any, hands: Any) -> None:
    config = CircuitConfig(["three", "five"], {"hand": QuestionConfig(PROMPT, dict(ANSWERS))})
    (cases,) = concept_cases(scope, config, lambda concept, _, n: hands[concept][:n], 2, {"free", "generate"})
    decoded = [scope.vlm.tokenizer.decode([token]) for token in (cases.answer[0], cases.target[0])]
    assert decoded == ["three", "five"] and cases.donors is not None
    check_outcomes(scope, cases)
    almost = replace(
        config, questions={"hand": QuestionConfig(PROMPT, ANSWERS | {"three": "a hand with three circles"})}
    )
    with pytest.raises(UserError, match=r"the model says: a hand with three fingers"):
        concept_cases(scope, almost, lambda concept, _, n: hands[concept][:n], 2, {"free"})

    sides = [[Side(PROMPT, [picture], ANSWERS[word]) for picture in hands[word]] for word in ANSWERS]
    pairs = [Pair(str(n), "hand", "picture", *both) for n, both in enumerate(zip(*sides, strict=True))]
    subject = subject_of_pairs(scope, "hand", pairs, 1)
    assert subject.moves and subject.tokens.tolist() == cases.answer.tolist()[: subject.size]
    check_outcomes(scope, pair_cases(scope, subject, pairs))
