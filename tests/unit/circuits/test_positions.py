"""Supernodes with positions: read back from files, and honoured by every plan that is made from a circuit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmscope.circuits.circuit import Circuit, at_supernodes, load_circuit, save_circuit, steer_plan
from vlmscope.core.artifacts import save_tensors, write_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import CircuitEdge, CircuitFeature, Supernode
from vlmscope.core.records import FeatureId, PatchBox, Places, Positions
from vlmscope.interventions.edits import merge, set_features
from vlmscope.interventions.named import matched_features
from vlmscope.interventions.run import edit_changes
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

N = 30


@pytest.fixture(scope="module")
def bench():
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, N, 6, seed=6).requires_grad_(False)
    batch = make_batch(vlm.adapter, [vlm.prepare("what is this ?", [tiny_image(i)]) for i in range(3)])
    return Scope(vlm, transcoders), batch


def member(text: str) -> CircuitFeature:
    return CircuitFeature(FeatureId.parse(text), "last", 0.5, 0.25)


def node(name: str, *features: str, positions: Positions | None = None) -> Supernode:
    return Supernode(name, tuple(map(member, features)), positions, "ids")


HALF = Positions(("last",), PatchBox(0.0, 0.0, 0.5, 1.0))


def test_a_box_takes_the_soft_tokens_that_overlap_it(bench) -> None:
    *_, batch = bench
    mask = HALF.mask(batch.places)
    boxes = [box for box, chosen in zip(batch.patch_boxes, mask, strict=True) if chosen and box is not None]
    assert boxes and all(box.left < 0.5 for box in boxes)
    assert 0 < len(boxes) < batch.is_image.sum()
    assert mask[-1] and mask.sum() == len(boxes) + 1
    with pytest.raises(UserError, match="different shapes"):
        HALF.mask(Places(batch.roles))


def test_pictures_of_other_shapes_leave_the_boxes_out(bench) -> None:
    vlm = bench[0].vlm
    one = vlm.prepare("what is this ?", [tiny_image(0)])
    other = replace(one, patch_boxes=[None if b is None else PatchBox(0, 0, 1, 1) for b in one.patch_boxes])
    assert make_batch(vlm.adapter, [one, one]).patch_boxes == tuple(one.patch_boxes)
    assert make_batch(vlm.adapter, [one, other]).patch_boxes == ()


def test_a_circuit_is_read_back_as_it_was(tmp_path: Path) -> None:
    nodes = {"mars": node("mars", "L1/3", "L2/7", positions=HALF), "dust": node("dust", "L2/9")}
    edges = (CircuitEdge("mars", "dust", -1.25, -0.1, 3),)
    levels = {"mars": {"name:last": {1: torch.tensor([0.5]), 2: torch.tensor([0.25])}}}
    save_circuit(Circuit(nodes, levels, edges, "orrery", {1: 30, 2: 30}), tmp_path)
    again = load_circuit(tmp_path)
    assert again.supernodes == nodes and again.edges == edges
    assert (again.model, again.n_features) == ("orrery", {1: 30, 2: 30})
    assert float(again.level("mars", "last", 2)[0]) == 0.25


def test_version_1_is_still_read(tmp_path: Path) -> None:
    rows = [{"feature": "L1/3", "role": "last", "contrast": 0.5, "influence": 0.25}]
    write_yaml(tmp_path / "circuit.yaml", {"version": 1, "supernodes": {"mars": rows}})
    save_tensors(tmp_path / "levels.safetensors", {"mars.name:last.1": np.ones(1, np.float32)}, {"version": "1"})
    found = load_circuit(tmp_path)
    assert found.supernodes == {"mars": Supernode("mars", (member("L1/3"),))}
    assert found.edges == () and found.model == ""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"version": 3, "supernodes": {}}, "has version 3"),
        ({"version": 2}, "no supernodes"),
        ({"version": 2, "supernodes": {"a": {"features": [{"feature": "L1/3"}]}}}, "incomplete circuit"),
        ({"version": 2, "supernodes": {"a": 3}}, "incomplete circuit"),
    ],
)
def test_files_that_are_no_circuit_are_refused(tmp_path: Path, body: dict, said: str) -> None:
    write_yaml(tmp_path / "circuit.yaml", body)
    with pytest.raises(UserError, match=said):
        load_circuit(tmp_path)


def test_circuits_of_others_are_refused() -> None:
    circuit = Circuit({"a": node("a", "L1/3")}, {}, model="orrery", n_features={1: 30})
    circuit.check_fits("orrery", {1: 30})
    for model, widths, said in (
        ("gemma", {1: 30}, "model orrery, not of gemma"),
        ("orrery", {2: 30}, "other transcoders"),
        ("orrery", {1: 3}, "other transcoders"),
        ("orrery", {1: 40}, "other transcoders"),
    ):
        with pytest.raises(UserError, match=said):
            circuit.check_fits(model, widths)
    unknown = Circuit(circuit.supernodes, {})
    for widths, said in (({2: 30}, "no such layer"), ({1: 3}, "layer 1 has 3 features")):
        with pytest.raises(UserError, match=said):
            unknown.check_fits("orrery", widths)


def test_each_feature_is_edited_at_the_positions_of_its_supernodes(bench) -> None:
    scope, batch = bench
    nodes = [
        node("a", "L1/3", "L1/4", positions=Positions(("last",))),
        node("b", "L1/4", "L1/5", positions=Positions(("image",))),
        node("c", "L1/6"),
        node("d", "L1/5", positions=Positions(("answer",))),
    ]
    everywhere = torch.ones(batch.length, dtype=torch.bool)
    features = torch.tensor([3, 4, 5, 6])
    whole = {1: set_features(features, torch.full((4,), 2.0), everywhere, torch.full((4,), 2.0))}
    plan = at_supernodes(whole, nodes, batch.places)
    at = plan[1].at
    assert at is not None and plan[1].at_generated is not None
    last, image = batch.roles == "last", batch.roles == "image"
    for column, expected in enumerate((last, last | image, image, np.ones_like(last))):
        assert at[:, column].tolist() == expected.tolist()
    assert plan[1].at_generated.tolist() == [False, False, True, True]
    # What is written is the sum of what single edits at these positions write.
    x = torch.randn(2, batch.length, scope.adapter.d_model, generator=torch.Generator().manual_seed(1))
    (written,) = edit_changes(scope.transcoders[1], x, plan[1], 0)
    parts = [
        edit_changes(scope.transcoders[1], x, set_features(features[i : i + 1], torch.full((1,), 2.0), at[:, i]), 0)[0]
        for i in range(4)
    ]
    assert torch.allclose(written, torch.stack(parts).sum(0), atol=1e-6)
    (generated,) = edit_changes(scope.transcoders[1], x[:, :1], plan[1], batch.length)
    alone = set_features(features[2:], torch.full((2,), 2.0), everywhere, torch.full((2,), 2.0))
    assert torch.allclose(generated, edit_changes(scope.transcoders[1], x[:, :1], alone, batch.length)[0], atol=1e-6)
    # Controls keep the positions, and so does a merge.
    control = matched_features(plan, {1: torch.linspace(0.1, 1, N)}, 0)
    assert torch.equal(control[1].at, at)  # pyright: ignore[reportArgumentType]
    more = {1: set_features(torch.tensor([6, 9]), torch.ones(2), everywhere, torch.ones(2))}
    joined = merge([plan, more])[1]
    assert joined.features.tolist() == [3, 4, 5, 6, 9] and joined.at is not None
    assert torch.equal(joined.at[:, :3], at[:, :3]) and bool(joined.at[:, 3:].all())


def test_without_positions_a_plan_stays_as_it_was(bench) -> None:
    *_, batch = bench
    plan = {1: set_features(torch.tensor([3]), torch.ones(1), torch.ones(batch.length, dtype=torch.bool))}
    assert at_supernodes(plan, [node("a", "L1/3")], batch.places) == plan


def test_steering_acts_where_the_supernodes_are(bench) -> None:
    *_, batch = bench
    nodes = {
        "off": node("off", "L1/3", positions=Positions(("question",))),
        "on": node("on", "L1/5", positions=Positions(("last",))),
    }
    levels = {name: {"q:last": {1: torch.ones(1)}} for name in nodes}
    edit = steer_plan(Circuit(nodes, levels), "off", "on", batch.places, 1.0)[1]
    assert edit.features.tolist() == [3, 5] and edit.at is not None
    assert edit.at[:, 0].tolist() == (batch.roles == "question").tolist()
    assert edit.at[:, 1].tolist() == (batch.roles == "last").tolist()


def test_a_prompt_without_such_a_position_is_refused(bench) -> None:
    *_, batch = bench
    places = Places(np.where(batch.roles == "image", "special", batch.roles))
    plan = {1: set_features(torch.tensor([3]), torch.ones(1), torch.ones(batch.length, dtype=torch.bool))}
    with pytest.raises(UserError, match="supernode a: the prompt has no position in image"):
        at_supernodes(plan, [node("a", "L1/3", positions=Positions(("image",)))], places)
