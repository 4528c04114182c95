"""Facts and words of a study's items, kept in the study folder: reading them goes through all the data again."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from vlmscope.core.artifacts import load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.study import MANIFEST
from vlmscope.features.labels.item_facts import MOST_WORDS, ItemFacts, item_facts, scoring_half
from vlmscope.features.labels.rules import Predicate
from vlmscope.features.study.records import StudyFolder

FOLDER = "index"  # in the study folder; may be deleted
_VERSION = "1"
_LOG = logging.getLogger(__name__)


def study_facts(study: StudyFolder, most_words: int = MOST_WORDS) -> ItemFacts:
    """`item_facts` of a study, read from `index/` in it when they were read before.

    Raises:
        UserError: as `item_facts`, when they are read for the first time.
    """
    path = study.path / FOLDER / f"item_facts_{most_words}.safetensors"
    mark = {"version": _VERSION, "study": hashlib.sha256((study.path / MANIFEST).read_bytes()).hexdigest()}
    found = _read(path, mark) if path.is_file() else None
    if found is None:
        found = item_facts(study.items, most_words)
        _write(path, mark, found)
    return found


def _read(path: Path, mark: dict[str, str]) -> ItemFacts | None:
    """What was kept; None when it is damaged or of another study."""
    try:
        arrays, head = load_tensors(path)
        if any(head.get(key) != value for key, value in mark.items()):
            return None
        names = tuple(Predicate(*pair) for pair in json.loads(head["names"]))
        ids = arrays["ids"]
        bits = np.unpackbits(arrays["matrix"], axis=1, count=len(names))
        return ItemFacts(ids, scoring_half(ids), names, np.ascontiguousarray(bits.astype(np.float32)))
    except (UserError, KeyError, ValueError, TypeError):
        return None


def _write(path: Path, mark: dict[str, str], found: ItemFacts) -> None:
    arrays = {"ids": found.ids, "matrix": np.packbits(found.matrix.astype(bool), axis=1)}
    try:
        save_tensors(path, arrays, {**mark, "names": json.dumps([list(name) for name in found.names])})
    except UserError as error:  # a study that others own can be read all the same
        _LOG.warning("facts of the items are read anew each time: %s", error)
