"""Seconds and added memory of a block of code, on Linux. Standard library only: any environment can import it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Yield a record that holds, after the block, `seconds` and `added_mb`: peak resident memory less that at its
    start.
    """
    found: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = _kilobytes("VmRSS"), time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - began
    found["added_mb"] = (_kilobytes("VmHWM") - before) / 1e3
