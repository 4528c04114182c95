"""task=reproduce from the command line: numbers, page, resume, failures, kills.

Except where it says so, the experiments' processes are a script that answers at once in place of `run.py`.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests.unit.report.test_html import Parsed

from vlmscope.app import main
from vlmscope.tasks import reproduce

ROOT = Path(__file__).resolve().parents[2]
GOOD = """# @package _global_
# How many parameters has a tiny model?
defaults:
  - override /task: plan
  - override /model: tiny
  - _self_
name: NAME
reproduce: true
paper: four thousand million
headline:
  plan/parameters/total: {low: 30000, high: 40000, says: 'parameters of the model: all parts'}
"""
EMPTY = """# @package _global_
# Does an experiment that declares nothing run?
defaults:
  - override /task: experiment
  - _self_
name: NAME
reproduce: true
paper: nothing comparable
headline:
  some/rate: {low: 0.5, high: 1, says: never measured}
"""
# Stands for run.py: the same answers, files and exit codes; `slow` waits for a file beside its folder.
PROGRAM = """
import json, pathlib, sys, time
told = dict(argument.split("=", 1) for argument in sys.argv[1:])
name, folder = told.get("experiment", "data"), pathlib.Path(json.loads(told["hydra.run.dir"]))
folder.joinpath("config.yaml").write_text(json.dumps(told))
if name.startswith("empty"):
    sys.exit(print("cases: 0\\rerror: this task runs what an experiment declares: choose one", file=sys.stderr) or 2)
while name == "slow" and not folder.parent.joinpath("go").exists():
    time.sleep(0.02)
numbers = {"plan/parameters/total": 36488.0, "a/rate": 0.97, "a/rate_ci_low": 0.9, "a/rate_ci_high": 1.0}
folder.joinpath("metrics.json").write_text(json.dumps(numbers | {"a/rate_control": 0.02}))
"""
# A shell's background job ignores SIGINT, and so does what it starts, tests too: the driver listens to it again.
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from vlmscope.tasks import reproduce
program = sys.argv.pop(1)
reproduce._program = lambda: [sys.executable, program]
from vlmscope.app import main
sys.exit(main())
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(reproduce, "_program", lambda: [sys.executable, str(path)])
    return path


def experiments(folder: Path, **texts: str) -> str:
    """Experiments by name; returns the override that finds them."""
    (folder / "experiment").mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / "experiment" / f"{name}.yaml").write_text(text.replace("NAME", name))
    return f"hydra.searchpath=[file://{folder}]"


def only(*names: str) -> str:
    return f"task.only=[{','.join(names)}]"


@pytest.mark.usefixtures("program")
def test_numbers_are_judged_shown_and_not_measured_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rate = "  a/rate: {low: 0.9, high: 1, says: it works}\n  a/rate_control: {low: 0, high: 0.1, says: by chance}\n"
    off = GOOD.replace("low: 30000, high: 40000", "low: 1, high: 2")
    found = experiments(tmp_path, small=GOOD + rate, off=off, empty=EMPTY)
    run = tmp_path / "run"
    command = ["task=reproduce", only("small", "off", "empty"), found, f"hydra.run.dir={run}", "tracking=none"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(run)
    assert "small: 3 of 3 numbers in range" in out and "off: 0 of 1" in out
    last = err.splitlines()[-1]
    assert last.startswith("error: empty failed: this task runs what an experiment declares")
    assert last.endswith("(exit code 2); off: plan/parameters/total = 36488, range 1 to 2")
    metrics = json.loads((run / "metrics.json").read_text())
    counts = {name: metrics[f"reproduce/{name}"] for name in ("experiments", "failed", "numbers", "out_of_range")}
    assert counts == {"experiments": 3, "failed": 1, "numbers": 5, "out_of_range": 2}
    assert metrics["small/plan/parameters/total"] == 36488
    page = Parsed((run / "summary.html").read_text())
    assert page.values["36488.0"].split()[0] == "36,488" and page.values["0.97"].startswith("97.0\u00a0%")
    asked = ["How many parameters has a tiny model?", "four thousand million", "1 of 3", "3 of 4"]
    for words in (*asked, "out of range 1 to 2", "control 2.0\u00a0%", "in range 90 to 100\u00a0%", "choose one"):
        assert words in page.text, words

    # Ranges are judged anew, work that succeeded is not done again, what failed is.
    stamps = {name: (run / name / "config.yaml").stat().st_mtime_ns for name in ("small", "off", "empty")}
    experiments(tmp_path, off=GOOD)
    assert main([*command[:1], only("small", "off"), *command[2:]]) == 0
    assert "2 of 2 are in" in capsys.readouterr().out
    assert {name: (run / name / "config.yaml").stat().st_mtime_ns for name in stamps} == stamps
    assert main([*command, "trainer.threads=1", "model.dtype=float64"]) == 1
    assert all((run / name / "config.yaml").stat().st_mtime_ns > stamp for name, stamp in stamps.items())
    assert yaml.safe_load((run / "off" / "config.yaml").read_text())["model.dtype"] == "float64"


@pytest.mark.usefixtures("program")
def test_seeds_give_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, run = experiments(tmp_path, small=GOOD), tmp_path / "run"
    command = ["task=reproduce", only("small"), found, f"hydra.run.dir={run}", "tracking=none", "task.seeds=[3,5]"]
    assert main(command) == 0
    assert [yaml.safe_load((run / f"small_seed_{s}" / "config.yaml").read_text())["seed"] for s in (3, 5)] == ["3", "5"]
    table = json.loads((run / "ranges.json").read_text())
    one = table["experiments"]["small"]["plan/parameters/total"]
    assert one["values"] == {"small_seed_3": 36488.0, "small_seed_5": 36488.0}
    assert one["suggested"] == [34600.0, 38400.0] and "spread between the seeds" in table["rule"]
    assert (one["width"], one["holds"]) == (3800.0, None)
    pasted = yaml.safe_load((run / "ranges.yaml").read_text())
    assert pasted["headline"]["plan/parameters/total"]["says"] == "parameters of the model: all parts"
    assert main([*command, "seed=1"]) == 2
    assert "both seed= and task.seeds=" in capsys.readouterr().err
    assert main([*command[:-1], "task.seeds=[0]"]) == 2
    assert "ranges are tested on seed 0, so others must make them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.only=[smal]"], "no experiment 'smal' that says reproduce: true; did you mean 'small'"),
        (["experiment=small"], "choose them with task.only"),
        (["task.only=[small,lost]"], "experiment=lost: transcoder.path=/no/set is not there"),
        (["task.only=[small,wrong]"], "experiment=wrong: .*optim.lrr"),
        (["task.only=[small,swept]"], "experiment=swept is a sweep"),
        (["task.only=[small]", "hydra.run.dir=TAKEN"], "choose a new hydra.run.dir"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    overrides: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = GOOD.replace("name: NAME", "name: NAME\ntranscoder: {path: /no/set}")
    wrong = GOOD.replace("name: NAME", "name: NAME\noptim: {lrr: 1}")
    swept = GOOD.replace("name: NAME", "name: NAME\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params: {seed: '0,1'}")
    found = experiments(tmp_path, small=GOOD, lost=lost, wrong=wrong, swept=swept)
    (tmp_path / "taken" / "small").mkdir(parents=True)  # of other runs
    overrides = [one.replace("TAKEN", f"{tmp_path}/taken") for one in overrides]
    assert main(["task=reproduce", found, f"hydra.run.dir={tmp_path}/run", "tracking=none", *overrides]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(words, error), error
    assert not (tmp_path / "run" / "small").exists()


def started(tmp_path: Path, program: Path, command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    (tmp_path / "driver.py").write_text(DRIVER)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), str(program), *command], env=environment, **said
    )


def appears(path: Path) -> None:
    end = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


@pytest.mark.parametrize("kill", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_killed_reproduction_goes_on(
    kill: signal.Signals, tmp_path: Path, program: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    found = experiments(tmp_path, quick=GOOD, slow=GOOD)
    command = ["task=reproduce", only("quick", "slow"), found, f"hydra.run.dir={run}", "tracking=none"]
    process = started(tmp_path, program, command)
    appears(run / "slow" / "config.yaml")
    process.send_signal(kill)
    if kill == signal.SIGKILL:
        process.wait()
        # Its experiment is still at work; the next one waits for that instead of starting another.
        process = started(tmp_path, program, command)
        assert process.stdout is not None
        assert process.stdout.readline() == "slow is still running, for another run or one that was killed; waiting\n"
        stamp = (run / "slow" / "config.yaml").stat().st_mtime_ns
        (run / "go").touch()
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert "2 of 2 are in" in out and (run / "slow" / "config.yaml").stat().st_mtime_ns == stamp
    else:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 130 and "resume with" in err and "Traceback" not in err
        assert not (run / "slow" / "metrics.json").exists() and not (run / "summary.html").exists()
        stamp = (run / "quick" / "config.yaml").stat().st_mtime_ns
        (run / "go").touch()
        assert main(command) == 0
        assert "1 of 2 are in" in capsys.readouterr().out
        assert (run / "quick" / "config.yaml").stat().st_mtime_ns == stamp
