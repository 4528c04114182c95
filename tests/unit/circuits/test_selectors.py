"""Ways to choose the features of a supernode."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import trace
from vlmscope.circuits import selectors
from vlmscope.circuits.config import InfluenceConfig, LabelConfig, SupernodeConfig
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, PatchBox, Places, Positions
from vlmscope.features.labels import Label, Labels
from vlmscope.features.readouts import RoleMeans
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

N = 40
A, B, C = FeatureId(0, 3), FeatureId(1, 5), FeatureId(2, 7)
NO_ROLE: RoleMeans = {}
PLAIN = SupernodeConfig(influence=InfluenceConfig())


@pytest.fixture(scope="module")
def bench():
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, N, 6, seed=6).requires_grad_(False)
    graph = trace(Scope(vlm, transcoders), vlm.prepare("what is this ?", [tiny_image(0)]), AttributionConfig()).graph
    return Scope(vlm, transcoders), graph


def ids(members: list) -> list[FeatureId]:
    return [member.feature for member in members]


def labels(**texts: tuple[str, float, bool]) -> Labels:
    made = Labels.__new__(Labels)  # labels alone, without the study that they are of
    made.hand = {}
    made.automatic = {
        FeatureId.parse(name.replace("_", "/")): Label(text, "auto", low=low, beats_chance=beats)
        for name, (text, low, beats) in texts.items()
    }
    return made


LABELS = labels(
    L0_3=("red planets", 0.6, True),
    L1_5=("a red planet", 0.9, True),
    L2_7=("planet = red", 0.5, True),
    L2_8=("red shape", 0.9, True),
    L2_9=("red planet", 0.9, False),
)


def means(transcoders, **at: tuple[str, int, int, float]) -> RoleMeans:
    """`name=(role, layer, index, mean)`, all else 0."""
    table = {r: {layer: torch.zeros(N) for layer in transcoders.layers} for r in ("image", "last")}
    for role, layer, index, value in at.values():
        table[role][layer][index] = value
    return table


def test_by_contrast_finds_what_was_planted_at_its_role(bench) -> None:
    transcoders = bench[0].transcoders
    of = means(transcoders, a=("image", 0, 3, 2.0), b=("last", 1, 5, 3.0), c=("last", 2, 7, 1.0))
    against = means(transcoders, c=("last", 2, 7, 1.5), d=("image", 0, 9, 4.0))
    members = selectors.by_contrast(transcoders, of, against, PLAIN, {})
    assert {m.feature: (m.role, m.contrast) for m in members} == {A: ("image", 2.0), B: ("last", 3.0)}
    confirmed = selectors.by_contrast(transcoders, of, against, PLAIN, {A: 0.25}, True)
    assert ids(confirmed) == [A] and confirmed[0].influence == 0.25
    assert ids(selectors.by_contrast(transcoders, of, against, SupernodeConfig(layers=[1, 2]), {})) == [B]
    assert selectors.by_contrast(transcoders, of, of, PLAIN, {}) == []


def test_influence_adds_up_over_positions_and_answers(bench) -> None:
    *_, graph = bench
    whole = selectors.feature_influence(graph)
    assert sum(share for share, _ in whole.values()) == pytest.approx(1.0)
    parts = {role: selectors.feature_influence(graph, None, Positions((role,))) for role in set(graph.roles)}
    for feature, (share, role) in whole.items():
        split = {there: part[feature][0] for there, part in parts.items() if feature in part}
        assert sum(split.values()) == pytest.approx(share)
        assert split[role] == max(split.values())
    left = Positions((), PatchBox(0, 0, 0.5, 1))
    there = left.mask(Places(graph.roles, graph.patch_boxes))
    active = {graph.nodes.feature_id(n) for n in graph.nodes.of(1).tolist() if there[graph.nodes.position[n]]}
    assert set(selectors.feature_influence(graph, None, left)) == active
    assert selectors.feature_influence(graph, graph.logit_tokens[1]) != whole


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda *_: selectors.by_label(LabelConfig("s", "plamet"), LABELS, PLAIN, {}), "did you mean planet"),
        (
            lambda scope, _: selectors.by_contrast(scope.transcoders, NO_ROLE, NO_ROLE, PLAIN, {}),
            "no position role in common",
        ),
        (lambda _, graph: selectors.feature_influence(graph, "nothing"), "'nothing': the graph of 'what is this \\?'"),
        (
            lambda _, graph: selectors.check_graph(replace(graph, meta={"model": "other"}), "run", "tiny", {}),
            "run is a graph of the model other",
        ),
        (lambda _, graph: selectors.check_graph(graph, "run", "tiny_gemma3", {0: 3}), "the transcoders do not have"),
    ],
)
def test_what_is_not_there_is_named(bench, mistake: Callable[..., object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        mistake(*bench)
