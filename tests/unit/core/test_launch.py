"""What launchers say in the environment, read as a pure function."""

import gc
import sys
from pathlib import Path

import pytest

from vlmscope.core.errors import UserError
from vlmscope.core.launch import Place, import_quickly, place_of

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29511",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "4000", "SLURM_STEP_ID": "1", "SLURM_PROCID": "5", "SLURM_LOCALID": "5",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "2",
}  # fmt: skip


def test_alone() -> None:
    assert place_of({}) is None
    assert place_of({"WORLD_SIZE": "1", "RANK": "0"}) is None  # torchrun with one process
    assert place_of({"RANK": "0"}) is None


def test_torchrun() -> None:
    assert place_of(TORCHRUN) == Place("torchrun", 5, 8, "node0", 29511)
    assert place_of({**SRUN, **TORCHRUN}) == place_of(TORCHRUN)  # torchrun within a step of SLURM
    short = place_of({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"})
    assert short == Place("torchrun", 1, 2, "a", 29500) and not short.main


def test_srun() -> None:
    assert place_of(SRUN) == Place("srun", 5, 8, "127.0.0.1", 16101)
    assert place_of({**SRUN, "MASTER_ADDR": "x", "MASTER_PORT": "99"}) == Place("srun", 5, 8, "x", 99)
    allocation = {
        "SLURM_STEPID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
    }  # fmt: skip
    assert place_of(allocation) == Place("srun", 0, 2, "127.0.0.1", 12000)


def test_a_batch_script_and_a_shell_are_no_tasks_of_a_step() -> None:
    script = {key: value for key, value in SRUN.items() if "STEP" not in key}
    assert place_of({**script, "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) is None
    assert place_of({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None


def test_submitit_on_this_machine() -> None:
    env = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1"}
    assert place_of({**env, "SUBMITIT_LOCAL_JOB_ID": "77"}) == Place("submitit", 1, 2, "127.0.0.1", 12077)
    assert place_of({**env, "SUBMITIT_LOCAL_NTASKS": "1", "SUBMITIT_LOCAL_GLOBALID": "0",
                     "SUBMITIT_LOCAL_LOCALID": "0"}) is None  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "first"}, "RANK='first', which is not a number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
        ({"RANK": "8"}, "process 8 of 8"),
        ({"LOCAL_WORLD_SIZE": "4"}, "torchrun started 8 processes on several machines"),
    ],
)
def test_nonsense_is_one_line(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        place_of({**TORCHRUN, **changes})
    with pytest.raises(UserError, match="srun started 8 processes on several machines"):
        place_of({**SRUN, "SLURM_STEP_NUM_NODES": "2"})


def test_large_imports_pause_the_collector_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large_one.py").write_text("import gc\ncollects = gc.isenabled()\n")
    (tmp_path / "large_wrong.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    frozen: list[int] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))
    for _ in range(2):
        import_quickly("large_one")
    assert not sys.modules.pop("large_one").collects and gc.isenabled() and frozen == [1]
    with pytest.raises(ZeroDivisionError):
        import_quickly("large_wrong")
    assert gc.isenabled()
