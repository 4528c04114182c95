"""Layers and batches over several processes: layout, agreement, and the exchange of activations.

Ranks (processes) are on one machine. Each layer belongs to one rank, in contiguous runs whose sizes differ by at most
one. Each rank runs the frozen model on its share of the batch, whole rows in order, and sends every other rank the
activations of the layers that it owns. All messages are tensors, so nothing is pickled. A single process sends nothing.

Next to the `torch.distributed` group the processes of a launch share its key-value store. There they agree on the run
folder, and count failures: the first process to fail is the one that prints, and a thread in each other process ends it
if it is still waiting for the failed one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vlmscope.core.errors import RankLost, Terminated, UserError
from vlmscope.core.launch import Place
from vlmscope.data.samples import WHOLE, Share
from vlmscope.models.base import Stack
from vlmscope.training.batches import ENDED, Batch, Forward, LayerActivations, OwnPart, collect, forwards, nothing

_PICTURES = "pixel_values"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun and srun pass on a signal that the terminal or SLURM also sent to every process, so each gets it twice.
_SAME_SIGNAL_SECONDS = 1.0
_MEETING_SECONDS = 300  # for the processes to find each other at the start
_GRACE_SECONDS = 15  # for a process to end by itself after another has failed
_FAILED = "vlmscope/failed"
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out")


@dataclass(frozen=True)
class Layout:
    """`n_layers` layers over `world` ranks."""

    n_layers: int
    world: int = 1

    def __post_init__(self) -> None:
        if self.world > self.n_layers:
            raise UserError(
                f"{self.world} processes for {self.n_layers} layers: a layer is never divided; start {self.n_layers} "
                "or fewer"
            )

    def layers(self, rank: int) -> list[int]:
        """The layers that a rank owns, ascending; a remainder goes to the first ranks, one layer each."""
        each, remainder = divmod(self.n_layers, self.world)
        first = rank * each + min(rank, remainder)
        return list(range(first, first + each + (rank < remainder)))

    def owner(self, layer: int) -> int:
        """The rank that owns a layer."""
        return next(rank for rank in range(self.world) if layer in self.layers(rank))


def share(batch: Batch, part: int, parts: int, soft_token: int | None) -> list[Forward]:
    """Part number `part` of `parts` of a batch, in consecutive rows; it may be empty.

    Rows of a forward can be separated if every tensor but the pictures has the shape [B, T, ..] of the tokens, and all
    pictures have the same number of tokens, so that each belongs to a known row. Otherwise the forward stays whole.
    """
    whole = forwards(batch)
    pictures = [_pictures(forward, soft_token) for forward in whole]
    units = [(n, row) for n, counts in enumerate(pictures) for row in range(1 if counts is None else len(counts))]
    cuts = np.linspace(0, len(units), parts + 1).round().astype(int)
    own_units = units[cuts[part] : cuts[part + 1]]
    own_forwards = []
    for n in sorted({n for n, _ in own_units}):
        forward, counts = whole[n], pictures[n]
        if counts is not None:
            rows = [row for m, row in own_units if m == n]
            first, last = rows[0], rows[-1] + 1
            begin, end = sum(counts[:first]), sum(counts[:last])
            images = {_PICTURES: forward[_PICTURES][begin:end]} if end > begin else {}
            forward = {k: tensor[first:last] for k, tensor in forward.items() if k != _PICTURES} | images
        own_forwards.append(forward)
    return own_forwards


def _pictures(forward: Forward, soft_token: int | None) -> Sequence[int] | None:
    """The number of pictures of each row; None if the rows cannot be separated."""
    ids: Tensor = forward["input_ids"]
    if any(tensor.shape[:2] != ids.shape for name, tensor in forward.items() if name != _PICTURES):
        return None
    if _PICTURES not in forward:
        return [0] * len(ids)
    if soft_token is None:
        return None
    tokens, number = (ids == soft_token).sum(1), len(forward[_PICTURES])
    each = int(tokens.sum()) // number if number else 0
    if not each or each * number != int(tokens.sum()) or bool((tokens % each).any()):
        return None
    return (tokens // each).tolist()


class AgreedStop(pl.Callback):
    """Ctrl-C or SIGTERM among processes that train together: all stop after the same step.

    Signals may reach the processes at different moments, or only one of them, and one that stopped at once would leave
    the others waiting. So a signal is recorded, and after each step the processes compare; then all `save` and raise
    `KeyboardInterrupt`, or `Terminated` if one got SIGTERM. A second signal ends the process at once.
    """

    def __init__(self, save: Callable[[Any], None]) -> None:
        self.save = save
        self.arrivals: dict[int, float] = {}  # when each signal first came
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Record signals from now on."""
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop if any process got a signal."""
        interrupted, terminated = joint_sum([float(number in self.arrivals) for number in STOP_SIGNALS])
        if interrupted or terminated:
            self.save(pl_module)
            raise Terminated if terminated else KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Restore the handlers of signals."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Restore the handlers of signals."""
        self.on_train_end(trainer, pl_module)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.arrivals and now - min(self.arrivals.values()) > _SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        self.arrivals.setdefault(number, now)


class Meeting:
    """The key-value store of a launch, which rank 0 (with torchrun: its agent) serves."""

    _open: Meeting | None = None

    def __init__(self, place: Place, store: Any) -> None:
        self.place, self.store = place, store

    @classmethod
    def join(cls, place: Place) -> Meeting:
        """This process's connection, which stays open until it ends; RankLost if the others do not connect in time."""
        if cls._open is None:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.address, str(place.port)
            wait = timedelta(seconds=_MEETING_SECONDS)
            try:
                store, _, _ = next(rendezvous("env://", place.rank, place.world, timeout=wait))
            except (dist.DistError, RuntimeError) as error:
                raise RankLost(
                    f"process {place.rank} of {place.world} found no other at {place.address}:{place.port}: "
                    f"{str(error).splitlines()[0]}; set MASTER_ADDR and MASTER_PORT to what rank 0 can be reached at"
                ) from error
            cls._open = cls(place, store)
        return cls._open

    def from_main(self, name: str, text: str) -> str:
        """Rank 0's `text`, on every rank."""
        if self.place.main:
            self.store.set(f"vlmscope/{name}", text)
            return text
        return self.store.get(f"vlmscope/{name}").decode()

    def wait_for_failures(self) -> None:
        """Wait, for a limited time, until every process has failed too and knows which one was first."""
        end = time.monotonic() + _GRACE_SECONDS
        while self.store.add(_FAILED, 0) < self.place.world and time.monotonic() < end:
            time.sleep(0.1)


def first_to_fail(place: Place) -> bool:
    """Report that this process has failed; True if it is the first, or if the store no longer answers."""
    try:
        return Meeting.join(place).store.add(_FAILED, 1) == 1
    except (RankLost, RuntimeError):
        return True


def see_off(place: Place) -> None:
    """After a failure, keep rank 0, which may serve the store, until the others have read of it."""
    if place.main and Meeting._open is not None:
        with suppress(RuntimeError):
            Meeting._open.wait_for_failures()


@contextmanager
def opened(place: Place, device: str, timeout_minutes: float) -> Iterator[Meeting]:
    """The `torch.distributed` group of all processes around the work: NCCL on GPUs, else gloo.

    `device` is the model's. RankLost if another process ended, or did not answer in time.
    """
    meeting = Meeting.join(place)
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
    """End this process some time after another has failed: it may wait for that one in a call without a timeout."""
    while not done.wait(1.0):
        try:
            failed = store.add(_FAILED, 0)
        except RuntimeError:
            failed = 1  # the server of the store has ended, and with it rank 0
        if failed and not done.wait(_GRACE_SECONDS):
            print(f"process {rank} stops, since another has failed", file=sys.stderr, flush=True)
            os._exit(1)


def own_share() -> Share:
    """This process's part of a stream of data, among those that train together."""
    return Share(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else WHOLE


def joint_sum(values: Sequence[float]) -> list[float]:
    """The sums of values over all processes, on each of them; all must call it at the same point of their work."""
    if not dist.is_initialized():
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


class Ranks:
    """One process of a layout; tensors to be sent must be on `device`."""

    def __init__(self, layout: Layout, rank: int = 0, device: torch.device | str = "cpu") -> None:
        self.layout, self.rank, self.device = layout, rank, torch.device(device)
        self.layers = layout.layers(rank)

    @classmethod
    def single(cls, n_layers: int) -> Ranks:
        """One process that owns everything."""
        return cls(Layout(n_layers))

    @classmethod
    def current(cls, stack: Stack) -> Ranks:
        """The open process group, or a single process."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls.single(stack.n_layers)
        device = stack.device if stack.device.type == "cuda" else "cpu"
        return cls(Layout(stack.n_layers, dist.get_world_size()), dist.get_rank(), device)

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.layout.world > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))

    def by_layer(self, values: Mapping[int, float]) -> dict[int, float]:
        """Combine one number per layer from the layers' owners, for all ranks."""
        if self.layout.world == 1:
            return dict(values)
        vector = torch.zeros(self.layout.n_layers, dtype=torch.float64, device=self.device)
        for layer, value in values.items():
            vector[layer] = value
        dist.all_reduce(vector)
        return dict(enumerate(vector.tolist()))

    def collect(self, stack: Stack, batch: Batch) -> LayerActivations:
        """The activations of this rank's layers at all tokens, from the joint batch or this rank's own part of it."""
        if self.layout.world == 1:
            return collect(stack, batch)
        is_part = isinstance(batch, OwnPart)
        part = batch if is_part else share(batch, self.rank, self.layout.world, stack.soft_token_id())
        return self._exchange(collect(stack, part) if part else nothing(stack))

    def _exchange(self, own: LayerActivations) -> LayerActivations:
        counts = torch.zeros(self.layout.world, dtype=torch.long, device=self.device)
        counts[self.rank] = own.n_tokens
        dist.all_reduce(counts)
        sizes = counts.tolist()
        if not any(sizes):
            raise UserError(f"no process has a token of this batch any more; {ENDED}")
        members = range(self.layout.world)
        x, device = own.by_layer[0][0], own.is_image.device
        received: dict[int, Tensor] = {}
        images: dict[int, Tensor] = {}
        operations: list[dist.P2POp] = []
        sent: list[Tensor] = []  # a message must live until it is sent
        for rank in members:
            if rank == self.rank:
                received[rank], images[rank] = _packed(own, self.layers), own.is_image
                continue
            received[rank] = torch.empty(len(self.layers), 2, sizes[rank], x.shape[1], dtype=x.dtype, device=device)
            images[rank] = torch.empty(sizes[rank], dtype=torch.bool, device=device)
            if own.n_tokens:
                sent += [_packed(own, self.layout.layers(rank)), own.is_image.contiguous()]
                operations += [dist.P2POp(dist.isend, _bytes(message), rank) for message in sent[-2:]]
            if sizes[rank]:
                operations += [dist.P2POp(dist.irecv, _bytes(m), rank) for m in (received[rank], images[rank])]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        del sent
        joined = torch.cat([received[rank] for rank in members], dim=2)
        by_layer = {layer: (joined[n, 0], joined[n, 1]) for n, layer in enumerate(self.layers)}
        return LayerActivations(by_layer, torch.cat([images[rank] for rank in members]))

    def to_main(self, tensors: Mapping[str, Tensor], layer: int) -> None:
        """Copy `tensors` of the layer's owner into those of rank 0."""
        owner = self.layout.owner(layer)
        if owner == 0 or self.rank not in (0, owner):
            return
        for _, tensor in sorted(tensors.items()):
            if self.rank == owner:
                dist.send(_bytes(tensor.detach().contiguous()), 0)
            else:
                message = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                dist.recv(_bytes(message), owner)
                with torch.no_grad():
                    tensor.copy_(message)


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes, which every backend sends unchanged: [..] -> [n]."""
    return tensor.reshape(-1).view(torch.uint8)


def _packed(own: LayerActivations, layers: Sequence[int]) -> Tensor:
    """Inputs and outputs of `layers` in one message [layers, 2, N, d]."""
    return torch.stack([torch.stack(own.by_layer[layer]) for layer in layers])
