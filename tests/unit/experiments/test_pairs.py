"""What hierarchy and object_recognition compute of pairs, on a tiny random model with transcoders."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.unit.circuits.subjects import carried, cases_of, recovered

from vlmscope.circuits.operations import Carry, all_features
from vlmscope.circuits.pairs import PairEffects, PairSubject, pair_subject
from vlmscope.core.errors import UserError
from vlmscope.data.config import PairsConfig
from vlmscope.interventions.run import run_edited
from vlmscope.interventions.trials import Setting, Trial, run_trials
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.tasks.experiment import own_analysis
from vlmscope.transcoders.transcoder import random_set

HIERARCHY: Any = own_analysis("hierarchy")
OBJECTS: Any = own_analysis("object_recognition")


@pytest.fixture(scope="session")
def made() -> tuple[Any, PairSubject]:
    """(bench, subject): three pairs, whose answers are the two words that the model thinks most probable."""
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 24, 5, seed=6).requires_grad_(False)
    sides = [[vlm.prepare("what is this planet ?", [tiny_image(i)]) for i in some] for some in (range(3), range(3, 6))]
    logits = vlm.adapter.forward(sides[0][0].tensors, use_cache=False).logits[0, -1, : vlm.adapter.vocab_size]
    first, second = (logits.topk(2).indices[i].repeat(3) for i in (0, 1))
    scope = Scope(vlm, transcoders)
    subject = pair_subject(scope, "name", sides[0], sides[1], first, second, 2, answerable=False)
    return SimpleNamespace(vlm=vlm, scope=scope, transcoders=transcoders, cfg=SimpleNamespace(seed=0)), subject


def test_ranges_grow_to_all_layers_from_both_ends(made: tuple[Any, PairSubject]) -> None:
    bench, subject = made
    settings = [Setting("first", layers="0-each", matched=0), Setting("last", layers="each-", matched=0)]
    table = run_trials(bench.scope, [Trial("all", Carry(None), [cases_of(subject)], settings)])
    first, last = (of.pivot(index="case", columns="layers", values="recovered") for _, of in table.groupby("setting"))
    layers = bench.transcoders.layers
    assert first.columns.tolist() == [f"0-{n}" for n in layers] and last.columns.tolist() == [f"{n}-" for n in layers]
    np.testing.assert_allclose(first[f"0-{layers[-1]}"], last["0-"], rtol=1e-4)
    plan = carried(bench.scope, subject, None)
    logits = run_edited(bench.scope, subject.batch, {i: plan[i] for i in (0, 1)})
    np.testing.assert_allclose(first["0-1"], recovered(subject, logits), rtol=1e-4, atol=1e-5)
    assert np.ptp(first.to_numpy(), axis=1).max() > 1e-4  # the ranges differ


def test_likeness_is_of_absolute_effects_role_by_role() -> None:
    def effects(rows: list[list[float]]) -> PairEffects:
        table = {0: torch.tensor(rows)}
        return PairEffects(("image", "last"), table, table)

    bench: Any = SimpleNamespace(transcoders=SimpleNamespace(layers=[0]), cfg=SimpleNamespace(seed=0))
    one = effects([[1.0, -2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    other = effects([[-1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])
    found = HIERARCHY.likenesses(bench, {"name": one, "cover": other}).set_index("role").alike
    assert found["image"] == pytest.approx(1.0) and found["last"] == pytest.approx(0.0)
    assert np.isnan(HIERARCHY.cosine(np.zeros(3), np.ones(3)))


def test_a_contrast_compares_the_pairs_that_both_questions_have() -> None:
    rows = [("a", "shape", 0.9), ("b", "shape", 0.5), ("c", "shape", 0.7), ("c", "colour", 0.1), ("a", "colour", 0.3)]
    found = OBJECTS.contrast(pd.DataFrame(rows, columns=["case", "question", "recovered"]), "shape")
    assert found.tolist() == pytest.approx([0.9 - 0.3, 0.7 - 0.1])


def test_features_elsewhere_are_left_alone_when_a_place_is_carried(made: tuple[Any, PairSubject]) -> None:
    bench, subject = made
    soft = np.flatnonzero(subject.batch.is_image)
    for places in (soft[:2], soft[2:], soft):
        where = torch.zeros(subject.batch.length, dtype=torch.bool)
        where[places] = True
        logits = run_edited(bench.scope, subject.batch, carried(bench.scope, subject, None, where))
        expected = float(recovered(subject, logits).mean())
        assert abs(expected) > 1e-3
        carry = Carry(all_features(bench.transcoders), at=where.expand(subject.size, -1))
        trial = Trial("carry", carry, [cases_of(subject)], [Setting(positions="image", matched=0)])
        assert run_trials(bench.scope, [trial]).recovered.mean() == pytest.approx(expected, rel=1e-4)


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
