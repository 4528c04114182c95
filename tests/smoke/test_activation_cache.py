"""`task.cache` on the command line: a sweep whose second job never captures, and mistakes in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.smoke.test_mix import TRAIN, one_error

import vlmscope.training.ranks as ranks
from vlmscope.app import main

MIX = [*TRAIN, "data=mix_orrery", "trainer.max_steps=10"]


def test_the_second_job_of_a_sweep_reads_what_the_first_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captured: list[Any] = []
    right = ranks.collect
    monkeypatch.setattr(ranks, "collect", lambda adapter, batch: captured.append(batch) or right(adapter, batch))
    cache = f"task.cache={tmp_path / 'cache'}"
    sweep = ["-m", *MIX, cache, "transcoder.expansion_factor=2,3", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert main(sweep) == 0
    assert len(captured) == 10  # of two jobs with 10 steps each
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cache of activations: ")]
    assert len(said) == 2 and "0.0 kB of it to be written" in said[1] and "0.0 kB of it to be" not in said[0]

    # The same job by itself: the weights are the same, and so are the figures of data that the cached job never drew.
    assert main([*MIX, "transcoder.expansion_factor=3", f"hydra.run.dir={tmp_path / 'alone'}"]) == 0
    assert len(captured) == 10 + 8 + 10  # the eight of the start twice
    names = sorted(file.name for file in (tmp_path / "alone" / "transcoders").glob("*.safetensors"))
    for name in names:
        ours, theirs = (tmp_path / run / "transcoders" / name for run in ("sweep/1", "alone"))
        assert ours.read_bytes() == theirs.read_bytes()
    found, alone = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("sweep/1", "alone"))
    differing = {name for name in alone if found[name] != alone[name]}
    assert differing <= {"perf/tokens_per_s", "perf/peak_mem_gb", "perf/seconds"}
    assert alone["data/text/tokens_share"] > 0

    capsys.readouterr()
    for changed, words in (("seed=1", "order seed 0, "), ("task.tokens_per_batch=90", "data mix, ")):
        assert main([*MIX, cache, changed, f"hydra.run.dir={tmp_path / 'other'}"]) == 2
        error = one_error(capsys)
        assert "was made with another " in error and words in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["task.cache_dtype=int8", "task.cache=there"],
            "task.cache_dtype=int8: no such choice",
        ),
        (["task.cache_dtype=bfloat16"], "task.cache_dtype=bfloat16 without a cache; name its folder"),
        (["task.epoch_batches=2"], "task.epoch_batches=2: it must be at least 8"),
        (["trainer.precision=64"], "trainer.precision=64: no such choice; choose one of 32, bf16-mixed"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*MIX, *arguments, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert words in one_error(capsys)
