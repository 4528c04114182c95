"""Pairs of icons and their relations: carrying between picture and name, features of all relations or of one."""

import numpy as np
import pytest
import torch

from vlmscope.circuits.cases import TO_PICTURE, TO_TEXT, pairs_by_question, standing_for
from vlmscope.circuits.config import InterchangeConfig
from vlmscope.circuits.experiment import COMMON, PARTICULAR, PairSource
from vlmscope.circuits.operations import Carry
from vlmscope.data.config import PairsConfig
from vlmscope.data.icons import PICTURE
from vlmscope.interventions.edits import codes
from vlmscope.interventions.run import run_edited
from vlmscope.interventions.trials import Cases
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

WIDTH = 30


@pytest.fixture(scope="module")
def scope() -> Scope:
    vlm = tiny_gemma3(5)
    return Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, WIDTH, 6, seed=6).requires_grad_(False))


@pytest.fixture(scope="module")
def source(scope: Scope) -> PairSource:
    pairs = PairsConfig(relations=["capital", "language"], train=8, test=10)
    config = InterchangeConfig(features=20, steps=1, least=2, answerable=False)
    return PairSource(scope, pairs, lambda split, asked: pairs_by_question(asked, split), config)


@pytest.fixture(scope="module")
def cases(source: PairSource) -> dict[str, list[Cases]]:
    return source.cases({"test": {"free"}, TO_PICTURE: {"free"}, TO_TEXT: {"free"}})


def test_a_picture_and_a_name_stand_for_each_other(scope: Scope) -> None:
    picture = scope.inputs(f"Country: {PICTURE}\nCapital:", [tiny_image(0)])
    text = scope.inputs("Country: Chile\nCapital:")
    name = range(text.tokens.index("h") - 1, text.tokens.index("h") + 4)
    to_picture, to_text = (standing_for(*both).tolist() for both in ((picture, text), (text, picture)))
    assert {to_picture[place] for place in np.flatnonzero(picture.is_image)} <= set(name)
    assert to_picture[-1] == len(text) - 1 and to_text[-1] == len(picture) - 1
    for at, mine, theirs in ((to_picture, picture, text), (to_text, text, picture)):
        assert len(at) == len(mine)
        outside = [n for n, place in enumerate(at) if mine.input_ids[n] == theirs.input_ids[place]]
        assert [at[n] for n in outside] == sorted(at[n] for n in outside) and len(outside) >= len("Country: Capital:")


@pytest.mark.parametrize("name", [TO_PICTURE, TO_TEXT])
def test_the_donors_activations_arrive_where_they_stand_for(
    scope: Scope, cases: dict[str, list[Cases]], name: str
) -> None:
    """The edited run is the one in which hooks set the chosen features to the donor's at the aligned positions."""
    subject = cases[name][0]
    assert subject.donors is not None and subject.donor_at is not None
    assert subject.batch.is_image.any() == (name == TO_PICTURE) != subject.donors.is_image.any()
    chosen = {layer: torch.tensor([3, 17, 4]) for layer in (0, 2)}
    edited = run_edited(scope, subject.batch, Carry(chosen).plan(scope, subject, 1.0))
    given = {layer: code.dense(WIDTH)[:, subject.donor_at] for layer, code in codes(scope, subject.donors).items()}
    for layer, features in chosen.items():

        def hook(_module, args, out, layer=layer, features=features):
            own = scope.transcoders[layer].encode(args[0]).dense(WIDTH)
            return out + (given[layer] - own)[..., features] @ scope.transcoders[layer].W_dec[features]

        handle = scope.adapter.mlp(layer).register_forward_hook(hook)
        chosen[layer] = handle  # type: ignore[assignment]
    try:
        torch.testing.assert_close(edited, scope.forward(subject.batch), atol=1e-4, rtol=1e-4)
    finally:
        for handle in chosen.values():
            handle.remove()  # type: ignore[attr-defined]


def test_common_features_are_of_every_question_and_particular_ones_of_one(source: PairSource) -> None:
    ranked = {name: {m.feature for m in source.ranked(name)[:20]} for name in source.questions}
    common = [member.feature for member in source.common()]
    assert set(common) == ranked["capital"] & ranked["language"] and common
    for name, other in (("capital", "language"), ("language", "capital")):
        assert {m.feature for m in source.particular(name)} == ranked[name] - ranked[other]
    features, _ = source.chosen(COMMON, "capital", 2)
    assert sum(map(len, features.values())) == 2
    assert source.chosen(PARTICULAR, "capital", None)[0].keys() <= set(source.scope.transcoders.layers)
