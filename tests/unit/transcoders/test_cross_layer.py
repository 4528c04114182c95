"""Cross-layer sets: the function, its folders (circuit-tracer's built by hand, and ours), and what cannot hold them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from vlmscope.transcoders.formats import FORMATS, detect, load_set, refusal, save_set
from vlmscope.transcoders.transcoder import Standardisation, TranscoderSet, fold, random_set

D, F, K, L = 6, 24, 4, 3


def inputs() -> dict[int, torch.Tensor]:
    rng = np.random.default_rng(0)
    return {layer: torch.from_numpy(rng.standard_normal((20, D))) for layer in range(L)}


def made(activation: str = "topk", skip: bool = False) -> TranscoderSet:
    return random_set(L, D, F, K, skip, 3, torch.float64, activation=activation, cross_layer=True)


def outputs(transcoders: TranscoderSet) -> list[torch.Tensor]:
    x = inputs()
    codes = transcoders.encode(x)
    return [transcoders.decode(layer, codes, x[layer]).detach() for layer in range(L)]


@pytest.mark.parametrize("skip", [False, True])
def test_a_layer_is_rebuilt_from_its_own_features_and_those_below(skip: bool) -> None:
    transcoders, x = made(skip=skip), inputs()
    assert transcoders.cross_layer and not random_set(L, D, F, K).cross_layer
    for layer, found in enumerate(outputs(transcoders)):
        expected = transcoders[layer].b_dec.detach().clone().expand(20, D)
        for lower in range(layer + 1):
            one = transcoders[lower]
            dense = one.encode(x[lower]).dense(F)
            decoder = one.W_dec if lower == layer else one.W_later[layer - lower - 1]
            expected = expected + dense @ decoder
        w_skip = transcoders[layer].W_skip
        assert (w_skip is not None) == skip
        if w_skip is not None:
            expected = expected + x[layer] @ w_skip.T
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)


def test_folding_scales_each_decoder_by_its_target_layer() -> None:
    transcoders, x = made(skip=True), inputs()
    rng = np.random.default_rng(1)
    mean = [torch.from_numpy(rng.standard_normal(D)) for _ in range(2 * L)]
    scale, maps = rng.uniform(0.5, 2.0, L), torch.from_numpy(rng.standard_normal((L, D, D)))
    standards = [Standardisation(mean[n], maps[n] + maps[n].T, mean[n + L], scale[n]) for n in range(L)]
    folded = {n: fold(transcoders[n], standards[n], [standards[m].y_scale for m in range(n + 1, L)]) for n in range(L)}
    inside = {n: standards[n].apply(x[n], x[n])[0] for n in range(L)}
    codes = transcoders.encode(inside)
    for layer, found in enumerate(outputs(TranscoderSet(folded, transcoders.config))):
        own = transcoders.decode(layer, codes, inside[layer]) * standards[layer].y_scale + standards[layer].y_mean
        torch.testing.assert_close(found, own.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_our_own_folder_computes_the_same(tmp_path: Path, activation: str) -> None:
    transcoders = made(activation, skip=True)
    save_set(transcoders, tmp_path, dtype="float64")
    loaded = load_set(tmp_path, L, D, torch.float64)
    assert loaded.config == transcoders.config
    assert [loaded[n].config.writes for n in range(L)] == [3, 2, 1]
    for found, expected in zip(outputs(loaded), outputs(transcoders), strict=True):
        assert torch.equal(found, expected)
    # A reader of single layers must not take it for such a set.
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model_kind"] == "cross_layer_transcoder_set"


def by_hand(folder: Path, threshold: bool) -> None:
    """As circuit-tracer's `to_safetensors` lays it out."""
    rng = np.random.default_rng(5)
    for n in range(L):
        encoder = {f"W_enc_{n}": rng.standard_normal((F, D)), f"b_enc_{n}": 0.3 * rng.standard_normal(F)}
        encoder[f"b_dec_{n}"] = rng.standard_normal(D)
        if threshold:
            encoder[f"threshold_{n}"] = rng.uniform(0.5, 1.5, F)
        save_file(encoder, folder / f"W_enc_{n}.safetensors")
        save_file({f"W_dec_{n}": rng.standard_normal((F, L - n, D))}, folder / f"W_dec_{n}.safetensors")
    record = {
        "model_name": "google/gemma-2-2b", "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "ln2.hook_out", "feature_output_hook": "hook_mlp_out",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(record))


def formula(folder: Path) -> list[np.ndarray]:
    """`y_m = b_dec_m + sum over l <= m of a_l W_dec_l[:, m - l]`."""
    x, acts, out = inputs(), [], []
    for n in range(L):
        w = load_file(folder / f"W_enc_{n}.safetensors")
        pre = x[n].numpy() @ w[f"W_enc_{n}"].T + w[f"b_enc_{n}"]
        acts.append(np.maximum(pre, 0) * (pre > w.get(f"threshold_{n}", 0)))
        total = w[f"b_dec_{n}"] + sum(
            acts[low] @ load_file(folder / f"W_dec_{low}.safetensors")[f"W_dec_{low}"][:, n - low]
            for low in range(n + 1)
        )
        out.append(total)
    return out


@pytest.mark.parametrize("threshold", [False, True])
def test_circuit_tracers_folder_is_read_by_its_own_formula_and_written_back(tmp_path: Path, threshold: bool) -> None:
    by_hand(tmp_path, threshold)
    assert detect(tmp_path) == "clt"
    loaded = load_set(tmp_path, L, D, torch.float64)
    assert loaded.config.activation == ("jumprelu" if threshold else "relu")
    assert (loaded.config.input_hook, loaded.config.output_hook) == ("mlp_in", "mlp_out_post")
    for found, expected in zip(outputs(loaded), formula(tmp_path), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    again = tmp_path / "again"
    save_set(loaded, again, dtype="float64", format="clt")
    for found, expected in zip(formula(again), formula(tmp_path), strict=True):
        np.testing.assert_array_equal(found, expected)
    # Neither file says k, and an unknown one is cut to the width.
    assert replace(load_set(again, dtype=torch.float64).config, k=0) == replace(loaded.config, k=0)


def test_formats_of_single_layers_refuse() -> None:
    for activation, fitting in (
        ("relu", {"vlmscope", "clt"}),
        ("topk", {"vlmscope"}),
        ("jumprelu", {"vlmscope", "clt"}),
    ):
        able = {name for name in FORMATS if refusal(made(activation), name) is None}
        assert able == fitting, activation
    assert "clt" in str(refusal(made("relu"), "circuit_tracer"))
    assert "skip path" in str(refusal(made("relu", skip=True), "clt"))
    assert "later" in str(refusal(random_set(L, D, F, K, activation="relu"), "clt"))
