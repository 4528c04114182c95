"""The checks of a model: when one holds, the cases, the sampling, and the table and numbers of `task=check`."""

import dataclasses
import math

import pytest
import torch

from vlmscope.conformance import (
    BEHAVIOUR,
    CASES,
    IDENTITIES,
    PROMPT,
    CaseReport,
    Check,
    Limits,
    Skipped,
    Subject,
    check,
    completeness,
    direct_effects,
    make_subject,
    noise_picture,
    run_cases,
    total_effects,
)
from vlmscope.core.errors import UserError
from vlmscope.models.base import exact_float64
from vlmscope.models.orrery import build_tokenizer
from vlmscope.models.tiny import tiny_vlm
from vlmscope.scope import Scope
from vlmscope.tasks.check import failures, flat_metrics, render
from vlmscope.transcoders.transcoder import random_set

SMALL = Limits(sources=2, positions=2, new_tokens=2)


@check("a number is small", 0.5)
def half(subject: float) -> float:
    if subject < 0:
        raise Skipped("negative")
    return subject


@check("a number is large", 0.5, at_least=True)
def moves(subject: float) -> float:
    return subject


@pytest.mark.parametrize(
    ("function", "value", "held"),
    [(half, 0.5, True), (half, 0.6, False), (half, math.nan, False), (half, math.inf, False)]
    + [(moves, 0.6, True), (moves, 0.5, False), (moves, math.nan, False)],
)
def test_a_check_holds_only_when_it_was_measured_and_is_within_its_tolerance(function, value, held: bool) -> None:
    outcome = function(value)
    assert (outcome.held, outcome.failed, outcome.skipped) == (held, not held, False)
    left_out = half(-1.0)
    assert (left_out.held, left_out.failed, left_out.skipped, left_out.reason) == (False, False, True, "negative")
    assert (left_out.name, left_out.claim, left_out.tolerance) == ("half", "a number is small", 0.5)
    with pytest.raises(TypeError):
        half("no number")


def bench(family: str, dtype: torch.dtype) -> Scope:
    vlm = tiny_vlm(family, seed=1, dtype=dtype)
    shape = (vlm.adapter.n_layers, vlm.adapter.d_model, 40, 5)
    return Scope(vlm, random_set(*shape, skip=True, dtype=dtype).requires_grad_(False))


def test_every_check_holds_on_every_case_whatever_the_dtype() -> None:
    reports = list(run_cases(bench("gemma3", torch.bfloat16), limits=SMALL))
    assert [report.case for report in reports] == list(CASES)
    for count, report in enumerate(reports):
        assert len(report.exact) == len(IDENTITIES) + len(BEHAVIOUR)
        assert [c.name for c in report.exact if not c.held] == (["soft_tokens"] if count == 0 else [])
        assert not failures([report])
        # The model's own dtype is told and not judged: the forward is in bfloat16, the graph in float32.
        assert len(report.own) == len(IDENTITIES)
        assert 1e-4 < report.own["parity"] < 0.5 and 0 < report.own["total_effects"] < 1e-4


def test_a_text_model_is_checked_on_text_and_a_float64_one_once() -> None:
    text, one, two = run_cases(bench("gemma3_text", torch.float64), limits=SMALL)
    assert all(outcome.held for outcome in text.exact if outcome.name != "soft_tokens")
    assert not text.own
    assert all(not report.exact and "takes no pictures" in report.reason for report in (one, two))


def test_a_prompt_that_no_case_takes_is_the_users_mistake() -> None:
    text = bench("gemma3_text", torch.float32)
    words = dataclasses.replace(text.vlm, processor=build_tokenizer(("user", "model")))
    with pytest.raises(UserError, match="zebra"):
        list(run_cases(Scope(words, text.transcoders), prompt="zebra", limits=SMALL))


def subject_of(limits: Limits) -> Subject:
    scope = bench("gemma3", torch.float64)
    return make_subject(scope, scope.inputs(PROMPT, [noise_picture(0)]), limits=limits)


def test_what_does_not_fit_is_sampled_and_still_complete() -> None:
    with exact_float64():
        subject = subject_of(Limits(targets=50, sources=4))
        assert len(subject.feature_nodes) == 50 < subject.n_active
        assert len(set(subject.edges.nodes.layer[subject.feature_nodes])) == 4
        assert completeness(subject).held and direct_effects(subject).held
        assert "active features" in total_effects(subject).reason
        again, other = subject_of(Limits(targets=50)), subject_of(Limits(targets=50, seed=1))
        every = subject_of(Limits(sources=1))
    assert 0 in every.edges.nodes.position[every.sources]
    assert again.table_rows.tolist() == subject.table_rows.tolist() != other.table_rows.tolist()


def test_the_table_says_no_when_one_case_fails() -> None:
    good, skipped = Check("parity", "same", 2e-15, 1e-9, 0.25), Check("total", "same", None, 1e-9, 0.25, reason="many")
    bad = dataclasses.replace(good, error=math.nan)
    reports = [
        CaseReport("text", 11, 1408, (good, skipped), {"parity": 3e-7}, 1.5),
        CaseReport("one_picture", 29, 9, (bad, skipped), {"parity": 4e-7}, 1.0),
        CaseReport("two_pictures", 0, 0, (), {}, reason="takes one picture"),
    ]
    lines = render(reports, "float32").splitlines()
    assert lines[0].split()[:6] == ["identity", "text", "one_picture", "tolerance", "holds", "seconds"]
    assert lines[2].split() == ["parity", "2.0e-15", "nan", "<=", "1e-09", "NO", "0.5", "4.0e-07", "same"]
    assert lines[3].split() == ["total", "-", "-", "<=", "1e-09", "skipped", "0.5", "-", "same"]
    assert len({line.index(" 1e-09") for line in lines[2:4]}) == 1
    assert "two_pictures: skipped, takes one picture" in lines and "total, text: skipped, many" in lines
    assert "float32" not in render(reports[:1], "")
    assert failures(reports) == ["parity on one_picture (nan, needs <= 1e-09)"]
    counts = {"held": 1.0, "failed": 0.0, "skipped": 1.0, "text/seconds": 1.5}
    parity = {"error": 2e-15, "seconds": 0.25, "error_own_dtype": 3e-7}
    expected = counts | {f"text/parity/{name}": value for name, value in parity.items()}
    assert flat_metrics(reports[:1]) == {f"check/{name}": value for name, value in expected.items()}
