"""Training by two processes that a launcher started: one set, one folder, one record; stops, losses and mistakes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.processes import ROOT, Forked, all_codes, command_line

from vlmscope.app import main

SMALL = [
    "task=train_transcoders", "model=tiny", "model.family=llava",
    "transcoder=arch", "transcoder.expansion_factor=2", "transcoder.k=4",
    "task.steps_per_batch=1", "task.pool_batches=2", "task.val_examples=6", "optim.warmup=1", "trainer.threads=1",
]  # fmt: skip
MIX = [*SMALL, "data=mix_orrery", "data.context=32", "task.tokens_per_batch=80", "trainer.checkpoint_every=0"]


def start(arguments: list[str], world: int = 2) -> list[Forked]:
    """Start the command as a launcher would, once for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        command_line(
            *arguments,
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for rank in range(world)
    ]  # fmt: skip


def ended(processes: list[Forked], seconds: float = 240) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, stdout and stderr of all."""
    codes = all_codes(processes, seconds)
    said = [process.said() for process in processes]
    return codes, [out for out, _ in said], [err for _, err in said]


def errors(said: list[str]) -> list[str]:
    return [line for text in said for line in text.splitlines() if line.startswith("error: ")]


def checkpoint(run_dir: Path) -> dict[str, dict]:
    (folder,) = (run_dir / "transcoder_checkpoint").glob("step_*")
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def distance(ours: Path, theirs: Path) -> float:
    """The largest difference between the weights and moments of two runs."""
    one, other = checkpoint(ours), checkpoint(theirs)
    assert one and {k: v.keys() for k, v in one.items()} == {k: v.keys() for k, v in other.items()}
    return max(float((one[f][k].float() - other[f][k].float()).abs().max()) for f in one for k in one[f])


def stopped(command: list[str], run: Path, number: signal.Signals, code: int, world: int = 2) -> None:
    """Send the signal to the last process after some steps: all end with its code and leave one checkpoint."""
    processes = start(command, world)
    states = run / ("data_states.json" if world == 1 else f"data_states_{world - 1}_of_{world}.json")
    end = time.monotonic() + 200
    while not states.exists() or len(json.loads(states.read_text())["states"]) < 3:
        assert time.monotonic() < end and processes[-1].poll() is None
        time.sleep(0.01)
    processes[-1].send_signal(number)
    codes, _, said = ended(processes)
    assert codes == [code] * world and sum(words.count("trainer.resume=true") for words in said) == 1
    assert not any("Traceback" in words for words in said)
    assert not [path for path in run.rglob(".*") if ".tmp" in path.name]
    (marker,) = run.glob("transcoder_checkpoint/step_*/complete.json")
    steps = next(int(word.partition("=")[2]) for word in command if word.startswith("trainer.max_steps="))
    assert 0 < json.loads(marker.read_text())["steps_done"] < steps


def test_torchrun_trains_one_set_in_one_folder_with_one_record(tmp_path: Path, data: Path, store: str) -> None:
    command = [*SMALL, "data=folder", f"data.path={data}", "task.tokens_per_batch=60", "trainer.max_steps=6"]
    assert main([*command, "tracking=none", f"hydra.run.dir={tmp_path / 'alone'}"]) == 0
    # Each process would have a folder of its own, as with the time in the folder's name.
    several = [*command, f"tracking.uri={store}", f"hydra.run.dir={tmp_path}/runs/${{oc.env:LOCAL_RANK}}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "run.py"]
    done = subprocess.run([*torchrun, *several], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == str(tmp_path / "runs" / "0") and done.stdout.count("FVU by layer") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["0"]
    assert distance(tmp_path / "runs" / "0", tmp_path / "alone") < 1e-5
    metrics = [
        json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "runs/0", tmp_path / "alone")
    ]
    assert metrics[0]["val/fvu"] == pytest.approx(metrics[1]["val/fvu"], abs=1e-4)

    from vlmscope.tracking.client import open_client

    client = open_client(store)
    experiment = client.get_experiment_by_name("train_transcoders")
    assert experiment is not None
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"]


@pytest.mark.slow
def test_ctrl_c_stops_all_after_one_step_and_a_mix_goes_on_exactly(tmp_path: Path) -> None:
    command = [*MIX, "tracking=none", "trainer.max_steps=60"]
    assert ended(start([*command, f"hydra.run.dir={tmp_path / 'whole'}"]))[0] == [0, 0]
    states = {path.name for path in (tmp_path / "whole").glob("data_states*")}
    assert states == {"data_states_0_of_2.json", "data_states_1_of_2.json"}
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    shares = [metrics[f"data/{name}/tokens_share"] for name in ("text", "captions", "questions")]
    assert shares == pytest.approx([0.4, 0.4, 0.2], abs=0.05) and sum(shares) == pytest.approx(1)

    half = [*command, f"hydra.run.dir={tmp_path / 'half'}"]
    stopped(half, tmp_path / "half", signal.SIGINT, 130)
    codes, _, said = ended(start([*half, "trainer.resume=true"], 3))
    assert set(codes) <= {1, 2} and len(errors(said)) == 1 and "read by 2 processes" in errors(said)[0]
    assert ended(start([*half, "trainer.resume=true"]))[0] == [0, 0]
    assert distance(tmp_path / "half", tmp_path / "whole") == 0


def test_sigterm_to_one_process_stops_all_with_a_checkpoint_and_143(tmp_path: Path) -> None:
    command = [*MIX, "tracking=none", "trainer.max_steps=100000", f"hydra.run.dir={tmp_path / 'run'}"]
    stopped(command, tmp_path / "run", signal.SIGTERM, 143)


def test_a_mistake_is_one_line_and_a_task_for_one_process_says_so(tmp_path: Path) -> None:
    where = ["tracking=none", f"hydra.run.dir={tmp_path / 'run'}"]
    codes, out, said = ended(start(["task=steer", "model=tiny", "model.family=llava", "prompt=red", *where]))
    assert codes == [2, 2] and not any(out)
    assert errors(said) == ["error: task=steer is made for one process, and torchrun started 2; start it alone"]
    assert not (tmp_path / "run").exists()
    codes, _, said = ended(start([*MIX, *where, "trainer.max_stepz=3"]))
    assert codes == [2, 2] and len(errors(said)) == 1 and "did you mean" in errors(said)[0]
    assert not any("Traceback" in text for text in said)
