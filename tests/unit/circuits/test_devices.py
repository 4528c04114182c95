"""Circuits and pairs on another device than the CPU: no tensor that we make is left behind there."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.circuits.pretended_device import PretendDevice, mark, marked, move
from tests.unit.circuits.subjects import carried, cases_of

from vlmscope.circuits.circuit import at_supernodes, load_circuit, save_circuit, steer_plan
from vlmscope.circuits.discovery.edges import pair_edges, run_edges
from vlmscope.circuits.discovery.nodes import changing_nodes, eap_ig, measure
from vlmscope.circuits.operations import Ablate, Carry, Exchange, Toward
from vlmscope.circuits.pairs import pair_effects, pair_subject
from vlmscope.circuits.selectors import contrast_circuit, place_levels
from vlmscope.core.records import FeatureId, Positions
from vlmscope.core.results import CircuitFeature, Supernode
from vlmscope.features.readouts import role_means
from vlmscope.interventions.edits import donor_activations, patch_plan, position_mask, set_features
from vlmscope.interventions.run import base_run, run_edited
from vlmscope.interventions.trials import Cases, Setting, Trial, run_trials
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPT = "what is this planet ?"
WIDTH = 24
MODES = ("direct", "frozen_attention", "free")


@pytest.fixture(scope="module")
def there():
    """(scope, two sides of prompts) on the pretended device."""
    vlm = tiny_gemma3(5)
    adapter = vlm.adapter
    transcoders = random_set(adapter.n_layers, adapter.d_model, WIDTH, 5, seed=6).requires_grad_(False)
    sides = [[vlm.prepare(PROMPT, [tiny_image(i)]) for i in some] for some in (range(3), range(3, 6))]
    move(adapter.model)
    move(transcoders)
    blocks: Any = adapter.decoder().layers
    for block in blocks:
        # Masks are made under vmap, where marks are lost.
        block.register_forward_pre_hook(lambda _m, args, kwargs: mark((args, kwargs)), with_kwargs=True)
    for side in sides:
        for inputs in side:
            mark(inputs.tensors)
    return Scope(vlm, transcoders), sides


@pytest.fixture
def pairs(there):
    scope, sides = there
    with PretendDevice(), torch.no_grad():
        first, second = (mark(torch.arange(3) + start) for start in (3, 7))
        return pair_subject(scope, "name", sides[0], sides[1], first, second, 2, answerable=False)


def test_circuits_are_found_steered_and_patched_there(there, tmp_path) -> None:
    scope, sides = there
    adapter = scope.adapter
    with PretendDevice(), torch.no_grad():
        batches = [make_batch(adapter, side) for side in sides]
        means = {n: {"name": role_means(scope, [b])} for n, b in zip("ab", batches, strict=True)}
        features, per_layer = [FeatureId(k, i) for k in range(4) for i in range(WIDTH)], {"image": 2, "last": 2}
        influence = {n: {(role, f): 1.0 for role in per_layer for f in features} for n in "ab"}
        found, _ = contrast_circuit(scope.transcoders, means, influence, per_layer, scope.vlm.name)
        found = place_levels(scope, found, {n: {"name": batch} for n, batch in zip("ab", batches, strict=True)})
        save_circuit(found, tmp_path)
        base, own = base_run(scope, batches[0], MODES), mark(torch.arange(3))
        cases = Cases("test", "name", batches[0], base, own, own + 3, ("a", "b", "c"), batches[1], base.logits)
        operations = [Carry(None)]
        for circuit in (found, load_circuit(tmp_path)):
            roles = batches[0].roles
            steered = steer_plan(circuit, "a", "b", batches[0].places, 2.0)
            patched = patch_plan(donor_activations(scope, batches[1], circuit.union()), roles)
            node = replace(circuit.node("a"), positions=Positions(("image",)))
            some = at_supernodes(patched, [node], batches[0].places)
            where = position_mask(roles, "all")
            ablated = {k: set_features(f, torch.zeros(len(f)), where) for k, f in circuit.indices("a").items()}
            for plan in (steered, patched, some, ablated):
                for mode in MODES:
                    assert marked(run_edited(scope, batches[0], plan, mode, base))
            both = circuit.union()
            operations += [Exchange(circuit, "a", "b", 0.5), Carry(both, nodes=(node,)), Toward(both), Ablate(both)]
        settings = [Setting(mode=mode, random_direction=1) for mode in MODES] + [
            Setting(layers="no_last", positions="image")
        ]
        table = run_trials(scope, [Trial("do", do, [cases], settings) for do in operations])
        assert np.isfinite(table[["kl", "drop"]].to_numpy()).all()


def test_interchanges_and_their_controls_run_there(there, pairs) -> None:
    scope, _ = there
    nodes = (Supernode("a", (CircuitFeature(FeatureId(1, 2), "", 0, 0),), Positions(("image",))),)
    some = {1: torch.tensor([2, 5]), 3: torch.tensor([4])}
    settings = [Setting(mode=mode, random_direction=int(mode == "free")) for mode in MODES]
    with PretendDevice(), torch.no_grad():
        cases = cases_of(pairs)
        for do in (Carry(None), Carry(some, nodes=nodes)):
            run_trials(scope, [Trial("carry", do, [cases], settings)])
        run_trials(scope, [Trial("carry", Carry(some), [cases.select([0, 2])], [Setting()])])
    with PretendDevice():
        assert len(pair_effects(scope, pairs, 2).ranked(3)) == 3


def test_half_precision_runs_the_whole_way() -> None:
    """numpy has no bfloat16, and a difference of rounded sums would be mostly rounding."""
    vlm = tiny_gemma3(5, dtype=torch.bfloat16)
    adapter = vlm.adapter
    transcoders = random_set(adapter.n_layers, adapter.d_model, WIDTH, 5, seed=6, dtype=torch.bfloat16)
    transcoders.requires_grad_(False)
    sides = [[vlm.prepare(PROMPT, [tiny_image(i)]) for i in some] for some in (range(3), range(3, 6))]
    first, second = (torch.arange(3) + start for start in (3, 7))
    scope = Scope(vlm, transcoders)
    pairs = pair_subject(scope, "name", sides[0], sides[1], first, second, 2, answerable=False)
    for do in (Carry({1: torch.tensor([2, 5])}), Carry(None)):
        run_trials(scope, [Trial("carry", do, [cases_of(pairs)], [Setting(mode=mode) for mode in MODES])])
    same = carried(scope, replace(pairs, other=pairs.batch), None)
    assert float((run_edited(scope, pairs.batch, same) - pairs.base.logits).abs().max()) < 0.05
    assert len(pair_effects(scope, pairs, 2).ranked(3)) == 3
    measured = measure(scope, pairs)
    nodes = changing_nodes(measured, transcoders)
    assert np.isfinite(eap_ig(scope, measured, nodes, 2)).all()
    targets = np.flatnonzero(nodes.is_feature)[:20]
    edges = pair_edges(scope, measured, nodes, targets, 1, 1)
    assert np.isfinite(run_edges(edges, [None])).all()
