"""Rates, intervals and divergences against values known by hand or by another library."""

import numpy as np
import pytest
from scipy.special import log_softmax as scipy_log_softmax
from scipy.stats import entropy

from vlmscope.metrics.causal import bootstrap_rate, kl_divergence, log_softmax, paired_p


def test_bootstrap_interval_is_near_the_binomial_one() -> None:
    rate = bootstrap_rate([True] * 30 + [False] * 70)
    assert rate.value == pytest.approx(0.3)
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 100)
    assert rate.ci_low == pytest.approx(0.3 - spread, abs=0.02)
    assert rate.ci_high == pytest.approx(0.3 + spread, abs=0.02)
    assert rate == bootstrap_rate([True] * 30 + [False] * 70)


def test_unanimous_cases_do_not_claim_certainty() -> None:
    assert bootstrap_rate([True] * 100).ci_low == pytest.approx(0.97)
    assert bootstrap_rate([False] * 100).ci_high == pytest.approx(0.03)
    with pytest.raises(ValueError, match="at least one case"):
        bootstrap_rate([])


def test_divergence_equals_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 9)) * 4
    assert np.allclose(log_softmax(a), scipy_log_softmax(a, axis=-1))
    p, q = np.exp(scipy_log_softmax(a, axis=-1)), np.exp(scipy_log_softmax(b, axis=-1))
    assert np.allclose(kl_divergence(a, b), entropy(p, q, axis=-1))
    assert np.allclose(kl_divergence(a, a), 0)


def test_cases_of_one_group_are_drawn_together() -> None:
    hits = np.repeat([True, False, True, False, False, True], 10)
    groups = [f"picture {i // 10}" for i in range(60)]
    alone, together = bootstrap_rate(hits), bootstrap_rate(hits, groups=groups)
    assert alone.value == together.value == 0.5
    assert together.ci_high - together.ci_low > 2.5 * (alone.ci_high - alone.ci_low)
    assert bootstrap_rate(hits, groups=[str(i) for i in range(60)]).ci_low == pytest.approx(alone.ci_low, abs=0.04)
    assert bootstrap_rate([True] * 40, groups=["a", "b"] * 20).ci_low == 0.0  # two pictures say little
    with pytest.raises(ValueError, match="names of groups"):
        bootstrap_rate(hits, groups=["a"])


def test_a_paired_p_value_by_hand() -> None:
    done = [True, True, True, True, False, True]
    control = [False, False, False, True, False, False]
    assert paired_p(done, control) == 1 / 16  # four cases differ, all for the intervention
    assert paired_p(control, done) == 1.0
    assert paired_p([True, False], [False, True]) == 0.75
    assert paired_p([], []) == paired_p([True], [True]) == 1.0
    with pytest.raises(ValueError, match="2 cases"):
        paired_p([True, True], [True])
