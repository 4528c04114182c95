"""From the `pairs` group to batches of answerable pairs, a question each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vlmscope.circuits.pair_subject import PairSubject, pair_subject
from vlmscope.core.errors import UserError
from vlmscope.data.pairs import Pair, Side, load_pairs

if TYPE_CHECKING:
    from collections.abc import Collection

    from vlmscope.models.base import ModelInputs
    from vlmscope.tasks.steps.bench import Bench


def pairs_of(bench: Bench, split: str) -> dict[str, list[Pair]]:
    """The pairs of a split by question. Of a question whose answer differs in some pairs, only those count.

    Raises:
        UserError: the run has no pairs.
    """
    if bench.cfg.pairs is None:
        raise UserError("this experiment needs pairs: choose some, such as pairs=first_digit")
    found: dict[str, list[Pair]] = {}
    for pair in load_pairs(bench.cfg.pairs, split):
        found.setdefault(pair.question, []).append(pair)
    return {name: [p for p in some if p.moves] or some for name, some in found.items()}


def moving(pairs: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    """The questions of `pairs_of` whose answer differs within pairs."""
    return {name: some for name, some in pairs.items() if some[0].moves}


def subject_of(
    bench: Bench, question: str, pairs: list[Pair], answerable: bool = True, modes: Collection[str] = ("free",)
) -> PairSubject:
    """Both sides of a question's pairs, run once; `answerable`: only those answered rightly on both; `modes`: those
    that the originals will be edited in.
    """

    def prepare(side: Side) -> ModelInputs:
        return bench.vlm.prepare(side.prompt, list(side.images))

    def tokens(sides: list[Side]) -> torch.Tensor:
        known = {word: bench.token(word) for word in {side.answer for side in sides}}
        return torch.tensor([known[side.answer] for side in sides], device=bench.vlm.adapter.device)

    originals, others = [p.original for p in pairs], [p.counterfactual for p in pairs]
    return pair_subject(
        bench.scope,
        question,
        [prepare(side) for side in originals],
        [prepare(side) for side in others],
        tokens(originals),
        tokens(others),
        bench.cfg.interchange.least,
        answerable,
        modes,
    )
