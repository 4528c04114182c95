"""Read and write artifacts (JSON, YAML and safetensors, atomically, never pickle), and compare their origins.

Every writer fills a temporary file in the same folder, flushes it to the disk and renames it over the target, so a
reader sees the old file or the new one, never a part.

The origin of a result is everything that it depends on, by name: settings by value, files by digest. Work resumes only
with the same origin, so that no result mixes two models or two data sets.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlmscope.core.errors import NoRoom, UserError

_LFS = b"version https://git-lfs"
_MOST_VALUES = 10_000_000  # of a YAML file, aliases unfolded
_DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEMPORARY = re.compile(r"\..*\.(\d+)\.[0-9a-f]{8}\.tmp(\..*)?")  # names made by `atomic_path` and `atomic_folder`


def shipped(relative: str) -> Path:
    """A file or folder that comes with vlmscope, `conf/...` or `assets/...`: in the clone, or in an installed wheel.

    The package's folder `shipped` links to the clone's folders, and a wheel holds what they contain (pyproject.toml).
    """
    return (Path(__file__).resolve().parents[1] / "shipped" / relative).resolve()


def no_room(error: BaseException, path: str | Path) -> NoRoom | None:
    """The user's error if a full disk or quota caused `error` while `path` was written, else None."""
    current: BaseException | None = None if isinstance(error, UserError) else error
    while current is not None:
        # safetensors reports the errno in its message only.
        text = re.search(r"\(os error (\d+)\)", str(current)) if isinstance(current, SafetensorError) else None
        code = int(text[1]) if text else getattr(current, "errno", None)
        if code in _FULL:
            return NoRoom(f"cannot write {path}: {os.strerror(code)}; make room or choose another folder")
        current = current.__cause__ or current.__context__
    return None


_UMASK = os.umask(0)
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK  # as any new file has it: safetensors alone makes files that only their owner may read


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; it replaces `path` on success and is removed on any error.

    Missing parent folders are created. The temporary name keeps the suffix, which some writers depend on.

    Raises:
        UserError: the folder cannot be written (`NoRoom`: its disk or quota is full).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # some network drives know no modes
            temporary.chmod(_MODE)
        os.replace(temporary, path)
    except Exception as error:
        if full := no_room(error, path):
            raise full from error
        # Only errors about this path are translated: the caller may read other files inside the block.
        paths = (None, str(temporary), str(path), *map(str, path.parents))
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS and error.filename in paths:
            raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
        raise
    finally:
        # Absent after a replace; `unlink(missing_ok=True)` would raise where the parent is a file.
        if os.path.lexists(temporary):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` on success; `path` must be absent or empty."""
    path = Path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there already; choose a folder that is not, or remove it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def remove_leftovers(folder: str | Path) -> None:
    """Remove temporary files and folders that killed processes left below `folder`, which may be missing."""
    for path in list(Path(folder).rglob(".*.tmp*")):
        named = _TEMPORARY.fullmatch(path.name)
        with suppress(FileNotFoundError):  # another process may remove it at the same time
            if named and _is_gone(int(named[1])):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_gone(process: int) -> bool:
    """Whether a process has ended."""
    if process == os.getpid():  # of an earlier process with the same number, in another container
        return True
    try:
        os.kill(process, 0)  # signal 0 only checks that the process exists
    except OSError as error:  # PermissionError: it exists, and belongs to another user
        return isinstance(error, ProcessLookupError)
    return False


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; surrogates for non-UTF-8 file names become `\\udce9`, which JSON reads back."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def read_text(path: str | Path) -> str:
    """Read UTF-8 text, without the byte order mark that editors on Windows write."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text; save it as UTF-8") from error


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, with their numbers from 1."""
    # Not `str.splitlines`, which also splits at form feeds, U+0085, U+2028 and U+2029: they may stand unescaped inside
    # the strings of valid JSON.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def write_json(path: str | Path, obj: Any, *, indent: int | None = 2) -> None:
    """Write `obj` as JSON, numpy values as numbers and paths as strings; NaN and infinity raise `ValueError`."""

    def jsonable(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{type(value).__name__} cannot be written as JSON")

    write_text(path, json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False, default=jsonable) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing file or invalid JSON raises `UserError`."""
    text = read_text(path)
    try:
        return parse_json(text)
    except UserError as error:
        raise UserError(f"{path} is {error}") from error


def parse_json(text: str) -> Any:
    """Parse JSON text; invalid text raises `UserError` "not valid JSON ...", without a file name."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}" if "\n" in text.rstrip() else f"column {error.colno}"
        raise UserError(f"not valid JSON ({error.msg.removesuffix(' at')} at {where}); correct it") from error
    except (RecursionError, ValueError) as error:  # brackets nested too deep, numbers of thousands of digits
        raise UserError(f"not valid JSON ({str(error)[:200]}); correct it") from error


def write_yaml(path: str | Path, obj: Any) -> None:
    """Write plain containers and scalars as YAML, keys unsorted."""
    write_text(path, yaml.safe_dump(obj, sort_keys=False, allow_unicode=True, width=120))


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file of plain values, as `parse_yaml` does."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text of plain containers and scalars; tags such as !!python/object raise `UserError`."""
    try:
        value = yaml.safe_load(text)
        if _size(value, {}) > _MOST_VALUES:
            raise UserError(f"{where}: its aliases unfold to more than {_MOST_VALUES:,} values; write them out")
        return value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        reason = " ".join((getattr(error, "problem", None) or "").split())[:200]
        raise UserError(f"{where} is not valid YAML{line}{': ' if reason else ''}{reason}; correct it") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # such as 2024-13-45
        raise UserError(f"{where} is not valid YAML: {str(error)[:200]}; correct it") from error


def _size(value: Any, known: dict[int, int]) -> int:
    """Number of values in a tree, aliases counted each time; a value inside itself raises `RecursionError`."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = -1  # while its parts are counted
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    if known[id(value)] < 0:
        raise RecursionError("a value contains itself")
    return known[id(value)]


def save_tensors(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays as one safetensors file with string metadata.

    Arrays of bool, integer and float dtypes keep shape, dtype and every bit; any strides are accepted.
    """
    # safetensors writes the raw buffer, so an array that is not C-contiguous would come back scrambled.
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=dict(metadata or {}))


@contextmanager
def open_tensors(path: str | Path, framework: str = "numpy") -> Iterator[Any]:
    """Open a safetensors file; safetensors checks its dtypes, shapes, offsets and exact length.

    `framework` of the tensors is "numpy" or "pt" (numpy has neither bfloat16 nor float8).
    """
    if not Path(path).is_file():
        raise UserError(f"cannot read {path}: no such file; check the path")
    refuse_lfs_pointer(path)
    try:
        with safe_open(str(path), framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]  # it may quote the header, of any length
        size = f"{Path(path).stat().st_size:,} bytes"
        raise UserError(
            f"cannot read {path}: not a complete safetensors file ({size}; {reason}); download or make it again"
        ) from error


@contextmanager
def built_from(path: str | Path, what: str, remedy: str) -> Iterator[None]:
    """Turn errors of code that builds `what` from a file into a one-line `UserError` that ends in `remedy`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path} is an incomplete {what} ({reason}); {remedy}") from error


def refuse_lfs_pointer(path: str | Path) -> None:
    """Raise `UserError` for the pointer that a clone without Git LFS has in place of a large file."""
    with Path(path).open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in the repository, or download "
                "it with `hf download`"
            )


class TensorHead(NamedTuple):
    """Header entry of one tensor; `dtype` as safetensors names it, such as F32."""

    dtype: str
    shape: tuple[int, ...]


def tensor_heads(path: str | Path) -> dict[str, TensorHead]:
    """Dtype and shape of each tensor of a safetensors file by name, without reading values."""
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return {name: TensorHead(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def load_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata (empty if absent) of a safetensors file, which must not have dtypes that numpy lacks."""
    with built_from(path, "file of arrays", "make it again"), open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


_HEX = 16  # hexadecimal digits of a digest
_LISTS = ("*.jsonl", "index.json", "state.json", "dataset_info.json")  # texts, or digests of shards: read in full
_WHOLE, _BLOCKS, _BLOCK = (
    1 << 20,
    16,
    1 << 16,
)  # files above `_WHOLE` bytes are read in `_BLOCKS` blocks of `_BLOCK` bytes
_SHOWN = 4  # differences that a message names


def flat(name: str, value: Any) -> dict[str, Any]:
    """Nested settings as one mapping with dotted keys: `flat("optim", {"lr": 1})` is `{"optim.lr": 1}`."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in flat(f"{name}.{part}", inner).items()}


def plain(origin: Mapping[str, Any]) -> dict[str, Any]:
    """An origin after a round trip through JSON."""
    return json.loads(json.dumps(dict(origin), default=str))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name old -> new` for each name whose value differs, or that only one of the origins has."""
    then, now = plain(then), plain(now)
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return [f"{name} {then.get(name)} -> {now.get(name)}" for name in changed]


def refuse_other(what: str, then: Any, now: Mapping[str, Any], advice: str = "choose a new hydra.run.dir") -> None:
    """Raise `UserError` if `what`, such as a folder, was begun with an origin `then` that differs from `now`.

    `advice` is the alternative to restoring the old values.
    """
    if not isinstance(then, Mapping):
        raise UserError(f"{what} was begun by an earlier version, which did not record model and data; {advice}")
    changed = differences(then, now)
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise UserError(
            f"{what} was begun with other settings, model or data ({', '.join(changed[:_SHOWN])}{more}); restore them, "
            f"or {advice}"
        )


def files_digest(files: Iterable[Path]) -> str:
    """Digest of the full contents of files, in order and without their names."""
    total = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    return total.hexdigest()[:_HEX]


def folder_digest(folder: str | Path, without: Path | None = None) -> str:
    """Digest of a data folder: names and contents of all files below it, except hidden ones and `without`.

    Since data sets may have terabytes, a large file is represented by its size and 16 blocks spread over it, and shards
    by the digests in their index. A missing folder has a digest too; its reader reports it with a better message.
    """
    folder, total = Path(folder), hashlib.sha256()
    indexed = (folder / "index.json").is_file()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if without is not None and file.absolute() == without.absolute():
            continue
        name = file.relative_to(folder)
        # `datasets` writes its caches next to the data that it reads.
        if any(part.startswith(".") for part in name.parts) or file.match("cache-*.arrow"):
            continue
        size = file.stat().st_size
        total.update(os.fsencode(f"{name} {size}\n"))
        if indexed and file.suffix == ".tar":
            continue
        with file.open("rb") as opened:
            if size <= _WHOLE or any(file.match(pattern) for pattern in _LISTS):
                total.update(hashlib.file_digest(opened, "sha256").digest())
                continue
            blocks = hashlib.sha256()
            for block in range(_BLOCKS):
                opened.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                blocks.update(opened.read(_BLOCK))
            total.update(blocks.digest())
    return total.hexdigest()[:_HEX]
