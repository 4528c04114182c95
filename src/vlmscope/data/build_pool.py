"""Runs parts of a build in this process, or in several that ask this one which samples are new.

Processes are started afresh (`spawn`): the libraries beneath keep threads, which a fork would break.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, cast

from vlmscope.core.errors import UserError
from vlmscope.data.build_part import Chunk, PartJob, chunks_of

Claim = Callable[[PartJob, list[bytes]], list[bool]]
Enter = Callable[[PartJob, Chunk], None]
Finish = Callable[[PartJob], None]


class _Fault(NamedTuple):
    """The traceback of a fault of the program in another process."""

    text: str


def run_jobs(
    jobs: list[PartJob],
    processes: int,
    claim: Claim,
    enter: Enter,
    finish: Finish,
) -> None:
    """Go through all parts.

    Args:
        jobs: the parts.
        processes: how many at the same time.
        claim: which digests are new.
        enter: told each chunk that is on the disk.
        finish: told each part that is done.

    Raises:
        UserError: that of any part, or its process was ended from outside.
        RuntimeError: a fault of the program in another process, with its traceback.
    """
    if processes == 1 or len(jobs) == 1:
        for job in jobs:
            _here(job, claim, enter)
            finish(job)
    elif jobs:
        _there(jobs, min(processes, len(jobs)), claim, enter, finish)


def _here(job: PartJob, claim: Claim, enter: Enter) -> None:
    steps = chunks_of(job)
    said = next(steps, None)
    while said is not None:
        if isinstance(said, Chunk):
            enter(job, said)
            said = next(steps, None)
        else:
            said = steps.send(claim(job, said))


def _there(
    jobs: list[PartJob],
    processes: int,
    claim: Claim,
    enter: Enter,
    finish: Finish,
) -> None:
    context = multiprocessing.get_context("spawn")
    waiting, working, started = list(jobs), dict[Connection, PartJob](), []
    try:
        for _ in range(processes):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            _start(process)
            theirs.close()
            started.append((process, mine))
            _hand_over(cast(Connection, mine), waiting, working)
        while working:
            for ready in wait(list(working)):
                connection = cast(Connection, ready)
                job = working[connection]
                match _received(connection, job):
                    case Chunk() as chunk:
                        enter(job, chunk)
                    case list() as digests:
                        connection.send(claim(job, digests))
                    case str() as error:
                        raise UserError(error)
                    case _Fault(text):
                        raise RuntimeError(f"part {job.part.index} of {job.name} failed in its process:\n{text}")
                    case None:
                        finish(job)
                        del working[connection]
                        _hand_over(connection, waiting, working)
    finally:
        for _, connection in started:
            connection.close()
        for process, _ in started:
            process.join(20)  # a process ends when it next asks or tells; it removes what it was writing
            if process.is_alive():
                process.kill()  # SIGTERM does not reach it


def _start(process: Any) -> None:
    """Start a process that Ctrl-C and SIGTERM do not reach, not even while it imports: it is the builder's to end."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be set
        process.start()
        return
    # A new process inherits it.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process.start()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hand_over(connection: Connection, waiting: list[PartJob], working: dict[Connection, PartJob]) -> None:
    job = waiting.pop(0) if waiting else None
    connection.send(job)
    if job is not None:
        working[connection] = job


def _received(connection: Connection, job: PartJob) -> Any:
    try:
        return connection.recv()
    except EOFError as error:
        raise UserError(
            f"the process that wrote part {job.part.index} of {job.name} was ended from outside (out of memory?); run "
            "the same again, with fewer task.workers"
        ) from error


def _work(connection: Connection) -> None:
    """A process: parts until it is told None, or the builder is gone."""
    try:
        while (job := connection.recv()) is not None:
            try:
                steps = chunks_of(job)
                said = next(steps, None)
                while said is not None:
                    connection.send(said)
                    said = next(steps, None) if isinstance(said, Chunk) else steps.send(connection.recv())
                connection.send(None)
            except UserError as error:
                connection.send(str(error))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception:
                connection.send(_Fault(traceback.format_exc()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
