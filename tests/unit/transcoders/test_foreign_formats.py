"""Every format against its own description: folders built by hand, and a dense formula in the format's own convention.

Neither uses our readers or writers, so that both can be held against them; each trap of REFERENCES section 3 has a
case here that fails for whoever falls into it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from vlmscope.core.errors import UserError
from vlmscope.transcoders.formats import Choice, detect, load_set, refusal, save_set
from vlmscope.transcoders.transcoder import Transcoder, TranscoderConfig, TranscoderSet, TranscoderSetConfig, random_set

D, F, L, K = 6, 24, 2, 4
RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, D))
Arrays = dict[str, np.ndarray]


def draw(seed: int, skip: bool = False, threshold: bool = False, f: int = F) -> Arrays:
    """Weights as one row a feature; nothing is square or symmetric but W_skip, whose two orientations differ."""
    rng = np.random.default_rng(seed)
    found = {"W_enc": rng.standard_normal((f, D)), "W_dec": rng.standard_normal((f, D))}
    found |= {"b_enc": 0.3 * rng.standard_normal(f), "b_dec": rng.standard_normal(D)}
    if skip:
        found["W_skip"] = rng.standard_normal((D, D))
    if threshold:
        found["threshold"] = rng.uniform(0.5, 1.5, f)
    return found


def topk(pre: np.ndarray, k: int) -> np.ndarray:
    pre = np.maximum(pre, 0)
    return np.where(pre >= np.sort(pre, -1)[:, [-k]], pre, 0)


def put(path: Path, arrays: Arrays, dtype: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array.astype(dtype)) for name, array in arrays.items()}, path)


def put_json(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


# -- each format: a folder by hand, and what its own reader computes from a folder, layer by layer


def paper_folder(folder: Path, dtype: str, skip: bool) -> None:
    for layer in range(L):
        put(folder / f"layer_{layer}.safetensors", draw(layer, skip, f=F + 4 * layer), dtype)
    record = {
        "model_kind": "transcoder_set", "model_name": "some/vlm", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out", "top_k": K, "layers": [0, 1], "num_model_layers": 2,
        "transcoders": ["layer_0.safetensors", "layer_1.safetensors"],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(record))


def paper_formula(folder: Path, layer: int) -> np.ndarray:
    record = yaml.safe_load((folder / "config.yaml").read_text())
    w = load_file(folder / record["transcoders"][layer])
    acts = topk(X @ w["W_enc"].T + w["b_enc"], record.get("top_k", 48))
    return acts @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"].T if "W_skip" in w else 0)


def circuit_tracer_folder(folder: Path, dtype: str, skip: bool) -> None:
    paper_folder(folder, dtype, skip)
    record = {
        "model_kind": "transcoder_set", "model_name": "some/llm", "scan": "some", "activation": "topk", "k": K,
        "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out",
        "transcoders": ["layer_0.safetensors", "layer_1.safetensors"],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(record))


def to_safetensors_folder(folder: Path, dtype: str, skip: bool, kind: str = "jumprelu", ks: tuple = (K, K)) -> None:
    """As `TranscoderSet.to_safetensors` lays it out, with the `config.yaml` that circuit-tracer's cache adds."""
    for layer in range(L):
        w = draw(layer, skip, threshold=kind == "jumprelu")
        if kind == "jumprelu":
            w["activation_function.threshold"] = w.pop("threshold")
        put(folder / f"layer_{layer}.safetensors", w, dtype)
        if kind == "topk":  # from circuit-tracer's pull request 94 on: `torch.tensor(activation_function.k)`
            save_file(load_file(folder / f"layer_{layer}.safetensors") | {"k": np.array(ks[layer])},
                      folder / f"layer_{layer}.safetensors")  # fmt: skip
    record = {
        "model_kind": "transcoder_set", "model_name": "some/llm", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out", "scan": "some/set", "revision": None,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(record))


def to_safetensors_topk_folder(folder: Path, dtype: str, skip: bool) -> None:
    to_safetensors_folder(folder, dtype, skip, "topk")


def circuit_tracer_formula(folder: Path, layer: int) -> np.ndarray:
    record = yaml.safe_load((folder / "config.yaml").read_text())
    w = load_file(folder / f"layer_{layer}.safetensors")
    pre = X @ w["W_enc"].T + w["b_enc"]
    if "activation_function.threshold" in w:
        acts = pre * (pre > w["activation_function.threshold"])
    else:
        k = w.get("k", record.get("k") if record.get("activation") == "topk" else None)
        acts = np.maximum(pre, 0) if k is None else topk(pre, int(k))
    return acts @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"].T if "W_skip" in w else 0)


def gemma_name(layer: int, skip: bool, l0: str = "small") -> str:
    return f"transcoder_all/layer_{layer}_width_16k_l0_{l0}{'_affine' if skip else ''}"


def gemma_folder(folder: Path, dtype: str, skip: bool, l0: str = "small", first_seed: int = 0) -> None:
    for layer in range(L):
        w = draw(first_seed + layer, skip, threshold=True)
        theirs = {"w_enc": w["W_enc"].T, "w_dec": w["W_dec"]} | {n: w[n] for n in ("b_enc", "b_dec", "threshold")}
        if skip:
            theirs["affine_skip_connection"] = w["W_skip"]  # stored (in, out)
        put(folder / gemma_name(layer, skip, l0) / "params.safetensors", theirs, dtype)
        record = {
            "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output",
            "width": F, "model_name": "google/gemma-3-4b-it", "architecture": "jump_relu", "l0": 10,
            "affine_connection": skip, "type": "transcoder",
        }  # fmt: skip
        put_json(folder / gemma_name(layer, skip, l0) / "config.json", record)


def gemma_formula(folder: Path, layer: int) -> np.ndarray:
    (path,) = folder.glob(f"transcoder_all/layer_{layer}_width_*_l0_*/params.safetensors")
    w = load_file(path)
    pre = X @ w["w_enc"] + w["b_enc"]
    acts = (pre > w["threshold"]) * np.maximum(pre, 0)
    skip = X @ w["affine_skip_connection"] if "affine_skip_connection" in w else 0
    return acts @ w["w_dec"] + w["b_dec"] + skip


def sparsify_folder(folder: Path, dtype: str, skip: bool) -> None:
    for layer in range(L):
        w = draw(layer, skip)
        theirs = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"]}
        theirs |= {name: w[name] for name in ("W_dec", "b_dec", "W_skip") if name in w}
        put(folder / f"layers.{layer}.mlp" / "sae.safetensors", theirs, dtype)
        record = {
            "activation": "topk", "expansion_factor": 4, "num_latents": 0, "k": K, "multi_topk": False,
            "skip_connection": skip, "transcode": True, "normalize_decoder": True, "d_in": D,
        }  # fmt: skip
        put_json(folder / f"layers.{layer}.mlp" / "cfg.json", record)


def sparsify_formula(folder: Path, layer: int) -> np.ndarray:
    w = load_file(folder / f"layers.{layer}.mlp" / "sae.safetensors")
    record = json.loads((folder / f"layers.{layer}.mlp" / "cfg.json").read_text())
    x = X if record["transcode"] else X - w["b_dec"]
    assert w["encoder.weight"].shape[0] == (record["num_latents"] or record["expansion_factor"] * record["d_in"])
    acts = topk(x @ w["encoder.weight"].T + w["encoder.bias"], record["k"])
    return acts @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"].T if record["skip_connection"] else 0)


def sae_lens_folder(folder: Path, dtype: str, skip: bool, **changes: Any) -> None:
    for layer in range(L):
        w = draw(layer, skip, threshold=True)
        w["W_enc"] = w["W_enc"].T
        put(folder / f"layer_{layer}" / "sae_weights.safetensors", w, dtype)
        record = {
            "architecture": f"jumprelu_{'skip_' if skip else ''}transcoder", "d_in": D, "d_out": D, "d_sae": F,
            "apply_b_dec_to_input": False, "normalize_activations": "none",
            "metadata": {
                "model_name": "qwen3", "hook_name": f"blocks.{layer}.mlp.hook_in",
                "hook_name_out": f"blocks.{layer}.hook_mlp_out",
            },
        }  # fmt: skip
        put_json(folder / f"layer_{layer}" / "cfg.json", record | changes)


def sae_lens_formula(folder: Path, layer: int) -> np.ndarray:
    w = load_file(folder / f"layer_{layer}" / "sae_weights.safetensors")
    record = json.loads((folder / f"layer_{layer}" / "cfg.json").read_text())
    x = X - w["b_dec"] if record["apply_b_dec_to_input"] else X
    pre = x @ w["W_enc"] + w["b_enc"]
    acts = np.maximum(pre, 0) * (pre > w["threshold"] if "jumprelu" in record["architecture"] else 1)
    return acts @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"].T if "skip" in record["architecture"] else 0)


class Case(NamedTuple):
    folder: Callable[..., None]
    formula: Callable[[Path, int], np.ndarray]
    hooks: tuple[str, str]


CASES = {
    "paper": Case(paper_folder, paper_formula, ("mlp_in", "mlp_out")),
    "circuit_tracer": Case(circuit_tracer_folder, circuit_tracer_formula, ("mlp_in", "mlp_out")),
    "circuit_tracer jumprelu": Case(to_safetensors_folder, circuit_tracer_formula, ("mlp_in", "mlp_out")),
    "circuit_tracer topk": Case(to_safetensors_topk_folder, circuit_tracer_formula, ("mlp_in", "mlp_out")),
    "gemma_scope": Case(gemma_folder, gemma_formula, ("mlp_in", "mlp_out_post")),
    "sparsify": Case(sparsify_folder, sparsify_formula, ("mlp_in", "mlp_out")),
    "sae_lens": Case(sae_lens_folder, sae_lens_formula, ("mlp_in", "mlp_out")),
}
ALL = [pytest.param(name, skip, id=f"{name}{'-skip' if skip else ''}") for name in CASES for skip in (False, True)]
WRITTEN = [param for param in ALL if param.values[0] != "gemma_scope"]


def ours(transcoders: TranscoderSet, layer: int) -> np.ndarray:
    with torch.no_grad():
        return transcoders[layer](torch.from_numpy(X)).reconstruction.numpy()


def assert_computes(transcoders: TranscoderSet, formula: Callable[[Path, int], np.ndarray], folder: Path) -> None:
    tolerance = 1e-12 if transcoders[0].W_enc.dtype == torch.float64 else 1e-6
    for layer in transcoders.layers:
        expected = formula(folder, layer)
        assert np.abs(ours(transcoders, layer) - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("name", "skip"), ALL)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_folder_made_by_hand_is_read_as_its_own_tool_reads_it(
    tmp_path: Path, name: str, skip: bool, dtype: str
) -> None:
    case = CASES[name]
    case.folder(tmp_path, dtype, skip)
    assert detect(tmp_path) == name.split()[0]
    loaded = load_set(tmp_path, n_layers=L, d_model=D, dtype=getattr(torch, dtype))
    assert (loaded.config.input_hook, loaded.config.output_hook) == case.hooks
    assert_computes(loaded, case.formula, tmp_path)


@pytest.mark.parametrize(("name", "skip"), WRITTEN)
def test_what_we_write_is_read_the_same_by_the_other_tool_and_by_us(tmp_path: Path, name: str, skip: bool) -> None:
    case = CASES[name]
    case.folder(tmp_path / "hand", "float64", skip)
    loaded = load_set(tmp_path / "hand", dtype=torch.float64)
    save_set(loaded, tmp_path / "ours", "float64", format=name.split()[0])
    for layer in range(L):
        np.testing.assert_allclose(case.formula(tmp_path / "ours", layer), ours(loaded, layer), rtol=0, atol=1e-11)
    again = load_set(tmp_path / "ours", dtype=torch.float64)
    assert (again.config.input_hook, again.config.output_hook) == case.hooks
    for layer in range(L):
        assert np.array_equal(ours(again, layer), ours(loaded, layer))
        assert again[layer].config == loaded[layer].config


# -- traps


def test_the_papers_k_is_48_when_top_k_is_absent(tmp_path: Path) -> None:
    for layer in range(L):
        put(tmp_path / f"layer_{layer}.safetensors", draw(layer, f=100), "float64")
    (tmp_path / "config.yaml").write_text("layers: [0, 1]\nnum_model_layers: 2\nmodel_name: m\n")
    record = {"transcoders": ["layer_0.safetensors", "layer_1.safetensors"]}
    loaded = load_set(tmp_path, dtype=torch.float64)
    assert loaded.config.k == 48
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"layers": [0, 1], **record}))
    assert_computes(loaded, paper_formula, tmp_path)


def test_circuit_tracer_takes_relu_without_its_keys_and_what_we_write_has_all_three(tmp_path: Path) -> None:
    circuit_tracer_folder(tmp_path / "theirs", "float64", False)
    where = tmp_path / "theirs" / "config.yaml"
    record = yaml.safe_load(where.read_text())
    where.write_text(yaml.safe_dump({n: v for n, v in record.items() if n not in ("activation", "k")}))
    loaded = load_set(tmp_path / "theirs", dtype=torch.float64)
    assert loaded.config.activation == "relu"
    assert_computes(loaded, circuit_tracer_formula, tmp_path / "theirs")
    save_set(random_set(L, D, F, K), tmp_path / "ours")
    record = yaml.safe_load((tmp_path / "ours" / "config.yaml").read_text())
    assert (record["top_k"], record["activation"], record["k"]) == (K, "topk", K)


def change_layer(folder: Path, layer: int, **arrays: np.ndarray | None) -> None:
    where = folder / f"layer_{layer}.safetensors"
    found = load_file(where) | {name.replace("__", "."): array for name, array in arrays.items()}
    save_file({name: array for name, array in found.items() if array is not None}, where)


def test_each_file_of_to_safetensors_says_its_own_nonlinearity(tmp_path: Path) -> None:
    to_safetensors_folder(tmp_path / "topk", "float64", False, "topk", ks=(3, 5))
    loaded = load_set(tmp_path / "topk", dtype=torch.float64)
    assert [loaded[layer].config.k for layer in range(L)] == [3, 5]
    assert_computes(loaded, circuit_tracer_formula, tmp_path / "topk")
    to_safetensors_folder(tmp_path / "mixed", "float64", False)
    change_layer(tmp_path / "mixed", 0, activation_function__threshold=np.array(0.7))  # `JumpReLU(0.7)`: a scalar
    change_layer(tmp_path / "mixed", 1, activation_function__threshold=None)
    loaded = load_set(tmp_path / "mixed", dtype=torch.float64)
    assert [loaded[layer].config.activation for layer in range(L)] == ["jumprelu", "relu"]
    assert_computes(loaded, circuit_tracer_formula, tmp_path / "mixed")


@pytest.mark.parametrize(
    ("kind", "said", "arrays", "words"),
    [
        ("jumprelu", {"activation": "relu"}, {}, "activation is 'relu', but .*layer_0.safetensors holds thresholds"),
        ("jumprelu", {"activation": "topk", "k": 4}, {}, "activation is 'topk', but .* holds thresholds"),
        ("topk", {"activation": "relu"}, {}, "activation is 'relu', but .*layer_0.safetensors holds k"),
        ("topk", {"activation": "topk", "k": 5}, {}, "k is 5, but layer_0.safetensors says 4"),
        ("topk", {}, {"k": np.array([4, 4])}, r"layer_1.safetensors: k has shape \(2,\) and dtype I64 where one whole"),
        ("topk", {}, {"k": np.array(4.5)}, r"layer_1.safetensors: k has shape \(\) and dtype F64 where one whole"),
        ("topk", {}, {"k": np.array(0)}, "k must be a positive whole number, not 0"),
        ("topk", {}, {"k": np.array(F + 1)}, f"k = {F + 1} must lie between 1 and n_features"),
        ("jumprelu", {}, {"activation_function__threshold": -np.ones(F)}, "thresholds below 0"),
        ("jumprelu", {}, {"threshold": np.ones(F)}, "holds its thresholds twice"),
        ("jumprelu", {}, {"log_thresholds": np.ones(F)}, "holds log_thresholds"),
    ],
)  # fmt: skip
def test_what_circuit_tracer_would_read_otherwise_is_refused(
    tmp_path: Path, kind: str, said: dict, arrays: dict, words: str
) -> None:
    to_safetensors_folder(tmp_path, "float64", False, kind)
    change_layer(tmp_path, 1, **arrays)
    where = tmp_path / "config.yaml"
    where.write_text(yaml.safe_dump(yaml.safe_load(where.read_text()) | said))
    with pytest.raises(UserError, match=words) as caught:
        load_set(tmp_path)
    assert "\n" not in str(caught.value)


def test_hook_mlp_out_lies_after_the_norm_in_gemma_alone(tmp_path: Path) -> None:
    circuit_tracer_folder(tmp_path, "float32", False)
    where = tmp_path / "config.yaml"
    assert load_set(tmp_path).config.output_hook == "mlp_out"
    where.write_text(where.read_text().replace("some/llm", "google/gemma-2-2b"))
    loaded = load_set(tmp_path)
    assert loaded.config.output_hook == "mlp_out_post"
    save_set(loaded, tmp_path / "again")
    assert load_set(tmp_path / "again").config.output_hook == "mlp_out_post"
    where.write_text(where.read_text().replace("mlp.hook_in", "ln2.hook_normalized"))
    assert load_set(tmp_path).config.input_hook == "ln2.hook_normalized"  # before the norm's weight: not mlp_in


def test_gemma_scopes_sets_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    gemma_folder(tmp_path, "float64", False, "small", first_seed=10)
    gemma_folder(tmp_path, "float64", False, "big", first_seed=20)
    gemma_folder(tmp_path, "float64", True, "small", first_seed=30)
    with pytest.raises(UserError, match=r"several sets; choose one of: .*transcoder.l0=big transcoder.affine=false"):
        load_set(tmp_path)
    with pytest.raises(UserError, match="no transcoders of that choice"):
        load_set(tmp_path, choice=Choice(width="262k"))
    with pytest.raises(UserError, match="several sets"):
        load_set(tmp_path, choice=Choice("16k", "small"))
    chosen = load_set(tmp_path, choice=Choice("16k", "small", False), dtype=torch.float64)
    assert np.array_equal(chosen[0].W_enc.detach().numpy(), draw(10, threshold=True)["W_enc"])
    skips = load_set(tmp_path / "transcoder_all", choice=Choice(affine=True), dtype=torch.float64)
    assert skips[1].W_skip is not None
    assert np.array_equal(skips[1].W_skip.detach().numpy(), draw(31, True, True)["W_skip"].T)
    single = load_set(tmp_path / gemma_name(1, False, "big"), dtype=torch.float64)
    assert single.layers == [1] and np.array_equal(single[1].b_enc.detach().numpy(), draw(21, threshold=True)["b_enc"])


JSON = {
    "gemma_scope": f"{gemma_name(0, False)}/config.json", "sparsify": "layers.0.mlp/cfg.json",
    "sae_lens": "layer_0/cfg.json",
}  # fmt: skip
ACROSS = {"hook_name": "blocks.0.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma_scope", {"hf_hook_point_out": "model.layers.0.mlp.output"}, "hf_hook_point_out is 'model.layers.0.mlp"),
        (
            "gemma_scope",
            {"hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output"},
            "only 'model.layers.0",
        ),
        ("gemma_scope", {"architecture": "topk"}, "architecture is 'topk'; only 'jump_relu'"),
        ("sparsify", {"transcode": False}, "transcode is False; only True can be read"),
        ("sparsify", {"activation": "groupmax"}, "activation is 'groupmax'"),
        ("sparsify", {"signed": True}, "signed is True; only False can be read"),
        ("sparsify", {"skip_connection": True}, "W_skip is missing, but cfg.json says otherwise"),
        ("sparsify", {"num_latents": 25}, r"makes \(25, 6\) features and model width, but W_enc has \(24, 6\)"),
        ("sparsify", {"expansion_factor": 5}, r"makes \(30, 6\) features"),
        ("sparsify", {"d_in": 7}, r"makes \(28, 7\) features"),
        ("sparsify", {"k": 0}, "k must be a positive whole number"),
        ("sae_lens", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
        ("sae_lens", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm is True"),
        ("sae_lens", {"architecture": "gated"}, "architecture is 'gated'"),
        ("sae_lens", {"metadata": {"hook_name": "blocks.0.hook_resid_post"}}, "this is an autoencoder"),
        ("sae_lens", {"metadata": ACROSS}, "within one"),
        ("sae_lens", {"architecture": "transcoder"}, "holds threshold"),
        ("sae_lens", {"architecture": "jumprelu_skip_transcoder"}, "W_skip is missing"),
    ],
)
def test_what_another_tool_would_read_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], words: str
) -> None:
    CASES[name].folder(tmp_path, "float32", False)
    where = tmp_path / JSON[name]
    where.write_text(json.dumps(json.loads(where.read_text()) | changes))
    with pytest.raises(UserError, match=words) as caught:
        load_set(tmp_path)
    assert str(where.parent) in str(caught.value) and "\n" not in str(caught.value)


def test_sparsifys_hooks_k_and_width(tmp_path: Path) -> None:
    """k is 32 when absent and differs by layer; `num_latents` goes before `expansion_factor`; h.1.mlp is GPT-2's."""
    for name, f, record in (
        ("model.layers.0.mlp", 40, {"num_latents": 40, "expansion_factor": 32}),
        ("h.1.mlp", 42, {"expansion_factor": 7, "k": 3}),
    ):
        w = draw(f, f=f)
        theirs = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
        put(tmp_path / name / "sae.safetensors", theirs, "float64")
        put_json(tmp_path / name / "cfg.json", {"transcode": True, "d_in": D, **record})
    put_json(tmp_path / "config.json", {"model": "some/llm"})
    loaded = load_set(tmp_path, dtype=torch.float64)
    assert [loaded[layer].config.k for layer in (0, 1)] == [32, 3] and loaded.config.model_name == "some/llm"
    w = draw(42, f=42)
    expected = topk(X @ w["W_enc"].T + w["b_enc"], 3) @ w["W_dec"] + w["b_dec"]
    np.testing.assert_allclose(ours(loaded, 1), expected, rtol=0, atol=1e-12)
    assert "k once for all layers, but they have 3, 32" in (refusal(loaded, "vlmscope") or "")
    assert refusal(loaded, "sparsify") is None
    (tmp_path / "h.1.mlp").rename(tmp_path / "h.1.attn")
    with pytest.raises(UserError, match="hook 'h.1.attn' is not an MLP"):
        load_set(tmp_path)


def test_sae_lens_input_bias_is_folded_exactly(tmp_path: Path) -> None:
    sae_lens_folder(tmp_path, "float64", False, apply_b_dec_to_input=True)
    loaded = load_set(tmp_path, dtype=torch.float64)
    assert_computes(loaded, sae_lens_formula, tmp_path)
    save_set(loaded, tmp_path / "again", "float64", format="sae_lens")
    np.testing.assert_allclose(sae_lens_formula(tmp_path / "again", 0), ours(loaded, 0), rtol=0, atol=1e-11)
    assert json.loads((tmp_path / "again" / "layer_0" / "cfg.json").read_text())["apply_b_dec_to_input"] is False


# -- what a format cannot say


def set_of(
    activation: str, output_hook: str = "mlp_out", skip: bool = False, layers: range = range(L)
) -> TranscoderSet:
    base = random_set(max(layers) + 1, D, F, K, skip, activation=activation, model_name="google/gemma-3-1b")
    found = {}
    for layer in layers:
        config = TranscoderConfig(D, F, K, layer, activation, skip, "mlp_in", output_hook)
        found[layer] = Transcoder(config)
        found[layer].load_state_dict(base[layer].state_dict())
    return TranscoderSet(found, TranscoderSetConfig(max(layers) + 1, K, activation, "gemma-3", "mlp_in", output_hook))


@pytest.mark.parametrize(
    ("activation", "hook", "format", "words"),
    [
        ("batchtopk", "mlp_out", "paper", "no place for batchtopk, only for topk"),
        ("jumprelu", "mlp_out", "sparsify", "no place for jumprelu"),
        ("topk", "mlp_out_post", "sparsify", "maps mlp_in to mlp_out, and these map mlp_in to mlp_out_post"),
        ("topk", "mlp_out_post", "paper", "maps mlp_in to mlp_out, and these"),
        ("jumprelu", "mlp_out_post", "gemma_scope", "it is only read"),
        ("topk", "mlp_out", "sae_lens", "no place for topk"),
    ],
)
def test_what_a_format_cannot_say_is_refused(
    tmp_path: Path, activation: str, hook: str, format: str, words: str
) -> None:
    with pytest.raises(UserError, match=f"cannot write this set as {format}: .*{words}"):
        save_set(set_of(activation, hook), tmp_path, format=format)
    assert not list(tmp_path.iterdir())


# -- what lies in a stranger's files

ODD = [None, True, -1, 1.5, 10**30, float("nan"), "4", "x" * 300, "a\0b", [], [[1]], ["a\0b", "é"], {"a": 1}]


@pytest.mark.parametrize("name", CASES)
def test_an_odd_value_in_a_configuration_is_read_or_one_line(tmp_path: Path, name: str) -> None:
    """Numbers as strings, lists where one is expected, names of 300 letters: no traceback."""
    CASES[name].folder(tmp_path, "float32", False)
    (where,) = [*tmp_path.rglob("*.yaml"), *sorted(tmp_path.rglob("c*fg.json")), *tmp_path.rglob("config.json")][:1]
    yaml_file = where.suffix == ".yaml"
    record = (yaml.safe_load if yaml_file else json.loads)(where.read_text())
    keys = [*record, "activation", "k", "top_k", "layers", "num_model_layers", "l0", "activation_fn", "metadata"]
    for key in dict.fromkeys(keys):
        for value in ODD:
            changed = record | {key: value}
            where.write_text(yaml.safe_dump(changed) if yaml_file else json.dumps(changed))
            try:
                load_set(tmp_path)
            except UserError as error:
                assert len(str(error)) < 1000 and "\n" not in str(error), (key, str(value)[:50], str(error)[:300])
            except Exception as error:
                raise AssertionError(f"{key}: {str(value)[:50]}: {type(error).__name__} {str(error)[:200]}") from error


FIRST = {
    "paper": "layer_0.safetensors", "circuit_tracer": "layer_0.safetensors",
    "circuit_tracer jumprelu": "layer_0.safetensors", "gemma_scope": f"{gemma_name(0, False)}/params.safetensors",
    "sparsify": "layers.0.mlp/sae.safetensors", "sae_lens": "layer_0/sae_weights.safetensors",
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
def test_wrong_tensors_are_one_line_in_every_format(tmp_path: Path, name: str) -> None:
    CASES[name].folder(tmp_path, "float32", False)
    path = tmp_path / FIRST[name]
    whole = load_file(path)
    for tensor, array in whole.items():
        wrong: dict[str, np.ndarray | None] = {
            "missing": None, "not a number": np.full_like(array, np.nan), "infinite": np.full_like(array, np.inf),
            "too large for float32": np.full(array.shape, 1e300), "integers": array.astype(np.int8),
            "one dimension more": array[None], "one row less": np.ascontiguousarray(array[1:]), "empty": array[:0],
            "turned": np.ascontiguousarray(array.T[::-1]) if array.ndim == 2 else array[:3],
        }  # fmt: skip
        for why, found in wrong.items():
            if why == "turned" and array.shape == (D, D):
                continue
            save_file({n: a for n, a in (whole | {tensor: found}).items() if a is not None}, path)
            if tensor == "activation_function.threshold" and why == "missing":
                continue  # ReLU, as circuit-tracer takes it
            try:
                load_set(tmp_path)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 600, (tensor, why)
            else:
                raise AssertionError(f"{tensor}, {why}: read without a word")
    save_file(whole | {"extra": np.ones(3, np.float32)}, path)
    with pytest.raises(UserError, match="extra"):
        load_set(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", FIRST)
def test_short_floats_are_read_as_the_numbers_that_they_are(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    CASES[name].folder(tmp_path, "float32", False)
    for path in tmp_path.rglob("*.safetensors"):
        stored = {n: torch.from_numpy(a).to(dtype) for n, a in load_file(path).items()}
        save_torch(stored, path)
    loaded = load_set(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):  # for the formula, which is numpy's
        save_file({n: t.float().numpy() for n, t in load_torch(path).items()}, path)
    with torch.no_grad():
        assert_computes(loaded.to(torch.float32), CASES[name].formula, tmp_path)
