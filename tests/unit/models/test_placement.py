"""Devices, memory said beforehand, and weights that rest on disk or in CPU memory."""

import re
from pathlib import Path

import pytest
import torch

from vlmscope.app import main
from vlmscope.conformance import run_cases
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.features.readouts import top_and_bottom_logits
from vlmscope.models import checkpoint as placement
from vlmscope.models.checkpoint import check_device, check_memory, computing_device, is_offloaded, materialised
from vlmscope.models.loading import VLM, load_vlm
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


def saved(family: str, folder: Path) -> VLM:
    vlm = tiny_vlm(family, 3)
    vlm.model.save_pretrained(folder, max_shard_size="20KB")
    vlm.processor.save_pretrained(folder)
    return vlm


def rests_on_disk(folder: Path) -> VLM:
    return load_vlm(folder, offload="disk")


def rests_in_memory(folder: Path) -> VLM:
    """As `offload=cpu` on a GPU, but that the CPU computes too."""
    vlm = load_vlm(folder)
    placement.offload_to_cpu(vlm.model, "cpu")
    return vlm


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl", "gemma4"])
@pytest.mark.parametrize("load", [rests_on_disk, rests_in_memory])
def test_offloaded_weights_give_the_same_logits(family: str, load, tmp_path: Path) -> None:
    before = saved(family, tmp_path)
    after = load(tmp_path)
    assert is_offloaded(after.model) and not is_offloaded(before.model)
    inputs = after.prepare("what is this planet ?", [tiny_image(1)])
    with torch.no_grad():
        assert torch.equal(before.model(**inputs.tensors).logits, after.model(**inputs.tensors).logits)
        tokens = [vlm.model.generate(**inputs.tensors, max_new_tokens=4, do_sample=False) for vlm in (before, after)]
    assert torch.equal(*tokens)
    assert all(parameter.device.type == "meta" for parameter in after.model.parameters())  # back to rest


@pytest.mark.parametrize("load", [rests_on_disk, rests_in_memory])
def test_an_adapter_reads_offloaded_weights(load, tmp_path: Path) -> None:
    models = saved("qwen2_5_vl", tmp_path), load(tmp_path)
    before, after = (vlm.adapter for vlm in models)
    assert (after.device, after.dtype) == (before.device, before.dtype)
    for layer in range(before.n_layers):
        assert torch.equal(after.value_weight(layer), before.value_weight(layer))
        assert torch.equal(after.output_weight(layer), before.output_weight(layer))
        bias, expected = after.value_bias(layer), before.value_bias(layer)
        assert bias is not None and expected is not None and torch.equal(bias, expected)
        assert after.output_bias(layer) is None
    x = torch.randn(3, before.d_model)
    assert torch.equal(after.norm_scale(after.final_norm(), x), before.norm_scale(before.final_norm(), x))
    assert torch.equal(materialised(after.lm_head()), before.lm_head().weight)
    assert placement.model_fingerprint(after.model) == placement.model_fingerprint(before.model)
    transcoders = random_set(before.n_layers, before.d_model, 16, 4)
    words = [top_and_bottom_logits(Scope(vlm, transcoders), FeatureId(1, 3)) for vlm in models]
    assert words[0] == words[1]


def test_offload_in_another_dtype_and_on_another_device(tmp_path: Path) -> None:
    saved("gemma3", tmp_path)
    vlm = load_vlm(tmp_path, "bfloat16", offload="disk")
    assert vlm.adapter.dtype == materialised(vlm.adapter.lm_head()).dtype == torch.bfloat16
    inputs = vlm.prepare("what is this ?", [tiny_image(1)])
    with torch.no_grad():
        expected = load_vlm(tmp_path, "bfloat16").model(**inputs.tensors).logits
        assert torch.equal(vlm.model(**inputs.tensors).logits, expected)
    with pytest.raises(UserError, match="is offloaded, and the checks copy its weights to float64"):
        next(run_cases(Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 16, 4))))
    placement.compute_on(vlm.model, "cuda:1")  # nothing runs there; only the direction is looked at
    assert vlm.adapter.device == computing_device(vlm.adapter.lm_head()) == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("device", "dtype", "there", "words"),
    [
        ("gpu", "float32", False, "unknown device 'gpu'; choose cpu, cuda, cuda:N or mps"),
        ("cuda:x", "float32", False, "unknown device 'cuda:x'"),
        ("cuda", "float32", False, "no GPU is usable here"),
        ("mps", "float32", False, "this is not a Mac"),
        ("cuda:2", "float32", True, "there are 2 GPUs here; the first is cuda:0"),
        ("mps", "float64", True, "cannot compute in float64"),
    ],
)
def test_devices(device: str, dtype: str, there: bool, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    with pytest.raises(UserError, match=words):
        check_device(device, dtype)
    if there:
        check_device("cuda:1")
        check_device("mps", "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "offload", "free", "words"),
    [
        ("float32", "none", {"cuda": 9e6}, "the weights of M in float32 need about 9.2 MB on cuda, 9.0 MB are free"),
        ("float64", "disk", {"cuda": 8e6}, "the weights of M in float64 need about 9.7 MB on cuda"),
        ("bfloat16", "cpu", {"cuda": 3e6, "cpu": 4e6}, "the weights of M in bfloat16 need about 4.6 MB on cpu"),
        ("bfloat16", "disk", {"cuda": 3e6, "cpu": 0}, None),
    ],
)
def test_too_little_memory_is_said(
    dtype: str, offload: str, free: dict[str, float], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 1e6 < placement.free_bytes("cpu") < 1e14
    monkeypatch.setattr(placement, "free_bytes", lambda where: int(free[where]))
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000, False), torch.nn.Linear(1000, 1100, False)).to("meta")
    if words is None:
        check_memory(model, "M", dtype, "cuda", offload)
        return
    with pytest.raises(UserError, match=words):
        check_memory(model, "M", dtype, "cuda", offload)


MEMORY = [
    (["model=path", "model.path=MODEL"], 0.1, "in float32 need about .* on cpu, .*model.dtype=bfloat16"),
    (
        ["model=orrery2", "transcoder.stream=false"],
        12,
        "the transcoders in .*orrery2_transcoders need about 16.8 MB on cpu, 12.0 MB are free; leave transcoder.stream",
    ),
    (
        ["model=tiny", "transcoder=random", "transcoder.n_features=100000"],
        12,
        "random transcoders need about 76.8 MB on cpu, 12.0 MB are free; choose a smaller transcoder.n_features",
    ),
    (["model.offload=disc"], None, "did you mean 'disk'"),
    (["model.dtype=half"], None, "no such choice"),
    (["model.device=tpu"], None, "unknown device 'tpu'"),
]


@pytest.mark.parametrize(("arguments", "free_mb", "words"), MEMORY)
def test_what_does_not_fit_is_one_line_before_weights_are_read(
    arguments: list[str],
    free_mb: float | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if "model.path=MODEL" in arguments:
        saved("gemma3", tmp_path / "model")
        capfd.readouterr()  # the bar of writing it
        monkeypatch.setattr("vlmscope.models.loading._load_weights", None)
    if free_mb is not None:  # 12 MB are room for Orrery's 10
        monkeypatch.setattr(placement, "free_bytes", lambda _: int(free_mb * 1e6))
    asked = ["task=trace", "prompt=what is this ?", "tracking=none", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main([*asked, *(argument.replace("MODEL", str(tmp_path / "model")) for argument in arguments)]) == 2
    error = capfd.readouterr().err
    assert re.search(words, error) and len(error.strip().splitlines()) == 1, error
