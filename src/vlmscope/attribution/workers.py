"""Rows of one graph by several devices of this process, and by all processes of a launch.

Batches of targets are independent. Batch n is of process n mod P and there of device n / P mod D; each process gets all
rows in order, so that all of them choose the same features next. Each device holds a copy of the frozen model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vlmscope.attribution.adjoint import Adjoint, SourceVectors
from vlmscope.core.errors import UserError
from vlmscope.models.checkpoint import check_device

Job = TypeVar("Job")
Rows = TypeVar("Rows")


def moved(value: Any, device: torch.device) -> Any:
    """The same with all tensors in records and lists on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value) if f.init})
    return value


class Workers:
    """The adjoints that make rows, one for each device; the given one where `devices` is empty."""

    def __init__(self, adjoint: Adjoint, devices: Sequence[str] = (), cache_bytes: float = 0) -> None:
        """Copy the frozen model to the devices.

        Raises:
            UserError: a device does not exist, or the graph goes through a vision tower, which stays on its own.
        """
        model = adjoint.replacement
        if devices and model.tower is not None:
            raise UserError(
                "attribution.devices: a graph with attribution.tower=true is made by one device; leave it out"
            )
        for device in devices:
            check_device(device, str(model.errors.dtype).removeprefix("torch."))
        there = {model.errors.device: adjoint}
        for place in (torch.empty(0, device=device).device for device in devices):
            if place not in there:
                copied = moved(model, place)
                there[place] = Adjoint(copied, SourceVectors(copied, cache_bytes))
        self.adjoints = [there[torch.empty(0, device=device).device] for device in devices] or [adjoint]
        self.rank, self.world = own_rank()

    def ordered(
        self, jobs: Sequence[Job], work: Callable[[Adjoint, Job], Rows], share: Callable[[Job, Rows | None, int], Rows]
    ) -> Iterator[Rows]:
        """The work on each job in order; `share(job, rows, owner)` gives all processes what the owner has."""
        if len(self.adjoints) == self.world == 1:
            yield from (work(self.adjoints[0], job) for job in jobs)
            return
        own, waiting = iter(range(self.rank, len(jobs), self.world)), deque[Future[Rows]]()
        with ThreadPoolExecutor(len(self.adjoints)) as pool:

            def begin() -> None:
                if (number := next(own, None)) is not None:
                    adjoint = self.adjoints[number // self.world % len(self.adjoints)]
                    waiting.append(pool.submit(work, adjoint, jobs[number]))

            for _ in self.adjoints:
                begin()
            for number, job in enumerate(jobs):
                owner, rows = number % self.world, None
                if owner == self.rank:
                    rows = waiting.popleft().result()
                    begin()
                yield rows if self.world == 1 and rows is not None else share(job, rows, owner)


def own_rank() -> tuple[int, int]:
    """The number of this process among those of the launch, and how many they are."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def broadcast(values: Tensor, owner: int) -> Tensor:
    """The owner's values on every process."""
    on_gpu = dist.get_backend() == "nccl"
    sent = values.cuda() if on_gpu else values
    dist.broadcast(sent, owner)
    return sent.cpu()
