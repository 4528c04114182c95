"""Rank of this process among several on one machine, from the environment that its launcher sets.

torchrun (`python -m torch.distributed.run`) sets RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
`srun` sets SLURM_PROCID and, for its step, SLURM_STEP_NUM_TASKS and SLURM_STEP_NUM_NODES (srun's manual, "output
environment variables"); the names without STEP describe the allocation and are the fallback. submitit's local executor
sets SUBMITIT_LOCAL_NTASKS and so on.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmscope.core.errors import UserError

LARGE_MODULES = ("torch", "transformers.modeling_utils", "transformers.processing_utils")  # of whatever loads a model


def program() -> str:
    """The command that started this process, for commands in messages; `vlmscope` where Python started otherwise."""
    path = Path(sys.argv[0])
    module = path.name == "__main__.py" and path.parent.name == "vlmscope"
    return "python run.py" if path.name == "run.py" else "python -m vlmscope" if module else "vlmscope"


def import_quickly(*modules: str) -> None:
    """Import large modules with the garbage collector paused.

    Importing torch, transformers and MLflow makes a million objects and hardly any garbage, and collections among them
    take a quarter of that time (docs/commands.md). What was imported stays, so later collections leave it out.
    """
    if all(module in sys.modules for module in modules):
        return  # a second `gc.freeze` would keep models that are no longer used
    collects = gc.isenabled()
    gc.disable()
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world` on this machine; they meet at `address`:`port`. `UserError` for impossible numbers."""

    launcher: str
    rank: int
    world: int
    address: str
    port: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UserError(f"{self.launcher} says that it is process {self.rank} of {self.world}; start it again")

    @property
    def main(self) -> bool:
        """Whether this is the process that writes, prints and tracks."""
        return self.rank == 0


def place_of(env: Mapping[str, str]) -> Place | None:
    """The place of this process in the environment `env`; None when it runs alone."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    if "RANK" in env and "WORLD_SIZE" in env:
        launcher, world, rank = "torchrun", _number(env, "WORLD_SIZE"), _number(env, "RANK")
        here, address, port = _number(env, "LOCAL_WORLD_SIZE", world), env.get("MASTER_ADDR", ""), 29500
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, but is a single process, not a task of a step.
    elif step is not None and "SLURM_PROCID" in env:
        world = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
        if world == 1:  # such as an interactive shell, whose other variables may describe its allocation
            return None
        nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 1))
        launcher, rank, here = "srun", _number(env, "SLURM_PROCID"), world // nodes
        # Steps of one job get ports of their own.
        port = _port(_number(env, "SLURM_JOB_ID", 0) + 101 * (int(step) if step.isdigit() else 0))
        address = env.get("MASTER_ADDR") or "127.0.0.1"
    elif "SUBMITIT_LOCAL_GLOBALID" in env:
        launcher, rank = "submitit", _number(env, "SUBMITIT_LOCAL_GLOBALID")
        world = here = _number(env, "SUBMITIT_LOCAL_NTASKS", 1)
        address, port = "127.0.0.1", _port(_number(env, "SUBMITIT_LOCAL_JOB_ID", 0))
    else:
        return None
    if here != world:
        raise UserError(f"{launcher} started {world} processes on several machines; start them on one")
    if world > 1 and not address:
        raise UserError("RANK and WORLD_SIZE are set, and MASTER_ADDR is not; set it, or unset them to run alone")
    place = Place(launcher, rank, world, address, _number(env, "MASTER_PORT", port))
    return place if world > 1 else None


def _port(job: int) -> int:
    """A port that two jobs on one host are unlikely to share, below the ephemeral ports of operating systems."""
    return 12000 + job % 20000


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(f"the environment has {name}={text!r}, which is not a number; start the processes again")
    return int(text)
