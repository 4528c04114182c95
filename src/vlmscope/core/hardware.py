"""What machines can do, as stated by their makers or measured here, and the least time that work takes on them.

The roofline (Williams, Waterman and Patterson 2009): work is bounded by arithmetic or by memory traffic, whichever
takes longer. Real programs reach a third to a half of it; the time is a bound from below.
"""

from dataclasses import dataclass
from typing import NamedTuple

from vlmscope.core.errors import UserError


class Bound(NamedTuple):
    """The least time of some work, and what bounds it: "arithmetic", "memory", "link" or "network"."""

    seconds: float
    by: str


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        name: what it is, and where the figures come from.
        flops: dtype -> operations a second, dense, a multiply and an add counted as two.
        bandwidth: bytes a second between memory and processor.
        memory: bytes; None when it is the host's own.
        link: bytes a second that one device sends to the others of its host, one direction.
        network: bytes a second that one device sends to other hosts; None where none is known.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: float | None
    link: float
    network: float | None = None

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The least time for `flops` operations in `dtype` that move `moved` bytes."""
        return self.bound(flops, moved, dtype).seconds

    def bound(self, flops: float, moved: float, dtype: str, linked: float = 0.0, networked: float = 0.0) -> Bound:
        """The same, with what bounds it, for work that also sends bytes over the host's link and the network.

        Raises:
            UserError: bytes are to go over the network, and the machine's is not known.
        """
        if networked and self.network is None:
            raise UserError(f"no network between hosts is known of {self.name}; plan one host")
        times = {
            "arithmetic": flops / self.flops[dtype],
            "memory": moved / self.bandwidth,
            "link": linked / self.link,
            "network": networked / (self.network or 1.0),
        }
        by = max(times, key=lambda one: times[one])
        return Bound(times[by], by)


def _gpu(
    name: str, float64: float, float32: float, half: float, bandwidth: float, memory: float, link: float, network: float
) -> Hardware:
    """Rates in 10^12 a second, memory in GB, link and network in GB a second."""
    rates = {"float64": float64, "float32": float32, "bfloat16": half, "float16": half}
    flops = {dtype: rate * 1e12 for dtype, rate in rates.items()}
    return Hardware(name, flops, bandwidth * 1e12, memory * 1e9, link * 1e9, network * 1e9 if network else None)


# float32 is that of the plain units, not TF32; half precision that of the tensor cores without sparsity. The link is
# half of the datasheet's NVLink (PCIe for L4), which counts both directions; the network one adapter a GPU, as in
# NVIDIA's DGX of that GPU (ConnectX-7, 400 Gbit/s; ConnectX-6, 200 Gbit/s); for L4 none is stated.
HARDWARE = {
    "h100": _gpu("NVIDIA H100 SXM, 80 GB (NVIDIA H100 and DGX H100 datasheets)", 34, 67, 989, 3.35, 80, 450, 50),
    "h200": _gpu("NVIDIA H200 SXM, 141 GB (NVIDIA H200 and DGX H200 datasheets)", 34, 67, 989, 4.8, 141, 450, 50),
    "a100": _gpu("NVIDIA A100 SXM, 80 GB (NVIDIA A100 and DGX A100 datasheets)", 9.7, 19.5, 312, 2.039, 80, 300, 25),
    "l4": _gpu("NVIDIA L4, 24 GB (NVIDIA L4 datasheet)", 0.5, 30.3, 121, 0.3, 24, 32, 0),
    # Measured with torch 2.13, one thread, best of 12 while others worked: matmul of 2048 x 2048, copy of 128 MiB. Half
    # precision (512 x 512) has a hundredth of float32's rate, since this CPU has no instructions for it. Processes send
    # each other messages through memory.
    "cpu": Hardware(
        "one CPU core without half precision (AMD EPYC, measured by the project)",
        {"float64": 27e9, "float32": 72e9, "bfloat16": 0.7e9, "float16": 0.7e9},
        7.7e9,
        None,
        7.7e9,
    ),
}
