"""Circuits: found where they were planted, saved and loaded, and turned into plans that keep to their positions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmscope.activations import mlp_inputs
from vlmscope.circuits.circuit import Circuit, at_supernodes, labelled, load_circuit, save_circuit, steer_plan
from vlmscope.circuits.config import CircuitConfig, QuestionConfig, SettingConfig
from vlmscope.circuits.operations import Exchange
from vlmscope.circuits.selectors import contrast_circuit, mean_levels
from vlmscope.core.artifacts import save_tensors, write_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, PatchBox, Places, Positions
from vlmscope.core.results import CircuitEdge, CircuitFeature, Supernode
from vlmscope.features.readouts import RoleMeans, role_means
from vlmscope.interventions.edits import Plan, donor_activations, merge, patch_plan, set_features
from vlmscope.interventions.run import base_run, edit_changes, run_edited
from vlmscope.interventions.trials import Cases
from vlmscope.models.batching import InputBatch, make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPT = "what is this planet ?"
N = 30


@pytest.fixture(scope="module")
def bench():
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, N, 6, seed=6).requires_grad_(False)
    batch = make_batch(vlm.adapter, [vlm.prepare(PROMPT, [tiny_image(i)]) for i in range(6)])
    return Scope(vlm, transcoders), batch


def planted(transcoders, feature: int, role: str, size: float) -> RoleMeans:
    table = {r: {layer: torch.zeros(N) for layer in transcoders.layers} for r in ("image", "question", "last")}
    for layer in transcoders.layers:
        table[role][layer][feature] = size
    return table


def two_concepts(transcoders, confirmed: bool = True, mars: int = 3) -> tuple[Circuit, dict[str, float]]:
    means = {
        "mars": {"name": planted(transcoders, mars, "last", 2.0)},
        "earth": {"name": planted(transcoders, 8, "image", 1.5)},
    }
    share = {"mars": ("last", mars), "earth": ("image", 8)}
    influence = {c: {(role, FeatureId(i, f)): 0.1 for i in transcoders.layers} for c, (role, f) in share.items()}
    none = {"mars": {}, "earth": {}}
    known, per_layer = influence if confirmed else none, {"image": 4, "last": 4}
    circuit, metrics = contrast_circuit(transcoders, means, known, per_layer, "tiny")
    levels = {c: mean_levels(node.features, means[c]["name"], "name") for c, node in circuit.supernodes.items()}
    return replace(circuit, levels=levels), metrics


def test_planted_features_are_found_at_their_role(bench) -> None:
    transcoders = bench[0].transcoders
    circuit, metrics = two_concepts(transcoders)
    for concept, feature, role in (("mars", 3, "last"), ("earth", 8, "image")):
        members = circuit.supernodes[concept].features
        assert [m.feature for m in members] == [FeatureId(layer, feature) for layer in transcoders.layers]
        assert {m.role for m in members} == {role}
        assert float(circuit.levels_at(concept, [role], 0, "name")[0, 0]) == {"mars": 2.0, "earth": 1.5}[concept]
        assert metrics[f"circuit/{concept}/confirmed_frac"] == 1.0
    assert circuit.size("mars", "earth") == 2 * len(transcoders)
    circuit, metrics = two_concepts(transcoders, confirmed=False)
    assert circuit.size("mars", "earth") == 0 and metrics["circuit/mars/confirmed_frac"] == 0.0


def test_each_role_gives_features_of_its_own(bench) -> None:
    """What the last position has is so large that one ranking over roles would take nothing from the soft tokens."""
    transcoders = bench[0].transcoders
    sizes = {("last", 3): 9.0, ("last", 4): 8.0, ("image", 5): 0.2, ("image", 6): 0.1, ("question", 7): 5.0}

    def means(sign: int) -> RoleMeans:
        table = {r: {i: torch.zeros(N) for i in transcoders.layers} for r in ("image", "question", "last")}
        for (role, feature), size in sizes.items():
            for layer in transcoders.layers:
                table[role][layer][feature + 10 * (sign < 0)] = size / float(transcoders[layer].write_norms()[feature])
        return table

    both = {"mars": {"name": means(1)}, "earth": {"name": means(-1)}}
    # Feature 5 has influence, but not at the soft tokens.
    confirmed = [("last", 3), ("last", 4), ("last", 5), ("image", 6), ("question", 7)]
    influence = {"mars": {(r, FeatureId(i, f)): 0.1 for r, f in confirmed for i in transcoders.layers}, "earth": {}}
    for per_layer, expected in (
        ({"image": 1, "last": 1}, {3, 6}),
        ({"image": 1, "last": 0}, {6}),
        ({"last": 5}, {3, 4}),
        ({"question": 2, "image": 2}, {6, 7}),
    ):
        node = contrast_circuit(transcoders, both, influence, per_layer, "tiny")[0].supernodes["mars"]
        assert {m.feature.index for m in node.features} == expected
        roles = {role for role, count in per_layer.items() if count}
        assert node.positions is not None and {*node.positions.roles} == roles and not node.positions.generated
    free, _ = contrast_circuit(transcoders, both, influence, {"image": 1, "last": 1}, "tiny", confirmed=False)
    assert {m.feature.index for m in free.supernodes["mars"].features} == {3, 5}


def test_steering_sets_levels_by_role(bench) -> None:
    scope, batch = bench
    transcoders = scope.transcoders
    circuit, _ = two_concepts(transcoders)
    edit = steer_plan(circuit, "mars", "earth", batch.places, 2.0)[0]
    assert edit.features.tolist() == [3, 8]
    new = edit.scale * 9.0 + edit.value
    assert (new[:, 0] == 0).all()
    image = torch.from_numpy(batch.roles == "image")
    assert (new[image, 1] == 3.0).all()
    assert (new[~image, 1] == 0).all()


def test_gated_steering_leaves_prompts_without_the_suppressed_concept_alone(bench) -> None:
    scope, batch = bench
    inputs = mlp_inputs(scope.adapter, batch, scope.transcoders.layers)
    fires = torch.stack([scope.transcoders[layer].encode(x).dense(N)[:, -1] > 0 for layer, x in inputs.items()]).any(0)
    mars = int((fires.sum(0) - batch.size / 2).abs().argmin())  # fires at the end of about half of the prompts
    silent = ~fires[:, mars]
    circuit, _ = two_concepts(scope.transcoders, mars=mars)
    before = run_edited(scope, batch, {})
    cases = plain_cases(scope, batch)
    after = run_edited(scope, batch, Exchange(circuit, "mars", "earth", 0.5).plan(scope, cases, 20.0))
    assert 0 < int(silent.sum()) < batch.size
    assert torch.equal(after[silent], before[silent])
    assert not torch.equal(after[~silent], before[~silent])


def plain_cases(scope: Scope, batch: InputBatch) -> Cases:
    ones, base = torch.ones(batch.size, dtype=torch.int64), base_run(scope, batch)
    ids = tuple(map(str, range(batch.size)))
    return Cases("test", "name", batch, base, ones, 2 * ones, ids, batch, base.logits.flip(0))


def test_patching_with_the_recipient_itself_changes_nothing(bench) -> None:
    scope, batch = bench
    features = two_concepts(scope.transcoders)[0].union()
    assert {layer: f.tolist() for layer, f in features.items()} == {i: [3, 8] for i in scope.transcoders.layers}
    own = patch_plan(donor_activations(scope, batch, features), batch.roles)
    assert torch.allclose(run_edited(scope, batch, own), run_edited(scope, batch, {}), atol=1e-5)


def test_patching_everything_reproduces_the_donor_at_a_layer(bench) -> None:
    """All features of layer 0 from the donor: the layer then writes the donor's reconstruction plus its own error."""
    scope, batch = bench
    donors = batch.select([1, 2, 3, 4, 5, 0])
    mlp, norm = scope.adapter.mlp(0), scope.adapter.norms(0).mlp_out_post
    assert norm is not None

    def layer(rows: InputBatch, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the MLP, and what leaves it with the edit."""
        seen: dict[int, torch.Tensor] = {}
        handles = [
            m.register_forward_pre_hook(lambda _, x, i=i: seen.update({i: x[0]})) for i, m in enumerate((mlp, norm))
        ]
        run_edited(scope, rows, plan)
        for handle in handles:
            handle.remove()
        return seen[0], seen[1]

    patched = patch_plan(donor_activations(scope, donors, {0: torch.arange(N)}), batch.roles)
    (x, out), (donor_x, _), (_, written) = layer(batch, {}), layer(donors, {}), layer(batch, patched)
    error = out - scope.transcoders[0](x).reconstruction
    assert torch.allclose(written, scope.transcoders[0](donor_x).reconstruction + error, atol=1e-5)


def test_role_means_equal_a_plain_loop(bench) -> None:
    scope, batch = bench
    means = role_means(scope, [batch, batch.select([0])])
    dense = scope.transcoders[2].encode(mlp_inputs(scope.adapter, batch, [2])[2]).dense(N)
    both = torch.cat([dense, dense[:1]])
    for role in ("image", "question", "last", "special"):
        mask = torch.from_numpy(batch.roles == role)
        assert torch.allclose(means[role][2], both[:, mask].mean((0, 1)), atol=1e-6)


def member(text: str) -> CircuitFeature:
    return CircuitFeature(FeatureId.parse(text), "last", 0.5, 0.25)


def node(name: str, *features: str, positions: Positions | None = None) -> Supernode:
    return Supernode(name, tuple(map(member, features)), positions, "ids")


HALF = Positions(("last",), PatchBox(0.0, 0.0, 0.5, 1.0))


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
    # A merge keeps the positions.
    more = {1: set_features(torch.tensor([6, 9]), torch.ones(2), everywhere, torch.ones(2))}
    joined = merge(plan, more)[1]
    assert joined.features.tolist() == [3, 4, 5, 6, 9] and joined.at is not None
    assert torch.equal(joined.at[:, :3], at[:, :3]) and bool(joined.at[:, 3:].all())


def test_a_circuit_is_read_back_as_it_was(bench, tmp_path: Path) -> None:
    scope, batch = bench
    nodes = {"mars": node("mars", "L1/3", "L2/7", positions=HALF), "dust": node("dust", "L2/9")}
    plain = Circuit(nodes, {"mars": {"name:last": {1: torch.tensor([0.5]), 2: torch.tensor([0.25])}}})
    named = replace(labelled(plain, {FeatureId(2, 7): "planet = mars (0.97)"}), model="orrery", n_features={1: 30})
    circuit = replace(named, edges=(CircuitEdge("mars", "dust", -1.25, -0.1, 3),))
    assert [member.label for member in circuit.node("mars").features] == ["", "planet = mars (0.97)"]
    save_circuit(circuit, tmp_path / "named")
    again = load_circuit(tmp_path / "named")
    assert replace(again, levels=circuit.levels) == circuit
    assert float(again.levels_at("mars", ["last"], 2)[0, 0]) == 0.25
    # What a feature is called stays where nothing else is known.
    assert labelled(again, {}).supernodes == circuit.supernodes
    concepts, _ = two_concepts(scope.transcoders)
    save_circuit(concepts, tmp_path / "concepts")
    both = (concepts, load_circuit(tmp_path / "concepts"))
    plans = [steer_plan(circuit, "mars", "earth", batch.places, 2.0) for circuit in both]
    assert torch.equal(*(run_edited(scope, batch, plan) for plan in plans))


def stored(folder: Path, body: dict) -> Circuit:
    write_yaml(folder / "circuit.yaml", body)
    save_tensors(folder / "levels.safetensors", {"mars.name:last.1": np.ones(1, np.float32)}, {"version": "1"})
    return load_circuit(folder)


ONE = Circuit({"a": node("a", "L1/3", positions=Positions(("image",)))}, {}, model="orrery", n_features={1: 30})
UNKNOWN = Circuit(ONE.supernodes, {})
WITHOUT_PICTURE = Places(np.array(["special", "last"]))
QUESTION = QuestionConfig("what colour ?", {"neptune": "blue", "earth": "blue"})


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda folder: stored(folder, {"version": 3, "supernodes": {}}), "has version 3"),
        (lambda folder: stored(folder, {"version": 2}), "no supernodes"),
        (lambda folder: stored(folder, {"version": 2, "supernodes": {"a": {"features": [{}]}}}), "incomplete circuit"),
        (lambda folder: stored(folder, {"version": 2, "supernodes": {"a": 3}}), "incomplete circuit"),
        (lambda _: ONE.check_fits("gemma", {1: 30}), "model orrery, not of gemma"),
        (lambda _: ONE.check_fits("orrery", {1: 40}), "other transcoders"),
        (lambda _: UNKNOWN.check_fits("orrery", {1: 3}), "which the transcoders do not have"),
        (lambda _: ONE.indices("venus"), "no supernode 'venus'"),
        (lambda _: HALF.mask(WITHOUT_PICTURE), "different shapes"),
        (lambda _: at_supernodes({}, [ONE.node("a")], WITHOUT_PICTURE), "a: the prompt has no position in image"),
        (lambda _: CircuitConfig(["mars", "mars"], {}), "needs two different concepts"),
        (lambda _: CircuitConfig(["mars", "earth"], {"colour": QUESTION}), "questions.colour.answers lacks mars"),
        (
            lambda _: CircuitConfig(["neptune", "earth", "hand"], {"colour": QUESTION}),
            "no question has an answer of hand",
        ),
        (
            lambda _: CircuitConfig(["neptune", "earth"], {"colour": QUESTION}),
            "both 'blue' to .*leave the question",
        ),
        (lambda _: CircuitConfig(["mars", "earth"], {}, third="mars"), "third=mars is one of circuit.concepts"),
        (lambda _: SettingConfig(mode=["fre"]), "settings.mode=fre: no such choice; did you mean 'free'"),
        (lambda _: SettingConfig(layers=["last"]), "settings: layers=last: write all, no_last"),
    ],
)
def test_what_makes_no_sense_is_refused(mistake: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        mistake(tmp_path)
