"""Tokens named by the user, as words or ids."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Protocol

from vlmscope.core.errors import UserError


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    unk_token_id: int | None

    def decode(self, token_ids: list[int]) -> str: ...  # a tokenizer's own words

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def get_vocab(self) -> dict[str, int]: ...


def token_id(tokenizer: Tokenizer, word: str, key: str) -> int:
    """The one token of a word; `id:17` is token 17.

    A word is taken as it stands; where it is no single token so, with a space before it, as inside a sentence.

    Args:
        tokenizer: the model's.
        word: as the user wrote it.
        key: the setting that has it, for messages.

    Raises:
        UserError: the word is no single token of the vocabulary; the message names the nearest that is.
    """
    prefix, _, number = word.partition("id:")
    if not prefix and number.isdecimal():
        return int(number)
    for text in (word, " " + word):
        found = _known(tokenizer, text)
        if len(found) == 1:
            return found[0]
    pieces = _known(tokenizer, word)
    vocabulary = {tokenizer.decode([token]).strip(): token for token in tokenizer.get_vocab().values()}
    near = get_close_matches(word.strip(), [text for text in vocabulary if text], n=1, cutoff=0.0)
    hint = f"the nearest is {near[0]!r}" if near else "write it as id:NUMBER"
    if len(pieces) > 1:
        raise UserError(
            f"{key}: {word!r} is {len(pieces)} tokens, not one; {hint} (a whole answer is attribution.answer=)"
        )
    raise UserError(f"{key}: {word!r} is no token of the model; {hint}")


def _known(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text; none if one of them is unknown."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return [] if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids else ids


def answer_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of an answer, as they would follow the prompt.

    Raises:
        UserError: the answer is empty or has a word that the model does not know.
    """
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise UserError("attribution.answer is empty; write what the model would say, as in attribution.answer=mars")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        for word in text.split():
            token_id(tokenizer, word, "attribution.answer")
        raise UserError(f"attribution.answer: the model does not know every word of {text!r}; use other words")
    return ids


def token_ids(tokenizer: Tokenizer, words: Sequence[str], key: str) -> list[int]:
    """`token_id` of several."""
    return [token_id(tokenizer, word, key) for word in words]
