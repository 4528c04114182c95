"""Round trips compare outputs; every way a set can be wrong is one line that names the file."""

from pathlib import Path

import pytest
import torch
import yaml

from vlmscope.core.errors import UserError
from vlmscope.transcoders.formats import load_set, save_set
from vlmscope.transcoders.transcoder import Transcoder, TranscoderConfig, TranscoderSet, random_set

D, F, K, L = 6, 20, 4, 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_set(random_set(L, D, F, K, seed=1, model_name="tiny"), tmp_path)
    return tmp_path


def _x() -> torch.Tensor:
    return torch.randn(10, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("skip", [False, True])
def test_a_loaded_set_computes_the_same(tmp_path: Path, skip: bool) -> None:
    transcoders = random_set(L, D, F, K, skip=skip, seed=1, model_name="tiny")
    save_set(transcoders, tmp_path)
    loaded = load_set(tmp_path, n_layers=L, d_model=D)
    assert loaded.config == transcoders.config
    for layer in range(L):
        assert loaded[layer].config == transcoders[layer].config
        assert torch.equal(loaded[layer](_x()).reconstruction, transcoders[layer](_x()).reconstruction)


def test_bfloat16_is_half_the_size_and_computed_in_float32(tmp_path: Path) -> None:
    transcoders = random_set(1, 64, 256, K, seed=1)
    save_set(transcoders, tmp_path / "float32")
    save_set(transcoders, tmp_path / "bfloat16", dtype="bfloat16")
    sizes = [(tmp_path / name / "layer_0.safetensors").stat().st_size for name in ("float32", "bfloat16")]
    assert 0.48 < sizes[1] / sizes[0] < 0.52
    rounded = transcoders.to(torch.bfloat16).to(torch.float32)
    loaded = load_set(tmp_path / "bfloat16")
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    assert loaded[0].W_enc.dtype == torch.float32
    assert torch.equal(loaded[0](x).reconstruction, rounded[0](x).reconstruction)
    with pytest.raises(UserError, match="int16"):
        save_set(transcoders, tmp_path, dtype="int16")


def test_int8_is_a_quarter_of_the_size_and_rounds_each_number_by_half_a_step_of_its_row(tmp_path: Path) -> None:
    transcoders = random_set(1, 64, 256, K, seed=1)
    for dtype in ("float32", "int8"):
        save_set(transcoders, tmp_path / dtype, dtype=dtype)
    sizes = [(tmp_path / name / "layer_0.safetensors").stat().st_size for name in ("float32", "int8")]
    assert 0.24 < sizes[1] / sizes[0] < 0.3
    exact, rounded = transcoders[0], load_set(tmp_path / "int8")[0]
    for name in ("W_enc", "W_dec"):
        ours, theirs = getattr(exact, name).detach(), getattr(rounded, name).detach()
        steps = ours.abs().amax(1, keepdim=True) / 127
        assert ((ours - theirs).abs() <= 0.501 * steps).all()
        assert not torch.equal(ours, theirs)
    assert torch.equal(exact.b_dec, rounded.b_dec)
    with pytest.raises(UserError, match="scales"):
        save_set(transcoders, tmp_path / "paper", dtype="int8", format="paper")


def test_widths_may_differ_by_layer_and_layers_may_be_missing_if_nobody_asks_for_all(tmp_path: Path) -> None:
    base = random_set(2, D, F, K)
    wider = Transcoder(TranscoderConfig(D, 33, K, layer=2))
    save_set(TranscoderSet({0: base[0], 2: wider}, base.config), tmp_path)
    loaded = load_set(tmp_path)
    assert loaded.layers == [0, 2] and loaded[2].W_enc.shape == (33, D)
    with pytest.raises(UserError, match=r"layers 0, 2 \(2\), but the model has 3 layers"):
        load_set(tmp_path, n_layers=3)


def test_a_bare_set_is_not_guessed(saved: Path) -> None:
    """The two tools that read this layout have different defaults, so someone must say whose it is."""
    save_set(random_set(2, D, 60, 48, seed=1), saved)
    (saved / "layer_2.safetensors").unlink()
    (saved / "config.yaml").write_text("model_kind: transcoder_set\nmodel_name: x\n")
    with pytest.raises(UserError, match=r"neither top_k nor activation.*transcoder.format=paper"):
        load_set(saved)
    loaded = load_set(saved, format="paper")
    assert loaded.layers == [0, 1] and loaded.config.k == 48
    assert (loaded.config.input_hook, loaded.config.output_hook) == ("mlp_in", "mlp_out")
    assert load_set(saved, format="circuit_tracer").config.activation == "relu"


def _edit(folder: Path, **changes: object) -> None:
    record = yaml.safe_load((folder / "config.yaml").read_text())
    record |= changes
    (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in record.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "gelu"}, "config.yaml.*unknown activation 'gelu'.*topk"),
        ({"model_kind": "cross_layer_transcoder"}, "model_kind is 'cross_layer_transcoder'"),
        ({"top_k": 5}, "top_k = 5 but k = 4"),
        ({"top_k": 21, "k": 21}, "config.yaml.*k = 21"),
        ({"top_k": "many", "k": "absent"}, "k must be a positive whole number"),
        ({"layers": "all"}, "layers must be a list"),
        ({"layers": [0, 1]}, "3 transcoders for 2"),
        ({"transcoders": ["layer_0.safetensors", "../a.safetensors", "layer_2.safetensors"]}, "does not lie in"),
        ({"transcoders": ["hf://a/b/c", "layer_1.safetensors", "layer_2.safetensors"]}, "does not lie in"),
        ({"layers": [0, 1, 2, 3], "transcoders": "absent"}, r"layer_3.safetensors is missing \(layer 3"),
        ({"transcoders": [1, 2, 3]}, "must be a list of file names"),
    ],
)
def test_a_wrong_config_is_one_line(saved: Path, changes: dict[str, object], words: str) -> None:
    _edit(saved, **changes)
    with pytest.raises(UserError, match=words) as caught:
        load_set(saved)
    assert "\n" not in str(caught.value)


def test_missing_and_corrupt_files(saved: Path, tmp_path: Path) -> None:
    path = saved / "layer_1.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="layer_1.safetensors: not a complete safetensors file"):
        load_set(saved)
    path.unlink()
    with pytest.raises(UserError, match="layer_1.safetensors is missing"):
        load_set(saved)
    with pytest.raises(UserError, match="there is no such folder"):
        load_set(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of config.yaml.*params.safetensors.*sae.safetensors.*sae_weights"):
        load_set(tmp_path / "empty")
    with pytest.raises(UserError, match="config.yaml is missing"):
        load_set(tmp_path / "empty", format="paper")
    (saved / "config.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="holds no keys"):
        load_set(saved)
