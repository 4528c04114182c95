"""Figures of a transcoder set against formulas written out; the check of a loaded set warns where it does not fit."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.unit.training.helpers import make_batch
from torch import Tensor

from vlmscope.config.catalog import asset
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.metrics.dictionary import fvu
from vlmscope.models.loading import VLM, load_vlm
from vlmscope.models.tiny import tiny_gemma3, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.training.batches import collect
from vlmscope.training.evaluation import check_hooks, evaluate_transcoders, spliced, warn_if_unfit
from vlmscope.transcoders.formats import load_set
from vlmscope.transcoders.transcoder import TranscoderSet, random_set, set_weight


def test_evaluation_equals_the_formula_on_all_tokens_at_once(gemma: VLM) -> None:
    transcoders = random_set(4, 24, 96, 8, seed=5)
    batches = [make_batch(1), make_batch(2)]
    figures = evaluate_transcoders(Scope(gemma, transcoders), batches)
    parts = [collect(gemma.adapter, batch) for batch in batches]
    is_image = torch.cat([part.is_image for part in parts])
    valid = [batch["attention_mask"].bool() for batch in batches]
    ids = torch.cat([batch["input_ids"][mask] for batch, mask in zip(batches, valid, strict=True)])
    place = torch.cat([torch.arange(14).expand(6, -1)[mask] for mask in valid])
    last = place == 11  # the answers are the last two of 14 tokens
    special = ids < 8  # the tokenizer's special tokens but the soft token, 8
    rows = {"": torch.ones_like(last), "_text": ~is_image, "_image": is_image, "_special": special, "_last": last}
    expected: dict[str, list[float]] = {}
    for layer in range(4):
        x, y = (torch.cat([part.by_layer[layer][i] for part in parts]) for i in (0, 1))
        with torch.no_grad():
            out = transcoders[layer](x)
        for kind, mask in rows.items():
            target, guess = y[mask].double(), out.reconstruction[mask].double()
            own = torch.stack([target[ids[mask] == token].mean(0) for token in ids[mask]])
            repeated = torch.tensor([int((ids[mask] == token).sum()) > 1 for token in ids[mask]])
            about_own = (target - guess)[repeated].square().sum() / (target - own).square().sum()
            name = "fvu_image" if kind == "_image" else f"fvu_token{kind}"  # soft tokens are all one token
            for key, value in ((f"fvu{kind}", fvu(target, guess)), (name, about_own)):
                expected.setdefault(key, []).append(float(value))
                if f"layers/{key}/layer_00" in figures:
                    assert figures[f"layers/{key}/layer_{layer:02d}"] == pytest.approx(float(value), rel=1e-6)
    for key, values in expected.items():
        assert figures[f"val/{key}"] == pytest.approx(np.mean(values), rel=1e-6)
    dense = out.code.dense(96) > 0
    assert figures["layers/l0/layer_03"] == pytest.approx(float(dense.sum(1).double().mean()))
    assert figures["layers/dead_frac/layer_03"] == pytest.approx(float((~dense.any(0)).double().mean()))
    assert {"layers/fvu_last/layer_03", "layers/fvu_token_text/layer_03"} <= figures.keys()


def test_ce_delta_is_the_rise_of_the_loss_on_answer_tokens(gemma: VLM) -> None:
    transcoders = random_set(4, 24, 96, 8, seed=5)
    batch = make_batch(1)
    arguments = {name: tensor for name, tensor in batch.items() if name != "loss_mask"}

    def loss() -> float:
        with torch.no_grad():
            logits = gemma.model(**arguments).logits
        log_p = logits[:, -3:-1].log_softmax(-1).gather(-1, batch["input_ids"][:, -2:, None])
        return -float(log_p.mean())

    own = loss()
    with spliced(Scope(gemma, transcoders)):
        replaced = loss()
    figures = evaluate_transcoders(Scope(gemma, transcoders), [batch])
    assert abs(replaced - own) > 0.01
    assert figures["val/ce"] == pytest.approx(own, rel=1e-5)
    assert figures["val/ce_delta"] == pytest.approx(replaced - own, rel=1e-4)
    assert loss() == own, "the splice must be taken out again"


def _perfect_after_the_norm(vlm: VLM, batch: dict[str, Tensor]) -> TranscoderSet:
    """Skip paths alone that give the post-norm's output exactly: fewer tokens than dimensions."""
    adapter = vlm.adapter
    made = random_set(adapter.n_layers, adapter.d_model, 48, 4, skip=True, dtype=torch.float64).requires_grad_(False)
    activations = collect(adapter, batch)
    assert activations.n_tokens < adapter.d_model
    for layer, (x, y) in activations.by_layer.items():
        norm, one = adapter.norms(layer).mlp_out_post, made[layer]
        assert norm is not None and one.W_skip is not None
        set_weight(one.W_dec, 0 * one.W_dec)
        set_weight(one.b_dec, 0 * one.b_dec)
        set_weight(one.W_skip, torch.linalg.lstsq(x, norm(y).detach()).solution.T)
        one.config = replace(one.config, output_hook="mlp_out_post")
    return made


def test_a_set_of_the_post_norms_output_is_compared_and_spliced_in_there() -> None:
    vlm = tiny_gemma3(0, text_only=True, dtype=torch.float64)
    ids = torch.from_numpy(generator(3, "text").integers(9, 20, (1, 12)))
    loss_mask = torch.zeros(1, 12, dtype=torch.bool)
    loss_mask[:, -3:] = True
    batch = {"input_ids": ids, "loss_mask": loss_mask}
    figures = evaluate_transcoders(Scope(vlm, _perfect_after_the_norm(vlm, batch)), [batch])
    assert figures["val/fvu"] < 1e-12
    assert abs(figures["val/ce_delta"]) < 1e-6
    with spliced(Scope(vlm, (other := random_set(4, 24, 96, 8, seed=5, dtype=torch.float64)))), torch.no_grad():
        at_the_mlp = vlm.model(input_ids=ids).logits
    for one in other.transcoders.values():
        one.config = replace(one.config, output_hook="mlp_out_post")
    with spliced(Scope(vlm, other)), torch.no_grad():
        after_the_norm = vlm.model(input_ids=ids).logits
    assert (at_the_mlp - after_the_norm).abs().max() > 1e-3


# -- the check on loading


@pytest.fixture(scope="module")
def orrery() -> VLM:
    return load_vlm(asset("orrery2"))


def shipped() -> TranscoderSet:
    return load_set(asset("orrery2_transcoders")).requires_grad_(False)


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


def with_hooks(transcoders: TranscoderSet, input_hook: str, output_hook: str) -> TranscoderSet:
    for transcoder in transcoders.transcoders.values():
        transcoder.config = replace(transcoder.config, input_hook=input_hook, output_hook=output_hook)
    return transcoders


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
