"""This process among those that train together: what they send each other.

Within a host: each rank runs the frozen model on its share of the batch and sends every other rank the activations of
the layers which that rank owns. Between hosts, among the owners of a layer: sums for the loss, gradients, and which
features fired. Everything is sent as tensors, so nothing is pickled. Alone, nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.models.base import Adapter
from vlmscope.training.layout import Layout
from vlmscope.training.losses.joint import Total
from vlmscope.training.shares import share
from vlmscope.training.transcoder_data import ENDED, Batch, LayerActivations, OwnPart, collect


class _Total(torch.autograd.Function):
    """Sum over hosts in value; the gradient is that of the own part."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        joint = value.detach().clone()
        dist.all_reduce(joint, group=group)
        return joint

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None


class Ranks:
    """One process of a layout; `device` is where tensors to be sent must lie."""

    def __init__(self, layout: Layout, rank: int = 0, device: torch.device | str = "cpu") -> None:
        self.layout, self.rank, self.device = layout, rank, torch.device(device)
        self.layers = layout.layers(rank)
        self._host_group: Any = None
        self._peer_group: Any = None
        if layout.world > 1:
            # Every process has to make every group, in the same order.
            hosts = [dist.new_group(layout.members(host)) for host in range(layout.hosts)]
            owners = [dist.new_group(layout.peers(local)) for local in range(layout.per_host)]
            self._host_group, self._peer_group = hosts[layout.host(rank)], owners[rank % layout.per_host]

    @classmethod
    def single(cls, n_layers: int) -> Ranks:
        """One process that owns everything."""
        return cls(Layout(n_layers))

    @classmethod
    def current(cls, adapter: Adapter, per_host: int | None = None) -> Ranks:
        """The process group that is open, or a single process; `per_host` None: all ranks are one host."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls.single(adapter.n_layers)
        world = dist.get_world_size()
        device = adapter.device if adapter.device.type == "cuda" else "cpu"
        return cls(Layout(adapter.n_layers, world, per_host or world), dist.get_rank(), device)

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes its layers: those of the first host do."""
        return self.layout.host(self.rank) == 0

    @property
    def total(self) -> Total | None:
        """Sums over hosts, or None with one host."""
        if self.layout.hosts == 1:
            return None
        return lambda value: _Total.apply(value, self._peer_group)  # pyright: ignore[reportReturnType]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over hosts, in one message."""
        if self.layout.hosts == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self._peer_group)
        for tensor, joint in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(joint.view_as(tensor))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.layout.world > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))

    def by_layer(self, values: Mapping[int, float]) -> dict[int, float]:
        """One number a layer from the layers' owners of a host, for all of its ranks."""
        if self.layout.per_host == 1:
            return dict(values)
        vector = torch.zeros(self.layout.n_layers, dtype=torch.float64, device=self.device)
        for layer, value in values.items():
            vector[layer] = value
        dist.all_reduce(vector, group=self._host_group)
        return dict(enumerate(vector.tolist()))

    def collect(self, adapter: Adapter, batch: Batch) -> LayerActivations:
        """The activations of this rank's layers at all tokens of its host, from the joint batch or its own part.

        Raises:
            UserError: on every rank, when no rank has a part of the batch any more.
        """
        if self.layout.world == 1:
            return collect(adapter, batch)
        own = isinstance(batch, OwnPart)
        part = batch if own else share(batch, self.rank, self.layout.world, adapter.soft_token_id())
        return self._exchange(collect(adapter, part) if part else _nothing(adapter))

    def _exchange(self, own: LayerActivations) -> LayerActivations:
        counts = torch.zeros(self.layout.world, dtype=torch.long, device=self.device)
        counts[self.rank] = own.n_tokens
        dist.all_reduce(counts)
        sizes = counts.tolist()
        if not any(sizes):
            raise UserError(f"no process has a token of this batch any more; {ENDED}")
        members = self.layout.members(self.layout.host(self.rank))
        kind, width = own.by_layer[0][0].dtype, own.by_layer[0][0].shape[1]
        received: dict[int, Tensor] = {}
        images: dict[int, Tensor] = {}
        waiting: list[dist.P2POp] = []
        keep: list[Tensor] = []  # a message must live until it is sent
        for other in members:
            if other == self.rank:
                received[other], images[other] = _packed(own, self.layers), own.is_image
                continue
            received[other] = torch.empty(
                len(self.layers), 2, sizes[other], width, dtype=kind, device=own.is_image.device
            )
            images[other] = torch.empty(sizes[other], dtype=torch.bool, device=own.is_image.device)
            if own.n_tokens:
                keep += [_packed(own, self.layout.layers(other)), own.is_image.contiguous()]
                waiting += [dist.P2POp(dist.isend, _bytes(message), other) for message in keep[-2:]]
            if sizes[other]:
                waiting += [dist.P2POp(dist.irecv, _bytes(m), other) for m in (received[other], images[other])]
        for work in dist.batch_isend_irecv(waiting) if waiting else []:
            work.wait()
        del keep
        joined = torch.cat([received[other] for other in members], dim=2)
        by_layer = {layer: (joined[n, 0], joined[n, 1]) for n, layer in enumerate(self.layers)}
        first = sum(sizes[: members[0]])
        return LayerActivations(by_layer, torch.cat([images[other] for other in members]), first, sum(sizes))

    def all_tokens(self, batch: LayerActivations) -> dict[int, tuple[Tensor, Tensor]]:
        """The tokens of a batch from all hosts, in the order of the batch, for this rank's layers."""
        if self.layout.hosts == 1:
            return batch.by_layer
        found = {}
        for layer, pair in batch.by_layer.items():
            # Rows of other hosts stay zero, so the sum puts every row in its place, exactly.
            places = [one.new_zeros(batch.joint_tokens, one.shape[1]) for one in pair]
            for place, one in zip(places, pair, strict=True):
                place[batch.first : batch.first + batch.n_tokens] = one
            self.add_up(places)
            found[layer] = (places[0], places[1])
        return found

    def to_main(self, tensors: Mapping[str, Tensor], layer: int) -> None:
        """Fill `tensors` on rank 0 with those of the layer's owner on the first host."""
        owner = self.layout.owner(layer)
        if owner == 0 or self.rank not in (0, owner):
            return
        for name in sorted(tensors):
            tensor = tensors[name]
            if self.rank == owner:
                dist.send(_bytes(tensor.detach().contiguous()), 0)
            else:
                message = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                dist.recv(_bytes(message), owner)
                with torch.no_grad():
                    tensor.copy_(message)


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as bytes, which every backend sends as they are: [..] -> [n]."""
    return tensor.reshape(-1).view(torch.uint8)


def _packed(own: LayerActivations, layers: Sequence[int]) -> Tensor:
    """Inputs and outputs of some layers in one message [layers, 2, N, d]."""
    return torch.stack([torch.stack(own.by_layer[layer]) for layer in layers])


def _nothing(adapter: Adapter) -> LayerActivations:
    """Activations of no token."""
    kind = next(iter(adapter.model.parameters())).dtype
    none = torch.empty(0, adapter.d_model, dtype=kind, device=adapter.device)
    by_layer = dict.fromkeys(range(adapter.n_layers), (none, none))
    return LayerActivations(by_layer, torch.empty(0, dtype=torch.bool, device=adapter.device))
