"""Roles: what the user wrote is `question` to the character, what template and processor add is `special`."""

import dataclasses

import numpy as np
import pytest
import torch

from vlmscope.core.errors import UserError
from vlmscope.core.records import Conversation, Exchange
from vlmscope.interventions.run import generate_batch, generate_edited
from vlmscope.models.base import ModelInputs
from vlmscope.models.conversations import LOSS_MASK, continued, encode, greedy_answer, sequence_forward
from vlmscope.models.loading import VLM
from vlmscope.models.orrery import build_tokenizer
from vlmscope.models.template import Turn
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPTS = (
    "describe this picture",
    "is this für mich? 🪐 行星",
    "  what is this ?  ",
    "\n\nwhat\n\n is this ?\n",
    " ",
    "\n",
    "é",
    # The template's own words, where counting them would go wrong.
    "USER: user assistant ASSISTANT: model ?",
    "<b>this</b>",
)


@pytest.fixture(scope="module", params=["gemma3", "gemma3_text", *FAMILIES])
def vlm(request: pytest.FixtureRequest) -> VLM:
    return tiny_vlm(request.param, 5)


def pictures(vlm: VLM, number: int = 1) -> list:
    return [tiny_image(n) for n in range(number if vlm.adapter.has_vision else 0)]


def text(vlm: VLM, inputs: ModelInputs, role: str) -> str:
    return vlm.tokenizer.decode(
        [token for token, found in zip(inputs.input_ids, inputs.roles, strict=True) if found == role]
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_question_is_the_prompt_to_the_character(vlm: VLM, prompt: str) -> None:
    inputs = vlm.prepare(prompt, pictures(vlm))
    assert text(vlm, inputs, "question") == prompt
    found = np.flatnonzero(inputs.roles == "question")
    assert (np.diff(found) == 1).all()
    assert inputs.roles[-1] == "last" and "question" not in inputs.roles[inputs.is_image]


def test_an_empty_prompt_has_no_question(vlm: VLM) -> None:
    assert "question" not in vlm.prepare("", pictures(vlm)).roles


def test_what_template_and_processor_add_is_the_same_whatever_the_prompt(vlm: VLM) -> None:
    one, other = (vlm.prepare(prompt, pictures(vlm)) for prompt in ("what is this ?", "\n Größe \n"))
    assert text(vlm, one, "special") == text(vlm, other, "special")


def test_a_token_with_the_templates_space_and_the_users_word_is_the_users() -> None:
    vlm = tiny_vlm("llava", 5)
    inputs = vlm.prepare("what is this ?")  # USER: what ...
    assert text(vlm, inputs, "question") == " what is this ?"


def test_spelt_placeholders_and_special_tokens_are_not_the_question(vlm: VLM) -> None:
    if not vlm.adapter.has_vision:
        return
    mark = getattr(vlm.adapter, "placeholder", None)
    mark = vlm.tokenizer.boi_token if vlm.adapter.model.config.model_type == "gemma3" else mark
    inputs = vlm.prepare(f"Größe {mark}\nis <eos>{mark} this ?", pictures(vlm, 2))
    assert text(vlm, inputs, "question") == "Größe \nis  this ?"


def test_words_that_the_processor_adds_are_not_the_users() -> None:
    turn = Turn("user ", "see <img>!", " model")
    replaced = [{"span": (9, 14), "text": "<img>", "replacement": "here is <soft>"}]
    # "user see here is <soft>! model", a token a word; the last but one reaches from the prompt into the template.
    offsets = np.array([(0, 4), (4, 8), (9, 13), (13, 16), (17, 23), (23, 25), (25, 30)])
    assert turn.written(replaced, offsets).tolist() == [False, True, False, False, False, True, False]
    with pytest.raises(AssertionError, match="another text"):
        turn.written([{**replaced[0], "text": "<pic>"}], offsets)
    with pytest.raises(AssertionError, match="does not have"):
        turn.written(replaced, offsets + 1)


def test_words_that_a_word_level_tokenizer_lacks_are_named() -> None:
    words = ("user", "model", "what", "is", "this", "?")
    vlm = dataclasses.replace(tiny_vlm("gemma3_text", 5), processor=build_tokenizer(words))
    with pytest.raises(UserError, match="does not know the word 'zebra' of the prompt; use another word"):
        vlm.prepare("what zebra is")
    inputs = vlm.prepare(" what user is model this ?\n")
    question = [token for token, role in zip(inputs.tokens, inputs.roles, strict=True) if role == "question"]
    assert question == ["what", "user", "is", "model", "this", "?"]
    assert inputs.tokens[:3] == ["<bos>", "<start_of_turn>", "user"] and inputs.roles[2] == "special"


def test_nothing_longer_than_the_models_positions_runs(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tuple(picture.resize((48, 24)) for picture in pictures(vlm, 1))
    inputs = vlm.prepare("what is this ?", images)
    conversation = Conversation(images, (Exchange("what is this ?", "red planet"),), "line 3")
    (spoken,) = encode(vlm, conversation)
    found: list[torch.Tensor] = []

    def keep(_module: object, args: tuple, kwargs: dict) -> None:
        found.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    hook = vlm.adapter.decoder().rotary_emb.register_forward_pre_hook(keep, with_kwargs=True)  # pyright: ignore
    vlm.adapter.forward(inputs.tensors)
    vlm.adapter.forward({name: tensor for name, tensor in spoken.items() if name != LOSS_MASK})
    hook.remove()
    # What Hugging Face counts; with rows and columns (M-RoPE) a picture takes fewer positions than soft tokens.
    used, used_by_all = (int(one.max() - one.min()) + 1 for one in (found[0], found[-1]))
    assert (used < len(inputs)) == vlm.adapter.m_rope
    text = vlm.model.config.get_text_config()
    monkeypatch.setattr(text, "max_position_embeddings", used)
    assert len(vlm.prepare("what is this ?", images)) == len(inputs)
    refused = f"has {used} positions; shorten"
    scope = Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 8, 2))
    for longer in (
        lambda: vlm.prepare("what is this ? and", images),
        lambda: continued(vlm.adapter, inputs, [5], vlm.tokenizer),
        lambda: greedy_answer(vlm.adapter, inputs, 1),
        lambda: generate_edited(scope, inputs, max_new_tokens=1),
        lambda: generate_batch(vlm.adapter, [inputs], max_new_tokens=1),
        lambda: sequence_forward(vlm, [5] * (used + 1)),
    ):
        with pytest.raises(UserError, match=refused):
            longer()
    monkeypatch.setattr(text, "max_position_embeddings", used_by_all - 1)
    with pytest.raises(
        UserError, match=f"line 3: .*{used_by_all} positions.* has {used_by_all - 1} positions; shorten"
    ):
        encode(vlm, conversation)
    assert encode(vlm, conversation, spoken["input_ids"].shape[1] - 1)
