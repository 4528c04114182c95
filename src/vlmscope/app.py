"""The command line: Hydra composes the configuration, one task runs, its folder is printed last.

Exit codes: 0 success, 1 a failure of the program (with a traceback) or a failed check (one line), 2 a usage error (one
line), 130 Ctrl-C, 141 the reader of the output went away, 143 SIGTERM.
"""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from vlmscope.core import __version__
from vlmscope.core.errors import CheckFailed, RankLost, Terminated, UserError
from vlmscope.core.launch import Place, place_of, program

USAGE = """\
vlmscope: transcoders, attribution graphs and causal tests for vision-language models.

  {program} experiment=NAME [key=value ...]       a whole experiment
  {program} task=NAME [key=value ...]             one task on your own pictures and prompt
  {program} -m experiment=NAME seed=0,1,2         a sweep: one run for each combination
  {program} experiment=NAME --cfg job             show the configuration, run nothing
  {program} --version                             the version

{overview}

Keys
  prompt=TEXT, prompt_file=PATH   the prompt, taken exactly as it is written; so are paths and words everywhere
  prompts=SET prompt_name=NAME    a ready prompt of a set (docs/prompts.md)
  image=PATH, image=[A,B]         one picture or several
  images.NAME=[A,B]               a named set of your own pictures
  model= transcoder= data= optim= pairs= circuit= study= tracking=    choose an option of a group
  trainer.max_steps=10            set one key of it; a misspelt key is an error
  debug=fast, debug=small         tiny limits, to see whether it runs at all; minutes with a pretrained small model
  tracking=none                   nothing but the run folder
  hydra.run.dir=PATH              the run folder (default outputs/<experiment or task>/<date_time>)
  trainer.resume=true             with hydra.run.dir of an earlier run: resume it where it stopped

Examples
{examples}
Each run writes config.yaml, metrics.json and its artifacts into its folder and prints that folder last; {program} serve
shows all runs in the browser. Set HYDRA_FULL_ERROR=1 to see the traceback of a configuration error.
"""


_UNREAD = 141  # the exit code of a program whose reader has gone, as in `python run.py --help | head`


def _discard_output() -> None:
    """Let what is still printed go nowhere, or Python would complain when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Failures:
    """Errors of jobs, printed as they happen."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.errors: list[Exception] = []
        self.unread = False  # the reader of the output has gone

    def add(self, error: Exception) -> None:
        """Print and keep an error; of several processes that fail together only the first prints.

        In a process that a launcher started it is raised too, since only an exception reaches the main one.
        """
        place, first = _place(), True
        if place is not None:  # only then: the import takes seconds
            from vlmscope.training.ranks import first_to_fail

            first = first_to_fail(place)
        if first:
            if isinstance(error, UserError | CheckFailed | RankLost):
                _say(str(error))
            else:
                traceback.print_exception(error)
        self.errors.append(error)
        if place is not None:
            from vlmscope.training.ranks import see_off

            see_off(place)
        if os.getpid() != self.process:
            raise error

    def exit_code(self) -> int:
        """0 without failures, 2 when all are usage errors, else 1."""
        if not self.errors:
            return _UNREAD if self.unread else 0
        return 2 if all(isinstance(error, UserError) for error in self.errors) else 1


def _place() -> Place | None:
    """The rank of this process among several, or None; None too where the launcher's variables are wrong."""
    try:
        return place_of(os.environ)
    except UserError:
        return None


def _help() -> str:
    from vlmscope.config import catalog
    from vlmscope.tasks.list import overview

    experiments = list(catalog.options("experiment"))
    examples = [f"  {program()} experiment={name}\n" for name in experiments[:2]]
    examples.append(f"  {program()} task=trace image=cat.png prompt='what animal is this ?'\n")
    return USAGE.format(program=program(), overview=overview(), examples="".join(examples))


def _say(message: str) -> None:
    """Print a message as one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _checked(argv: Sequence[str]) -> list[str]:
    """The command line with overrides before flags, so that users may mix them; Hydra's parser needs this order.

    The flags are checked here, since the parser's own errors print a usage page and exit.
    """
    from hydra._internal.utils import get_args_parser

    from vlmscope.config.catalog import conf_dir

    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see {program()} --help")

    parser.error = refuse
    args: argparse.Namespace = parser.parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun reads a pickle, which vlmscope never does; use the run's config.yaml")
    modes = [args.run, args.multirun, args.cfg is not None, args.info is not None, args.shell_completion]
    if sum(map(bool, modes)) > 1:
        raise UserError("--run, --multirun, --cfg, --info and --shell-completion exclude each other; give one")
    if args.resolve and args.cfg is None:
        raise UserError("--resolve goes with --cfg; add --cfg job")
    for override in args.overrides:
        group, _, option = override.partition("=")
        if option == "null" and (conf_dir() / group).is_dir():
            raise UserError(
                f"{override}: name an option of the group (`{program()} task=list`); ~{group} leaves it out"
            )
    flags = list(argv)
    for override in args.overrides:
        flags.remove(override)
    return [*args.overrides, *flags]


def _job(failures: _Failures) -> Callable[[Any], None]:
    """`run_job` with its failure kept, so that Hydra prints no line of its own and a sweep continues."""
    from hydra.core.hydra_config import HydraConfig

    from vlmscope.config.resolve import CONFIG_ERRORS, one_line
    from vlmscope.core.artifacts import no_room
    from vlmscope.tasks.job import run_job

    def job(cfg: Any) -> None:
        try:
            run_job(cfg)
        except CONFIG_ERRORS as error:
            failures.add(UserError(one_line(error)))
        except BrokenPipeError:
            failures.unread = True
            _discard_output()
        except Exception as error:
            # Most writers report a full disk; this covers logs, files of other libraries and redirected output.
            place = getattr(error, "filename", None) or HydraConfig.get().runtime.output_dir
            failures.add(no_room(error, place) or error)

    return job


@contextmanager
def _hydra_process(argv: Sequence[str]) -> Iterator[None]:
    """Set sys.argv, which Hydra reads, and HYDRA_FULL_ERROR, without which it prints its errors and exits."""
    saved_argv, saved_env = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [str(Path(saved_argv[0] or "run.py")), *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = saved_argv
        if saved_env is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_env


def _run_hydra(argv: Sequence[str], failures: _Failures) -> None:
    """Let Hydra compose and run; its own errors become a `UserError`."""
    import hydra

    from vlmscope.config.catalog import adopt, conf_dir, register
    from vlmscope.config.resolve import CONFIG_ERRORS, one_line, quote_arguments
    from vlmscope.tasks.job import SweepRefused
    from vlmscope.tasks.settings import TASKS

    arguments = quote_arguments(_checked(argv), TASKS)
    register(TASKS)
    arguments = adopt(arguments)
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    entry = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(_job(failures))
    try:
        with _hydra_process(arguments):
            entry()
    except SweepRefused as error:
        raise UserError(str(error)) from error
    except CONFIG_ERRORS as error:
        if show_traceback:
            traceback.print_exc()
        raise UserError(one_line(error)) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another hydra.run.dir") from error


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise the first Ctrl-C or SIGTERM, so that the program can save its state; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers only there
        yield
        return
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, by default the process's own, and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["serve"]:
        argv[0] = "task=serve"
    if argv[:1] == ["--worker"] and len(argv) == 2 and argv[1].isdigit():  # as the workbench starts it
        from vlmscope.viewer.jobs import run_worker

        return run_worker(main, int(argv[1]))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # prints a folder's name with the bytes that it has
    try:
        if argv == ["--version"]:  # Hydra's own flag would print Hydra's
            print(f"vlmscope {__version__}")
            code = 0
        elif not argv or {"-h", "--help"} & set(argv):
            print(_help())
            code = 0 if argv else 2
        else:
            with _stopped_by_signals():
                code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard_output()
        return _UNREAD


def _run(argv: Sequence[str]) -> int:
    failures = _Failures()
    killed = True
    try:
        _run_hydra(argv, failures)
        killed = False
    except KeyboardInterrupt as stop:
        place = _place()
        if place is None or place.main:
            print("interrupted; resume with trainer.resume=true and this run's hydra.run.dir", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except Exception as error:
        killed = False
        failures.add(error)
    finally:
        from vlmscope.tracking.run import close_parent

        close_parent(killed=killed, failed=bool(failures.errors))  # Hydra's own callback is skipped when a job fails
    return failures.exit_code()
