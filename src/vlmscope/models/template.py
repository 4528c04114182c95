"""User turns and conversations in a model's chat template, their own text kept apart from the template's words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange

# Placeholders for the text of each role: private-use characters, which no template spells.
_MARKS = {"user": "\ue000", "assistant": "\ue001"}


@dataclass(frozen=True)
class Turn:
    """A user turn as the model's input, before pictures become soft tokens: `before + content + after`.

    `content` is the prompt; before and after it are the template's words, pictures' placeholders among them.
    """

    before: str
    content: str
    after: str

    @property
    def text(self) -> str:
        """The whole turn."""
        return self.before + self.content + self.after

    def written(self, replaced: Sequence[Mapping[str, Any]], offsets: np.ndarray) -> np.ndarray:
        """Which tokens hold a part of the prompt, by characters: `[T]` bool.

        Words or ids would not do: a character may be several tokens, a token may reach from the template into the
        prompt, and text that the processor puts around soft tokens may change how the text next to it is split.

        Args:
            replaced: the processor's replacements of placeholders, in order: `span`, first character and end in the
                turn, the `text` there, and its `replacement`, which is not the user's.
            offsets: `[T, 2]`, first character and end of every token in the text after the replacements.
        """
        start = len(self.before)
        prompt = np.zeros(len(self.text), dtype=bool)
        prompt[start : start + len(self.content)] = True
        pieces, done = [], 0
        for change in replaced:
            first, last = change["span"]
            assert self.text[first:last] == change["text"], "the processor was given another text than the turn"
            pieces += [prompt[done:first], np.zeros(len(change["replacement"]), dtype=bool)]
            done = last
        characters = np.concatenate([*pieces, prompt[done:]])
        assert offsets.max(initial=0) <= len(characters), "the processor added text that the turn does not have"
        return np.array([characters[first:last].any() for first, last in offsets], dtype=bool)


class Span(NamedTuple):
    """A piece of a conversation's text."""

    text: str
    by_assistant: bool


@dataclass(frozen=True)
class Dialogue:
    """A conversation as the model's input, before pictures become soft tokens."""

    spans: tuple[Span, ...]  # in order; the template's and the user's words are not `by_assistant`
    # The answer, for a processor that joins it to the prompt itself (PaliGemma); no span is then `by_assistant`.
    suffix: str | None = None

    @property
    def text(self) -> str:
        """All spans in one."""
        return "".join(span.text for span in self.spans)


def spelt_placeholders(prompt: str, placeholder: str, n_images: int) -> int:
    """The number of placeholders that the prompt spells: none, or one per picture, else a `UserError`."""
    spelt = prompt.count(placeholder)
    if spelt not in (0, n_images):
        raise UserError(
            f"the prompt spells {placeholder} {spelt} times but {n_images} pictures were given; make them equal"
        )
    return spelt


def user_turn(tokenizer: Any, template: str, prompt: str, placeholder: str, n_images: int) -> Turn:
    """Render a Hugging Face chat template (Jinja) around a verbatim prompt.

    The template places the pictures unless the prompt spells their placeholders.
    """
    n_given = n_images - spelt_placeholders(prompt, placeholder, n_images)
    words = _template_words(tokenizer, template, ["user"], placeholder, n_given)
    if words is None:
        raise UserError(f"the model's chat template does not show the prompt with its {n_images} pictures; repair it")
    return Turn(words[0], prompt, words[1])


def dialogue(tokenizer: Any, template: str, exchanges: Sequence[Exchange], placeholder: str, n_images: int) -> Dialogue:
    """`user_turn` for a conversation; only its first prompt may spell the pictures' placeholders."""
    later = [exchanges[0].assistant, *(text for exchange in exchanges[1:] for text in exchange)]
    if any(placeholder in text for text in later):
        raise UserError(f"{placeholder} is spelt after the first user turn; pictures come with the first user turn")
    n_given = n_images - spelt_placeholders(exchanges[0].user, placeholder, n_images)
    words = _template_words(tokenizer, template, ["user", "assistant"] * len(exchanges), placeholder, n_given)
    if words is None:
        raise UserError(
            f"the model's chat template does not show {len(exchanges)} exchanges with {n_images} pictures as they "
            "were said; repair it"
        )
    spans = [Span(words[0], False)]
    for exchange, between, after in zip(exchanges, words[1::2], words[2::2], strict=True):
        spans += [Span(exchange.user + between, False), Span(exchange.assistant, True), Span(after, False)]
    return Dialogue(tuple(spans))


def _template_words(
    tokenizer: Any, template: str, roles: Sequence[str], placeholder: str, n_images: int
) -> list[str] | None:
    """The template's words before, between and after the texts of these roles; None where it leaves some text out."""
    marks = [_MARKS[role] for role in roles]
    for as_items in (True, False):  # a template for text alone takes a string
        messages = []
        for number, (role, mark) in enumerate(zip(roles, marks, strict=True)):
            count = n_images if number == 0 else 0
            items = [{"type": "image"}] * count + [{"type": "text", "text": mark}]
            messages.append({"role": role, "content": items if as_items else placeholder * count + mark})
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=roles[-1] == "user"
            )
        except (TypeError, TemplateError):
            continue
        words = re.split("|".join(_MARKS.values()), text)
        if [character for character in text if character in marks] != marks or "'type'" in words[0]:
            continue  # it dropped a text, or printed the list of items
        if words[0].count(placeholder) != n_images:
            return None
        # Templates may leave the first token to the tokenizer, which later runs without special tokens.
        bos = tokenizer.bos_token
        if bos and not words[0].startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
            words[0] = bos + words[0]
        return words
    return None
