"""The suite's cases, its limits, what it says of a model's own dtype, and the table and numbers of the outcome."""

import dataclasses

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
    Subject,
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


def bench(family: str, dtype: torch.dtype):
    vlm = tiny_vlm(family, seed=1, dtype=dtype)
    adapter = vlm.adapter
    transcoders = random_set(adapter.n_layers, adapter.d_model, 40, 5, skip=True, dtype=dtype).requires_grad_(False)
    return Scope(vlm, transcoders)


@pytest.fixture(scope="module")
def reports() -> list[CaseReport]:
    return list(run_cases(bench("gemma3", torch.bfloat16), limits=SMALL))


def test_every_check_holds_on_every_case_whatever_the_dtype(reports: list[CaseReport]) -> None:
    assert [report.case for report in reports] == list(CASES)
    for count, report in enumerate(reports):
        assert len(report.exact) == len(IDENTITIES) + len(BEHAVIOUR)
        assert [c.name for c in report.exact if not c.held] == (["soft_tokens"] if count == 0 else [])
        assert not failures([report])


def test_the_models_own_dtype_is_told_and_not_judged(reports: list[CaseReport]) -> None:
    for report in reports:
        assert len(report.own) == len(IDENTITIES)
        assert 1e-4 < report.own["parity"] < 0.5  # the forward is in bfloat16
        assert 0 < report.own["total_effects"] < 1e-4  # within the graph, which is in float32


def test_a_text_model_is_checked_on_text_and_a_float64_one_once() -> None:
    text, one, two = run_cases(bench("gemma3_text", torch.float64), limits=SMALL)
    assert all(check.held for check in text.exact if check.name != "soft_tokens")
    assert not text.own
    for report in (one, two):
        assert not report.exact
        assert "takes no pictures" in report.reason


def test_a_prompt_that_no_case_takes_is_the_users_mistake() -> None:
    scope = bench("gemma3", torch.float32)
    prompt = "what is <image_soft_token> this ?"
    with pytest.raises(UserError, match="the prompt spells <image_soft_token>"):
        list(run_cases(scope, prompt=prompt, limits=SMALL))
    text = bench("gemma3_text", torch.float32)
    words = dataclasses.replace(text.vlm, processor=build_tokenizer(("user", "model")))
    with pytest.raises(UserError, match="zebra"):
        list(run_cases(Scope(words, scope.transcoders), prompt="zebra", limits=SMALL))


def subject_of(limits: Limits) -> Subject:
    scope = bench("gemma3", torch.float64)
    return make_subject(scope, scope.vlm.prepare(PROMPT, [noise_picture(0)]), limits=limits)


def test_what_does_not_fit_is_sampled_and_still_complete() -> None:
    with exact_float64():
        subject = subject_of(Limits(targets=50, sources=4))
        assert len(subject.feature_nodes) == 50 < subject.n_active
        assert len(set(subject.edges.nodes.layer[subject.feature_nodes])) == 4
        assert completeness(subject).held
        assert direct_effects(subject).held
        assert "active features" in total_effects(subject).reason
        again, other = subject_of(Limits(targets=50)), subject_of(Limits(targets=50, seed=1))
    assert again.table_rows.tolist() == subject.table_rows.tolist() != other.table_rows.tolist()


def test_sources_include_the_first_position() -> None:
    with exact_float64():
        subject = subject_of(Limits(sources=1))
    assert 0 in subject.edges.nodes.position[subject.sources]


def outcome(**changes) -> Check:
    return dataclasses.replace(Check("parity", "same", 2e-15, 1e-9, 0.25), **changes)


def test_the_table_says_no_when_one_case_fails() -> None:
    skipped = outcome(name="total", error=None, reason="too many")
    good = CaseReport("text", 11, 1408, (outcome(), skipped), {"parity": 3e-7}, 1.5)
    bad = CaseReport("one_picture", 29, 9, (outcome(error=float("nan")), skipped), {"parity": 4e-7}, 1.0)
    none = CaseReport("two_pictures", 0, 0, (), {}, reason="takes one picture")
    lines = render([good, bad, none], "float32").splitlines()
    assert lines[0].split() == [
        *("identity", "text", "one_picture", "tolerance", "holds", "seconds", "in", "float32", "what", "it", "says")
    ]
    assert lines[2].split() == ["parity", "2.0e-15", "nan", "<=", "1e-09", "NO", "0.5", "4.0e-07", "same"]
    assert lines[3].split() == ["total", "-", "-", "<=", "1e-09", "skipped", "0.5", "-", "same"]
    assert len({line.index(" 1e-09") for line in lines[2:4]}) == 1
    assert "two_pictures: skipped, takes one picture" in lines
    assert "total, text: skipped, too many" in lines
    assert "float32" not in render([good], "")
    assert failures([good, bad, none]) == ["parity on one_picture (nan, needs <= 1e-09)"]


def test_metrics_are_flat() -> None:
    report = CaseReport("text", 11, 5, (outcome(), outcome(name="total", error=None)), {"parity": 3e-7}, 1.5)
    assert flat_metrics([report]) == {
        "check/held": 1.0,
        "check/failed": 0.0,
        "check/skipped": 1.0,
        "check/text/parity/error": 2e-15,
        "check/text/parity/seconds": 0.25,
        "check/text/parity/error_own_dtype": 3e-7,
        "check/text/seconds": 1.5,
    }
