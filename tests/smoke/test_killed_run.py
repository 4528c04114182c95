"""A training run that is stopped or killed, and its continuation: exit codes, files, and one run in MLflow."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.processes import Forked, command_line
from tests.smoke.test_launch import MIX

from vlmscope.app import main
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.tracking.client import open_client
from vlmscope.transcoders.formats import save_set
from vlmscope.transcoders.init import random_set


def _reached(process: Forked, run: Path, pattern: str) -> None:
    """Wait until the running `process` has written a file."""
    end = time.monotonic() + 240
    while not list(run.glob(pattern)):
        assert time.monotonic() < end and process.poll() is None, process.said()
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_leaves_a_state_and_says_how_to_resume(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "run"
    command = [*MIX, f"hydra.run.dir={run}", "tracking=none", "trainer.max_steps=100000"]
    process = command_line(*command)
    _reached(process, run, "data_states.json")
    while len(json.loads((run / "data_states.json").read_text())["states"]) < 2:  # some steps
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait() == code
    (line,) = [line for line in process.said()[1].splitlines() if "trainer.resume=true" in line]
    assert "Traceback" not in process.said()[1]
    (marker,) = run.glob("transcoder_checkpoint/step_*/complete.json")
    assert 0 < json.loads(marker.read_text())["steps_done"] < 100000
    assert not [path for path in run.rglob(".*") if ".tmp" in path.name]


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
            end = time.monotonic() + 60
            while word not in process.said()[0]:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.005)
            process.send_signal(number)
        began = time.monotonic()
        assert process.wait() == expected and time.monotonic() - began < 10


@pytest.mark.slow
def test_a_killed_run_goes_on_as_the_same_run_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, uri = tmp_path / "run", f"sqlite:///{tmp_path}/m.db"
    command = [*MIX, f"hydra.run.dir={run}", f"tracking.uri={uri}", "trainer.log_every=1", "trainer.checkpoint_every=3"]
    process = command_line(*command, "trainer.max_steps=40")
    end = time.monotonic() + 240
    while not list(run.glob("transcoder_checkpoint/step_*/complete.json")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run_id = (run / ".mlflow_run_id").read_text().strip()
    client = open_client(uri)
    assert client.get_run(run_id).info.status == "RUNNING"  # nothing could say otherwise
    before = client.get_metric_history(run_id, "train/fvu")
    reached = max(metric.step for metric in before)
    assert 3 <= reached < 40 and not (run / "metrics.json").exists()

    assert main([*command, "trainer.max_steps=40", "trainer.resume=true"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(run)]
    assert (run / ".mlflow_run_id").read_text().strip() == run_id
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and found.data.tags["changed.trainer.resume"] == "True"
    assert len(client.search_runs([found.info.experiment_id])) == 1
    history = client.get_metric_history(run_id, "train/fvu")
    values = {metric.step: metric.value for metric in before}
    assert {metric.step for metric in history} == set(range(1, 41))
    # The steps since the last checkpoint were taken twice, to the same figures.
    again = [metric for metric in history if metric.step in values]
    assert all(metric.value == pytest.approx(values[metric.step], rel=1e-6) for metric in again)
    assert found.data.metrics["val/fvu"] > 0


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
