"""What a result is made of (its origin), by name: settings as they are, files by a digest.

Work is resumed only with the same origin, so that no result is made of two models or of two data sets.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmscope.core.errors import UserError

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
    """Refuse to resume what was begun with another origin.

    Args:
        what: that was begun, such as a folder.
        then: its origin, as it was recorded.
        now: this run's.
        advice: what else to do than to restore the old values.

    Raises:
        UserError: they differ; it names what, with the old and the new value.
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
    """Digest of the whole content of some files, in their order; their names do not matter.

    Raises:
        UserError: one cannot be read.
    """
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
        total.update(os.fsencode(f"{name} {file.stat().st_size}\n"))
        if not (indexed and file.suffix == ".tar"):
            total.update(_content(file))
    return total.hexdigest()[:_HEX]


def _content(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _WHOLE or any(file.match(pattern) for pattern in _LISTS):
            return hashlib.file_digest(opened, "sha256").digest()
        found = hashlib.sha256()
        for block in range(_BLOCKS):
            opened.seek((size - _BLOCK) * block // (_BLOCKS - 1))
            found.update(opened.read(_BLOCK))
        return found.digest()
