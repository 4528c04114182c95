"""The processes of one launch: where they meet, the group in which they train, and how one's end ends the others.

Besides the `torch.distributed` group they share its key-value store. There they agree on the run folder, and the first
that fails says so, which makes it the one that prints; a watch in each process sees it and ends the process where
waiting for the failed one would not.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vlmscope.core.errors import RankLost
from vlmscope.core.launch import Place
from vlmscope.data.share import WHOLE, Share

MEETING_SECONDS = 300  # to find each other when the processes start
GRACE_SECONDS = 15  # for a process to end by itself after another has failed
_FAILED = "vlmscope/failed"
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out")


class Meeting:
    """The store that the processes of a launch share; rank 0 (with torchrun: its agent) keeps it."""

    _open: Meeting | None = None

    def __init__(self, place: Place) -> None:
        self.place = place
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.address, str(place.port)
        wait = timedelta(seconds=MEETING_SECONDS)
        self.store: Any = None
        self.store, _, _ = next(rendezvous("env://", place.rank, place.world, timeout=wait))

    @classmethod
    def of(cls, place: Place) -> Meeting:
        """The meeting of this process, which lasts until it ends.

        Raises:
            RankLost: the others were not found in `MEETING_SECONDS`.
        """
        if cls._open is None:
            try:
                cls._open = cls(place)
            except (dist.DistError, RuntimeError) as error:
                raise RankLost(
                    f"process {place.rank} of {place.world} found no other at {place.address}:{place.port}: "
                    f"{str(error).splitlines()[0]}; set MASTER_ADDR and MASTER_PORT to what rank 0 can be reached at"
                ) from error
        return cls._open

    def from_main(self, name: str, text: str) -> str:
        """Rank 0's `text`, for all."""
        if self.place.main:
            self.store.set(f"vlmscope/{name}", text)
            return text
        return self.store.get(f"vlmscope/{name}").decode()

    def failed(self) -> int:
        """Say that this process has failed; how many now have."""
        return self.store.add(_FAILED, 1)

    def wait_for_failures(self) -> None:
        """Wait until every process has failed too, so that it hears who was first, but not for ever."""
        end = time.monotonic() + GRACE_SECONDS
        while self.store.add(_FAILED, 0) < self.place.world and time.monotonic() < end:
            time.sleep(0.1)


def first_to_fail(place: Place) -> bool:
    """Say that this process has failed; whether no other had before, or that can no longer be known."""
    try:
        return Meeting.of(place).failed() == 1
    except (RankLost, RuntimeError):
        return True


def see_off(place: Place) -> None:
    """After a failure: rank 0, which may keep the store, lets the others hear of it before it ends."""
    if place.main and Meeting._open is not None:
        with suppress(RuntimeError):
            Meeting._open.wait_for_failures()


@contextmanager
def opened(place: Place, device: str, timeout_minutes: float) -> Iterator[Meeting]:
    """The `torch.distributed` group of all processes around the work: NCCL on GPUs, else gloo.

    Args:
        place: which process this is.
        device: where the model computes, such as "cpu" or "cuda:1".
        timeout_minutes: how long one waits for another that neither answers nor ends.

    Raises:
        RankLost: another process ended, or did not answer in time.
    """
    meeting = Meeting.of(place)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    done = threading.Event()
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore("group", meeting.store),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(minutes=timeout_minutes),
        )
        threading.Thread(target=_watch, args=(meeting.store.clone(), done, place.rank), daemon=True).start()
        yield meeting
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _LOST):
            raise
        raise RankLost(
            f"process {place.rank} of {place.world} lost another one: {str(error).splitlines()[0]}; see what ended "
            "that one, then go on with trainer.resume=true and this run's hydra.run.dir"
        ) from error
    finally:
        done.set()
        if dist.is_initialized():
            dist.destroy_process_group()


def _watch(store: Any, done: threading.Event, rank: int) -> None:
    """End this process some time after another has failed: it may be waiting for that one where nothing interrupts."""
    while not done.wait(1.0):
        try:
            failed = store.add(_FAILED, 0)
        except RuntimeError:
            failed = 1  # the keeper of the store is gone, and with it rank 0
        if failed and not done.wait(GRACE_SECONDS):
            print(f"process {rank} stops, since another has failed", file=sys.stderr, flush=True)
            os._exit(1)


def own_share() -> Share:
    """The part of a stream of data that is this process's among those that train together."""
    return Share.of(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


def joint_sum(values: Sequence[float]) -> list[float]:
    """The sums of the processes' values, for all of them; every one has to ask at the same point of its work."""
    if not dist.is_initialized():
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
