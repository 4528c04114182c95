"""The prompt sets: typed, in words that their model knows, with as many placeholders as pictures, and right."""

from functools import cache
from pathlib import Path

import pytest
from tests.configs.composing import composed
from transformers import AutoTokenizer

from vlmscope.config import catalog
from vlmscope.config.catalog import asset
from vlmscope.core.errors import UserError
from vlmscope.data.config import PromptConfig, PromptSetConfig
from vlmscope.data.orrery import scenes as facts
from vlmscope.models.tiny import tiny_vlm

SETS = sorted(catalog.options("prompts"))
ORRERY = [name for name in SETS if name.startswith("orrery_")]
GEMMA = [name for name in SETS if name not in ORRERY]


@cache
def prompts(name: str) -> dict[str, PromptConfig]:
    chosen = composed(f"prompts={name}").prompts
    assert isinstance(chosen, PromptSetConfig) and chosen.source
    assert all(isinstance(prompt, PromptConfig) for prompt in chosen.prompts.values())
    return chosen.prompts


@pytest.mark.parametrize("name", ORRERY)
def test_orrery_knows_every_word(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(asset("orrery"), local_files_only=True)
    for prompt in prompts(name).values():
        for text in filter(None, (prompt.prompt, prompt.answer)):
            assert tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False).input_ids, text


@pytest.mark.parametrize("name", ORRERY)
def test_orrery_is_asked_what_it_was_taught(name: str) -> None:
    text = {question: answer for _, question, answer in facts.text_facts()}
    groups = (facts.PLANET_QUESTIONS, facts.DIGIT_QUESTIONS, facts.SHAPE_QUESTIONS, facts.HAND_QUESTIONS)
    with_picture = {wording for group in groups for wordings in group.values() for wording in wordings}
    for prompt in prompts(name).values():
        if not prompt.images:
            assert text[prompt.prompt] == prompt.answer
            continue
        assert prompt.prompt in with_picture | set(facts.CAPTION_PROMPTS)
        planet = facts.PLANETS.get(prompt.images[0])
        if planet is not None:
            true = dict(zip(facts.PLANET_QUESTIONS, (planet.name, planet.colour, planet.cover), strict=True))
            asked = next(k for k, wordings in facts.PLANET_QUESTIONS.items() if prompt.prompt in wordings)
            assert prompt.answer == true[asked]


@pytest.mark.parametrize("name", GEMMA)
def test_gemma_gets_a_placeholder_a_picture(name: str) -> None:
    vlm = tiny_vlm("gemma3")
    for prompt in prompts(name).values():
        turn = vlm.adapter.wrap_prompt(prompt.prompt, len(prompt.images), vlm.tokenizer)
        assert turn.text.count(vlm.tokenizer.boi_token) == len(prompt.images)
        assert turn.content == prompt.prompt


def test_the_command_line_goes_before_an_experiments_prompt_name(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    body = "# @package _global_\ndefaults:\n  - override /prompts: orrery_cross_modal\nprompt_name: mars_text\n"
    (tmp_path / "experiment" / "named.yaml").write_text(body)
    chosen = ["experiment=named", f"hydra.searchpath=[file://{tmp_path}]"]
    assert composed(*chosen).prompt == "what colour is mars ?"
    assert composed(*chosen, "prompt=what").prompt == "what"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompt_name=mars"], "choose one too, as in prompts=mars_earth"),
        (
            ["prompts=mars_earth", "prompt_name=marz", "image=x.png"],
            "prompt_name=marz: no such prompt; did you mean 'mar",
        ),
        (["prompts=mars_earth", "prompt_name=mars"], "gives 0 pictures, it needs 1: Mars, the whole disc"),
        (["prompts=cross_modal", "prompt_name=mars_text", "image=x.png"], "gives 1 pictures, it needs none"),
        (
            ["prompts=mars_earth", "prompt_name=mars", "image=x.png", "prompt=what"],
            "both prompt_name= and prompt= were",
        ),
        (
            ["prompts=mars_earth", "prompts.prompts.mars.contrast=venus"],
            r"mars.contrast=venus: no other such prompt; ch",
        ),
        (["prompts=mars_earth", "prompts.prompts.mars.wording=mine"], "mine: no such choice; choose one of pap"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        composed(*overrides)
    assert "\n" not in str(raised.value)
