"""All checks on one model, and their outcome as text and numbers.

The outcome of a suite as text for people and as flat numbers for records.

All checks on one model: text alone, with one picture, with two, exactly and as the model computes otherwise.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from vlmscope.conformance.identities import (
    Check,
    batching,
    completeness,
    direct_effects,
    direct_mode,
    generation,
    parity,
    soft_tokens,
    total_effects,
    weights,
)
from vlmscope.conformance.subject import Limits, Subject, make_subject
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.models.base import ModelInputs, exact_float64
from vlmscope.models.families import adapter_for
from vlmscope.models.placement import is_offloaded
from vlmscope.scope import Scope


def render(reports: Sequence[CaseReport], own_dtype: str = "") -> str:
    """An aligned table, a row an identity, and below it what was skipped and why.

    Args:
        reports: a report a case.
        own_dtype: heads the column of errors outside float64; no such column when empty.
    """
    done = [report for report in reports if report.exact]
    head = ["identity", *(report.case for report in done), "tolerance", "holds", "seconds"]
    head += [f"in {own_dtype}"] * bool(own_dtype) + ["what it says"]
    lines = [head]
    for found in zip(*(report.exact for report in done), strict=True):
        first = found[0]
        cells = [first.name, *(_number(check.error) for check in found), _bound(first), _verdict(found)]
        cells.append(f"{sum(check.seconds for check in found):.1f}")
        if own_dtype:
            cells.append(_number(max((r.own[first.name] for r in done if first.name in r.own), default=None)))
        lines.append([*cells, first.claim])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, *_notes(reports)])


def _notes(reports: Sequence[CaseReport]) -> list[str]:
    sizes = [f"{r.case}: {r.n_tokens} tokens, {r.n_features:,} active features, {r.seconds:.1f} s" for r in reports]
    notes = [
        size if report.exact else f"{report.case}: skipped, {report.reason}"
        for report, size in zip(reports, sizes, strict=True)
    ]
    for report in reports:
        notes += [f"{check.name}, {report.case}: skipped, {check.reason}" for check in report.exact if check.skipped]
    return notes


def _number(error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.0f}" if error == 0 else f"{error:.1e}"


def _bound(check: Check) -> str:
    return f"{'>' if check.at_least else '<='} {check.tolerance:.0e}" if check.tolerance else "= 0"


def _verdict(found: Sequence[Check]) -> str:
    if any(check.failed for check in found):
        return "NO"
    return "skipped" if all(check.skipped for check in found) else "yes"


def failures(reports: Sequence[CaseReport]) -> list[str]:
    """A phrase for each identity that was measured and does not hold."""
    return [
        f"{check.name} on {report.case} ({_number(check.error)}, needs {_bound(check)})"
        for report in reports
        for check in report.exact
        if check.failed
    ]


def flat_metrics(reports: Sequence[CaseReport]) -> dict[str, float]:
    """`check/<case>/<identity>/error`, `.../seconds`, `.../error_own_dtype`, and the counts of all."""
    every = [check for report in reports for check in report.exact]
    metrics = {
        "check/held": float(sum(check.held for check in every)),
        "check/failed": float(sum(check.failed for check in every)),
        "check/skipped": float(sum(check.skipped for check in every)),
    }
    for report in reports:
        for check in report.exact:
            if check.error is not None:
                metrics[f"check/{report.case}/{check.name}/error"] = check.error
                metrics[f"check/{report.case}/{check.name}/seconds"] = check.seconds
        for name, error in report.own.items():
            metrics[f"check/{report.case}/{name}/error_own_dtype"] = error
        if report.exact:
            metrics[f"check/{report.case}/seconds"] = report.seconds
    return metrics


CASES = ("text", "one_picture", "two_pictures")  # the n-th has n pictures
PROMPT = "what is this planet ?"
IDENTITIES: tuple[Callable[[Subject], Check], ...] = (
    parity,
    completeness,
    direct_effects,
    total_effects,
    batching,
    direct_mode,
)
BEHAVIOUR: tuple[Callable[[Subject], Check], ...] = (soft_tokens, generation, weights)


@dataclass(frozen=True)
class CaseReport:
    """What was found at one prompt.

    Attributes:
        case: one of `CASES`.
        n_tokens: T, 0 when the model does not take so many pictures.
        n_features: active features.
        exact: every check in float64.
        own: identity -> error as the model computes by itself (forward in its dtype, graph in float32), for
            information; empty for a float64 model and for identities that were skipped.
        seconds: time taken, the finding of the edges included.
        reason: why the case was left out, "" when it was not.
    """

    case: str
    n_tokens: int
    n_features: int
    exact: tuple[Check, ...]
    own: dict[str, float]
    seconds: float = 0.0
    reason: str = ""


def in_float64(scope: Scope) -> Scope:
    """Copies of model and transcoders with the same weights in float64.

    Raises:
        UserError: when the model's weights rest on disk or in CPU memory.
    """
    if is_offloaded(scope.vlm.model):
        raise UserError(
            f"{scope.vlm.name} is offloaded, and the checks copy its weights to float64; use model.offload=none"
        )
    model = copy.deepcopy(scope.vlm.model).double()
    vlm = replace(scope.vlm, model=model, adapter=adapter_for(model))
    return Scope(vlm, copy.deepcopy(scope.transcoders).double())


def own_dtype_errors(
    scope: Scope, inputs: ModelInputs, limits: Limits, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """The error of every identity as `task=trace` computes: the forward in the model's dtype, the graph in another.

    Args:
        scope: the model and its transcoders.
        inputs: the prompt.
        limits: how much to look at.
        dtype: of the graph.

    Returns:
        identity -> error, without those that were skipped.
    """
    subject = make_subject(scope, inputs, None, limits, dtype)
    return {found.name: found.error for found in (check(subject) for check in IDENTITIES) if found.error is not None}


def noise_picture(seed: int) -> Image.Image:
    """A random RGB picture: the identities hold for any, and no two look alike."""
    return Image.fromarray(generator(seed, "noise picture").integers(0, 256, (64, 64, 3), dtype=np.uint8))


def run_cases(
    scope: Scope,
    prompt: str = PROMPT,
    pictures: Sequence[Image.Image] = (),
    limits: Limits | None = None,
) -> Iterator[CaseReport]:
    """Check a model on text alone and, where it takes pictures, on one and on two.

    Args:
        scope: the model and its transcoders.
        prompt: what is asked, the same in all cases.
        pictures: used first; random pictures fill up.
        limits: how much to look at.

    Yields:
        A report a case, as soon as it is known.

    Raises:
        UserError: when the model takes the prompt with no number of pictures, or cannot be represented.
    """
    limits = limits or Limits()
    images = [*pictures, *(noise_picture(number) for number in range(2))][:2]
    others = [noise_picture(number) for number in (2, 3)]
    with exact_float64():
        wide = in_float64(scope)
    refusals: list[UserError] = []
    for count, case in enumerate(CASES):
        try:
            scope.vlm.prepare(prompt, images[:count])
        except UserError as error:
            refusals.append(error)
            if len(refusals) == len(CASES):
                raise
            yield CaseReport(case, 0, 0, (), {}, reason=str(error))
            continue
        yield _run_case(case, scope, wide, prompt, images[:count], others[:count], limits)


def _run_case(
    case: str,
    scope: Scope,
    wide: Scope,
    prompt: str,
    images: Sequence[Image.Image],
    others: Sequence[Image.Image],
    limits: Limits,
) -> CaseReport:
    """One case in float64 and, when the model's dtype is another, in that."""
    start = time.perf_counter()
    with exact_float64():
        inputs = wide.vlm.prepare(prompt, images)
        other = wide.vlm.prepare(prompt, others) if images else None
        subject = make_subject(wide, inputs, other, limits)
        exact = tuple(check(subject) for check in (*IDENTITIES, *BEHAVIOUR))
    own: dict[str, float] = {}
    if scope.adapter.dtype != torch.float64:
        own = own_dtype_errors(scope, scope.vlm.prepare(prompt, images), limits)
    return CaseReport(case, len(inputs), subject.n_active, exact, own, time.perf_counter() - start)
