"""A short digest of a folder of data, by which later runs see whether it has changed; pictures are not read for it."""

import hashlib
import os
from pathlib import Path

_READ = ("*.jsonl", "index.json", "state.json", "dataset_info.json")  # small, and they list or hold the words


def folder_digest(folder: str | Path) -> str:
    """Digest of names and sizes of all files below a folder, and of the contents of lists (`_READ`).

    A folder that is not there has a digest too: what reads it will say so better.
    """
    folder, digest = Path(folder), hashlib.blake2b(digest_size=8)
    for file in sorted(one for one in folder.rglob("*") if one.is_file()):
        digest.update(os.fsencode(f"{file.relative_to(folder)} {file.stat().st_size}\n"))
        if any(file.match(pattern) for pattern in _READ):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
