"""Prompts of one shape as a batch; conversations and plain text as forwards of a model with a loss mask.

A forward is a dict with the keyword arguments of the Hugging Face model, batch size 1, and `loss_mask [1, T]` bool:
True at the assistant's words, each predicted from the position before it, and at all tokens of plain text except the
first; False at what the template adds, an answer's end included. Words that the tokenizer does not know become its
unknown token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.records import ANSWER, Conversation, Document, PatchBox, Places, Sample, check_characters
from vlmscope.models.base import INJECTIONS, Adapter, ModelInputs, token_strings
from vlmscope.models.loading import VLM, refused_in_one_line
from vlmscope.models.template import Dialogue

CHUNK = 64  # prompts per forward of the vision tower
LOSS_MASK = "loss_mask"
_POSITIONS = "position_ids"
_TEXT = ("attention_mask", "token_type_ids", "mm_token_type_ids")  # inputs `[B, T]` next to `input_ids`


@dataclass(frozen=True)
class InputBatch:
    """B prompts of T tokens each."""

    # Arguments of `Adapter.forward` with `inputs_embeds [B, T, d]` in place of ids and pixels; for M-RoPE also
    # `position_ids [3, B, T]`, for DeepStack `INJECTIONS [B, n, T, d]`.
    tensors: dict[str, Tensor]
    input_ids: Tensor  # [B, T]
    roles: np.ndarray  # [T] position roles, the same for every prompt
    is_image: np.ndarray  # [T] bool
    # T entries, as in `ModelInputs`; empty where the prompts' pictures have different shapes.
    patch_boxes: tuple[PatchBox | None, ...] = ()
    # Attention implementation -> the masks that a forward made, which are an eighth of the time of a small model's.
    _masks: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def places(self) -> Places:
        """Roles and boxes of the positions."""
        return Places(self.roles, self.patch_boxes)

    @property
    def size(self) -> int:
        """B."""
        return int(self.input_ids.shape[0])

    @property
    def length(self) -> int:
        """T."""
        return int(self.input_ids.shape[1])

    @torch.no_grad()
    def next_logits(self, adapter: Adapter) -> Tensor:
        """Logits [B, V] at the last position of a forward, whose attention masks serve those after it if they can."""
        text = adapter.model.config.get_text_config()
        if (masks := self._masks.get(text._attn_implementation)) is not None:
            return adapter.next_logits(self.tensors | {"attention_mask": masks})

        def keep(_module: object, _args: tuple, kwargs: dict) -> None:
            if adapter.takes_masks and isinstance(made := kwargs.get("attention_mask"), dict):
                self._masks[text._attn_implementation] = made

        handle = adapter.decoder().register_forward_pre_hook(keep, with_kwargs=True)
        try:
            return adapter.next_logits(self.tensors)
        finally:
            handle.remove()

    def select(self, rows: Tensor | Sequence[int]) -> InputBatch:
        """The prompts of these rows."""
        index = torch.as_tensor(rows)
        tensors = {
            name: tensor[:, index] if name == _POSITIONS else tensor[index] for name, tensor in self.tensors.items()
        }
        return InputBatch(tensors, self.input_ids[index], self.roles, self.is_image, self.patch_boxes)


@torch.no_grad()
def make_batch(adapter: Adapter, inputs: Sequence[ModelInputs]) -> InputBatch:
    """Stack prompts of equal length with soft tokens at the same positions, and compute their embeddings."""
    if not inputs:
        raise UserError("no inputs to batch: choose at least one picture")
    first = inputs[0]
    for prompt in inputs:
        if len(prompt) != len(first) or not np.array_equal(prompt.is_image, first.is_image):
            raise UserError(
                f"prompts of a batch must align: {first.prompt!r} has {len(first)} tokens, "
                f"{prompt.prompt!r} has {len(prompt)}; use the same wording, and pictures of the same shape"
            )
    # Pictures of different shapes cannot be stacked, even with equal numbers of soft tokens.
    shapes = [{name: tensor.shape[1:] for name, tensor in prompt.tensors.items()} for prompt in inputs]
    chunk = CHUNK if all(shape == shapes[0] for shape in shapes) else 1
    parts = [entering(adapter, inputs[i : i + chunk]) for i in range(0, len(inputs), chunk)]
    # The pictures are in the embeddings now, so that their own inputs (sizes, grids) are not needed any more.
    names = [name for name in _TEXT if name in first.tensors]
    tensors = {name: torch.cat([i.tensors[name] for i in inputs]) for name in names}
    tensors["inputs_embeds"] = torch.cat([part.embeddings for part in parts])
    if adapter.m_rope:
        tensors[_POSITIONS] = torch.cat([part.positions for part in parts if part.positions is not None], dim=1)
    injections = [part.injections for part in parts if part.injections is not None]
    if injections:
        tensors[INJECTIONS] = torch.cat(injections)
    ids = torch.cat([i.tensors["input_ids"] for i in inputs])
    boxes = tuple(first.patch_boxes) if all(i.patch_boxes == first.patch_boxes for i in inputs) else ()
    return InputBatch(tensors, ids, first.roles, first.is_image, boxes)


def aligned(inputs: Sequence[ModelInputs], boxes: bool = False) -> list[list[int]]:
    """Numbers of the prompts that fit into one batch, group by group: of equal roles and soft tokens; with `boxes` also
    of equal patches.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, each in enumerate(inputs):
        key = each.is_image.tobytes(), *each.roles.tolist(), *(each.patch_boxes if boxes else ())
        groups.setdefault(key, []).append(number)
    return list(groups.values())


class Entering(NamedTuple):
    """Inputs of the decoder: `embeddings [B, T, d]`; for M-RoPE `positions [3, B, T]`, which embeddings alone
    do not determine; for DeepStack `injections [B, n, T, d]`.
    """

    embeddings: Tensor
    positions: Tensor | None
    injections: Tensor | None


def entering(adapter: Adapter, inputs: Sequence[ModelInputs]) -> Entering:
    """The inputs that the model makes for its decoder, with gradient."""
    tensors = {name: torch.cat([i.tensors[name] for i in inputs]) for name in inputs[0].tensors}
    args, kwargs = adapter.arguments_of(adapter.decoder(), tensors)
    embeddings = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
    positions, injections = kwargs.get(_POSITIONS), adapter.injections(kwargs)
    if embeddings is None:  # a text-only model embeds inside its decoder
        embeddings = adapter.model.get_input_embeddings()(tensors["input_ids"])
    if not adapter.m_rope:
        positions = None
    elif positions is None:  # text alone
        size, length = embeddings.shape[:2]
        positions = torch.arange(length, device=embeddings.device).expand(3, size, -1)
    return Entering(embeddings, positions, injections)


@contextmanager
def watching_injections(adapter: Adapter) -> Iterator[list[Tensor]]:
    """A list to which every forward appends its injections `[B, n, T, d]`, if it has any."""
    recorded: list[Tensor] = []

    def hook(_module: object, _args: tuple, kwargs: dict) -> None:
        injections = adapter.injections(kwargs)
        if injections is not None:
            recorded.append(injections)

    handle = adapter.decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield recorded
    finally:
        handle.remove()


@torch.no_grad()
def generated(adapter: Adapter, tensors: Mapping[str, Tensor], max_tokens: int) -> Tensor:
    """Greedy decoding: `[B, at most max_tokens]` ids, ends included, padding after them."""
    adapter.check_length(tensors, max_tokens)

    def check(_module: object, _args: tuple, output: Any) -> None:
        adapter.finite(output.logits[:, -1])  # argmax over NaN would give token 0

    handle = adapter.model.register_forward_hook(check)  # sees the logits before generation masks tokens with -inf
    try:
        ids = adapter.model.generate(**tensors, max_new_tokens=max_tokens, do_sample=False, use_cache=True)
    finally:
        handle.remove()
    return ids[:, tensors["input_ids"].shape[1] :]


def greedy_answer(adapter: Adapter, inputs: ModelInputs, max_tokens: int) -> list[int]:
    """The model's own answer by `generated`: at most `max_tokens` ids, its end included."""
    return generated(adapter, inputs.tensors, max_tokens)[0].tolist()


def continued(adapter: Adapter, inputs: ModelInputs, token_ids: Sequence[int], tokenizer: Any) -> ModelInputs:
    """The prompt followed by these tokens, of role "answer", as the model sees it while it answers."""
    count = len(token_ids)
    if count == 0:
        return inputs
    adapter.check_length(inputs.tensors, count)
    more = {
        "input_ids": list(token_ids),
        "attention_mask": [1] * count,
        "token_type_ids": [adapter.answer_type] * count,
        "mm_token_type_ids": [0] * count,
    }
    tensors = {
        name: torch.cat([tensor, tensor.new_tensor([more[name]])], dim=1) if name in more else tensor
        for name, tensor in inputs.tensors.items()
    }
    return replace(
        inputs,
        tensors=tensors,
        tokens=[*inputs.tokens, *token_strings(tokenizer, token_ids)],
        is_image=np.append(inputs.is_image, np.zeros(count, dtype=bool)),
        image_index=np.append(inputs.image_index, np.full(count, -1)),
        patch_boxes=[*inputs.patch_boxes, *[None] * count],
        roles=np.append(inputs.roles, np.full(count, ANSWER)),
    )


def encode(vlm: VLM, sample: Sample, max_tokens: int | None = None) -> list[dict[str, Tensor]]:
    """The forwards of one example: one, or one per exchange for a family without turns (PaliGemma).

    Longer ones are cut at `max_tokens`, but not through a picture. A `UserError` names the example's origin.
    """
    try:
        if isinstance(sample, Document):
            return [sequence_forward(vlm, text_ids(vlm, sample.text, whole=True)[:max_tokens])]
        n_images = len(sample.images)
        dialogues = vlm.adapter.wrap_exchanges(sample.exchanges, n_images, vlm.tokenizer, vlm.chat_template)
        return [_cut(vlm, _dialogue(vlm, dialogue, sample), max_tokens) for dialogue in dialogues]
    except UserError as error:
        raise UserError(f"{sample.origin}: {error}" if sample.origin else str(error)) from error


def _dialogue(vlm: VLM, dialogue: Dialogue, sample: Conversation) -> dict[str, Tensor]:
    if dialogue.suffix is not None:
        check_characters(dialogue.suffix, "the answer")
        tensors = vlm.tokenised(dialogue.text, sample.images, suffix=[dialogue.suffix])
        answer = (tensors["token_type_ids"] == 1) & (tensors["input_ids"] != vlm.tokenizer.eos_token_id)
        return {**tensors, LOSS_MASK: answer}
    tensors = vlm.tokenised(dialogue.text, sample.images)
    ids = tensors["input_ids"]
    tail = _tail_by_assistant(vlm.tokenizer, dialogue, ids[0].tolist())
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, ids.shape[1] - len(tail) :] = torch.tensor(tail)
    return {**tensors, LOSS_MASK: mask}


def _tail_by_assistant(tokenizer: Any, dialogue: Dialogue, ids: list[int]) -> list[bool]:
    """Which of the tokens from the first answer on overlap the assistant's words.

    Pictures come before the first answer, and placeholders and soft tokens are special tokens, so that from there
    on the tokens are those of the text alone, for which the tokenizer gives the characters that each covers.
    """
    encoded = tokenizer(dialogue.text, add_special_tokens=False, return_offsets_mapping=True)
    by_assistant = np.concatenate([np.full(len(text), by_assistant) for text, by_assistant in dialogue.spans])
    answered = [bool(by_assistant[first:last].any()) for first, last in encoded["offset_mapping"]]
    first = answered.index(True) if any(answered) else len(answered)
    tail = encoded["input_ids"][first:]
    if ids[len(ids) - len(tail) :] != tail:
        raise UserError("the processor changes the words of the answers; use the processor saved with the model")
    return answered[first:]


def _cut(vlm: VLM, forward: dict[str, Tensor], max_tokens: int | None) -> dict[str, Tensor]:
    """The forward cut at `max_tokens`; a `UserError` where it exceeds the model's positions."""
    ids = forward["input_ids"]
    if max_tokens is not None and ids.shape[1] > max_tokens:
        if vlm.adapter.has_vision and (ids[:, max_tokens:] == vlm.adapter.soft_token_id()).any():
            raise UserError(
                f"its pictures do not fit into {max_tokens} tokens ({ids.shape[1]} with the text); raise "
                "task.max_tokens, or give fewer or smaller pictures"
            )
        by_position = ("input_ids", *_TEXT, LOSS_MASK)
        forward = {name: tensor[:, :max_tokens] if name in by_position else tensor for name, tensor in forward.items()}
    vlm.adapter.check_length(forward)
    return forward


def text_ids(vlm: VLM, text: str, whole: bool = False) -> list[int]:
    """The tokens of a text; if it is `whole`, with the special tokens that the tokenizer adds around it."""
    adapter = vlm.adapter
    if adapter.needs_pictures:
        raise UserError(f"{type(vlm.model).__name__} is not made for text without a picture; leave the line out")
    check_characters(text, "the text")
    with refused_in_one_line(text):
        ids = vlm.tokenizer(text, add_special_tokens=whole)["input_ids"]
    if adapter.has_vision and adapter.soft_token_id() in ids:
        raise UserError("the text spells the token that stands for a picture; take it out")
    return ids


def sequence_forward(vlm: VLM, ids: list[int]) -> dict[str, Tensor]:
    """Tokens of plain text as a forward; a `UserError` where they exceed the model's positions."""
    row = torch.tensor([ids], device=vlm.adapter.device)
    mask = torch.ones_like(row, dtype=torch.bool)
    mask[:, 0] = False
    forward = {"input_ids": row, "attention_mask": torch.ones_like(row), LOSS_MASK: mask}
    vlm.adapter.check_length(forward)
    return forward


def ends_of_text(tokenizer: Any) -> tuple[int, int | None]:
    """The token that ends a document, and the one that the tokenizer puts before one (None: it puts none)."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token, with which texts are joined; set its eos_token")
    bos = tokenizer.bos_token_id
    starts = bos is not None and tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos]
    return tokenizer.eos_token_id, bos if starts else None


def by_shape(forwards: Sequence[Mapping[str, Tensor]]) -> list[list[int]]:
    """Indices of the forwards whose tensors have equal shapes; groups in order of appearance."""
    groups: dict[tuple, list[int]] = {}
    for number, forward in enumerate(forwards):
        key = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(forward.items()))
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def joined(forwards: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Forwards of equal shapes, concatenated along the first axis."""
    return {name: torch.cat([forward[name] for forward in forwards]) for name in forwards[0]}
