"""The tokenizers of tiny models: any text, few tokens for the words of the tests, the same after a save."""

import pytest

from vlmscope.models.tiny import FAMILIES, WORDS, byte_tokenizer, tiny_vlm

TEXTS = (
    "describe this picture",
    "Was ist das für ein Planet?",
    "какая это планета",
    "行星 🪐\u200d",
    " \n\ttwo  spaces\n",
    "\x00\x7f",
    "",
)


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text", *FAMILIES])
def test_any_text_is_encoded_and_given_back(family: str) -> None:
    vlm = tiny_vlm(family)
    tokenizer = vlm.tokenizer
    assert tokenizer.unk_token is None and 270 < len(tokenizer) < 1500
    assert vlm.adapter.vocab_size == len(tokenizer)  # every id has an embedding
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) <= len(text.encode())


def test_given_words_are_one_token_and_others_their_bytes() -> None:
    tokenizer = byte_tokenizer(("<pad>", "<bos>", "<eos>"), ("USER:", "planet"), named={}, adds_bos=False)

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]

    assert pieces("USER: planet") == ["USER", ":", " planet"]
    assert pieces("planets é") == [*"planets", " ", "\ufffd", "\ufffd"]
    assert tokenizer("<eos>planet")["input_ids"][0] == 2
    assert len(tokenizer) == 3 + 256 + 4  # each word with and without its space


def test_bos_is_added_where_the_family_leaves_it_to_the_tokenizer() -> None:
    assert tiny_vlm("llava").tokenizer("planet")["input_ids"][0] == 1
    gemma = tiny_vlm("gemma3").tokenizer
    assert gemma("planet")["input_ids"] == gemma("planet", add_special_tokens=False)["input_ids"]


def test_prompts_of_the_tests_stay_short() -> None:
    tokenizer = tiny_vlm("llava").tokenizer
    assert len(tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"]) == len(WORDS)
