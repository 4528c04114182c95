"""Counterfactual pairs as batches: both sides run once, and only pairs that the model answers rightly on both.

Legend: B pairs, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.intervention import MODES, Rate
from vlmscope.interventions.run import BaseRun, base_run
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope


@dataclass(frozen=True)
class PairSubject:
    """One question on B pairs.

    Attributes:
        question: its name.
        rows: [B], which of the pairs given these are.
        batch: the originals.
        other: the counterfactuals, row by row, in the same positions.
        base: the originals' unedited run.
        other_logits: [B, V], the counterfactuals' at the last position.
        tokens: [B], the originals' right answers.
        other_tokens: [B], the counterfactuals'.
        accuracy: of the originals, the counterfactuals and both, over all pairs given.
    """

    question: str
    rows: Tensor
    batch: InputBatch
    other: InputBatch
    base: BaseRun
    other_logits: Tensor
    tokens: Tensor
    other_tokens: Tensor
    accuracy: tuple[Rate, Rate, Rate]

    @property
    def size(self) -> int:
        """B."""
        return self.batch.size

    @property
    def moves(self) -> bool:
        """Whether the two answers differ, in every pair: what is to follow. Else in none: what is to stay."""
        return bool((self.tokens != self.other_tokens).all())


@torch.no_grad()
def pair_subject(
    scope: Scope,
    question: str,
    originals: Sequence[ModelInputs],
    others: Sequence[ModelInputs],
    tokens: Tensor,
    other_tokens: Tensor,
    least: int,
    answerable: bool = True,
    modes: Collection[str] = MODES,
) -> PairSubject:
    """Run both sides and keep the pairs with two right answers.

    Args:
        scope: the model and its transcoders.
        question: name for records and messages.
        originals: prompts of the originals.
        others: of the counterfactuals, row by row.
        tokens: [n] right answers of the originals.
        other_tokens: [n] of the counterfactuals; different from `tokens` in all rows or in none.
        least: how many pairs must be left.
        answerable: keep only pairs that are answered rightly on both sides; else all.
        modes: those that the originals will be edited in; what others freeze is not recorded.

    Raises:
        UserError: the sides do not align, or fewer than `least` pairs are left.
    """
    both = scope.batch([*originals, *others])
    n = len(originals)
    logits = scope.forward(both)
    right, other_right = logits[:n].argmax(-1) == tokens, logits[n:].argmax(-1) == other_tokens
    rows = torch.nonzero(right & other_right).flatten() if answerable else torch.arange(n, device=logits.device)
    if len(rows) < least:
        raise UserError(
            f"question {question!r}: the model answers both sides rightly on {len(rows)} of {n} pairs, too few for an "
            f"interval (interchange.least={least}); give more pairs, or pairs that it can answer"
        )
    batch, other = both.select(rows), both.select(rows + n)
    accuracy = tuple(bootstrap_rate(hits.cpu().numpy()) for hits in (right, other_right, right & other_right))
    first, second, share = accuracy
    return PairSubject(
        question,
        rows,
        batch,
        other,
        base_run(scope, batch, modes),
        logits[rows + n],
        tokens[rows],
        other_tokens[rows],
        (first, second, share),
    )


def part_of(subject: PairSubject, rows: list[int]) -> PairSubject:
    """Some of the pairs; of their unedited run only the logits, which is all that free mode needs."""
    index = torch.tensor(rows, device=subject.tokens.device)
    return replace(
        subject,
        rows=subject.rows[index],
        batch=subject.batch.select(index),
        other=subject.other.select(index),
        base=BaseRun(subject.base.logits[index], {}, {}, {}, {}),
        other_logits=subject.other_logits[index],
        tokens=subject.tokens[index],
        other_tokens=subject.other_tokens[index],
    )
