"""One user turn in a model's chat template, kept apart from the template's own words."""

from dataclasses import dataclass
from typing import Any

from vlmscope.core.errors import UserError

_MARK = "\ue000"  # a private character, where the prompt goes; no template spells it


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
    bos = tokenizer.bos_token
    # Templates leave the first token to the tokenizer, which is not asked for special tokens here.
    if bos and not before.startswith(bos) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        before = bos + before
    return Turn(before, prompt, after)


def _render(tokenizer: Any, template: str, content: Any) -> str:
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
