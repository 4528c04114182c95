"""Conversations as forwards: for every family the marked tokens are the assistant's words and no others."""

import pytest
import torch

from vlmscope.core.errors import UserError
from vlmscope.core.records import Conversation, Document, Exchange
from vlmscope.models.conversations import LOSS_MASK, encode
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm

# No word is said by both, so that a shifted mask shows.
EXCHANGES = (
    Exchange("what is this ?", "red planet"),
    Exchange("and the other one ?", "two blue"),
)


@pytest.fixture(scope="module", params=["gemma3", "gemma3_text", *FAMILIES])
def vlm(request: pytest.FixtureRequest) -> VLM:
    return tiny_vlm(request.param, 5)


def pictures(vlm: VLM, count: int) -> tuple:
    return tuple(tiny_image(i).resize((48, 24 + 24 * i)) for i in range(count if vlm.adapter.has_vision else 0))


def said(vlm: VLM, forward: dict[str, torch.Tensor]) -> str:
    """The marked tokens' words."""
    ids = forward["input_ids"][forward[LOSS_MASK]]
    return " ".join(vlm.tokenizer.decode(ids, skip_special_tokens=True).split())


def unmarked(vlm: VLM, forward: dict[str, torch.Tensor]) -> str:
    ids = forward["input_ids"][~forward[LOSS_MASK]]
    return " ".join(vlm.tokenizer.decode(ids, skip_special_tokens=True).split())


@pytest.mark.parametrize("count", [1, 2])
def test_the_assistants_words_are_marked_and_the_users_are_not(vlm: VLM, count: int) -> None:
    forwards = encode(vlm, Conversation(pictures(vlm, count), EXCHANGES))
    if vlm.adapter.needs_pictures:  # no turns: each exchange is a prompt of its own
        assert [said(vlm, one) for one in forwards] == ["red planet", "two blue"]
    else:
        assert len(forwards) == 1
        words = said(vlm, forwards[0])
        # Byte-level tokens of two answers meet without a space.
        assert words.replace(" ", "") == "redplanettwoblue"
    rest = " ".join(unmarked(vlm, one) for one in forwards)
    assert "what is this ?" in rest and "and the other one ?" in rest
    assert not {"red", "planet", "two", "blue"} & set(rest.split())
    for one in forwards:
        assert not one[LOSS_MASK][0, 0]
        assert not (one[LOSS_MASK] & (one["input_ids"] == vlm.adapter.soft_token_id())).any()


def test_a_forward_is_the_prompt_and_then_the_answer(vlm: VLM) -> None:
    """What the model predicts from is what `prepare` gives it for the first question."""
    images = pictures(vlm, 1)
    forward = encode(vlm, Conversation(images, EXCHANGES[:1]))[0]
    prompt = vlm.prepare(EXCHANGES[0].user, images)
    ids = forward["input_ids"][0].tolist()
    if vlm.model.config.model_type == "llava_onevision":
        # Its published template puts a space before a finished answer that it does not put before one to come.
        words = [i for i in ids if vlm.tokenizer.decode([i]).strip()]
        asked = [i for i in prompt.input_ids if vlm.tokenizer.decode([i]).strip()]
        assert words[: len(asked)] == asked
        return
    assert ids[: len(prompt)] == prompt.input_ids
    first = int(forward[LOSS_MASK][0].nonzero()[0])
    assert 0 <= first - len(prompt) <= 1  # a template may put a space or a newline before the answer
    inputs = {name: tensor for name, tensor in forward.items() if name != LOSS_MASK}
    with torch.no_grad():
        logits = vlm.model(**inputs).logits[0, len(prompt) - 1]
        alone = vlm.model(**prompt.tensors).logits[0, -1]
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


def test_pictures_move_what_a_forward_computes(vlm: VLM) -> None:
    if not vlm.adapter.has_vision:
        with pytest.raises(UserError, match="line 3: .* takes no pictures but 1 were given"):
            encode(vlm, Conversation((tiny_image(0),), EXCHANGES, "line 3"))
        return
    both = [encode(vlm, Conversation((tiny_image(i),), EXCHANGES))[0] for i in (0, 1)]
    for one in both:
        one.pop(LOSS_MASK)
    with torch.no_grad():
        first, second = (vlm.model(**one).logits[0, -1] for one in both)
    assert (first - second).abs().max() > 1e-3


def test_plain_text_is_marked_but_for_its_first_token(vlm: VLM) -> None:
    document = Document("what is this red planet ?", "line 4")
    if vlm.adapter.needs_pictures:
        with pytest.raises(UserError, match="line 4: .* not made for text without a picture"):
            encode(vlm, document)
        with pytest.raises(UserError, match="line 5: PaliGemma answers about pictures only"):
            encode(vlm, Conversation((), EXCHANGES, "line 5"))
        return
    (forward,) = encode(vlm, document)
    assert forward[LOSS_MASK][0].tolist() == [False] + [True] * (forward["input_ids"].shape[1] - 1)
    assert "this red planet ?" in said(vlm, forward)
    (cut,) = encode(vlm, document, max_tokens=4)
    assert cut["input_ids"].tolist() == forward["input_ids"][:, :4].tolist()
    assert cut[LOSS_MASK].shape == (1, 4)


def test_long_conversations_are_cut_but_never_through_a_picture(vlm: VLM) -> None:
    conversation = Conversation(pictures(vlm, 1), EXCHANGES, "line 9")
    whole = encode(vlm, conversation)[0]
    length = whole["input_ids"].shape[1]
    cut = encode(vlm, conversation, length - 1)[0]
    for name in ("input_ids", "attention_mask", LOSS_MASK):
        assert cut[name].tolist() == whole[name][:, :-1].tolist()
    with torch.no_grad():
        vlm.model(**{name: tensor for name, tensor in cut.items() if name != LOSS_MASK})
    if vlm.adapter.has_vision:
        with pytest.raises(UserError, match="line 9: its pictures do not fit into 3 tokens"):
            encode(vlm, conversation, 3)


def test_placeholders_belong_to_the_first_user_turn(vlm: VLM) -> None:
    if not vlm.adapter.has_vision:
        return
    is_gemma3 = vlm.model.config.model_type == "gemma3"
    placeholder = vlm.tokenizer.boi_token if is_gemma3 else vlm.adapter.placeholder  # pyright: ignore
    answered = (Exchange("what is this ?", f"red {placeholder}"),)
    with pytest.raises(UserError, match="line 2: .*spe(lt|lls)"):
        encode(vlm, Conversation((tiny_image(0),), answered, "line 2"))
    asked = (Exchange(f"{placeholder} {placeholder} what is this ?", "red"),)
    with pytest.raises(UserError, match="line 2: .* 2 times but 1 pictures were given"):
        encode(vlm, Conversation((tiny_image(0),), asked, "line 2"))
    spelt = (Exchange(f"what {placeholder} is this ?", "red planet"), EXCHANGES[1])
    forward = encode(vlm, Conversation((tiny_image(0),), spelt))[0]
    assert said(vlm, forward).startswith("red planet")


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


@pytest.mark.parametrize("template", [BLOCKS, STRINGS])
def test_the_models_own_template_is_used(template: str) -> None:
    vlm = tiny_vlm("llava", 5)
    vlm.processor.chat_template = template
    (forward,) = encode(vlm, Conversation((tiny_image(0),), EXCHANGES))
    assert said(vlm, forward).replace(" ", "") == "redplanettwoblue"
    assert unmarked(vlm, forward).count("ASSISTANT:") == 2 and "and the other one ?" in unmarked(vlm, forward)
    soft = int((forward["input_ids"] == vlm.adapter.soft_token_id()).sum())
    assert soft == 9


def test_a_template_without_answers_is_refused() -> None:
    vlm = tiny_vlm("llava", 5)
    vlm.processor.chat_template = DEAF
    with pytest.raises(UserError, match="line 8: the model's chat template does not show 2 exchanges with 0 pictures"):
        encode(vlm, Conversation((), EXCHANGES, "line 8"))
