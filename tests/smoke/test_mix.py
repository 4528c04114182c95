"""A mix on the command line: shards, training, a kill and its resumption, and mistakes in one line."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from vlmscope.app import main
from vlmscope.training.resume import Checkpoints

TRAIN = [
    "task=train_transcoders", "model=tiny", "model.family=llava",
    "transcoder=arch", "transcoder.expansion_factor=2", "transcoder.k=4",
    "data.context=32", "task.tokens_per_batch=80", "trainer.max_steps=24", "task.steps_per_batch=1",
    "task.pool_batches=2", "task.val_examples=6", "trainer.checkpoint_every=5", "optim.warmup=1", "tracking=none",
]  # fmt: skip


def transcoders(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "transcoders").iterdir()}


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_a_killed_run_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TRAIN, "data=mix_orrery"]
    assert main([*command, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    shares = [metrics[f"data/{name}/tokens_share"] for name in ("text", "captions", "questions")]
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.05) and sum(shares) == pytest.approx(1)

    save = Checkpoints.save

    def killed(self: Checkpoints, module) -> None:
        save(self, module)
        if module.steps_done == 15:
            raise RuntimeError("killed")  # no callback saves anything then, as after a kill

    monkeypatch.setattr(Checkpoints, "save", killed)
    half = [*command, f"hydra.run.dir={tmp_path / 'half'}"]
    assert main(half) == 1
    monkeypatch.setattr(Checkpoints, "save", save)
    capsys.readouterr()
    assert main([*half, "trainer.resume=true", "data.sources.text.weight=3"]) == 2
    assert "text 2, captions 2" in one_error(capsys)
    assert main([*half, "trainer.resume=true"]) == 0
    assert transcoders(tmp_path / "half") == transcoders(tmp_path / "whole")
    again = json.loads((tmp_path / "half" / "metrics.json").read_text())
    assert {k: v for k, v in again.items() if k.startswith("data/")} == {
        k: v for k, v in metrics.items() if k.startswith("data/")
    }


def test_shards_of_a_mix_are_built_and_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = [f"data.sources.{name}.limit=40" for name in ("text", "captions", "questions")]
    build = ["task=build_data", "data=mix_orrery", f"data.path={tmp_path / 'shards'}", *limits, "task.shard_size=16"]
    build += ["task.workers=1", "task.parts=1", "tracking=none"]
    assert main([*build, f"hydra.run.dir={tmp_path / 'build'}"]) == 0
    metrics = json.loads((tmp_path / "build" / "metrics.json").read_text())
    assert metrics["data/rows"] == 240 and metrics["data/shards"] == 18
    train = [*TRAIN, "data=mix_shards", f"data.path={tmp_path / 'shards'}", "trainer.max_steps=3"]
    assert main([*train, f"hydra.run.dir={tmp_path / 'train'}"]) == 0
    for shard in (tmp_path / "shards").glob("train-text-*.tar"):
        shard.write_bytes(b"")
    capsys.readouterr()
    assert main([*train, f"hydra.run.dir={tmp_path / 'bad'}"]) == 2
    assert "number 3, and data.max_bad_shards=2" in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=mix_paper"], "HF_HUB_OFFLINE forbids to stream EleutherAI/SmolLM2-135M-10B"),
        (["data=mix_paper", "~data.sources.text"], "HF_HUB_OFFLINE forbids to stream ILSVRC/imagenet-1k"),
        (["data=mix_local"], "data.sources.text.path"),
        (["data=mix_local", "data.sources.text.path={texts}", "~data.sources.captions", "~data.sources.questions",
          "data.sources.text.text=body"], "no column 'body'; the columns are text"),
        (["data=mix_orrery", "data.sources.text.weight=-1"], "data.sources.text.weight=-1.0: a weight must be"),
        (["data=mix_orrery", "data.sources.text.wieght=1"], "wieght"),
        (["data=mix_orrery", "model=tiny", "model.family=gemma3_text"], "samples of captions could not be used"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Dataset.from_dict({"text": ["a red planet"] * 4}).save_to_disk(tmp_path / "texts")
    given = [one.format(texts=tmp_path / "texts") for one in arguments]
    capsys.readouterr()
    assert main([*TRAIN, *given, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    assert message in one_error(capsys)
