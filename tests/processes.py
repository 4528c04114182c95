"""Processes for tests, forked from a server that has imported torch and vlmscope once: a start costs 20 ms, not 5 s.

For tests whose point is several processes, a kill, or an exit code. What a fresh interpreter does (imports, `run.py`
itself, torchrun) needs `subprocess`.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    # The server of Python 3.11 does not take over sys.path.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _run(code: str, argv: Sequence[str], env: Mapping[str, str], folder: str, files: tuple[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number, name in enumerate(files, 1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = list(argv)
    exec(compile(code, argv[0], "exec"), {"__name__": "__main__"})


class Forked:
    """A running process; the methods are those of `subprocess.Popen` in text mode."""

    def __init__(
        self, code: str, *arguments: object, env: Mapping[str, str] | None = None, cwd: str | Path = ROOT
    ) -> None:
        """Start `code` with `arguments` in sys.argv; `env` is the whole environment, by default this process's."""
        folder = tempfile.mkdtemp(prefix="forked")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._files = (f"{folder}/out", f"{folder}/err")
        argv = ["run.py", *map(str, arguments)]
        given = (code, argv, dict(os.environ if env is None else env), str(cwd), self._files)
        self._process = _context().Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 120) -> int:
        """The exit code; a process that is still there after `timeout` seconds is killed and fails the test."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.kill()
            raise TimeoutError(f"process {self.pid} ran for more than {timeout} s:\n{self.said()[1][-2000:]}")
        return code

    def said(self) -> tuple[str, str]:
        """stdout and stderr up to now."""
        out, err = (
            Path(name).read_text(errors="surrogateescape") if Path(name).exists() else "" for name in self._files
        )
        return out, err

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        return self.said()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_COMMAND = "import sys\nfrom vlmscope.app import main\nsys.exit(main())\n"


def command_line(*arguments: str, env: Mapping[str, str] | None = None, cwd: str | Path = ROOT) -> Forked:
    """`python run.py ARGUMENTS` as a forked process."""
    return Forked(_COMMAND, *arguments, env=env, cwd=cwd)


def all_codes(processes: Sequence[Forked], timeout: float = 120) -> list[int]:
    """The exit codes of processes that work together."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
