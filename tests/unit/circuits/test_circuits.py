"""Circuits: found where they were planted, saved and loaded, turned into plans, and measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmscope.activations.capture import mlp_inputs
from vlmscope.circuits.circuit import Circuit, labelled, load_circuit, save_circuit, steer_plan
from vlmscope.circuits.config import CircuitConfig, QuestionConfig, SettingConfig
from vlmscope.circuits.operations import Carry, Exchange
from vlmscope.circuits.selectors import contrast_circuit
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import CircuitFeature, Supernode
from vlmscope.core.records import FeatureId
from vlmscope.features.readouts import RoleMeans, role_means
from vlmscope.interventions.named import donor_activations, patch_plan
from vlmscope.interventions.run import base_run, run_edited
from vlmscope.interventions.trials import Cases, Setting, Trial, run_trials
from vlmscope.models.batching import make_batch
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
    return RoleMeans(table, {layer: torch.zeros(N) for layer in transcoders.layers}, 1)


def two_concepts(transcoders, confirmed: bool = True, mars: int = 3) -> tuple[Circuit, dict[str, float]]:
    means = {
        "mars": {"name": planted(transcoders, mars, "last", 2.0)},
        "earth": {"name": planted(transcoders, 8, "image", 1.5)},
    }
    share = {"mars": mars, "earth": 8}
    influence = {c: {FeatureId(layer, f): 0.1 for layer in transcoders.layers} for c, f in share.items()}
    return contrast_circuit(transcoders, means, influence if confirmed else {"mars": {}, "earth": {}}, 4, "tiny")


def test_planted_features_are_found_at_their_role(bench) -> None:
    transcoders = bench[0].transcoders
    circuit, metrics = two_concepts(transcoders)
    for concept, feature, role in (("mars", 3, "last"), ("earth", 8, "image")):
        members = circuit.supernodes[concept].features
        assert [m.feature for m in members] == [FeatureId(layer, feature) for layer in transcoders.layers]
        assert {m.role for m in members} == {role}
        assert float(circuit.level(concept, role, 0, "name")[0]) == {"mars": 2.0, "earth": 1.5}[concept]
        assert metrics[f"circuit/{concept}/confirmed_frac"] == 1.0
    assert circuit.size("mars", "earth") == 2 * len(transcoders)
    with pytest.raises(UserError, match="another"):
        circuit.check_fits("another", transcoders.widths, "circuit")


def test_features_without_influence_are_left_out(bench) -> None:
    transcoders = bench[0].transcoders
    circuit, metrics = two_concepts(transcoders, confirmed=False)
    assert circuit.size("mars", "earth") == 0
    assert metrics["circuit/mars/confirmed_frac"] == 0.0


def test_saved_and_loaded_circuits_steer_alike(bench, tmp_path: Path) -> None:
    scope, batch = bench
    circuit, _ = two_concepts(scope.transcoders)
    save_circuit(circuit, tmp_path)
    again = load_circuit(tmp_path)
    plans = [steer_plan(c, "mars", "earth", batch.places, 2.0) for c in (circuit, again)]
    logits = [run_edited(scope, batch, plan) for plan in plans]
    assert torch.equal(*logits)
    assert [m.feature for m in again.supernodes["mars"].features] == [
        m.feature for m in circuit.supernodes["mars"].features
    ]
    with pytest.raises(UserError, match="no supernode 'venus'"):
        again.indices("venus")


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
    mars = int(
        (fires.sum(0) - batch.size / 2).abs().argmin()
    )  # fires at the last position of about half of the prompts
    silent = ~fires[:, mars]
    circuit, _ = two_concepts(scope.transcoders, mars=mars)
    before = run_edited(scope, batch, {})
    after = run_edited(scope, batch, steer_plan(circuit, "mars", "earth", batch.places, 20.0, gate=0.5))
    assert 0 < int(silent.sum()) < batch.size
    assert torch.equal(after[silent], before[silent])
    assert not torch.equal(after[~silent], before[~silent])


def test_patching_with_the_recipient_itself_changes_nothing(bench) -> None:
    scope, batch = bench
    circuit, _ = two_concepts(scope.transcoders)
    base = run_edited(scope, batch, {})
    own = patch_plan(donor_activations(scope, batch, circuit.union()), batch.roles)
    assert torch.allclose(run_edited(scope, batch, own), base, atol=1e-5)
    assert {layer: f.tolist() for layer, f in circuit.union().items()} == {i: [3, 8] for i in scope.transcoders.layers}


def test_patching_everything_reproduces_the_donor_at_a_layer(bench) -> None:
    """All features of layer 0 from the donor: the layer then writes the donor's reconstruction plus its own error."""
    scope, batch = bench
    donors = batch.select([1, 2, 3, 4, 5, 0])
    everything = {"all": planted(scope.transcoders, 0, "last", 1.0), "none": planted(scope.transcoders, 1, "last", 0.0)}
    influence = {"all": {FeatureId(0, i): 1.0 for i in range(N)}, "none": {}}
    for table in everything["all"].by_role.values():
        table[0] += 1.0
    circuit, _ = contrast_circuit(
        scope.transcoders, {c: {"name": m} for c, m in everything.items()}, influence, N, "tiny"
    )
    carried = donor_activations(scope, donors, circuit.union())
    assert len(carried[0][0]) == N
    seen = {}
    for name, plan in (("base", {}), ("donor", {}), ("patched", {0: patch_plan(carried, batch.roles)[0]})):
        target = scope.adapter.norms(0).mlp_out_post
        assert target is not None
        handle = target.register_forward_hook(lambda _m, args, _o, name=name: seen.__setitem__(name, args[0]))
        run_edited(scope, donors if name == "donor" else batch, plan)
        handle.remove()
    x = {}
    for name, rows in (("base", batch), ("donor", donors)):
        handle = scope.adapter.mlp(0).register_forward_hook(
            lambda _m, args, _o, name=name: x.__setitem__(name, args[0])
        )
        run_edited(scope, rows, {})
        handle.remove()
    error = seen["base"] - scope.transcoders[0](x["base"]).reconstruction
    expected = scope.transcoders[0](x["donor"]).reconstruction + error
    assert torch.allclose(seen["patched"], expected, atol=1e-5)


def test_pooled_patch_gives_every_soft_token_the_mean(bench) -> None:
    scope, batch = bench
    circuit, _ = two_concepts(scope.transcoders)
    carried = donor_activations(scope, batch, circuit.union())
    image = torch.from_numpy(batch.is_image)
    edit = patch_plan(carried, batch.roles, strength=2.0, pooled=True)[1]
    mean = carried[1][1][:, image].mean(1, keepdim=True) * 2.0
    assert torch.allclose(edit.value[:, image], mean.expand(-1, int(image.sum()), -1))
    assert torch.equal(edit.value[:, ~image], carried[1][1][:, ~image] * 2.0)


def test_role_means_equal_a_plain_loop(bench) -> None:
    scope, batch = bench
    from vlmscope.activations.capture import mlp_inputs

    found = role_means(scope, [batch, batch.select([0])])
    dense = scope.transcoders[2].encode(mlp_inputs(scope.adapter, batch, [2])[2]).dense(N)
    both = torch.cat([dense, dense[:1]])
    for role in ("image", "question", "last", "special"):
        mask = torch.from_numpy(batch.roles == role)
        assert torch.allclose(found.by_role[role][2], both[:, mask].mean((0, 1)), atol=1e-6)
    assert torch.allclose(found.overall[2], both.mean((0, 1)), atol=1e-6)
    assert found.prompts == 7


def test_role_means_of_half_precision_keep_counting() -> None:
    """A bfloat16 running sum of equal numbers stops at 256 of them: the mean of many prompts would be too small."""
    half = tiny_gemma3(5, dtype=torch.bfloat16)
    transcoders = random_set(4, half.adapter.d_model, N, 6, seed=6, dtype=torch.bfloat16).requires_grad_(False)
    batch = make_batch(half.adapter, [half.prepare(PROMPT, [tiny_image(i)]) for i in range(2)])
    once, often = (role_means(Scope(half, transcoders), [batch] * times) for times in (1, 150))
    for layer in transcoders.layers:
        assert often.overall[layer].dtype == torch.float32
        torch.testing.assert_close(often.overall[layer], once.overall[layer])
        torch.testing.assert_close(often.by_role["image"][layer], once.by_role["image"][layer])


def test_circuits_of_half_precision_are_saved_and_matched(tmp_path: Path) -> None:
    half = tiny_gemma3(5, dtype=torch.bfloat16)
    transcoders = random_set(4, half.adapter.d_model, N, 6, seed=6, dtype=torch.bfloat16).requires_grad_(False)
    batch = make_batch(half.adapter, [half.prepare(PROMPT, [tiny_image(i)]) for i in range(3)])
    circuit, _ = two_concepts(transcoders)
    halves = {
        name: {k: {n: v.bfloat16() for n, v in t.items()} for k, t in of.items()} for name, of in circuit.levels.items()
    }
    save_circuit(replace(circuit, levels=halves), tmp_path)
    scope, means = (
        Scope(half, transcoders),
        {layer: torch.rand(N, dtype=torch.bfloat16) for layer in transcoders.layers},
    )
    ones = torch.ones(batch.size, dtype=torch.int64)
    base = base_run(scope, batch)
    cases = Cases("test", "name", batch, base, ones, 2 * ones, ("a", "b", "c"), batch, base.logits.flip(0))
    settings = [Setting(mode, mode, random_direction=1) for mode in ("direct", "frozen_attention", "free")]
    for do in (Exchange(load_circuit(tmp_path), "mars", "earth", 0.5), Carry(circuit.union())):
        table = run_trials(scope, [Trial("do", do, [cases], settings, means)])
        assert len(table) == 3 * 3 * 3 and np.isfinite(table[["drop", "kl"]].to_numpy()).all()
        assert (table.recovered.isna() == (table.case == "b")).all()  # whose donor is itself


def test_bad_settings_are_named() -> None:
    question = QuestionConfig("what ?", {"mars": "red"})
    with pytest.raises(UserError, match="needs two different concepts"):
        CircuitConfig(["mars", "mars"], {})
    with pytest.raises(UserError, match=r"questions.name.answers lacks earth"):
        CircuitConfig(["mars", "earth"], {"name": question})
    both = QuestionConfig("what colour ?", {"neptune": "blue", "earth": "blue"})
    with pytest.raises(UserError, match=r"both 'blue' to circuit.questions.colour.*leave the question out"):
        CircuitConfig(["neptune", "earth"], {"colour": both})
    with pytest.raises(UserError, match=r"circuit.third=mars is one of circuit.concepts"):
        CircuitConfig(["mars", "earth"], {}, third="mars")
    with pytest.raises(UserError, match="settings.mode=fre: no such choice; did you mean 'free'"):
        SettingConfig(mode=["fre"])
    with pytest.raises(UserError, match="settings: layers=last: write all, no_last"):
        SettingConfig(layers=["last"])


def test_labels_go_with_a_circuit_and_are_read_back(tmp_path: Path) -> None:
    members = (CircuitFeature(FeatureId(0, 1), "last", 1.0, 0.5), CircuitFeature(FeatureId(1, 2), "last", 0.5, 0.1))
    plain = Circuit({"mars": Supernode("mars", members)}, {})
    named = labelled(plain, {FeatureId(1, 2): "planet = mars (0.97)"})
    assert [member.label for member in named.supernodes["mars"].features] == ["", "planet = mars (0.97)"]
    save_circuit(named, tmp_path / "named")
    save_circuit(plain, tmp_path / "plain")
    assert load_circuit(tmp_path / "named").supernodes == named.supernodes
    assert "label" not in (tmp_path / "plain/circuit.yaml").read_text()
    # What a circuit is called stays where nothing else is known.
    assert labelled(load_circuit(tmp_path / "named"), {}).supernodes == named.supernodes
