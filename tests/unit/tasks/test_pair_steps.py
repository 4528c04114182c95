"""What the steps on pairs compute from what was run."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from vlmscope.circuits.interchange import Outcome, all_features, carried_controls, interchange_plan, run_interchange
from vlmscope.circuits.interchange_config import InterchangeConfig
from vlmscope.circuits.pair_subject import PairSubject
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import CircuitFeature, Rate
from vlmscope.core.records import FeatureId
from vlmscope.data.config import PairsConfig
from vlmscope.data.pairs import Pair, Side
from vlmscope.interventions.edits import at_positions
from vlmscope.interventions.named import mean_activations
from vlmscope.interventions.trials import Cases, Setting, Trial, run_trials
from vlmscope.models.tiny import tiny_image
from vlmscope.tasks.experiment import own_analysis
from vlmscope.tasks.steps import interchange
from vlmscope.tasks.steps.interchange import PairCase

OBJECTS: Any = own_analysis("object_recognition")
RATE = Rate(0.5, 0.4, 0.6, 10)


def test_a_contrast_compares_the_pairs_that_both_questions_have() -> None:
    rows = [("a", "shape", 0.9), ("b", "shape", 0.5), ("c", "shape", 0.7), ("c", "colour", 0.1), ("a", "colour", 0.3)]
    found = OBJECTS.contrast(pd.DataFrame(rows, columns=["case", "question", "recovered"]), "shape")
    assert found.tolist() == pytest.approx([0.9 - 0.3, 0.7 - 0.1])


def test_features_elsewhere_are_left_alone_when_a_place_is_carried(made: tuple[Any, PairSubject]) -> None:
    bench, subject = made
    soft = np.flatnonzero(subject.batch.is_image)
    on = np.zeros((subject.size, len(soft)), bool)
    on[:, :2] = True
    features = all_features(bench.transcoders)
    test = (subject.question, subject.batch, subject.base, subject.tokens, subject.other_tokens, ("a", "b", "c"))
    cases = Cases("test", *test, subject.other, subject.other_logits)
    plan = interchange_plan(bench.scope, subject, features)
    for chosen, places in ((on, soft[:2]), (~on, soft[2:]), (np.ones_like(on), soft)):
        where = torch.zeros(subject.batch.length, dtype=torch.bool)
        where[places] = True
        expected = run_interchange(bench.scope, subject, at_positions(plan, where)).recovered
        assert expected is not None and abs(expected.value) > 1e-3
        trial = Trial("carry", OBJECTS.CarryAt(chosen), [cases], [Setting(positions="image", matched=0)])
        found = run_trials(bench.scope, [trial]).recovered.mean()
        assert found == pytest.approx(expected.value, rel=1e-4)


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


def test_own_pairs_with_ids_and_orrerys_pass(tmp_path: Path) -> None:
    OBJECTS.check(own_pairs(tmp_path, ("1", "1")))
    OBJECTS.check(SimpleNamespace(pairs=PairsConfig(change="object")))


def test_training_pairs_whose_answers_agree_choose_nothing(
    made: tuple[Any, PairSubject], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, subject = made
    cfg = SimpleNamespace(interchange=InterchangeConfig(), pairs=None)
    bench: Any = SimpleNamespace(**vars(base) | {"cfg": cfg})
    side = Side("what ?", (), "x")
    splits = {"test": replace(side, answer="y"), "train": side}
    train = [Pair("1", "name", "x", side, splits["train"])]
    monkeypatch.setattr(interchange, "pairs_of", lambda _b, _split: {"name": train})
    monkeypatch.setattr(interchange, "subject_of", lambda *_args, **_kwargs: subject)
    monkeypatch.setattr(interchange, "pair_effects", lambda *_args: pytest.fail("there is no effect to estimate"))
    cases = {"name": PairCase([], subject)}
    assert interchange.chosen_features(bench, cases) == {}


def test_curves_over_counts_are_of_questions_that_move_and_their_controls_follow_the_seed(
    made: tuple[Any, PairSubject], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, subject = made
    cfg = SimpleNamespace(interchange=InterchangeConfig(counts=[1, 2]), seed=7)
    bench: Any = SimpleNamespace(**vars(base) | {"cfg": cfg, "records": {}, "metrics": {}})
    seeds = []

    def spy(*args: Any) -> list[Outcome]:
        seeds.append(args[-1])
        return carried_controls(*args)

    monkeypatch.setattr(interchange, "carried_controls", spy)
    still = replace(subject, question="cover", other_tokens=subject.tokens)
    cases = {"name": PairCase([], subject), "cover": PairCase([], still)}
    features = [CircuitFeature(FeatureId(0, index), "last", 1.0, 1.0) for index in (3, 4)]
    means = mean_activations(bench.scope, [subject.batch], bench.transcoders.layers)
    found = interchange.count_curves(bench, cases, {"name": features, "cover": features}, means)
    assert [curve.name for curve in found["follows"]] == ["name", "name, matched"]
    assert seeds == [7, 7]
