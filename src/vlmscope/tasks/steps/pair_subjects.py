"""From the `pairs` group to batches of answerable pairs, a question each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmscope.circuits.experiment import pairs_by_question, subject_of_pairs
from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection

    from vlmscope.circuits.pair_subject import PairSubject
    from vlmscope.data.pairs import Pair
    from vlmscope.tasks.steps.bench import Bench


def pairs_of(bench: Bench, split: str) -> dict[str, list[Pair]]:
    """The pairs of a split by question.

    Raises:
        UserError: the run has no pairs.
    """
    if bench.cfg.pairs is None:
        raise UserError("this experiment needs pairs: choose some, such as pairs=first_digit")
    return pairs_by_question(bench.cfg.pairs, split)


def moving(pairs: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    """The questions of `pairs_of` whose answer differs within pairs."""
    return {name: some for name, some in pairs.items() if some[0].moves}


def subject_of(
    bench: Bench, question: str, pairs: list[Pair], answerable: bool = True, modes: Collection[str] = ("free",)
) -> PairSubject:
    """Both sides of a question's pairs, as `subject_of_pairs` has it."""
    return subject_of_pairs(bench.scope, question, pairs, bench.cfg.interchange.least, answerable, modes)
