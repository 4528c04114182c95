"""What every position of a tokenised prompt is: its token, picture, part of the picture and role."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox
from vlmscope.models.base import ModelInputs
from vlmscope.models.template import Turn


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """What each token stands for in text, a space before a word included.

    The vocabulary's own spelling is not for readers: byte-level ones write a space as another letter and every byte
    beyond ASCII as one. A token that is a part of a character is the replacement character.
    """
    return [tokenizer.decode([int(token)]) for token in ids]


def describe_inputs(
    soft_token_id: int | None,
    tokenizer: Any,
    tensors: dict[str, Tensor],
    turn: Turn,
    boxes: Sequence[Sequence[PatchBox]],
    written: np.ndarray,
    sizes: Sequence[tuple[int, int]] = (),
) -> ModelInputs:
    """Name every position of tokenised inputs.

    Args:
        soft_token_id: the id of soft tokens in `input_ids`, None for a text-only model.
        tokenizer: the model's tokenizer.
        tensors: the model's inputs, batch size 1.
        turn: the prompt in its template, from which the inputs were made.
        boxes: for each picture the box of each of its soft tokens, in order.
        written: `[T]` bool, tokens with a part of what the user wrote, as `written_by_user` finds them.
        sizes: width and height of each picture in pixels.

    Raises:
        UserError: boxes and soft tokens differ in number, so that the processor and the model do not belong together.
    """
    ids = [int(token) for token in tensors["input_ids"][0]]
    is_image = np.array([token == soft_token_id for token in ids])
    tokens = token_strings(tokenizer, ids)
    flat = [(picture, box) for picture, found in enumerate(boxes) for box in found]
    if len(flat) != is_image.sum():
        raise UserError(
            f"the processor made {is_image.sum()} soft tokens where the model's pictures have {len(flat)}; "
            "use the processor that was saved with the model"
        )
    image_index = np.full(len(ids), -1, dtype=np.int64)
    patch_boxes: list[PatchBox | None] = [None] * len(ids)
    for position, (picture, box) in zip(np.flatnonzero(is_image), flat, strict=True):
        image_index[position], patch_boxes[position] = picture, box
    # Special tokens that the user spells are the template's all the same.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    by_user = written & np.array([token not in special for token in ids])
    roles = np.select([is_image, by_user], ["image", "question"], "special").astype("<U8")
    roles[-1] = "last"
    return ModelInputs(tensors, tokens, is_image, image_index, patch_boxes, roles, turn.content, tuple(sizes))


def written_by_user(turn: Turn, replaced: Sequence[Mapping[str, Any]], offsets: np.ndarray) -> np.ndarray:
    """Which tokens hold a part of the prompt, told by characters.

    Neither words nor ids would do: a character may be several tokens, a token may reach from the template into the
    prompt, and what the processor puts around soft tokens may change how the text beside it is cut.

    Args:
        turn: the text before placeholders were replaced.
        replaced: what the processor put in the place of placeholders, in order: `span`, first and last character (past
            the end) in the turn, `text`, what stood there, and `replacement`.
        offsets: `[T, 2]`, first and last character (past the end) of every token in the text after the replacement.

    Returns:
        `[T]` bool. What replaces a placeholder is not written by the user, wherever it was spelt.
    """
    start, end = len(turn.before), len(turn.before) + len(turn.content)
    prompt = np.zeros(len(turn.text), dtype=bool)
    prompt[start:end] = True
    pieces, done = [], 0
    for change in replaced:
        first, last = change["span"]
        assert turn.text[first:last] == change["text"], "the processor was given another text than the turn"
        pieces += [prompt[done:first], np.zeros(len(change["replacement"]), dtype=bool)]
        done = last
    characters = np.concatenate([*pieces, prompt[done:]])
    assert offsets.max(initial=0) <= len(characters), "the processor added text that the turn does not have"
    return np.array([characters[first:last].any() for first, last in offsets], dtype=bool)
