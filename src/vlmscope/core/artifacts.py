"""Reading and writing artifacts (JSON, YAML and safetensors, always atomically, never pickle), and their origins.

A reader sees the old file or the new one, never half of one: every writer fills a temporary file in the same folder,
flushes it to the disk and renames it over the target.

A result's origin is everything that decided it, by name: settings as they are, files by a digest. Work is resumed only
with the same origin, so that no result is made of two models or of two data sets.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
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
_MOST_VALUES = 10_000_000
_DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEMPORARY = re.compile(r"\..*\.(\d+)\.[0-9a-f]{8}\.tmp(\..*)?")  # the names that are made here


def no_room(error: BaseException, path: str | Path) -> NoRoom | None:
    """What to tell the user when `error` came of a full disk or quota while `path` was written, else None."""
    current: BaseException | None = None if isinstance(error, UserError) else error
    while current is not None:
        # safetensors keeps the number of the system's error in its text only.
        text = re.search(r"\(os error (\d+)\)", str(current)) if isinstance(current, SafetensorError) else None
        code = int(text[1]) if text else getattr(current, "errno", None)
        if code in _FULL:
            return NoRoom(f"cannot write {path}: {os.strerror(code)}; make room or choose another folder")
        current = current.__cause__ or current.__context__
    return None


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    Missing parent folders are made. The temporary name keeps the suffix, since some writers look at it.

    A folder that cannot be written is a `UserError`, a full disk or quota a `NoRoom`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        full = no_room(error, path)
        if full is not None:
            raise full from error
        # An OSError from the caller's own reading, for example of another file, must stay what it is.
        own = (None, str(temporary), str(path), *map(str, path.parents))
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS and error.filename in own:
            raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
        raise
    finally:
        # After a replace nothing is left to remove; the folder itself may be missing or not be one.
        if os.path.lexists(temporary):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which must not be there; on success it becomes `path`."""
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


def remove_leftovers(folder: str | Path, older_than: float = 0.0) -> None:
    """Remove the temporary files and folders that killed processes left anywhere below `folder`, which may be missing.

    Those younger than `older_than` seconds stay, where processes of other machines, which cannot be seen, write too.
    """
    for path in list(Path(folder).rglob(".*.tmp*")):
        named = _TEMPORARY.fullmatch(path.name)
        with suppress(FileNotFoundError):  # another process may be at it too
            if named and _is_gone(int(named[1])) and time.time() - path.stat().st_mtime >= older_than:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_gone(process: int) -> bool:
    """Whether a process has ended; what bears this one's own number is of one before it, in another container."""
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically. Bytes of a file name that are not UTF-8 become `\\udce9`, which JSON reads back."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def read_text(path: str | Path) -> str:
    """Read UTF-8 text, without the byte order mark with which editors on Windows begin a file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text; save it as UTF-8") from error


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1.

    Only a line feed (with or without a carriage return) ends a line. `str.splitlines` would also cut at form feeds and
    at U+0085, U+2028 and U+2029, which stand unescaped inside the strings of valid JSON.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def write_json(path: str | Path, obj: Any, *, indent: int | None = 2) -> None:
    """Write `obj` as JSON; numpy scalars, arrays and paths become plain. NaN and infinity raise `ValueError`."""

    def jsonable(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"{type(value).__name__} cannot be written as JSON")

    write_text(path, json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False, default=jsonable) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a file that is missing or not JSON is a `UserError`."""
    text = read_text(path)
    try:
        return parse_json(text)
    except UserError as error:
        raise UserError(f"{path} is {error}") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text; else a `UserError` "not valid JSON ...", without the name of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}" if "\n" in text.rstrip() else f"column {error.colno}"
        raise UserError(f"not valid JSON ({error.msg.removesuffix(' at')} at {where}); correct it") from error
    except (RecursionError, ValueError) as error:  # brackets nested too deep, numbers of thousands of digits
        raise UserError(f"not valid JSON ({str(error)[:200]}); correct it") from error


def write_yaml(path: str | Path, obj: Any) -> None:
    """Write plain containers and scalars as YAML, keys in their own order."""
    write_text(path, yaml.safe_dump(obj, sort_keys=False, allow_unicode=True, width=120))


def read_yaml(path: str | Path) -> Any:
    """Read YAML of plain values (`parse_yaml`)."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of YAML text, of plain containers and scalars only: a tag such as !!python/object makes nothing."""
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
    """Values in a tree, those that aliases repeat counted each time; a value within itself raises `RecursionError`."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = -1
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
    """An opened safetensors file, its header checked: dtypes, shapes, offsets, and that the file is exactly as long.

    Its tensors are those of `framework`, "numpy" or "pt" (numpy has neither bfloat16 nor float8).
    """
    if not Path(path).is_file():
        raise UserError(f"cannot read {path}: no such file; check the path")
    refuse_lfs_pointer(path)
    try:
        with safe_open(str(path), framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]  # it quotes the header, which may be anything
        size = f"{Path(path).stat().st_size:,} bytes"
        raise UserError(
            f"cannot read {path}: not a complete safetensors file ({size}; {reason}); download or make it again"
        ) from error


@contextmanager
def built_from(path: str | Path, what: str, remedy: str) -> Iterator[None]:
    """Around code that builds `what` from a file's content: whatever does not fit is one line, `remedy` at its end."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path} is an incomplete {what} ({reason}); {remedy}") from error


def refuse_lfs_pointer(path: str | Path) -> None:
    """Refuse the few lines that a clone without Git LFS has in place of a large file."""
    with Path(path).open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in the repository, or download "
                "it with `hf download`"
            )


class TensorHead(NamedTuple):
    """What a safetensors file's header says of one tensor; `dtype` in its own words, such as F32."""

    dtype: str
    shape: tuple[int, ...]


def tensor_heads(path: str | Path) -> dict[str, TensorHead]:
    """Dtype and shape of each tensor of a safetensors file by name; no values are read."""
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        return {name: TensorHead(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def load_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file: its arrays and its metadata (empty when it has none); no dtype that numpy lacks."""
    with built_from(path, "file of arrays", "make it again"), open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


_HEX = 16  # hexadecimal digits of a digest
_LISTS = ("*.jsonl", "index.json", "state.json", "dataset_info.json")  # they hold the words, or digests of shards
_WHOLE, _BLOCKS, _BLOCK = 1 << 20, 16, 1 << 16  # larger files are read in so many blocks of so many bytes
_SHOWN = 4  # differences that a message names


def flat(name: str, value: Any) -> dict[str, Any]:
    """Nested settings as one mapping: `flat("optim", {"lr": 1})` is `{"optim.lr": 1}`."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in flat(f"{name}.{part}", inner).items()}


def plain(origin: Mapping[str, Any]) -> dict[str, Any]:
    """An origin as it comes back from JSON."""
    return json.loads(json.dumps(dict(origin), default=str))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name old -> new` for each name whose value differs; a name that only one of them has differs too."""
    then, now = plain(then), plain(now)
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return [f"{name} {then.get(name)} -> {now.get(name)}" for name in changed]


def refuse_other(what: str, then: Any, now: Mapping[str, Any], advice: str = "choose a new hydra.run.dir") -> None:
    """Refuse to resume `what`, such as a folder, that was begun with the origin `then` and not with `now`.

    `advice` says what else to do than to restore the old values.
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
    """Digest of the whole content of some files, in their order; their names do not matter."""
    total = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    return total.hexdigest()[:_HEX]


def folder_digest(folder: str | Path, without: Path | None = None) -> str:
    """Digest of a folder of data: names and contents of all files below it, hidden ones and one file left out.

    Of a file above 1 MiB that is no list, 16 blocks from its beginning to its end and its size stand for its content:
    a data set may have terabytes. Of shards, the digests in their index do.
    A folder that is not there has a digest too: what reads it reports that better.
    """
    folder, total = Path(folder), hashlib.sha256()
    indexed = (folder / "index.json").is_file()
    for file in sorted(one for one in folder.rglob("*") if one.is_file()):
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
