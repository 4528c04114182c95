"""Batches for the training of transcoders, from conversations or a mix of sources, and the activations at their tokens.

A forward is a dict with the keyword arguments of the Hugging Face model (`input_ids` [B, T], `attention_mask` [B, T],
`pixel_values`, `token_type_ids`) and, for the cross-entropy, `loss_mask` [B, T] bool: True at answer tokens, each of
which is predicted from the position before it. A batch is one forward or a list of them, with their tokens combined.
Batch n depends only on the seed and n.

Scenes are packed (`pack`) with the picture as a shared prefix: each question with its answer is a segment that attends
to the prefix and to itself only, at the positions it would have alone. A segment is therefore exactly the single-turn
prompt that the model meets in use (tests compare the logits), at a fraction of the cost, and no answer can be copied
from another turn. Documents are packed (`TokenPacker`) end to end, each followed by the end-of-sequence token, and cut
every `length` tokens as in the paper (arXiv 2602.20330): positions run through, and documents in a sequence attend to
each other.

Shapes: N valid tokens of the batch, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations import capture_mlp
from vlmscope.core.artifacts import read_json, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import Sample
from vlmscope.data.mixing import ShuffledSource, TokenMix
from vlmscope.data.orrery.scenes import Question, Scene
from vlmscope.data.samples import WHOLE, RawSample, Share, drawn
from vlmscope.models.base import Stack
from vlmscope.models.batching import LOSS_MASK, by_shape, encode, ends_of_text, joined, sequence_forward, text_ids
from vlmscope.models.loading import VLM

ENDED = "add data.sources.NAME.repeat=true, give more data, or lower trainer.max_steps"  # advice when data have ended
EVERY = 8  # batches between two states of a mix that are kept
_KEPT = 128  # states
_PROBES = 16  # examples from which the average number of tokens is estimated

Forward = Mapping[str, Tensor]
EncodedForward = dict[str, Tensor]
Batch = Forward | Sequence[Forward]
Encoder = Callable[[Sample], list[EncodedForward]]  # such as vlmscope.models.batching.encode with its model
_Held = Callable[[], list[EncodedForward]]  # makes the forwards of a validation sample


class OwnPart(list[EncodedForward]):
    """This process's own part of a batch, if several processes train together; it may be empty.

    Any other batch is a whole one, of which each process takes its part (`vlmscope.training.ranks`).
    """


def forwards(batch: Batch) -> Sequence[Forward]:
    """The forwards of a batch."""
    return [batch] if isinstance(batch, Mapping) else batch


def forward_arguments(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch without the keys that the model's forward does not accept."""
    return {name: tensor for name, tensor in batch.items() if name != LOSS_MASK}


@dataclass(frozen=True)
class LayerActivations:
    """MLP inputs and outputs at the valid tokens: layer -> ([N, d], [N, d]); `is_image` [N] bool."""

    by_layer: dict[int, tuple[Tensor, Tensor]]
    is_image: Tensor

    @property
    def n_tokens(self) -> int:
        """N, the tokens of the batch."""
        return self.is_image.shape[0]

    def rows(self, rows: Tensor) -> LayerActivations:
        """The tokens of some row numbers [n]."""
        by_layer = {layer: (x[rows], y[rows]) for layer, (x, y) in self.by_layer.items()}
        return LayerActivations(by_layer, self.is_image[rows])


def collect(stack: Stack, batch: Batch) -> LayerActivations:
    """The activations of a batch in the frozen model; padding is dropped, and text that a tower does not see."""
    placed = [on_device(stack, forward) for forward in forwards(batch)]
    parts = [activations for _, activations in (seen(stack, forward) for forward in placed if shown(stack, forward))]
    if not parts:
        return nothing(stack)
    return parts[0] if len(parts) == 1 else joined_activations(parts)


def shown(stack: Stack, forward: Forward) -> bool:
    """Whether these layers see anything of a forward: a tower sees pictures alone."""
    return stack.site == "decoder" or any(name.startswith("pixel_values") for name in forward)


def seen(stack: Stack, placed: Forward) -> tuple[Forward, LayerActivations]:
    """A forward on the model's device as the tokens that these layers see, and their activations."""
    captured = capture_mlp(stack, forward_arguments(placed))
    tokens = stack.tokens(placed, captured[0][0].shape[:-1])
    ids, valid = tokens["input_ids"], valid_tokens(tokens)
    soft = stack.soft_token_id()
    is_image = torch.zeros_like(valid) if soft is None else ids == soft
    by_layer = {n: (x[valid], y[valid]) for n, (x, y) in captured.items()}
    return tokens, LayerActivations(by_layer, is_image[valid])


def nothing(stack: Stack) -> LayerActivations:
    """Activations of zero tokens."""
    dtype = next(iter(stack.model.parameters())).dtype
    empty = torch.empty(0, stack.d_model, dtype=dtype, device=stack.device)
    by_layer = dict.fromkeys(range(stack.n_layers), (empty, empty))
    return LayerActivations(by_layer, torch.empty(0, dtype=torch.bool, device=stack.device))


def valid_tokens(forward: Forward) -> Tensor:
    """Which tokens [B, T] of a forward are no padding, bool."""
    mask = forward.get("attention_mask")
    return torch.ones_like(forward["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def joined_activations(parts: Sequence[LayerActivations]) -> LayerActivations:
    """The tokens of several forwards as one batch, in order."""
    by_layer: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in parts[0].by_layer:
        x, y = (torch.cat([part.by_layer[layer][side] for part in parts]) for side in (0, 1))
        by_layer[layer] = (x, y)
    return LayerActivations(by_layer, torch.cat([part.is_image for part in parts]))


def on_device(stack: Stack, batch: Forward) -> dict[str, Tensor]:
    """A forward on the model's device."""
    return {name: tensor.to(stack.device) for name, tensor in batch.items()}


def stacked(forwards: Sequence[EncodedForward]) -> list[EncodedForward]:
    """Concatenate forwards of equal shapes along the first axis; groups are in order of appearance.

    Pictures of different sizes, and prompts of different lengths, stay separate, since each family of models would need
    its own padding.
    """
    return [joined([forwards[i] for i in group]) for group in by_shape(forwards)]


class ConversationBatches:
    """Batch number 0, 1, ... of the user's own examples, of about `tokens_per_batch` tokens.

    A batch holds a fixed number of examples, from an endless shuffled order that uses every example once per epoch.
    Indexing `samples` opens an example's pictures.
    """

    def __init__(self, samples: Sequence[Sample], encode: Encoder, tokens_per_batch: int, seed: int) -> None:
        self.samples, self.encode, self.seed = samples, encode, seed
        probes = range(min(_PROBES, len(samples)))
        tokens = sum(forward["input_ids"].numel() for n in probes for forward in self._forwards(n))
        self.examples_per_batch = max(1, round(tokens_per_batch * len(probes) / max(tokens, 1)))

    def __call__(self, number: int) -> list[EncodedForward]:
        """The forwards of one batch."""
        first = number * self.examples_per_batch
        examples = range(first, first + self.examples_per_batch)
        return stacked([forward for n in examples for forward in self._forwards(n)])

    def _forwards(self, n: int) -> list[EncodedForward]:
        """The forwards of the n-th example in the endless order."""
        return self.encode(self.samples[drawn(self.seed, n, len(self.samples))])


class ValidationBatches(Sequence[list[EncodedForward]]):
    """One batch for each example, made again at each access, since all pictures together would fill the memory."""

    def __init__(self, samples: Sequence[Any], encode: Callable[[Any], list[EncodedForward]]) -> None:
        self.samples, self.encode = samples, encode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        return self.encode(self.samples[index])


class SampleEncoder:
    """Encoder (`vlmscope.data.mixing`) of conversations, cut to `max_tokens`, and texts, packed to `context` tokens."""

    def __init__(self, vlm: VLM, context: int, max_tokens: int | None = None) -> None:
        eos, bos = ends_of_text(vlm.tokenizer)
        self.vlm, self.max_tokens = vlm, max_tokens
        self.packer = TokenPacker(eos, context, bos)
        self.ready: list[EncodedForward] | None = None

    def encode(self, sample: RawSample) -> list[EncodedForward]:
        """The forwards of a conversation."""
        return encode(self.vlm, sample.opened(), self.max_tokens)

    def add(self, sample: RawSample) -> None:
        """Add a sample."""
        if sample.exchanges:
            self.ready = self.encode(sample)
            return
        try:
            self.packer.add(text_ids(self.vlm, sample.text))
        except UserError as error:
            raise UserError(f"{sample.origin}: {error}") from error

    def pop(self) -> list[EncodedForward] | None:
        """The forwards of a conversation, or a packed sequence."""
        if self.ready is not None:
            item, self.ready = self.ready, None
            return item
        return self._forward(self.packer.pop())

    def rest(self) -> list[EncodedForward] | None:
        """The last, shorter sequence."""
        return self._forward(self.packer.rest())

    def tokens(self, item: list[EncodedForward]) -> int:
        """Tokens of the item's forwards, soft tokens included."""
        return sum(forward["input_ids"].numel() for forward in item)

    def state(self) -> list[int]:
        """Tokens left over from packing."""
        return list(self.packer.left)

    def load(self, state: list[int]) -> None:
        """Continue from tokens left over."""
        self.packer.left, self.ready = list(state), None

    def _forward(self, ids: list[int] | None) -> list[EncodedForward] | None:
        return None if ids is None else [sequence_forward(self.vlm, ids)]


class MixBatches:
    """Batch number 0, 1, ... of a mix, each of at least `tokens_per_batch` tokens.

    The mix is a stream: batch n needs all batches before it. So the states at some batches are kept, in memory and in a
    file of the run folder, and batch n starts from the last state before it. Without such a state (the file is lost)
    the stream starts over, which is slower but gives the same batches.

    If several processes train together, each has the batches of its own share of the sources (`share`), with its own
    states; their batches n together are the joint batch n. A process whose share has ended has empty parts.
    """

    def __init__(
        self,
        make: Callable[[], TokenMix],
        tokens_per_batch: int,
        file: Path,
        settings: str,
        resume: bool,
        share: Share = WHOLE,
        joint_sum: Callable[[Sequence[float]], Sequence[float]] = list,
    ) -> None:
        """With `resume`, load the states of an earlier run in `file` if they are of the same `settings`.

        `make` returns the mix, or the share of it, at its beginning; a share adds its number to the file's name;
        `joint_sum` sums numbers over all shares.
        """
        self.share, self.joint_sum, self.settings = share, joint_sum, settings
        self.make, self.tokens_per_batch = make, -(-tokens_per_batch // share.total)
        part = f"_{share.index}_of_{share.total}" if share.total > 1 else ""
        self.file = file = file.with_name(f"{file.stem}{part}{file.suffix}")
        self.states: dict[int, Any] = {}
        if resume and file.is_file():
            record = read_json(file)
            if record.get("settings") == settings:
                self.states = {int(number): state for number, state in record["states"].items()}
        self.mix = make()
        self.number = 0

    def __call__(self, number: int) -> list[EncodedForward]:
        """The forwards of one batch, or this share's part of them."""
        if number != self.number:
            start = max((n for n in self.states if n <= number), default=0)
            # The stream goes only forwards; a state that is further on than the stream saves reading.
            if not self.number < number or start > self.number:
                self.mix, self.number = self.make(), start
                if start in self.states:
                    self.mix.load_state_dict(self.states[start])
        while self.number < number:
            self._next()
        batch = stacked(self._next())
        return OwnPart(batch) if self.share.total > 1 else batch

    def figures(self) -> dict[str, float]:
        """Each source's fraction of the tokens so far, its samples left out, and corrupt shards, over all processes."""
        lanes = self.mix.lanes
        local = [self.mix.tokens[name] for name in lanes] + [lane.samples.skipped for lane in lanes.values()]
        joint = self.joint_sum([*local, sum(lane.samples.bad_shards for lane in lanes.values())])
        tokens, skipped = joint[: len(lanes)], joint[len(lanes) : -1]
        total = sum(tokens)
        figures = {f"data/{n}/tokens_share": t / total if total else 0.0 for n, t in zip(lanes, tokens, strict=True)}
        figures |= {f"data/{name}/skipped": float(count) for name, count in zip(lanes, skipped, strict=True)}
        return figures | {"data/bad_shards": float(joint[-1])}

    def _next(self) -> list[EncodedForward]:
        self._keep_state()
        forwards: list[EncodedForward] = []
        tokens = 0
        while tokens < self.tokens_per_batch and (item := next(self.mix, None)) is not None:
            forwards += item.item
            tokens += item.tokens
        if not forwards and self.share.total == 1:
            raise UserError(f"all sources have ended before batch {self.number}: {ENDED}")
        self.number += 1
        return forwards

    def _keep_state(self) -> None:
        """Keep the state before every `EVERY`-th batch, in memory and in the file."""
        if self.number % EVERY or self.number in self.states:
            return
        self.states[self.number] = self.mix.state_dict()
        self.states = {n: self.states[n] for n in sorted(self.states)[-_KEPT:]}
        states = {str(n): state for n, state in self.states.items()}
        write_json(self.file, {"settings": self.settings, "states": states}, indent=None)


def mix_validation(sources: Mapping[str, tuple[ShuffledSource, SampleEncoder]], examples: int) -> ValidationBatches:
    """The first validation samples of every source, equally many, about `examples` in total."""
    items: list[_Held] = []
    for name, (samples, encoder) in sources.items():
        held = list(_first(samples, encoder, max(1, examples // len(sources))))
        source = f"data.sources.{name}"
        if not held and samples.first_error:
            raise UserError(f"{source}: no sample for validation can be used, the first: {samples.first_error}")
        if not held:
            raise UserError(f"{source} has no sample for validation; raise data.val_share, or give {source}.val_split")
        items += held
    return ValidationBatches(items, lambda item: item())


def _first(samples: ShuffledSource, encoder: SampleEncoder, count: int) -> Iterator[_Held]:
    """Functions that make the first `count` items, so that a conversation's pictures are opened only when needed."""
    while count:
        sample = samples.next()
        if sample is None:
            rest = encoder.rest()
            if rest is not None:
                yield partial(list, rest)
            return
        try:
            encoder.add(sample)
        except UserError as error:
            samples.skip(error)
            continue
        while count and (item := encoder.pop()) is not None:
            yield partial(encoder.encode, sample) if sample.exchanges else partial(list, item)
            count -= 1


IGNORE = -100
SOFT = "<image_soft_token>"


@dataclass(frozen=True)
class PackedBatch:
    """A padded batch of B packed scenes; T is the longest sequence, P the number of scenes with a picture."""

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64, restarting after the prefix for each segment
    segments: Tensor  # [B, T] int64, 0 prefix, 1.. questions, -1 padding
    labels: Tensor  # [B, T] int64, the next token where it is part of an answer, else `IGNORE`
    kinds: list[str]  # of the scenes
    asked: list[list[Question]]  # the question of each segment, for each scene
    pixels: Tensor  # [P, 3, 64, 64] float32 in -1..1

    def masks(self, window: int, soft_id: int) -> tuple[Tensor, Tensor]:
        """Boolean attention masks [B, 1, T, T] (True = may attend) of global and sliding layers."""
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
    """Pack scenes, at most `max_questions` each in random order, answers followed by `<end_of_turn>`."""
    vocabulary = tokenizer.get_vocab()
    rows, asked = [], []
    for scene in scenes:
        questions = [scene.questions[int(i)] for i in rng.permutation(len(scene.questions))[:max_questions]]
        words = ["<bos>", "<start_of_turn>", "user"]
        if scene.image is not None:
            words += ["<start_of_image>", *[SOFT] * soft_tokens, "<end_of_image>"]
        prefix = len(words)
        positions, segments, labels = list(range(prefix)), [0] * prefix, [IGNORE] * prefix
        for number, question in enumerate(questions, start=1):
            prompt = [*question.question.split(), "<end_of_turn>", "<start_of_turn>", "model"]
            answer = [*question.answer.split(), "<end_of_turn>"]
            segment = prompt + answer[:-1]  # <end_of_turn> is a label only: nothing follows it
            words += segment
            positions += range(prefix, prefix + len(segment))
            segments += [number] * len(segment)
            labels += [IGNORE] * (len(prompt) - 1) + [vocabulary[word] for word in answer]
        rows.append(([vocabulary[word] for word in words], positions, segments, labels))
        asked.append(questions)
    length = max(len(row[0]) for row in rows)
    columns = [np.full((len(rows), length), fill, np.int64) for fill in (vocabulary["<pad>"], 0, -1, IGNORE)]
    for i, row in enumerate(rows):
        for column, values in zip(columns, row, strict=True):
            column[i, : len(values)] = values
    images = [scene.image for scene in scenes if scene.image is not None]
    pixels = to_pixels(np.stack(images)) if images else torch.zeros(0, 3, 64, 64)
    return PackedBatch(
        *map(torch.from_numpy, columns), kinds=[scene.kind for scene in scenes], asked=asked, pixels=pixels
    )


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1, as Orrery's image processor does for 64 x 64 pictures."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1.0)


def chat_batch(scenes: Sequence[Scene], tokenizer, soft_tokens: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """One random question per scene with its answer, as arguments of the Hugging Face forward.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` [B, T], `pixel_values` [P, 3, 64, 64] (absent without
        pictures) and `loss_mask` [B, T] bool, True at answer tokens.
    """
    batch = pack(scenes, tokenizer, soft_tokens, rng, max_questions=1)
    answers = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    answers[:, 1:] = (batch.labels != IGNORE)[:, :-1]  # a label sits one position before its token
    alive = batch.segments >= 0
    forward = {
        "input_ids": batch.input_ids,
        "attention_mask": alive.long(),
        "token_type_ids": (batch.input_ids == tokenizer.convert_tokens_to_ids(SOFT)).long(),
        "loss_mask": answers & alive,
    }
    return forward | ({"pixel_values": batch.pixels} if len(batch.pixels) else {})


class TokenPacker:
    """Cuts documents into sequences of equal length; its state is the tokens left over."""

    def __init__(self, eos: int, length: int, bos: int | None = None) -> None:
        """`eos` ends each document; `bos`, for models that expect it, starts each sequence."""
        if length < 2:
            raise ValueError(f"a sequence of {length} tokens predicts nothing: it needs at least 2")
        self.eos, self.length, self.head = eos, length, [] if bos is None else [bos]
        self.left: list[int] = []

    def add(self, document: Sequence[int]) -> None:
        """Append a document."""
        self.left += [*document, self.eos]

    def pop(self) -> list[int] | None:
        """A full sequence; None if too few tokens are left."""
        body = self.length - len(self.head)
        if len(self.left) < body:
            return None
        sequence, self.left = self.head + self.left[:body], self.left[body:]
        return sequence

    def rest(self) -> list[int] | None:
        """The shorter last sequence at the end of the data; None if it would predict nothing."""
        sequence, self.left = self.head + self.left, []
        return sequence if len(sequence) > max(1, len(self.head)) else None
