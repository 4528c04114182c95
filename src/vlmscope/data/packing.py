"""Texts and questions packed to sequences.

Questions about one picture: the picture is encoded once as a shared prefix; each question with its answer is a segment
that attends to the prefix and to itself only, at the positions it would have alone. Every segment is therefore exactly
the single-turn prompt that the model meets in use (tests compare the logits), at a fraction of the cost, and no answer
can be copied from another turn.

Documents: joined end to end, each followed by the end-of-sequence token, and cut every `length` tokens, as in the paper
(arXiv 2602.20330). A sequence is one piece for the model: positions run through, and documents in it see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.data.orrery.scenes import Scene

IGNORE = -100
SOFT = "<image_soft_token>"


@dataclass(frozen=True)
class PackedBatch:
    """A padded batch of packed scenes. T is the longest sequence, P the number of scenes with a picture."""

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64, restarting after the prefix for each segment
    segments: Tensor  # [B, T] int64, 0 prefix, 1.. questions, -1 padding
    labels: Tensor  # [B, T] int64, the next token where an answer is to be predicted, else `IGNORE`
    groups: list[list[str]]  # question group ('name', 'sum', ...) of each segment, for each scene
    pixels: Tensor  # [P, 3, 64, 64] float32 in -1..1

    def masks(self, window: int, soft_id: int) -> tuple[Tensor, Tensor]:
        """Boolean attention masks [B, 1, T, T] (True = may attend) of global and of sliding layers."""
        seg, pos = self.segments, self.position_ids
        same = (seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])
        alive = (seg[:, None, :] >= 0) & (seg[:, :, None] >= 0)
        soft = self.input_ids == soft_id
        order = (pos[:, None, :] <= pos[:, :, None]) | (soft[:, None, :] & soft[:, :, None])
        full = same & alive & order
        # Padding attends to itself, so that no row of the softmax is empty.
        full = full | torch.eye(seg.shape[1], dtype=torch.bool)
        return full[:, None], (full & (pos[:, None, :] > pos[:, :, None] - window))[:, None]


def pack(
    scenes: Sequence[Scene], tokenizer, soft_tokens: int, rng: np.random.Generator, max_questions: int = 6
) -> PackedBatch:
    """Pack scenes, questions in random order, answers followed by `<end_of_turn>`."""
    vocabulary = tokenizer.get_vocab()
    rows, groups = [], []
    for scene in scenes:
        asked = [scene.questions[int(i)] for i in rng.permutation(len(scene.questions))[:max_questions]]
        words = ["<bos>", "<start_of_turn>", "user"]
        if scene.image is not None:
            words += ["<start_of_image>", *[SOFT] * soft_tokens, "<end_of_image>"]
        prefix = len(words)
        positions, segments, labels = list(range(prefix)), [0] * prefix, [IGNORE] * prefix
        for number, question in enumerate(asked, start=1):
            prompt = [*question.question.split(), "<end_of_turn>", "<start_of_turn>", "model"]
            answer = [*question.answer.split(), "<end_of_turn>"]
            segment = prompt + answer[:-1]  # the last token predicts nothing that is scored
            words += segment
            positions += range(prefix, prefix + len(segment))
            segments += [number] * len(segment)
            labels += [IGNORE] * (len(prompt) - 1) + [vocabulary[word] for word in answer]
        rows.append(([vocabulary[word] for word in words], positions, segments, labels))
        groups.append([question.group for question in asked])
    length = max(len(row[0]) for row in rows)
    columns = [np.full((len(rows), length), fill, np.int64) for fill in (vocabulary["<pad>"], 0, -1, IGNORE)]
    for i, row in enumerate(rows):
        for column, values in zip(columns, row, strict=True):
            column[i, : len(values)] = values
    images = [scene.image for scene in scenes if scene.image is not None]
    pixels = to_pixels(np.stack(images)) if images else torch.zeros(0, 3, 64, 64)
    return PackedBatch(*map(torch.from_numpy, columns), groups=groups, pixels=pixels)


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1, what Orrery's image processor gives for 64 x 64 pictures."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1.0)


def chat_batch(scenes: Sequence[Scene], tokenizer, soft_tokens: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """One random question a scene with its answer, in the form of the Hugging Face forward.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` [B, T], `pixel_values` [P, 3, 64, 64] (absent without
        pictures) and `loss_mask` [B, T] bool, True at answer tokens.
    """
    batch = pack(scenes, tokenizer, soft_tokens, rng, max_questions=1)
    answers = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    answers[:, 1:] = (batch.labels != IGNORE)[:, :-1]
    alive = batch.segments >= 0
    forward = {
        "input_ids": batch.input_ids,
        "attention_mask": alive.long(),
        "token_type_ids": (batch.input_ids == tokenizer.convert_tokens_to_ids(SOFT)).long(),
        "loss_mask": answers & alive,
    }
    return forward | ({"pixel_values": batch.pixels} if len(batch.pixels) else {})


class TokenPacker:
    """Takes documents, gives sequences; its state is the tokens left over."""

    def __init__(self, eos: int, length: int, bos: int | None = None) -> None:
        """`eos` follows each document, `bos` begins each sequence, for models that expect it."""
        if length < 2:
            raise ValueError(f"a sequence of {length} tokens predicts nothing: it needs at least 2")
        self.eos, self.length, self.head = eos, length, [] if bos is None else [bos]
        self.left: list[int] = []

    def add(self, document: Sequence[int]) -> None:
        """Append a document."""
        self.left += [*document, self.eos]

    def pop(self) -> list[int] | None:
        """A full sequence, if there is one."""
        body = self.length - len(self.head)
        if len(self.left) < body:
            return None
        sequence, self.left = self.head + self.left[:body], self.left[body:]
        return sequence

    def rest(self) -> list[int] | None:
        """What is left at the end of the data, shorter than a full sequence; None when it is nothing."""
        sequence, self.left = self.head + self.left, []
        return sequence if len(sequence) > max(1, len(self.head)) else None
