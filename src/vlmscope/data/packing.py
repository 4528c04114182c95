"""Texts packed to sequences of one length.

Pack several questions about one picture into one sequence without letting them see each other.

The picture is encoded once as a shared prefix; each question with its answer is a segment that attends to the prefix
and to itself only, at the positions it would have alone. Every segment is therefore exactly the single-turn prompt
that the model meets in use (tests compare the logits), at a fraction of the cost, and no answer can be copied from
another turn.

Documents joined end to end and cut into sequences of one length, as the paper does with text (arXiv 2602.20330).

Each document's tokens are followed by the end-of-sequence token; the join is cut every `length` tokens. A sequence is
one piece for the model: positions run through, and documents in it see each other, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.data.orrery.scenes import Question, Scene

IGNORE = -100


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that packing needs, read from the tokenizer once."""

    bos: int
    turn: int
    end_turn: int
    user: int
    model: int
    boi: int
    eoi: int
    soft: int
    pad: int

    @classmethod
    def of(cls, tokenizer) -> SpecialIds:
        """Look the ids up in an Orrery tokenizer."""
        ids = tokenizer.convert_tokens_to_ids
        names = ("<bos>", "<start_of_turn>", "<end_of_turn>", "user", "model", "<start_of_image>", "<end_of_image>")
        return cls(*(ids(n) for n in names), soft=ids("<image_soft_token>"), pad=ids("<pad>"))


@dataclass(frozen=True)
class PackedBatch:
    """A padded batch of packed scenes. T is the longest sequence, P the number of scenes with a picture.

    Attributes:
        input_ids: [B, T] int64.
        position_ids: [B, T] int64, restarting after the prefix for each segment.
        segments: [B, T] int64, 0 prefix, 1.. questions, -1 padding.
        labels: [B, T] int64, the next token where an answer is to be predicted, else -100.
        groups: question group ('name', 'sum', ...) of each segment, for each scene.
        pixels: [P, 3, 64, 64] float32 in -1..1.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    labels: Tensor
    groups: list[list[str]]
    pixels: Tensor

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


def pack(scenes: Sequence[Scene], tokenizer, soft_tokens: int, rng: np.random.Generator, max_questions: int = 6):
    """Pack scenes, questions in random order, answers followed by `<end_of_turn>`. Returns a `PackedBatch`."""
    ids = SpecialIds.of(tokenizer)
    vocabulary = tokenizer.get_vocab()
    rows = []
    for scene in scenes:
        chosen = [scene.questions[int(i)] for i in rng.permutation(len(scene.questions))[:max_questions]]
        rows.append(_pack_one(scene, chosen, ids, vocabulary, soft_tokens))
    length = max(len(r[0]) for r in rows)
    columns = [np.full((len(rows), length), fill, np.int64) for fill in (ids.pad, 0, -1, IGNORE)]
    for i, row in enumerate(rows):
        for column, values in zip(columns, row[:4], strict=True):
            column[i, : len(values)] = values
    pictures = [s.image for s in scenes if s.image is not None]
    pixels = to_pixels(np.stack(pictures)) if pictures else torch.zeros(0, 3, 64, 64)
    tensors = [torch.from_numpy(c) for c in columns]
    return PackedBatch(*tensors, groups=[r[4] for r in rows], pixels=pixels)


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1, what Orrery's image processor gives for 64 x 64 pictures."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1.0)


def _pack_one(scene: Scene, questions: list[Question], ids: SpecialIds, vocabulary: dict[str, int], soft_tokens: int):
    tokens = [ids.bos, ids.turn, ids.user]
    if scene.image is not None:
        tokens += [ids.boi, *[ids.soft] * soft_tokens, ids.eoi]
    prefix = len(tokens)
    positions, segments, labels = list(range(prefix)), [0] * prefix, [IGNORE] * prefix
    for number, question in enumerate(questions, start=1):
        asked = [vocabulary[w] for w in question.question.split()] + [ids.end_turn, ids.turn, ids.model]
        answer = [vocabulary[w] for w in question.answer.split()] + [ids.end_turn]
        segment = asked + answer[:-1]  # the last token predicts nothing that is scored
        tokens += segment
        positions += range(prefix, prefix + len(segment))
        segments += [number] * len(segment)
        labels += [IGNORE] * (len(asked) - 1) + answer
    return tokens, positions, segments, labels, [q.group for q in questions]


class TokenPacker:
    """Takes documents, gives sequences; its state is the tokens left over."""

    def __init__(self, eos: int, length: int, bos: int | None = None) -> None:
        """Start empty.

        Args:
            eos: what follows each document.
            length: tokens of a sequence.
            bos: what begins each sequence, for models that expect it; None for nothing.
        """
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


def packed(documents: Iterable[Sequence[int]], packer: TokenPacker) -> Iterator[list[int]]:
    """All sequences of all documents; no token is lost."""
    for document in documents:
        packer.add(document)
        while (sequence := packer.pop()) is not None:
            yield sequence
    if (sequence := packer.rest()) is not None:
        yield sequence
