"""All checks on one model: text alone, with one picture, with two, exactly and as the model computes otherwise."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from vlmscope.conformance.behaviour import direct_mode, generation, soft_tokens, weights
from vlmscope.conformance.identities import batching, completeness, direct_effects, parity, total_effects
from vlmscope.conformance.record import Check
from vlmscope.conformance.subject import Limits, Subject, make_subject
from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator
from vlmscope.models.base import ModelInputs
from vlmscope.models.families import adapter_for
from vlmscope.models.placement import is_offloaded
from vlmscope.models.precision import exact_float64
from vlmscope.scope import Scope

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
