"""Prompts and conversations of every family: roles to the character, and the assistant's words and no others marked."""

import re

import numpy as np
import pytest
import torch

from vlmscope.core.errors import UserError
from vlmscope.core.records import Conversation, Document, Exchange
from vlmscope.interventions.run import generate_batch, generate_edited
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import LOSS_MASK, continued, encode, greedy_answer, sequence_forward
from vlmscope.models.loading import VLM
from vlmscope.models.template import Turn
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPTS = (
    "describe this picture",
    "is this für mich? 🪐 行星",
    "  what is this ?  ",
    "\n\nwhat\n\n is this ?\n",
    " ",
    "",
    # The template's own words, where counting them would go wrong.
    "USER: user assistant ASSISTANT: model ?",
    "<b>this</b>",
)
# No word is said by both, so that a shifted mask shows.
EXCHANGES = (Exchange("what is this ?", "red planet"), Exchange("and the other one ?", "two blue"))


def pictures(vlm: VLM, count: int = 1) -> tuple:
    return tuple(tiny_image(i).resize((48, 24 + 24 * i)) for i in range(count if vlm.adapter.has_vision else 0))


def text(vlm: VLM, inputs: ModelInputs, role: str) -> str:
    return vlm.tokenizer.decode([token for token, r in zip(inputs.input_ids, inputs.roles, strict=True) if r == role])


def marked(vlm: VLM, forward: dict[str, torch.Tensor], by_assistant: bool = True) -> str:
    ids = forward["input_ids"][forward[LOSS_MASK] == by_assistant]
    return " ".join(vlm.tokenizer.decode(ids, skip_special_tokens=True).split())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_question_is_the_prompt_to_the_character(vlm: VLM, prompt: str) -> None:
    inputs = vlm.prepare(prompt, pictures(vlm))
    assert text(vlm, inputs, "question") == prompt
    assert (np.diff(np.flatnonzero(inputs.roles == "question")) == 1).all()
    assert inputs.roles[-1] == "last" and "question" not in inputs.roles[inputs.is_image]
    assert [box is not None for box in inputs.patch_boxes] == inputs.is_image.tolist()
    assert (inputs.image_index == np.where(inputs.is_image, 0, -1)).all()
    other = vlm.prepare("\n Größe \n", pictures(vlm))
    assert text(vlm, inputs, "special") == text(vlm, other, "special")


def test_placeholders_stand_where_the_prompt_spells_them(vlm: VLM) -> None:
    if not vlm.adapter.has_vision:
        return
    mark, two = vlm.adapter.placeholder, [tiny_image(0), tiny_image(1)]
    inputs = vlm.prepare(f"Größe {mark}\nis <eos>{mark} this ?", two)
    assert text(vlm, inputs, "question") == "Größe \nis  this ?"  # neither placeholders nor special tokens
    first, second = (np.flatnonzero(inputs.image_index == n) for n in (0, 1))
    assert "is" in [token.strip() for token in inputs.tokens[first[-1] : second[0]]]
    with pytest.raises(UserError, match=f"spells {re.escape(mark)} 1 times but 2 pictures were given"):
        vlm.prepare(f"what {mark} is", two)


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


def test_nothing_longer_than_the_models_positions_runs(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(vlm)
    inputs = vlm.prepare("what is this ?", images)
    conversation = Conversation(images, EXCHANGES[:1], "line 3")
    (spoken,) = encode(vlm, conversation)
    seen: list[torch.Tensor] = []

    def keep(_module: object, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    hook = vlm.adapter.decoder().rotary_emb.register_forward_pre_hook(keep, with_kwargs=True)
    vlm.adapter.forward(inputs.tensors)
    vlm.adapter.forward({name: tensor for name, tensor in spoken.items() if name != LOSS_MASK})
    hook.remove()
    # What Hugging Face counts; with rows and columns (M-RoPE) a picture takes fewer positions than soft tokens.
    used, used_by_all = (int(positions.max() - positions.min()) + 1 for positions in (seen[0], seen[-1]))
    assert (used < len(inputs)) == vlm.adapter.m_rope
    config = vlm.model.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", used)
    assert len(vlm.prepare("what is this ?", images)) == len(inputs)
    scope = Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 8, 2))
    for longer in (
        lambda: vlm.prepare("what is this ? and", images),
        lambda: continued(vlm.adapter, inputs, [5], vlm.tokenizer),
        lambda: greedy_answer(vlm.adapter, inputs, 1),
        lambda: generate_edited(scope, inputs, max_new_tokens=1),
        lambda: generate_batch(vlm.adapter, [inputs], max_new_tokens=1),
        lambda: sequence_forward(vlm, [5] * (used + 1)),
    ):
        with pytest.raises(UserError, match=f"has {used} positions; shorten"):
            longer()
    monkeypatch.setattr(config, "max_position_embeddings", used_by_all - 1)
    refused = f"line 3: .*{used_by_all} positions.* has {used_by_all - 1} positions; shorten"
    with pytest.raises(UserError, match=refused):
        encode(vlm, conversation)
    assert encode(vlm, conversation, spoken["input_ids"].shape[1] - 1)


@pytest.mark.parametrize("count", [1, 2])
def test_the_assistants_words_are_marked_and_the_users_are_not(vlm: VLM, count: int) -> None:
    forwards = encode(vlm, Conversation(pictures(vlm, count), EXCHANGES))
    # Byte-level tokens of two answers meet without a space. A family without turns gets each exchange as a prompt.
    said = [marked(vlm, forward).replace(" ", "") for forward in forwards]
    assert said == (["redplanet", "twoblue"] if vlm.adapter.needs_pictures else ["redplanettwoblue"])
    rest = " ".join(marked(vlm, forward, False) for forward in forwards)
    assert "what is this ?" in rest and "and the other one ?" in rest
    assert not {"red", "planet", "two", "blue"} & set(rest.split())
    for forward in forwards:
        assert not forward[LOSS_MASK][0, 0]
        assert not (forward[LOSS_MASK] & (forward["input_ids"] == vlm.adapter.soft_token_id())).any()


def test_a_forward_is_the_prompt_and_then_the_answer(vlm: VLM) -> None:
    """What the model predicts from is what `prepare` gives it for the first question."""
    if vlm.model.config.model_type == "llava_onevision":
        return  # its published template puts a space before a finished answer that it does not put before one to come
    forward = encode(vlm, Conversation(pictures(vlm), EXCHANGES[:1]))[0]
    prompt = vlm.prepare(EXCHANGES[0].user, pictures(vlm))
    assert forward["input_ids"][0].tolist()[: len(prompt)] == prompt.input_ids
    first = int(forward.pop(LOSS_MASK)[0].nonzero()[0])
    assert 0 <= first - len(prompt) <= 1  # a template may put a space or a newline before the answer
    with torch.no_grad():
        logits = vlm.model(**forward).logits[0, len(prompt) - 1]
        torch.testing.assert_close(logits, vlm.model(**prompt.tensors).logits[0, -1], rtol=0, atol=1e-5)


def test_plain_text_is_marked_but_for_its_first_token(vlm: VLM) -> None:
    document = Document("what is this red planet ?", "line 4")
    if vlm.adapter.needs_pictures:
        with pytest.raises(UserError, match="line 4: .* not made for text without a picture"):
            encode(vlm, document)
        with pytest.raises(UserError, match="line 5: PaliGemma answers about pictures only; give at least one"):
            encode(vlm, Conversation((), EXCHANGES, "line 5"))
        return
    (forward,) = encode(vlm, document)
    assert forward[LOSS_MASK][0].tolist() == [False] + [True] * (forward["input_ids"].shape[1] - 1)
    assert "this red planet ?" in marked(vlm, forward)
    (cut,) = encode(vlm, document, max_tokens=4)
    assert all(cut[name].tolist() == forward[name][:, :4].tolist() for name in ("input_ids", LOSS_MASK))


def test_long_conversations_are_cut_but_never_through_a_picture(vlm: VLM) -> None:
    conversation = Conversation(pictures(vlm), EXCHANGES, "line 9")
    whole = encode(vlm, conversation)[0]
    cut = encode(vlm, conversation, whole["input_ids"].shape[1] - 1)[0]
    for name in ("input_ids", "attention_mask", LOSS_MASK):
        assert cut[name].tolist() == whole[name][:, :-1].tolist()
    with torch.no_grad():
        vlm.model(**{name: tensor for name, tensor in cut.items() if name != LOSS_MASK})
    if vlm.adapter.has_vision:
        with pytest.raises(UserError, match="line 9: its pictures do not fit into 3 tokens"):
            encode(vlm, conversation, 3)


def test_placeholders_belong_to_the_first_user_turn(vlm: VLM) -> None:
    mark, image = vlm.adapter.placeholder, (tiny_image(0),)
    if not vlm.adapter.has_vision:
        with pytest.raises(UserError, match="line 2: .* takes no pictures but 1 were given"):
            encode(vlm, Conversation(image, EXCHANGES, "line 2"))
        return
    with pytest.raises(UserError, match="line 2: .*spe(lt|lls)"):
        encode(vlm, Conversation(image, (Exchange("what is this ?", f"red {mark}"),), "line 2"))
    with pytest.raises(UserError, match="line 2: .* 2 times but 1 pictures were given"):
        encode(vlm, Conversation(image, (Exchange(f"{mark} {mark} what is this ?", "red"),), "line 2"))
    forward = encode(vlm, Conversation(image, (Exchange(f"what {mark} is this ?", "red planet"), EXCHANGES[1])))[0]
    assert marked(vlm, forward).startswith("red planet")


# In the manner of published ones: pictures before all text, and the answers in a block of their own.
BLOCKS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for item in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ item['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ item['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
STRINGS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
DEAF = "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", [BLOCKS, STRINGS, DEAF, "USER: ASSISTANT:"])
def test_the_models_own_template_is_used(template: str) -> None:
    vlm = tiny_vlm("llava", 5)
    vlm.processor.chat_template = template
    conversation = Conversation((tiny_image(0),), EXCHANGES, "line 8")
    if "add_generation_prompt" not in template:
        with pytest.raises(UserError, match="line 8: the model's chat template does not show 2 exchanges with 1 pic"):
            encode(vlm, conversation)
        if template != DEAF:
            with pytest.raises(UserError, match="chat template does not show the prompt with its 1 pictures"):
                vlm.prepare("what is the red one", [tiny_image(0)])
        return
    (forward,) = encode(vlm, conversation)
    assert marked(vlm, forward).replace(" ", "") == "redplanettwoblue"
    rest = marked(vlm, forward, False)
    assert rest.count("ASSISTANT:") == 2 and "and the other one ?" in rest
    assert int((forward["input_ids"] == vlm.adapter.soft_token_id()).sum()) == 9
    assert vlm.prepare("what is the red one", [tiny_image(0)]).is_image.sum() == 9
