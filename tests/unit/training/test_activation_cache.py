"""The cache of activations: same weights without the model, what it refuses, what a kill leaves, several processes."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.training.helpers import CONFIG, interrupted_at, make_batch, settings, state
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.hub import gb
from vlmscope.models.base import Adapter
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_gemma3
from vlmscope.training.captures import CacheSettings
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.transcoder import TranscoderSet

Number = Callable[[int], dict[str, Tensor]]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every forward of the model."""
    asked: list[int] = []
    right = Adapter.forward

    def counted(self: Adapter, *arguments: Any, **settings: Any) -> Any:
        asked.append(1)
        return right(self, *arguments, **settings)

    monkeypatch.setattr(Adapter, "forward", counted)
    return asked


def _train(
    model: VLM, folder: Path, cache: CacheSettings | None, batch: Number = make_batch, **changes: Any
) -> TranscoderSet:
    return train_transcoders(model, batch, [], settings(CONFIG, **changes), folder, cache=cache)[0]


def _equal(one: TranscoderSet, other: TranscoderSet) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_weights_are_those_without_a_cache_and_later_runs_never_run_the_model(
    gemma: VLM,
    tmp_path: Path,
    forwards: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = _train(gemma, tmp_path / "plain", None)
    assert len(forwards) == 8  # the two of the start, and again with the others
    forwards.clear()
    cache = CacheSettings(tmp_path / "cache")
    first = _train(gemma, tmp_path / "first", cache)
    assert len(forwards) == 6 and _equal(plain, first)
    # 4 layers, 78 tokens, inputs and outputs of width 24 in float32, 6 batches.
    size = 4 * 78 * 2 * gemma.adapter.d_model * 4
    (line,) = capsys.readouterr().out.splitlines()
    assert f"x 78 tokens x 6 batches), {gb(6 * size)} of it to be written" in line, line
    tensors = sum(t.nbytes for file in cache.folder.rglob("*.safetensors") for t in load_file(file).values())
    assert tensors == 6 * (size + 78)  # and which tokens are soft
    forwards.clear()
    second = _train(gemma, tmp_path / "second", cache)
    assert not forwards and _equal(plain, second) and state(tmp_path / "plain") == state(tmp_path / "second")
    other = _train(gemma, tmp_path / "other", cache, expansion_factor=8)  # a sweep
    assert not forwards and _equal(other, _train(gemma, tmp_path / "alone", None, expansion_factor=8))
    forwards.clear()
    _train(gemma, tmp_path / "longer", cache, max_steps=8)
    assert len(forwards) == 2  # batches that no run had asked for


def test_a_kill_leaves_whole_batches_and_a_checkpoint_that_goes_on_bit_for_bit(
    gemma: VLM,
    tmp_path: Path,
    forwards: list[int],
) -> None:
    whole = _train(gemma, tmp_path / "whole", None)
    cache = CacheSettings(tmp_path / "cache")

    with pytest.raises(KeyboardInterrupt):
        _train(gemma, tmp_path / "parts", cache, interrupted_at(5))
    part = cache.folder / "rank_00"
    assert sorted(file.name for file in part.iterdir()) == [f"batch_{n:06d}.safetensors" for n in range(5)]
    # What a killed process was writing, long ago and just now; and a file that the disk has cut short.
    old, new = (part / f".batch_000005.{os.getpid()}.{number * 8}.tmp.safetensors" for number in "01")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    damaged = part / "batch_000004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    forwards.clear()
    resumed = _train(gemma, tmp_path / "parts", cache, resume=True)
    assert len(forwards) == 2  # batches 4 and 5
    assert _equal(whole, resumed) and state(tmp_path / "whole") == state(tmp_path / "parts")
    assert [file.name for file in part.glob(".*")] == [new.name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_dtype_gives_the_same_run_whoever_captured(
    gemma: VLM,
    tmp_path: Path,
    dtype: str,
) -> None:
    cache = CacheSettings(tmp_path / "cache", dtype)
    first, second = (_train(gemma, tmp_path / name, cache) for name in ("first", "second"))
    assert _equal(first, second) and not _equal(first, _train(gemma, tmp_path / "plain", None))
    kept = load_file(cache.folder / "rank_00" / "batch_000000.safetensors")
    assert kept["layer_00.in"].dtype == getattr(torch, dtype)


def test_what_differs_is_named(gemma: VLM, tmp_path: Path) -> None:
    cache = CacheSettings(tmp_path / "cache", None, "my data", "seed 0")
    _train(gemma, tmp_path / "run", cache)

    def message(kept: CacheSettings = cache, model: VLM = gemma, batch: Number = make_batch) -> str:
        with pytest.raises(UserError) as raised:
            _train(model, tmp_path / "again", kept, batch)
        said = str(raised.value)
        assert "\n" not in said and said.startswith(f"task.cache={cache.folder} was made with another ")
        return said.partition("was made with another ")[2]

    assert message(dataclasses.replace(cache, data="yours")).startswith("data my data -> yours; restore it, or choose")
    assert message(dataclasses.replace(cache, dtype="bfloat16")).startswith("dtype float32 -> bfloat16; restore")
    assert message(dataclasses.replace(cache, order="seed 1")).startswith("order seed 0, batch 0 is ")
    # A batch that differs although nothing said so, such as another tokenizer or processor.
    assert message(batch=lambda number: make_batch(number + 1)).startswith("order seed 0, batch 0 is ")
    tiny = tiny_gemma3(0)
    with torch.no_grad():
        tiny.adapter.mlp(2).down_proj.weight[0, 0] += 1e-3  # one number of one weight
    assert message(model=tiny).startswith("model ")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"mine has no manifest\.json and holds other files; choose another"):
        _train(gemma, tmp_path / "again", CacheSettings(tmp_path / "mine"))


def test_epochs_go_through_the_first_batches_again(gemma: VLM, tmp_path: Path, forwards: list[int]) -> None:
    asked: list[int] = []
    changes = {"epoch_batches": 3, "max_steps": 8}
    plain = _train(gemma, tmp_path / "plain", None, lambda n: asked.append(n) or make_batch(n), **changes)
    assert asked[1:] == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1]  # first, batch 0 is what a checkpoint knows the data by
    forwards.clear()
    cached = _train(gemma, tmp_path / "cached", CacheSettings(tmp_path / "cache"), **changes)
    assert len(forwards) == 3 and _equal(plain, cached)
