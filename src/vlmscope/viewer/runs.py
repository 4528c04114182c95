"""Run folders below the workbench's root: the list, one run's details, and its numbers as small tables.

A run is a folder with `config.yaml`; its id is its path relative to the root. Nothing is kept that the files do not
say, but what was read of a run is reused while its folder and its files have the same times.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from vlmscope.core.artifacts import read_json, read_text
from vlmscope.core.errors import UserError
from vlmscope.core.launch import program
from vlmscope.core.study import MANIFEST
from vlmscope.viewer.safety import Refused, inside

CONFIG, METRICS, OVERRIDES, GRAPH = "config.yaml", "metrics.json", "overrides.yaml", "graph.json"
_DEPTH = 5  # of run folders below the root
_FOLDERS = 50_000  # that a listing looks into
_FILES = 5_000  # of one run that are listed
_STORE = "mlflow_artifacts"
_OF_RUN = {"figures", "rows", "study", "circuits", "checkpoints", "labels", "features"}  # in a run, without runs
_SHOWN = 6  # metrics in the list
_FIRST = ("graph/replacement_score", "graph/completeness_score", "val/fvu", "test/fvu", "eval/fvu", "study/items")
_MOST_VARIED = 4  # settings that a title names
_HASH = re.compile(r"[0-9a-f]{32,64}")  # the name of an uploaded picture
_LAYER = re.compile(r"layers/(?P<name>.+)/layer_(?P<layer>\d+)")
_TASK = re.compile(r"^task:\n(?:[ -].*\n)*?  name: (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """A run folder as the list needs it."""

    id: str
    names: frozenset[str]  # of the files and folders in it
    body: dict[str, Any]  # its entry in the list, without `status`
    metrics: dict[str, float | None]


class Runs:
    """All runs below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, tuple[tuple[int, ...], Run]] = {}
        self._lock = threading.Lock()  # requests are answered in threads

    def all(self) -> list[Run]:
        """All runs, the newest first."""
        with self._lock:
            found = [self._run(folder, names) for folder, names in self._folders()]
            self._known = {run.id: self._known[run.id] for run in found}
        # A set of transcoders has a config.yaml too, without a task.
        found = [run for run in found if run.body["task"]]
        return sorted(found, key=lambda run: run.body["started"], reverse=True)

    def listed(self) -> list[dict[str, Any]]:
        """The entries of the list."""
        return [{**run.body, "status": self.status(run)} for run in self.all()]

    def get(self, name: str) -> Run:
        """One run by its id."""
        folder = inside(self.root, name)
        if not (folder / CONFIG).is_file():
            raise Refused(f"{name[:200]} is no run: it has no {CONFIG}", 404)
        return self._run(self.root / name, frozenset(os.listdir(folder)))

    def status(self, run: Run) -> str:
        """running, done or failed: a run that ended without metrics was interrupted or met an error."""
        if ".lock" in run.names and _is_locked(self.root / run.id / ".lock"):
            return "running"
        return "done" if METRICS in run.names else "failed"

    def details(self, name: str) -> dict[str, Any]:
        """Everything about one run."""
        run, folder = self.get(name), inside(self.root, name)
        overrides = _read_overrides(folder / OVERRIDES)
        files, graphs = [], []
        for path in _files(folder):
            relative = path.relative_to(folder).as_posix()
            files.append({"path": relative, "bytes": path.stat().st_size})
            if path.name == GRAPH:
                graphs.append(f"{name}/{relative}".removesuffix(f"/{GRAPH}"))
        return {
            **run.body,
            "status": self.status(run),
            "metrics": run.metrics,
            "config": read_text(folder / CONFIG),
            "overrides": overrides,
            "command": shlex.join([*shlex.split(program()), *overrides]),
            "files": files,
            "graphs": graphs,
            "fvu_by_layer": list(by_layer(run.metrics).get("fvu", {}).values()),
        }

    def file(self, name: str, path: str) -> Path:
        """A file of a run's folder."""
        folder = inside(self.root, self.get(name).id)
        return _plain_file(inside(folder, path), path)

    def file_below(self, path: str) -> Path:
        """A file by its path below the root, which must lie in a run's folder."""
        file, parts = inside(self.root, path), path.split("/")
        folders = ["/".join(parts[:end]) for end in range(1, len(parts))]
        if not any((self.root / folder / CONFIG).is_file() for folder in folders):
            raise Refused(f"{path[:200]} is in no run's folder", 404)
        return _plain_file(file, path)

    def fvu(self) -> list[dict[str, Any]]:
        """Runs that measured FVU (training, evaluation): of all layers together and by layer."""
        rows = []
        for run in self.all():
            layers, metrics = by_layer(run.metrics).get("fvu", {}), run.metrics
            whole = next((name for name in metrics if re.fullmatch(r"(val|test|eval)/fvu", name)), None)
            if layers or whole:
                of = (whole or "val/fvu").partition("/")[0]
                row = {key: run.body[key] for key in ("id", "started")}
                row |= {"name": run.body["experiment"] or run.body["task"]}
                row |= {"expansion": _expansion(self.root / run.id / CONFIG), "fvu_by_layer": list(layers.values())}
                row |= {"fvu": metrics.get(f"{of}/fvu"), "l0": metrics.get(f"{of}/l0")}
                rows.append({**row, "dead": metrics.get(f"{of}/dead_frac")})
        return rows

    def _folders(self) -> Iterator[tuple[Path, frozenset[str]]]:
        """Folders of runs and the names in them."""
        todo, seen = [(self.root, 0)], 0
        while todo and seen < _FOLDERS:
            folder, depth = todo.pop()
            seen += 1
            try:
                with os.scandir(folder) as entries:
                    inner = list(entries)
            except OSError:  # removed or closed since
                continue
            names = frozenset(entry.name for entry in inner)
            if CONFIG in names:
                yield folder, names
            if depth < _DEPTH:
                skipped = {_STORE, *(_OF_RUN if CONFIG in names else ())}
                for entry in inner:
                    # Links are not followed: they may lead out of the root, or in a circle.
                    if entry.name[0] != "." and entry.name not in skipped and entry.is_dir(follow_symlinks=False):
                        todo.append((Path(entry.path), depth + 1))

    def _run(self, folder: Path, names: frozenset[str]) -> Run:
        """A run, read again where its folder or its files have changed."""
        name = folder.relative_to(self.root).as_posix()
        times = tuple(_time(folder / file) for file in ("", CONFIG, METRICS))
        known = self._known.get(name)
        if known is None or known[0] != times:
            known = times, Run(name, names, *_summary(folder, name, names))
            self._known[name] = known
        return known[1]


def by_layer(metrics: dict[str, float | None]) -> dict[str, dict[int, float | None]]:
    """Metrics of layers, `layers/<name>/layer_<ll>`, as name -> layer -> value, layers ascending."""
    found: dict[str, dict[int, float | None]] = {}
    for key in sorted(metrics):
        if match := _LAYER.fullmatch(key):
            found.setdefault(match["name"], {})[int(match["layer"])] = metrics[key]
    return found


def _summary(folder: Path, name: str, names: frozenset[str]) -> tuple[dict[str, Any], dict[str, float | None]]:
    """The entry of a run and all of its metrics."""
    started = _time(folder / CONFIG) / 1e9
    ended = _time(folder / METRICS) / 1e9
    overrides = _read_overrides(folder / OVERRIDES)
    experiment = next((word.partition("=")[2] for word in overrides if word.startswith("experiment=")), "")
    try:
        task = _TASK.search(read_text(folder / CONFIG))
        body = read_json(folder / METRICS) if METRICS in names else {}
    except UserError:  # half written by something else, or not ours
        task, body = None, {}
    metrics: dict[str, float | None] = (
        {str(key): value for key, value in body.items() if value is None or isinstance(value, int | float)}
        if isinstance(body, dict)
        else {}
    )
    shown = [key for key in _FIRST if key in metrics]
    shown += sorted((key for key in metrics if key not in shown), key=lambda key: (key.count("/"), len(key)))
    has = {
        "graph": GRAPH in names,
        "circuit": "circuits" in names,
        "trials": "trials.parquet" in names,
        "study": MANIFEST in names or (folder / "study" / MANIFEST).is_file(),
        "report": "report.html" in names,
        "sweep": folder.parent.name.startswith("sweep_"),
        "rows": "rows" in names,
    }
    return {
        "id": name,
        "task": task[1] if task else "",
        "experiment": experiment or None,
        "title": _title(overrides),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="milliseconds"),
        "seconds": ended - started if ended >= started else None,
        "metrics": {key: metrics[key] for key in shown[:_SHOWN]},
        "has": has,
    }, metrics


def _title(overrides: list[str]) -> str:
    """What tells a run from others of its task: picture and prompt of a trace, what a run of a sweep varies; or ""."""
    given = {key: value for key, _, value in (word.partition("=") for word in overrides)}
    if "prompt" in given:
        paths = [part.strip() for part in given.get("image", "").strip("[]").split(",") if part.strip()]
        names = ["a picture" if _HASH.fullmatch(Path(path).stem) else Path(path).stem for path in paths]
        return ": ".join(filter(None, [", ".join(names), given["prompt"].strip("'\"")]))
    if "experiment" not in given or len(given) > _MOST_VARIED + 1:
        return ""
    varied = [
        f"{key.rpartition('.')[2]} {value}" for key, value in given.items() if key not in ("experiment", "tracking")
    ]
    return ", ".join([given["experiment"], *varied]).replace("_", " ") if varied else ""


def _read_overrides(path: Path) -> list[str]:
    """The command line's overrides of a run; empty where they cannot be read."""
    try:
        body = yaml.load(read_text(path), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (UserError, yaml.YAMLError, ValueError, RecursionError):
        return []
    return [str(word) for word in body] if isinstance(body, list) else []


def _expansion(config: Path) -> float | None:
    """`transcoder.expansion_factor` of a run's configuration, if it has one."""
    try:
        found = re.search(r"^  expansion_factor: ([\d.]+)$", read_text(config), re.MULTILINE)
    except UserError:
        return None
    return float(found[1]) if found else None


def _files(folder: Path) -> Iterator[Path]:
    """Visible files below a folder, without those of links, at most `_FILES`."""
    count = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            if not name.startswith(".") and not path.is_symlink():
                count += 1
                if count > _FILES:
                    return
                yield path


def _plain_file(path: Path, name: str) -> Path:
    if not path.is_file():
        raise Refused(f"{name[:200]} is no file", 404)
    return path


def _time(path: Path) -> int:
    """Time of the last change in nanoseconds; 0 for a file that is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a run's folder."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
