"""The self-check of a loaded set: quiet where it fits, a warning with the layers where it does not."""

import logging
from dataclasses import replace

import pytest
import torch

from vlmscope.config.catalog import asset
from vlmscope.core.errors import UserError
from vlmscope.models.loading import VLM, load_vlm
from vlmscope.models.tiny import tiny_vlm
from vlmscope.scope import Scope
from vlmscope.tasks.load_check import warn_if_unfit
from vlmscope.training.evaluation import check_hooks, fvu_on_load
from vlmscope.transcoders.formats import load_set
from vlmscope.transcoders.transcoder import TranscoderSet, random_set, set_weight


@pytest.fixture(scope="module")
def orrery() -> VLM:
    return load_vlm(asset("orrery"))


def shipped() -> TranscoderSet:
    return load_set(asset("orrery_transcoders")).requires_grad_(False)


@pytest.mark.parametrize("prompt", [None, "what colour is mars ?"])
def test_the_shipped_set_fits(orrery: VLM, caplog: pytest.LogCaptureFixture, prompt: str | None) -> None:
    found = warn_if_unfit(Scope(orrery, shipped()), prompt)
    assert sorted(found) == list(range(8)) and max(found.values()) < 0.2
    assert not caplog.records


def test_a_set_that_does_not_fit_is_named_by_its_layers(orrery: VLM, caplog: pytest.LogCaptureFixture) -> None:
    spoilt = shipped()
    for layer in (2, 5):
        set_weight(spoilt[layer].W_dec, -spoilt[layer].W_dec.clone())
    with caplog.at_level(logging.WARNING):
        found = warn_if_unfit(Scope(orrery, spoilt), None)
    (record,) = caplog.records
    said = record.getMessage()
    assert "FVU above 1 on 442 tokens in layer 2 (" in said and ", 5 (" in said and "\n" not in said
    assert [layer for layer, value in found.items() if value > 1] == [2, 5]


def test_a_set_moved_by_one_layer_is_noticed(orrery: VLM, caplog: pytest.LogCaptureFixture) -> None:
    base = shipped()
    moved = TranscoderSet({layer: base[(layer + 1) % 8] for layer in range(8)}, base.config)
    found = warn_if_unfit(Scope(orrery, moved), None)
    assert sum(value > 1 for value in found.values()) >= 5 and caplog.records


def test_nothing_is_looked_at_without_an_input(caplog: pytest.LogCaptureFixture) -> None:
    vlm = tiny_vlm("gemma3_text", 0)
    assert warn_if_unfit(Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 48, 4)), None) == {}


def with_hooks(transcoders: TranscoderSet, input_hook: str, output_hook: str) -> TranscoderSet:
    for transcoder in transcoders.transcoders.values():
        transcoder.config = replace(transcoder.config, input_hook=input_hook, output_hook=output_hook)
    return transcoders


def test_a_target_after_the_norm_is_compared_there() -> None:
    """A linear skip path alone, fitted to the post norm's output: only there is its FVU small."""
    vlm = tiny_vlm("gemma3_text", 0, dtype=torch.float64)
    inputs = vlm.prepare("what is this ?")
    adapter = vlm.adapter
    made = random_set(adapter.n_layers, adapter.d_model, 48, 4, skip=True, dtype=torch.float64)
    from vlmscope.activations.capture import capture_mlp

    for layer, (x, y) in capture_mlp(adapter, inputs.tensors).items():
        norm = adapter.norms(layer).mlp_out_post
        assert norm is not None
        transcoder = made[layer].requires_grad_(False)
        target = norm(y)[0]
        assert target.shape[0] < adapter.d_model  # fewer tokens than dimensions: the fit is exact
        set_weight(transcoder.W_dec, 0 * transcoder.W_dec)
        set_weight(transcoder.b_dec, 0 * transcoder.b_dec)
        assert transcoder.W_skip is not None
        set_weight(transcoder.W_skip, torch.linalg.lstsq(x[0], target).solution.T)
    post, _ = fvu_on_load(Scope(vlm, with_hooks(made, "mlp_in", "mlp_out_post")), [inputs.tensors])
    raw, tokens = fvu_on_load(Scope(vlm, with_hooks(made, "mlp_in", "mlp_out")), [inputs.tensors])
    assert tokens == len(inputs) and max(post.values()) < 1e-9 and min(raw.values()) > 1e-3


def test_hooks_that_the_model_lacks_are_one_line() -> None:
    vlm = tiny_vlm("llava", 0)
    found = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 48, 4)
    check_hooks(Scope(vlm, found))
    with pytest.raises(
        UserError, match="layer 0 imitates mlp_out_post, the norm after the MLP, and this model has none"
    ):
        check_hooks(Scope(vlm, with_hooks(found, "mlp_in", "mlp_out_post")))
    with pytest.raises(UserError, match="maps ln2.hook_normalized to mlp_out"):
        check_hooks(Scope(vlm, with_hooks(found, "ln2.hook_normalized", "mlp_out")))
