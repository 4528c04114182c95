"""User turns and conversations in a model's chat template, kept apart from the template's own words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange

_MARK = "\ue000"  # a private character, where the prompt goes; no template spells it
_ANSWER = "\ue001"  # where an answer goes


@dataclass(frozen=True)
class Turn:
    """What the model is given, before pictures become soft tokens: `before + content + after`.

    Attributes:
        before: the template's words before the prompt, pictures' placeholders among them.
        content: the prompt.
        after: the template's words after it.
    """

    before: str
    content: str
    after: str

    @property
    def text(self) -> str:
        """The whole of it."""
        return self.before + self.content + self.after


class Span(NamedTuple):
    """A piece of a conversation's text."""

    text: str
    by_assistant: bool


@dataclass(frozen=True)
class Dialogue:
    """A conversation as the model is given it, before pictures become soft tokens.

    Attributes:
        spans: in order; the template's and the user's words are not `by_assistant`.
        suffix: the answer, for a processor that joins it to the prompt itself (PaliGemma); no span is then
            `by_assistant`.
    """

    spans: tuple[Span, ...]
    suffix: str | None = None

    @property
    def text(self) -> str:
        """All spans in one."""
        return "".join(span.text for span in self.spans)


def spelt_placeholders(prompt: str, placeholder: str, n_images: int) -> int:
    """How many placeholders the prompt spells: none, or one a picture.

    Raises:
        UserError: it spells another number.
    """
    spelt = prompt.count(placeholder)
    if spelt not in (0, n_images):
        raise UserError(
            f"the prompt spells {placeholder} {spelt} times but {n_images} pictures were given; make them equal"
        )
    return spelt


def user_turn(tokenizer: Any, template: str, prompt: str, placeholder: str, n_images: int) -> Turn:
    """Render a Hugging Face chat template around a prompt taken verbatim.

    Args:
        tokenizer: renders the template and knows its special tokens.
        template: a chat template in Jinja.
        prompt: what the user says; when it spells no placeholder, the template places the pictures.
        placeholder: what stands for a picture.
        n_images: the number of pictures.

    Raises:
        UserError: the prompt spells another number of placeholders than there are pictures, or the template does not
            show what the user says.
    """
    n_given = 0 if spelt_placeholders(prompt, placeholder, n_images) else n_images
    items = [{"type": "image"}] * n_given + [{"type": "text", "text": _MARK}]
    before, found, after = _render(tokenizer, template, items).partition(_MARK)
    if not found or "'type'" in before:  # a template for text alone takes a string, and would print the list
        before, found, after = _render(tokenizer, template, placeholder * n_given + _MARK).partition(_MARK)
    if not found or before.count(placeholder) + prompt.count(placeholder) != n_images:
        raise UserError(f"the model's chat template does not show the prompt with its {n_images} pictures; repair it")
    return Turn(_first_token(tokenizer, before) + before, prompt, after)


def dialogue(tokenizer: Any, template: str, exchanges: Sequence[Exchange], placeholder: str, n_images: int) -> Dialogue:
    """Render a Hugging Face chat template around what user and assistant say, taken verbatim.

    Args:
        tokenizer: renders the template and knows its special tokens.
        template: a chat template in Jinja.
        exchanges: what they say; the first may spell the pictures' placeholders, else the template places them first.
        placeholder: what stands for a picture.
        n_images: the number of pictures.

    Raises:
        UserError: placeholders are spelt elsewhere or in another number, or the template cannot show an answer.
    """
    n_given = 0 if spelt_in_first(exchanges, placeholder, n_images) else n_images

    def render(as_items: bool) -> list[str]:
        messages: list[dict[str, Any]] = []
        for number in range(len(exchanges)):
            n_here = n_given if number == 0 else 0
            for role, mark, count in (("user", _MARK, n_here), ("assistant", _ANSWER, 0)):
                items = [{"type": "image"}] * count + [{"type": "text", "text": mark}]
                messages.append({"role": role, "content": items if as_items else placeholder * count + mark})
        text = _apply(tokenizer, template, messages, add_generation_prompt=False)
        return re.split(f"({_MARK}|{_ANSWER})", text)

    wanted = [_MARK, _ANSWER] * len(exchanges)
    pieces = render(as_items=True)
    if pieces[1::2] != wanted or "'type'" in pieces[0]:
        pieces = render(as_items=False)
    if pieces[1::2] != wanted or pieces[0].count(placeholder) != n_given:
        raise UserError(
            f"the model's chat template does not show {len(exchanges)} exchanges with {n_images} pictures as they "
            "were said; repair it"
        )
    spans = [Span(_first_token(tokenizer, pieces[0]) + pieces[0], False)]
    for exchange, between, after in zip(exchanges, pieces[2::4], pieces[4::4], strict=True):
        spans += [Span(exchange.user + between, False), Span(exchange.assistant, True), Span(after, False)]
    return Dialogue(tuple(spans))


def spelt_in_first(exchanges: Sequence[Exchange], placeholder: str, n_images: int) -> int:
    """How many placeholders the first user turn spells: none, or one a picture.

    Raises:
        UserError: it spells another number, or some other turn spells one.
    """
    later = [exchanges[0].assistant, *(text for exchange in exchanges[1:] for text in exchange)]
    if any(placeholder in text for text in later):
        raise UserError(f"{placeholder} is spelt after the first user turn; pictures come with the first user turn")
    return spelt_placeholders(exchanges[0].user, placeholder, n_images)


def _first_token(tokenizer: Any, text: str) -> str:
    """The first token's string where `text` lacks it: templates leave it to the tokenizer, which is not asked here."""
    bos = tokenizer.bos_token
    missing = bos and not text.startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return bos if missing else ""


def _render(tokenizer: Any, template: str, content: Any) -> str:
    return _apply(tokenizer, template, [{"role": "user", "content": content}], add_generation_prompt=True)


def _apply(tokenizer: Any, template: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """The rendered messages, or nothing when the template cannot take them: one for strings chokes on lists."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TypeError, TemplateError):
        return ""
