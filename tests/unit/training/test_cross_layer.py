"""Training of cross-layer sets: it learns, later decoders included, matches the dense loss, and resumes bit for bit."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.unit.training.test_transcoder_training import CONFIG, _batch, _state, _train

from vlmscope.core.errors import UserError
from vlmscope.metrics.dictionary import fvu
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_gemma3
from vlmscope.scope import Scope
from vlmscope.training.batches import collect
from vlmscope.training.evaluation import evaluate_transcoders, spliced
from vlmscope.training.ranks import cross_layer_losses
from vlmscope.training.transcoder_module import TranscoderModule

CROSS = dataclasses.replace(CONFIG, cross_layer=True)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny_gemma3(0)


@pytest.fixture
def module(vlm: VLM) -> TranscoderModule:
    module = TranscoderModule(vlm.adapter, CROSS)
    module.initialise([collect(vlm.adapter, _batch(0))])
    return module


def test_every_decoder_learns_and_the_fvu_falls(vlm: VLM, tmp_path: Path) -> None:
    start, before = _train(vlm, tmp_path / "start", cross_layer=True, max_steps=1, lr=1e-9)
    found, after = _train(vlm, tmp_path / "run", cross_layer=True, max_steps=80, lr=1e-2)
    assert after["val/fvu"] < 0.8 * before["val/fvu"]
    n = vlm.adapter.n_layers
    for layer in range(n):
        assert found[layer].config.writes == n - layer
        for old, new in zip(start[layer].W_later, found[layer].W_later, strict=True):
            assert float((old - new).norm() / old.norm()) > 0.05
    assert 0 <= after["val/duplicated_frac"] <= 1


def test_losses_and_gradients_are_those_of_the_dense_formula(vlm: VLM, module: TranscoderModule) -> None:
    module.double()
    activations = collect(vlm.adapter, _batch(3))
    layers = range(vlm.adapter.n_layers)
    trainers = {layer: module.layer(layer) for layer in layers}
    by_layer = {layer: (x.double(), y.double()) for layer, (x, y) in activations.by_layer.items()}
    found = cross_layer_losses(trainers, by_layer, dataclasses.replace(CROSS, dead_after_tokens=10**9), None)
    sum(loss for loss, _, _ in found.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    total, dense = torch.zeros((), dtype=torch.float64), {}
    for layer in layers:
        one = trainers[layer].transcoder
        x, y = trainers[layer].standard.apply(*(side.float() for side in by_layer[layer]))
        x, y = x.double(), y.double()
        pre = x @ one.W_enc.T + one.b_enc
        keep = pre.relu() >= pre.relu().topk(one.config.k).values[:, -1:]
        dense[layer] = pre.relu() * keep
        out = one.b_dec + sum(dense[low] @ trainers[low].transcoder.decoder(layer - low) for low in range(layer + 1))
        term = fvu(y, out)
        torch.testing.assert_close(found[layer][1], term, rtol=1e-9, atol=0)
        total = total + term
    total.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_the_finished_set_computes_in_the_models_coordinates_what_training_saw(
    vlm: VLM, module: TranscoderModule
) -> None:
    activations = collect(vlm.adapter, _batch(3))
    trainers = {layer: module.layer(layer) for layer in range(vlm.adapter.n_layers)}
    with torch.no_grad():
        inside = cross_layer_losses(trainers, activations.by_layer, CROSS, None)
    found = module.finished_set()
    codes = found.encode({layer: x for layer, (x, _) in activations.by_layer.items()})
    for layer, (x, y) in activations.by_layer.items():
        outside = fvu(y, found.decode(layer, codes, x))
        torch.testing.assert_close(outside, inside[layer][1], rtol=1e-4, atol=1e-6)


def test_splicing_rebuilds_every_layer_from_all_codes_below(vlm: VLM, module: TranscoderModule) -> None:
    found, batch = module.finished_set(), _batch(3)
    adapter = vlm.adapter
    outputs = {}
    with spliced(Scope(vlm, found)):
        activations = collect(adapter, batch)
        handles = [
            adapter.mlp(n).register_forward_hook(lambda _m, _a, out, n=n: outputs.__setitem__(n, out))
            for n in range(adapter.n_layers)
        ]
        adapter.forward({name: t for name, t in batch.items() if name != "loss_mask"}, use_cache=False)
        for handle in handles:
            handle.remove()
    valid = batch["attention_mask"].bool()
    codes = found.encode({layer: x for layer, (x, _) in activations.by_layer.items()})
    for layer, (x, _) in activations.by_layer.items():
        torch.testing.assert_close(outputs[layer][valid], found.decode(layer, codes, x), rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_weights(vlm: VLM, tmp_path: Path) -> None:
    _train(vlm, tmp_path / "whole", cross_layer=True)
    _train(vlm, tmp_path / "parts", cross_layer=True, max_steps=6, checkpoint_every=3)
    state = tmp_path / "parts" / "transcoder_checkpoint"
    assert _state(tmp_path / "whole") == _state(tmp_path / "parts")
    assert any(state.glob("step_*/complete.json"))


def test_trouble_in_one_layer_stops_all_and_keeps_the_weights(
    vlm: VLM, module: TranscoderModule, caplog: pytest.LogCaptureFixture
) -> None:
    from vlmscope.training.batches import LayerActivations

    activations = collect(vlm.adapter, _batch(3))
    x, y = activations.by_layer[1]
    poisoned = LayerActivations({**activations.by_layer, 1: (x, y * float("nan"))}, activations.is_image)
    before = [p.detach().clone() for p in module.parameters()]
    module.optimizers = lambda: module.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    module.manual_backward = lambda loss: loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
    module.training_step(poisoned, 0)
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    assert not any(module.layer(n).running for n in range(vlm.adapter.n_layers))
    assert "layer 1 stopped" in caplog.text and "with layer 1" in caplog.text


def test_a_set_of_another_model_is_evaluated_as_badly_as_it_is(vlm: VLM, module: TranscoderModule) -> None:
    good = evaluate_transcoders(Scope(vlm, module.finished_set()), [_batch(0)])
    assert good["val/fvu"] < 1
    assert {"val/duplicated_frac", "layers/duplicated_frac/layer_00"} <= good.keys()


@pytest.mark.parametrize("setting", [{"matryoshka": (0.5,)}, {"micro_tokens": 16}, {"max_norm_ratio": 10.0}])
def test_what_is_of_single_layers_is_refused(vlm: VLM, tmp_path: Path, setting: dict) -> None:
    with pytest.raises(UserError, match="leave out it or cross_layer"):
        _train(vlm, tmp_path, cross_layer=True, **setting)
