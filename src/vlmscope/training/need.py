"""A training term that makes answers need the decoder's MLPs.

Let m be the mean output of each MLP at a token over the pictures of the training so far, under the same words, and p_m
the answer that the model gives with all MLP outputs at some positions replaced by m in one forward. The term is the
cross-entropy of p_m with the answer prior q of the question (running counts of its answers):
    need = - sum_a q(a) log p_m(a),
least where nothing of the picture is left in p_m. Without it a tower recognises and attention carries, and MLP features
explain little (docs/anatomy.md). Even steps replace MLPs at soft tokens, odd steps at all positions. m and q are
constants for the gradient, so the term teaches embeddings, tower and attention what to leave to the MLPs.

The means follow the drifting outputs: each step moves them by max(1 / n, `RATE`), n being the steps that showed them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmscope.data.orrery.scenes import CAPTION_PROMPTS, COMPOSED, COMPOSED_QUESTIONS, KINDS, QUESTIONS
from vlmscope.training.batches import IGNORE, PackedBatch

RATE = 0.03
_WIDTH = 32  # tokens of a prefix, or of a question with its answer, at most
_KINDS = (*KINDS, *COMPOSED)
# Questions by group and wording; those of composed scenes, and all captions, share their means.
_ASKED = [(group, wording) for group, wordings in QUESTIONS.items() for wording in wordings]
_ASKED += [(group, "") for group in COMPOSED_QUESTIONS] + [("caption", wording) for wording in CAPTION_PROMPTS]
_ASKED += [("text", "")]
_GROUPS = tuple(dict.fromkeys(group for group, _ in _ASKED))


class Need(nn.Module):
    """Running means of MLP outputs by layer and context, and answer priors by question; they are saved with a stage."""

    means: Tensor  # [L, contexts, d]
    seen: Tensor  # [contexts], in how many steps
    answers: Tensor  # [groups, V], how often

    def __init__(self, n_layers: int, d_model: int, n_words: int) -> None:
        super().__init__()
        contexts = (len(_KINDS) + len(_ASKED)) * _WIDTH
        self.register_buffer("means", torch.zeros(n_layers, contexts, d_model))
        self.register_buffer("seen", torch.zeros(contexts))
        self.register_buffer("answers", torch.zeros(len(_GROUPS), n_words))

    def contexts(self, batch: PackedBatch) -> Tensor:
        """[B, T] int64, the row of `means` of each token: its kind and place, or its question and place in it."""
        rows = torch.zeros_like(batch.input_ids)
        place = torch.arange(batch.input_ids.shape[1]).expand_as(rows)
        for row, kind in enumerate(batch.kinds):
            segments = batch.segments[row]
            prefix = segments <= 0  # padding too, whose outputs nobody reads
            rows[row, prefix] = _KINDS.index(kind) * _WIDTH + place[row, prefix].clamp(max=_WIDTH - 1)
            for number, question in enumerate(batch.asked[row], start=1):
                inside = segments == number
                first = (len(_KINDS) + _asked(question.group, question.question)) * _WIDTH
                rows[row, inside] = first + torch.arange(int(inside.sum())).clamp(max=_WIDTH - 1)
        return rows

    @torch.no_grad()
    def follow(self, outputs: Sequence[Tensor], contexts: Tensor, batch: PackedBatch) -> None:
        """Move the means towards this step's outputs [B, T, d], a tensor per layer, and count its answers."""
        alive = batch.segments >= 0
        rows, where = contexts[alive].unique(return_inverse=True)
        counts = torch.bincount(where, minlength=len(rows)).float()
        self.seen[rows] += 1
        rate = (1 / self.seen[rows]).clamp(min=RATE)[:, None]
        for means, out in zip(self.means, outputs, strict=True):
            sums = torch.zeros(len(rows), out.shape[-1]).index_add_(0, where, out[alive].float())
            means[rows] += rate * (sums / counts[:, None] - means[rows])
        groups, _, labels = answers(batch)
        self.answers.index_put_((groups, labels), torch.ones(len(labels)), accumulate=True)

    def loss(self, logits: Tensor, groups: Tensor) -> Tensor:
        """Mean cross-entropy of the answers' priors and logits [N, V] with the means in place."""
        priors = self.answers[groups]
        priors = priors / priors.sum(-1, keepdim=True).clamp(min=1)
        return -(priors * logits.float().log_softmax(-1)).sum(-1).mean()


def _asked(group: str, wording: str) -> int:
    if group.startswith("text"):
        return _ASKED.index(("text", ""))
    return _ASKED.index((group, "" if group in COMPOSED_QUESTIONS else wording))


def answers(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of each answer of one word about a picture: its group's number [N], its place [B, T] bool, its label [N]."""
    first = (batch.labels != IGNORE) & (batch.labels.roll(1, 1) == IGNORE)
    groups = torch.full_like(batch.input_ids, -1)
    for row, asked in enumerate(batch.asked):
        for number, question in enumerate(asked, start=1):
            if question.group in _GROUPS and question.group != "caption":
                groups[row, batch.segments[row] == number] = _GROUPS.index(question.group)
    place = first & (groups >= 0)
    return groups[place], place, batch.labels[place]


def pictured(batch: PackedBatch, contexts: Tensor, soft_id: int, step: int) -> tuple[PackedBatch, Tensor]:
    """Every other row with a picture, by turns, and their contexts."""
    has = (batch.input_ids == soft_id).any(1)
    numbers = has.nonzero()[:, 0]
    chosen = torch.arange(len(numbers)) % 2 == step // 2 % 2
    rows = numbers[chosen]
    part = {name: getattr(batch, name)[rows] for name in ("input_ids", "position_ids", "segments", "labels")}
    kinds, asked = ([of[row] for row in rows.tolist()] for of in (batch.kinds, batch.asked))
    return replace(batch, **part, kinds=kinds, asked=asked, pixels=batch.pixels[chosen]), contexts[rows]


@contextmanager
def listening(mlps: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the detached outputs of modules that run in this order."""
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for mlp in mlps:
            stack.callback(mlp.register_forward_hook(lambda _m, _a, out: outputs.append(out.detach())).remove)
        yield outputs


@contextmanager
def averaged(mlps: Sequence[nn.Module], means: Tensor, contexts: Tensor, where: Tensor) -> Iterator[None]:
    """Replace outputs of the modules by `means` [L, rows, d] of `contexts` [B, T] at `where` [B, T] bool."""
    with ExitStack() as stack:
        for mlp, table in zip(mlps, means, strict=True):

            def hook(_m: Any, _a: Any, out: Tensor, table: Tensor = table) -> Tensor:
                return torch.where(where[..., None], table[contexts].to(out.dtype), out)

            stack.callback(mlp.register_forward_hook(hook).remove)
        yield
