"""The tiny float64 cases as fixtures."""

from collections.abc import Iterator

import pytest
from tests.maths.maths_cases import CASES, WHOLE, Case, case_of

from vlmscope.models.base import exact_float64


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    """Cases made so far; a case costs a fraction of a second and serves all tests."""
    return {}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Iterator[Case]:
    """Each case in turn, with casts kept in float64 during the test."""
    with exact_float64():
        yield case_of(request.param, cases)


@pytest.fixture(params=WHOLE)
def one_case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Iterator[Case]:
    """The cases that have everything at once: pictures, skip paths and biases."""
    with exact_float64():
        yield case_of(request.param, cases)
