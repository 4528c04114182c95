"""What every position of a tokenised prompt is: its token, picture, part of the picture and role."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox
from vlmscope.models.base import ModelInputs
from vlmscope.models.template import Turn


def describe_inputs(
    soft_token_id: int | None,
    tokenizer: Any,
    tensors: dict[str, Tensor],
    turn: Turn,
    boxes: Sequence[Sequence[PatchBox]],
    sizes: Sequence[tuple[int, int]] = (),
) -> ModelInputs:
    """Name every position of tokenised inputs.

    Args:
        soft_token_id: the id of soft tokens in `input_ids`, None for a text-only model.
        tokenizer: the model's tokenizer.
        tensors: the model's inputs, batch size 1.
        turn: the prompt in its template, from which the inputs were made.
        boxes: for each picture the box of each of its soft tokens, in order.
        sizes: width and height of each picture in pixels.

    Raises:
        UserError: boxes and soft tokens differ in number, so that the processor and the model do not belong together.
    """
    ids = [int(token) for token in tensors["input_ids"][0]]
    is_image = np.array([token == soft_token_id for token in ids])
    tokens = [tokenizer.decode([token]) for token in ids]
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
    roles = _roles(tokenizer, turn, ids, tokens, is_image)
    return ModelInputs(tensors, tokens, is_image, image_index, patch_boxes, roles, turn.content, tuple(sizes))


def _roles(tokenizer: Any, turn: Turn, ids: list[int], tokens: list[str], is_image: np.ndarray) -> np.ndarray:
    """The role of every position.

    What processors add around soft tokens are special tokens and white space, so words keep their order, and the n-th
    word of the inputs is the n-th word of the turn, where it is known which of them the user wrote.
    """
    added = set(tokenizer.added_tokens_decoder)

    def is_word(token: int, text: str) -> bool:
        return token not in added and bool(text.strip()) and not (text.startswith("<") and text.endswith(">"))

    encoded = tokenizer(turn.text, add_special_tokens=False, return_offsets_mapping=True)
    start, end = len(turn.before), len(turn.before) + len(turn.content)
    written = [
        first < end and last > start
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if is_word(token, tokenizer.decode([token]))
    ]
    words = [p for p, token in enumerate(ids) if not is_image[p] and is_word(token, tokens[p])]
    roles = np.where(is_image, "image", "special").astype("<U8")
    for position, by_user in zip(words, written, strict=True):
        roles[position] = "question" if by_user else "special"
    roles[-1] = "last"
    return roles
