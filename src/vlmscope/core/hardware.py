"""What machines can do, as stated by their makers or measured here, and the least time that work takes on them.

The roofline (Williams, Waterman and Patterson 2009): work is bounded by arithmetic or by memory traffic, whichever
takes longer. Real programs reach a third to a half of it; the time is a bound from below.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        name: what it is, and where the figures come from.
        flops: dtype -> operations a second, dense, a multiply and an add counted as two.
        bandwidth: bytes a second between memory and processor.
        memory: bytes; None when it is the host's own.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: float | None

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The least time for `flops` operations in `dtype` that move `moved` bytes."""
        return max(flops / self.flops[dtype], moved / self.bandwidth)


def _gpu(name: str, float64: float, float32: float, half: float, bandwidth: float, memory: float) -> Hardware:
    rates = {"float64": float64, "float32": float32, "bfloat16": half, "float16": half}
    return Hardware(name, {dtype: rate * 1e12 for dtype, rate in rates.items()}, bandwidth * 1e12, memory * 1e9)


# float32 is that of the plain units, not TF32; half precision that of the tensor cores without sparsity.
HARDWARE = {
    "h100": _gpu("NVIDIA H100 SXM, 80 GB (NVIDIA H100 datasheet)", 34, 67, 989, 3.35, 80),
    "h200": _gpu("NVIDIA H200 SXM, 141 GB (NVIDIA H200 datasheet)", 34, 67, 989, 4.8, 141),
    "a100": _gpu("NVIDIA A100 SXM, 80 GB (NVIDIA A100 datasheet)", 9.7, 19.5, 312, 2.039, 80),
    "l4": _gpu("NVIDIA L4, 24 GB (NVIDIA L4 datasheet)", 0.5, 30.3, 121, 0.3, 24),
    # Measured with torch 2.13, one thread, best of 12 while others worked: matmul of 2048 x 2048, copy of 128 MiB. Half
    # precision (512 x 512) has a hundredth of float32's rate, since this CPU has no instructions for it.
    "cpu": Hardware(
        "one CPU core without half precision (AMD EPYC, measured by the project)",
        {"float64": 27e9, "float32": 72e9, "bfloat16": 0.7e9, "float16": 0.7e9},
        7.7e9,
        None,
    ),
}
