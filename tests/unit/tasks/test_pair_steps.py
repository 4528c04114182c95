"""What the steps on pairs compute from what was run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.unit.circuits.subjects import carried, cases_of, recovered

from vlmscope.circuits.pairs import PairSubject
from vlmscope.core.errors import UserError
from vlmscope.data.config import PairsConfig
from vlmscope.interventions.run import run_edited
from vlmscope.interventions.trials import Setting, Trial, run_trials
from vlmscope.models.tiny import tiny_image
from vlmscope.tasks.experiment import own_analysis

OBJECTS: Any = own_analysis("object_recognition")


def test_a_contrast_compares_the_pairs_that_both_questions_have() -> None:
    rows = [("a", "shape", 0.9), ("b", "shape", 0.5), ("c", "shape", 0.7), ("c", "colour", 0.1), ("a", "colour", 0.3)]
    found = OBJECTS.contrast(pd.DataFrame(rows, columns=["case", "question", "recovered"]), "shape")
    assert found.tolist() == pytest.approx([0.9 - 0.3, 0.7 - 0.1])


def test_features_elsewhere_are_left_alone_when_a_place_is_carried(made: tuple[Any, PairSubject]) -> None:
    bench, subject = made
    soft = np.flatnonzero(subject.batch.is_image)
    on = np.zeros((subject.size, len(soft)), bool)
    on[:, :2] = True
    for chosen, places in ((on, soft[:2]), (~on, soft[2:]), (np.ones_like(on), soft)):
        where = torch.zeros(subject.batch.length, dtype=torch.bool)
        where[places] = True
        logits = run_edited(bench.scope, subject.batch, carried(bench.scope, subject, None, where))
        expected = float(recovered(subject, logits).mean())
        assert abs(expected) > 1e-3
        trial = Trial("carry", OBJECTS.CarryAt(chosen), [cases_of(subject)], [Setting(positions="image", matched=0)])
        found = run_trials(bench.scope, [trial]).recovered.mean()
        assert found == pytest.approx(expected, rel=1e-4)


def own_pairs(folder: Path, ids: tuple[str | None, str | None]) -> Any:
    """A configuration with a file of two questions about the same pictures, with the ids given or none."""
    for name in "ab":
        tiny_image(ord(name)).save(folder / f"{name}.png")
    lines = [
        {"prompt": f"what {question} ?", "image": "a.png", "answer": "x", "question": question}
        | {"counterfactual": {"image": "b.png", "answer": "y"}}
        | ({} if one is None else {"id": one})
        for question, one in zip(("shape", "colour"), ids, strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(pairs=PairsConfig(path=str(folder / "pairs.jsonl"), train=0))


@pytest.mark.parametrize("ids", [(None, None), ("1", "2")])
def test_own_pairs_whose_questions_share_no_id_are_told_before_anything_runs(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(UserError, match=r"pairs.jsonl: .* give lines about one scene the same \"id\"") as error:
        OBJECTS.check(own_pairs(tmp_path, ids))
    assert "\n" not in str(error.value)
