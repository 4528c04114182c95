"""Which process ("rank") owns which layers, and which ranks make up a host.

Ranks are numbered host by host. Within a host each layer belongs to one rank, in contiguous runs whose sizes differ by
one at most; every host has the same division. The ranks that own the same layers on different hosts are peers.
"""

from dataclasses import dataclass

from vlmscope.core.errors import UserError


@dataclass(frozen=True)
class Layout:
    """`n_layers` layers over `world` ranks, of which `per_host` stand on one host.

    Raises:
        UserError: more ranks on a host than layers, or hosts of different sizes.
    """

    n_layers: int
    world: int = 1
    per_host: int = 1

    def __post_init__(self) -> None:
        if self.per_host < 1 or self.world % self.per_host:
            raise UserError(
                f"{self.world} processes do not fill hosts of {self.per_host}; start equally many on each host"
            )
        if self.per_host > self.n_layers:
            raise UserError(
                f"{self.per_host} processes on a host for {self.n_layers} layers: a layer is never divided; "
                f"start {self.n_layers} or fewer"
            )

    @property
    def hosts(self) -> int:
        """How many hosts."""
        return self.world // self.per_host

    def host(self, rank: int) -> int:
        """The host of a rank."""
        return rank // self.per_host

    def layers(self, rank: int) -> list[int]:
        """The layers that a rank owns, ascending; the first ranks of a host have one more where it does not divide."""
        each, more = divmod(self.n_layers, self.per_host)
        local = rank % self.per_host
        first = local * each + min(local, more)
        return list(range(first, first + each + (local < more)))

    def members(self, host: int) -> list[int]:
        """The ranks of a host."""
        return list(range(host * self.per_host, (host + 1) * self.per_host))

    def peers(self, rank: int) -> list[int]:
        """The ranks that own the same layers, one on each host, `rank` included."""
        return list(range(rank % self.per_host, self.world, self.per_host))

    def owner(self, layer: int, host: int = 0) -> int:
        """The rank of `host` that owns a layer."""
        return next(rank for rank in self.members(host) if layer in self.layers(rank))
