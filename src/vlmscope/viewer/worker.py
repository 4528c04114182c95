"""The process that runs the workbench's jobs: command lines, one after another, with the model kept loaded.

It is a process of its own, so that running out of memory, a crash or a cancelled job does not end the server. It reads
command lines from standard input, a JSON list a line, and writes what happens to a pipe, a JSON object a line: `ready`,
what it is doing (`text`), and the exit code of each command line, `done`. What the command lines print goes to standard
output, as ever.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

WORKER = "--worker"  # first argument of the command line that makes it; the second is the number of the pipe
INTERRUPTED = (130, 143)  # exit codes of a command line that a signal ended
FLUSHED = "(the end of this job's output)"


def run_worker(main: Callable[[Sequence[str]], int], pipe: int) -> int:
    """Run command lines with `main` until standard input ends, or one was interrupted."""

    def say(**event: object) -> None:
        os.write(pipe, (json.dumps(event) + "\n").encode())

    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # the system takes this process first when memory runs out, not the server
    import vlmscope.attribution.trace
    import vlmscope.models.loading  # noqa: F401  (what takes seconds, before the first job is there)
    from vlmscope.config.wiring import keep_loaded

    keep_loaded(lambda text: say(text=text))
    say(ready=True)
    for line in sys.stdin:
        code = main(json.loads(line))
        sys.stderr.flush()
        print(f"\n{FLUSHED}", flush=True)
        say(done=code)
        if code in INTERRUPTED:  # interrupted in the middle of something: the next job gets a new process
            return code
    return 0
