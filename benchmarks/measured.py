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
    """Yield a record that holds, after the block, `seconds`, `cpu_seconds` of this process, and `added_mb` and
    `kept_mb`: peak resident memory, and that at the end, less that at its start.
    """
    found: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began, worked = _kilobytes("VmRSS"), time.perf_counter(), time.process_time()
    yield found
    found["seconds"], found["cpu_seconds"] = time.perf_counter() - began, time.process_time() - worked
    found["kept_mb"] = (_kilobytes("VmRSS") - before) / 1e3
    found["added_mb"] = (_kilobytes("VmHWM") - before) / 1e3
