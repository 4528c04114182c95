"""What torch's and numpy's allocators hand out in a block of code, for tests of memory."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


@contextmanager
def allocated() -> Iterator[dict[str, int]]:
    """Yield a record that holds, after the block, the peaks of `numpy` and `torch` above what there was before.

    The two need not come together, so that their sum is at least the peak of both. Files that are mapped are in
    neither.
    """
    found: dict[str, int] = {}
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            yield found
        found["numpy"] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    found["torch"] = peak
