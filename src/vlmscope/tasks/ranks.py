"""One task by several processes that a launcher started (docs/scaling.md): rank 0 records, the others work along."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vlmscope.core.artifacts import remove_leftovers
from vlmscope.core.errors import NotMainRank, UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.core.launch import Place
    from vlmscope.tasks.registry import RunContext, Task

_LOG = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path, key: str = "hydra.run.dir") -> Iterator[None]:
    """Keep other runs out of a folder while this one writes there, and remove what killed ones left in it.

    The lock is the kernel's, so it ends with the process, however that ends; the file goes too when the work is done.
    `key` is the setting that names the folder.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(path, key)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another {key}") from error
    with file:
        remove_leftovers(folder)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is locked: who waits for this one sees that it is gone


def _locked(path: Path, key: str) -> IO[str]:
    """The open lock file."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read().strip() or "another process"
            raise UserError(
                f"{owner} is writing into {path.parent}; wait until it has ended, or choose another {key}"
            ) from None
        except OSError as error:
            _LOG.warning("%s: this disk has no locks (%s); start no second run there", path.parent, error.strerror)
            return file
        # Between opening and locking, the run before may have ended and removed the file.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


@contextmanager
def together(place: Place, task: Task, cfg: AppConfig, run_dir: Path) -> Iterator[tuple[AppConfig, Path]]:
    """The configuration for this process and rank 0's run folder, inside the group of all processes."""
    if not task.ranks:
        remove_empty(run_dir)
        raise UserError(
            f"task={task.name} is made for one process, and {place.launcher} started {place.world}; start it alone"
        )
    from vlmscope.training.ranks import opened

    device = _device(place, cfg.model.device)
    with ExitStack() as held, opened(place, device, cfg.trainer.rank_timeout) as meeting:
        refusal = ""
        if place.main:  # before any other knows the folder
            try:
                held.enter_context(claimed(run_dir))
            except UserError as error:
                refusal = str(error)
        refusal = meeting.from_main("refusal", refusal)
        if refusal:
            raise UserError(refusal)
        shared = Path(meeting.from_main("run_dir", str(run_dir)))
        if shared.resolve() != run_dir.resolve():  # their names hold the time, and Hydra has made one for each process
            remove_empty(run_dir)
        if not shared.is_dir():
            raise UserError(f"process {place.rank} does not see the run folder {shared}; choose one on a shared disk")
        yield dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, device=device)), shared


def work_along(task: Task, cfg: AppConfig, context: RunContext, rank: int) -> None:
    """The task on a process that is not rank 0: nothing is printed, and what is logged goes into `run.rank<N>.log`."""
    root = logging.getLogger()
    console = list(root.handlers)
    name = context.run_dir / f"run.rank{rank}.log"
    file = logging.FileHandler(name, delay=True, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.handlers = [file]
    logging.captureWarnings(True)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), suppress(NotMainRank):
            task.run(cfg, context)
    finally:
        logging.captureWarnings(False)
        root.handlers = console
        file.close()


def _device(place: Place, device: str) -> str:
    """The GPU of this process: number `local_rank` of its host, or the only one that the launcher shows it."""
    if not device.startswith("cuda") or place.per_host == 1:
        return device
    if device != "cuda":
        raise UserError(f"model.device={device} is one GPU for {place.per_host} processes; write model.device=cuda")
    import torch

    count = torch.cuda.device_count()
    if count == 1 and place.launcher == "srun":  # each task of a step may see its own GPU alone
        return "cuda:0"
    if count < place.per_host:
        raise UserError(f"{place.per_host} processes on a host with {count} GPUs; start as many as there are GPUs")
    return f"cuda:{place.local_rank}"


def remove_empty(run_dir: Path) -> None:
    """Hydra makes a folder for every run; one that a task left empty, and its empty parent, would only be litter."""
    with suppress(OSError):  # another process may be at it too
        for folder in (run_dir, run_dir.parent):
            folder.rmdir()
