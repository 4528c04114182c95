"""The command line as a process: exit codes, what it prints, what it leaves in the run folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.processes import Forked

from vlmscope import __version__
from vlmscope.app import main

ROOT = Path(__file__).resolve().parents[2]

# A task that exists only here, added to the package's search path before the app starts.
DUMMY = '''"""A task for tests."""
from dataclasses import dataclass
from vlmscope.core.errors import UserError
from vlmscope.tasks.settings import Settings


@dataclass
class Config(Settings):
    memory = "task.many"
    mode: str = "ok"

def run(cfg, context):
    if cfg.task.mode == "user":
        raise UserError("the thing is wrong\\nhere; do that")
    if cfg.task.mode == "crash":
        raise RuntimeError("boom")
    if cfg.task.mode == "full":
        raise OSError(28, "No space left on device")
    if cfg.task.mode.startswith("memory"):
        import numpy, pyarrow, torch
        many = 1 << 50
        def cuda(_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nGPU 0 has ...")
        {"torch": torch.empty, "numpy": numpy.empty, "arrow": pyarrow.allocate_buffer, "cuda": cuda,
         "list": lambda n: [0] * n}[cfg.task.mode.partition("_")[2]](many)
    if cfg.task.mode == "interrupt":
        raise KeyboardInterrupt
    (context.run_dir / "artifact.txt").write_text(str(cfg.prompt))
    return {"val/fvu": 0.5, "seed": cfg.seed, "nothing": float("nan")}
'''
DRIVER = """
import sys
import vlmscope.tasks
vlmscope.tasks.__path__.append(sys.argv.pop(1))
from vlmscope.app import main
from vlmscope.tasks import dummy, settings
settings.TASKS["dummy"] = dummy.Config
sys.exit(main())
"""


@pytest.fixture
def app(tmp_path: Path):
    """The same in a process forked from one that has imported everything."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "dummy.py").write_text(DUMMY)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        process = Forked(DRIVER, tmp_path / "tasks", *arguments, cwd=tmp_path)
        out, err = process.communicate()
        return subprocess.CompletedProcess(arguments, process.wait(), out, err)

    return run


def test_a_run_leaves_its_folder_and_prints_it_last(app, tmp_path) -> None:
    result = app("task=dummy", "tracking=none", "prompt=a, ${b} (c)", "seed=3", "image=x.png")
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.splitlines()[-1])
    assert folder.parent == tmp_path / "outputs" / "dummy"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["prompt"], config["seed"], config["trainer"]["seed"]) == ("a, ${b} (c)", 3, 3)
    assert (config["task"], config["image"]) == ({"name": "dummy", "mode": "ok"}, ["x.png"])
    assert json.loads((folder / "metrics.json").read_text()) == {"val/fvu": 0.5, "seed": 3.0, "nothing": None}
    assert (folder / "artifact.txt").read_text() == "a, ${b} (c)"


def test_names_that_are_not_utf8_pass_through(app, store, tmp_path) -> None:
    folder, picture = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9", b"p\xe9.png"))
    result = app("task=dummy", f"hydra.run.dir={folder}", f"image={picture}", f"tracking.uri={store}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(folder)  # before it, where the run is in MLflow
    assert yaml.safe_load((folder / "config.yaml").read_text())["image"] == [str(picture)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=mars_erth_patch"], "no experiment named"),
        (["task=dumy"], "did you mean 'dummy'"),
        (["task=dummy", "trainer.max_step=1"], "did you mean trainer.max_steps"),
        (["task=dummy", "seed=x"], "seed"),
        (["task=dummy", "task.mode=user"], "the thing is wrong here; do that"),
        (["task=dummy", "task.mode=full"], "No space left on device"),
        (["task=dummy", "pairs=null"], "~pairs leaves it out"),
        (["task=dummy", "foo"], "write it as key=value"),
        (["task=dummy", "--nonsense"], "unrecognized arguments"),
        (["task=dummy", "hydra.run.dir=file/below"], "cannot write"),
        (["task=dummy", "tracking=mlflow", "tracking.uri=sqlite:///file/x.db"], "cannot write"),
        (["-m", "task=dummy", "seed=1,x"], "seed"),
        (["-m", "task=dummy", "seed=1,2", "tracking=mlflow", "tracking.uri=sqlite:///file/x.db"], "cannot write"),
        (["--experimental-rerun", "x"], "pickle"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(app, tmp_path, arguments, words) -> None:
    (tmp_path / "file").write_text("")
    if not any(argument.startswith("tracking") for argument in arguments):
        arguments = [*arguments, "tracking=none"]
    result = app(*arguments)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert words in result.stderr


@pytest.mark.parametrize(("mode", "code", "words"), [("crash", 1, "RuntimeError: boom"), ("interrupt", 130, "resume")])
def test_a_crash_shows_one_traceback_and_an_interrupt_none(app, mode, code, words) -> None:
    result = app("task=dummy", f"task.mode={mode}", "tracking=none")
    assert result.returncode == code and words in result.stderr
    assert result.stderr.count("Traceback") == (mode == "crash")


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "cuda", "list"])
def test_memory_that_runs_out_is_one_line_that_says_what_to_lower(app, kind: str) -> None:
    result = app("task=dummy", f"task.mode=memory_{kind}", "tracking=none")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: task=dummy ran out of memory")
    assert "lower task.many" in result.stderr and "model.dtype=bfloat16" in result.stderr


def test_a_failed_job_does_not_lose_the_others_and_the_sweep_says_so(app, store, tmp_path) -> None:
    result = app("-m", "task=dummy", "task.mode=ok,crash,user", "seed=5", "prompt=a,b", f"tracking.uri={store}")
    assert result.returncode == 1
    assert "boom" in result.stderr
    assert "the thing is wrong" in result.stderr
    job, folder = (Path(line) for line in result.stdout.splitlines() if line.startswith("/"))
    assert job == folder / "0"
    assert (job / "artifact.txt").read_text() == "a,b"
    assert not (folder / "1" / "metrics.json").exists()

    from vlmscope.tracking.client import open_client

    client = open_client(store)
    experiment = client.get_experiment_by_name("dummy")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(folder.name)
    assert parent.info.status == "FAILED"
    assert "sweep.csv" in {item.path for item in client.list_artifacts(parent.info.run_id)}
    # Named by what sets them apart, not where they are.
    states = {"mode=ok": "FINISHED", "mode=crash": "FAILED", "mode=user": "FAILED"}
    assert {name: run.info.status for name, run in runs.items()} == states
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert runs["mode=ok"].data.metrics["val/fvu"] == 0.5
    kept = {item.path for item in client.list_artifacts(runs["mode=ok"].info.run_id)}
    assert {"config.yaml", "metrics.json"} <= kept


def test_the_configuration_can_be_shown(app) -> None:
    result = app("task=dummy", "--cfg", "job", "prompt=a, b")
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["prompt"] == "a, b"
    assert app("task=dummy", "--info", "defaults").returncode == 0
    assert app("task=dummy", "--info", "defaults", "seed=2").returncode == 0


def test_help_is_quick_and_names_everything() -> None:
    before = os.times()
    result = subprocess.run(
        [sys.executable, "run.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    after = os.times()
    assert result.returncode == 0, result.stderr
    for words in ("task=", "experiment=", "prompt=", "Examples", "trace"):
        assert words in result.stdout
    # The promise is 3 s. Processor time, since the wall clock of a busy machine says nothing about the program.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3


@pytest.mark.parametrize("command", ["--help", "task=list"])
def test_a_reader_that_goes_away_is_no_error(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run([sys.executable, "run.py", command], cwd=ROOT, stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.decode()) == (141, "")


def test_the_version_is_the_same_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """The package's, from which setuptools takes the wheel's; the citation's; and one with a section of changes."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlmscope {__version__}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text().splitlines()
