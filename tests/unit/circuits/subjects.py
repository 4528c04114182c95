"""Pairs as the cases of trials, and what carrying features between their sides is as a plan."""

import torch
from torch import Tensor

from vlmscope.circuits.operations import Carry
from vlmscope.circuits.pairs import PairSubject
from vlmscope.interventions.edits import AnyPlan, at_positions
from vlmscope.interventions.trials import Cases, Features
from vlmscope.scope import Scope


def cases_of(subject: PairSubject) -> Cases:
    """The originals, with the counterfactuals as donors."""
    own = (subject.question, subject.batch, subject.base, subject.tokens, subject.other_tokens)
    return Cases("test", *own, tuple(map(str, range(subject.size))), subject.other, subject.other_logits)


def carried(scope: Scope, subject: PairSubject, features: Features | None, where: Tensor | None = None) -> AnyPlan:
    """Features set to what they are in the counterfactuals, at positions `where` [T] bool alone; None: all of them."""
    everywhere = torch.ones(subject.batch.length, dtype=torch.bool)
    plan = Carry(features).plan(scope, cases_of(subject), 1.0)
    return at_positions(plan, everywhere if where is None else where)


def recovered(subject: PairSubject, logits: Tensor) -> Tensor:
    """[B], the share of the logit difference between original and counterfactual that edited logits [B, V] recover."""
    rows = torch.arange(subject.size)
    start, found, end = (
        one[rows, subject.other_tokens] - one[rows, subject.tokens]
        for one in (subject.base.logits, logits, subject.other_logits)
    )
    return (found - start) / (end - start)
