"""A training run that is stopped or killed, and its continuation: exit codes, files, and one run in MLflow."""

import itertools
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.processes import Forked
from tests.smoke.test_launch import MIX, ended, errors, start, stopped

from vlmscope.app import main
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.training.layer_trainer import LayerTrainer
from vlmscope.transcoders.formats import save_set
from vlmscope.transcoders.transcoder import random_set


def _said(process: Forked, word: str) -> None:
    """Wait until the running `process` has printed a word."""
    end = time.monotonic() + 240
    while word not in process.said()[0]:
        assert time.monotonic() < end and process.poll() is None, process.said()
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_leaves_a_state_and_says_how_to_resume(tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [*MIX, f"hydra.run.dir={tmp_path / 'run'}", "tracking=none", "trainer.max_steps=100000"]
    stopped(command, tmp_path / "run", number, code, world=1)


def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note, calls = LayerTrainer.note, itertools.count(1)

    def signalling(self: LayerTrainer, *given: Any) -> None:
        if next(calls) == 2:  # of the second layer or step: some weights are changed and some are not
            signal.raise_signal(signal.SIGTERM)
        note(self, *given)

    monkeypatch.setattr(LayerTrainer, "note", signalling)
    run = tmp_path / "run"
    assert main([*MIX, f"hydra.run.dir={run}", "tracking=none", "trainer.max_steps=100000"]) == 143
    (marker,) = run.glob("transcoder_checkpoint/step_*/complete.json")
    assert json.loads(marker.read_text())["steps_done"] == 1


def test_a_second_signal_ends_at_once() -> None:
    """The first is raised where the program is, which here takes its time to end; the second does not wait for that."""
    code = (
        "import sys, time, vlmscope.app as app\n"
        "def work(argv, failures):\n"
        "    try:\n        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n        print('saving', flush=True); time.sleep(60)\n"
        "app._run_hydra = work\n"
        "sys.exit(app.main(['task=list']))\n"
    )
    for first, second, expected in ((signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGTERM, 143)):
        process = Forked(code)
        for word, number in (("ready", first), ("saving", second)):
            _said(process, word)
            process.send_signal(number)
        began = time.monotonic()
        assert process.wait() == expected and time.monotonic() - began < 50  # of 60


# Kills or stops itself when a file whose path ends so is to get its name, or (with "after") has just got it.
_KILLED = """
import os, sys
from pathlib import Path
from vlmscope.app import main
number, when, name, replace = int(sys.argv.pop(1)), sys.argv.pop(1), sys.argv.pop(1), os.replace
def killing(source, target):
    hit = Path(target).match(name)
    if not (hit and when == "before"):
        replace(source, target)
    if hit:
        print("(reached)", flush=True)
        os.kill(os.getpid(), number)
os.replace = killing
sys.exit(main())
"""
_OF_THE_COMMAND = ("config.yaml", "overrides.yaml")  # they say trainer.resume


def _files(run: Path) -> dict[str, bytes | dict[str, float]]:
    """All files of a run, metrics without those of speed."""
    found: dict[str, bytes | dict[str, float]] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.name == "metrics.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("perf/")}
        elif path.name not in _OF_THE_COMMAND:
            found[name] = path.read_bytes() if path.is_file() else b"folder"
    return found


@pytest.mark.parametrize(
    ("task", "kills"),
    [
        ("train_transcoders", [
            ("before", "step_00000004/layer_01.safetensors"), ("after", "step_00000004/complete.json"),
            ("before", "fvu_by_layer.png"),
        ]),
        ("mix", [("after", "step_00000004/complete.json")]),
        ("study", [("before", "checkpoint_1"), ("after", "study/study.json")]),
    ],
)  # fmt: skip
def test_a_run_that_was_killed_and_resumed_has_the_files_of_an_uninterrupted_one(
    mixed_data: Path, tmp_path: Path, task: str, kills: list[tuple[str, str]], refusal: Callable[..., str]
) -> None:
    data = {
        "train_transcoders": [*FEW_STEPS, f"data.path={mixed_data}"], "study": [*FEW_ROWS, f"data.path={mixed_data}"],
        "mix": [*MIX, "trainer.max_steps=4"],
    }  # fmt: skip
    command = [*data[task], "tracking=none"]
    assert main([*command, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    whole = _files(tmp_path / "whole")
    run = [f"hydra.run.dir={tmp_path / 'run'}", "trainer.resume=true"]
    for when, name in kills:  # of one run, one after the other: what each leaves must go
        process = Forked(_KILLED, int(signal.SIGKILL), when, name, *command, *run)
        assert process.wait() == -signal.SIGKILL, (name, process.said())
        if when == "before":
            assert list((tmp_path / "run").rglob(".*.tmp*")), name
    if task == "mix":
        assert "text 2, captions 2" in refusal(*command, *run, "data.sources.text.weight=3")
    assert main([*command, *run]) == 0
    resumed = _files(tmp_path / "run")
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if resumed[name] != whole[name]] == []


def test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_blocks_nothing(
    mixed_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = [*FEW_ROWS, "tracking=none", f"data.path={mixed_data}", f"hydra.run.dir={run}", "trainer.resume=true"]
    process = Forked(_KILLED, int(signal.SIGSTOP), "before", "checkpoint_1", *command)
    _said(process, "(reached)")  # it stands still, and holds the folder
    before = _files(run)
    assert main(command) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert f"process {process.pid} on " in line and f"is writing into {run}; wait" in line
    assert _files(run) == before
    processes = start([*command[:-1]])
    codes, _, said = ended(processes)
    assert codes == [2, 2] and [f"is writing into {run}" in text for text in errors(said)] == [True]
    process.kill()
    process.wait()
    assert main(command) == 0 and not (run / ".lock").exists()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pictures with questions, and rows to trace, all on disk."""
    folder = tmp_path_factory.mktemp("own")
    vlm = tiny_vlm("llava", 3)
    vlm.model.save_pretrained(folder / "model")
    vlm.processor.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    turn = [{"user": "what is this ?", "assistant": "red"}]
    lines = [{"images": [f"{number}.bmp"], "texts": turn} for number in range(8)]
    for number in range(8):
        tiny_image(number).save(folder / "data" / f"{number}.bmp")  # all of one size, whatever they show
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"id": "a", "image": str(folder / "data" / "0.bmp"), "prompt": "what is this ?"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    random = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 12, 4, False, 0)
    save_set(random, folder / "set")
    return folder


def _other_weights(own: Path) -> None:
    (file,) = (own / "model").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith("down_proj.weight"))
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def _other_template(own: Path) -> None:
    file = own / "model" / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"more": 1}))


def _other_picture(own: Path) -> None:
    tiny_image(99).save(own / "data" / "0.bmp")


def _other_set(own: Path) -> None:
    file = own / "set" / "layer_0.safetensors"
    tensors = load_file(file)
    tensors["W_dec"].view(-1)[0] += 1e-3
    save_file(tensors, file)


CHANGES = {
    "model.weights": _other_weights, "model.processor_config.json": _other_template, "data.files": _other_picture,
    "data.sources.folder.files": _other_picture, "other pictures": _other_picture, "transcoder.files": _other_set,
}  # fmt: skip
TRAINING = [
    "task=train_transcoders", "data=folder", "transcoder=arch", "transcoder.expansion_factor=2", "transcoder.k=4",
    "trainer.max_steps=2", "task.steps_per_batch=1", "task.pool_batches=2", "task.tokens_per_batch=60",
    "optim.warmup=1",
]  # fmt: skip
FEW_STEPS = [
    *TRAINING[:-3], "model=tiny", "model.family=llava",
    "task.pool_batches=2", "task.tokens_per_batch=60", "optim.warmup=1",
    "trainer.max_steps=4", "trainer.checkpoint_every=2",
]  # fmt: skip
FEW_ROWS = [
    "task=study", "model=tiny", "data=folder", "study.top=3", "study.samples=4", "study.batch_size=4",
    "study.checkpoint_every=1",
]  # fmt: skip
STUDY = ["task=study", "data=folder", "study.top=2", "study.samples=2", "study.batch_size=2"]
ROWS = ["task=trace", "task.figure=false", "attribution.max_nodes=40"]


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        (TRAINING, ["model.weights", "model.processor_config.json", "data.files", "task.val_examples=3"]),
        (STUDY, ["model.weights", "data.sources.folder.files", "transcoder.files", "study.samples=3"]),
        (ROWS, ["model.weights", "other pictures", "transcoder.files", "attribution.max_nodes=30"]),
    ],
    ids=["train_transcoders", "study", "rows"],
)
def test_another_model_or_other_data_of_the_same_shape_is_refused_by_name(
    own: Path, tmp_path: Path, command: list[str], changes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "own"
    shutil.copytree(own, mine)
    rows = (mine / "rows.jsonl").read_text().replace(str(own), str(mine))
    (mine / "rows.jsonl").write_text(rows)
    run = f"hydra.run.dir={tmp_path / 'run'}"
    given = [*command, "model=path", f"model.path={mine / 'model'}", "tracking=none", run]
    if command is not TRAINING:
        given += ["transcoder=path", f"transcoder.path={mine / 'set'}"]
    given += [f"task.rows={mine / 'rows.jsonl'}"] if command is ROWS else [f"data.path={mine / 'data'}"]
    assert main(given) == 0
    for change in changes:
        changed = tmp_path / change.replace("=", "_")
        shutil.copytree(mine, changed)
        more = [change] if "=" in change else []
        if not more:
            CHANGES[change](mine)
        capsys.readouterr()
        assert main([*given, *more, "trainer.resume=true"]) == 2, change
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        assert change.partition("=")[0] in line and "hydra.run.dir" in line.replace("new run folder", "hydra.run.dir")
        shutil.rmtree(mine)
        shutil.move(changed, mine)
    # What decides nothing may change, and so may the place of the model.
    shutil.move(mine / "model", mine / "moved")
    moved = [word.replace(f"{mine}/model", f"{mine}/moved") for word in given]
    assert main([*moved, "trainer.resume=true", "trainer.log_every=1", "trainer.threads=1"]) == 0
