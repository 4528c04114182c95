"""Wrong answers can be predicted only where there is something to tell apart: mistakes in one line."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlmscope.attribution.config import HallucinationConfig
from vlmscope.core.errors import UserError
from vlmscope.tasks.steps import predict_errors
from vlmscope.tasks.steps.predict_errors import Case, asked_cases


def bench(**settings: Any) -> Any:
    return SimpleNamespace(cfg=SimpleNamespace(hallucination=HallucinationConfig(**settings)))


def test_one_question_is_refused_before_anything_is_traced() -> None:
    with pytest.raises(UserError, match="hallucination.scenes asks 1 question"):
        next(asked_cases(bench(scenes={"planets": 0, "hands": 4})))


def test_questions_that_are_all_right_or_all_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("a", "name", "what is this ?", "mars", "mars", 0.0, np.zeros((2, 2, 3), np.uint8), {})
    cases = [case, replace(case, scene="b"), replace(case, question="cover", said="earth")]
    monkeypatch.setattr(predict_errors, "asked_cases", lambda _bench: iter(cases))
    with pytest.raises(UserError, match="no question has right and wrong answers"):
        predict_errors.run(bench())
