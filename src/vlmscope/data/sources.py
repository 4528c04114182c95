"""From the settings of a source to the source: one function a kind."""

from __future__ import annotations

import json
from pathlib import Path

from vlmscope.core.conversation import Exchange
from vlmscope.core.errors import UserError
from vlmscope.core.seeds import derive
from vlmscope.data.conversation import record_parts
from vlmscope.data.hf_rows import hf_source
from vlmscope.data.orrery.dataset import plain_facts
from vlmscope.data.orrery.scene import KINDS, SPLITS, Scene, make_scene
from vlmscope.data.raw import RawSample, file_bytes, held_out
from vlmscope.data.readers import Indexed, Source
from vlmscope.data.shard_rows import ShardSource
from vlmscope.data.shards import encode_png
from vlmscope.data.source_config import SourceConfig, check_source

ORRERY_SCENES = 50_000  # without a limit; scenes are made while they are used, so the number is free


def open_source(
    name: str, config: SourceConfig, split: str | None = None, max_bad_shards: int = 0, check_pictures: bool = True
) -> Source:
    """A source as its settings say.

    Args:
        name: its key in `data.sources`.
        config: its settings.
        split: instead of `config.split`.
        max_bad_shards: how many corrupt shards a pass may skip, or corrupt files of a local table be left out.
        check_pictures: of a folder, look at all pictures first; else a bad one shows itself at its row.

    Raises:
        UserError: the settings are wrong, or the data are not there, empty or of another schema.
    """
    check_source(name, config)
    split = split or config.split
    if config.kind == "orrery":
        return _orrery(name, config, split)
    if config.kind == "folder":
        return _folder(name, config, split, check_pictures)
    if config.kind == "shards":
        return ShardSource(name, Path(str(config.path)), config.stream or name, split, config.limit, max_bad_shards)
    return hf_source(name, config, split, max_bad_shards)


def keeps(config: SourceConfig, val_share: float, validation: bool):
    """Which samples of the stream belong to training, or to validation: a function of the sample alone.

    With a split of its own for validation every sample belongs; else `val_share` of them, by their digest, is held out.
    """
    if config.val_split is not None:
        return lambda _sample: True
    return lambda sample: held_out(sample, val_share) == validation


def _orrery(name: str, config: SourceConfig, split: str) -> Indexed:
    if split not in SPLITS:
        raise UserError(f"data.sources.{name}.split={split}: Orrery's scenes have {', '.join(SPLITS)}")
    kinds = ("text",) if config.stream == "text" else tuple(kind for kind in KINDS if kind != "text")

    def sample(number: int) -> RawSample:
        scene = make_scene(split, kinds[number % len(kinds)], number // len(kinds))
        return scene_sample(scene, str(config.stream))

    return Indexed(name, config.limit or ORRERY_SCENES, sample)


def scene_sample(scene: Scene, stream: str) -> RawSample:
    """A scene of Orrery as plain text, or as its picture with the caption, with one question, or with all of them.

    "questions" picks one by the scene's key, since Orrery was trained on single turns; "dialogues" asks all, caption
    apart.
    """
    facts = plain_facts(scene.kind, scene.facts)
    if scene.image is None:
        said = " ".join(f"{q.question} {q.answer}" for q in scene.questions)
        return RawSample(text=said, origin=scene.key, facts=facts)
    asked = [q for q in scene.questions if (q.group == "caption") == (stream == "captions")]
    if stream == "questions":
        asked = [asked[derive(0, "question", scene.key) % len(asked)]]
    exchanges = tuple(Exchange(q.question, q.answer) for q in asked)
    return RawSample((encode_png(scene.image),), exchanges, origin=scene.key, facts=facts)


def _folder(name: str, config: SourceConfig, split: str, check_pictures: bool) -> Indexed:
    from vlmscope.data.folder import JsonLines

    path = Path(str(config.path)) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}; data.sources.{name}.path: as docs/bring_your_own.md says")
    lines = JsonLines(path, check_pictures, check_words=False)
    count = len(lines) if config.limit is None else min(len(lines), config.limit)

    def sample(number: int) -> RawSample:
        record = lines.record(number)
        origin = lines.origin(number)
        names, exchanges, text = record_parts(record, origin)
        pictures = tuple(file_bytes(lines.path.parent / image, origin) for image in names)
        given = record.get("facts")
        facts = {k: v for k, v in given.items() if isinstance(v, str | int)} if isinstance(given, dict) else {}
        return RawSample(pictures, exchanges, text, origin, facts)

    return Indexed(name, count, sample)


def fingerprint(sources: dict[str, SourceConfig]) -> str:
    """Sources in words that change when anything changes that the samples hang on."""
    import dataclasses
    import hashlib

    digest = hashlib.sha256(json.dumps({k: dataclasses.asdict(v) for k, v in sources.items()}).encode()).hexdigest()
    return f"{', '.join(f'{name} {one.weight:g}' for name, one in sources.items())} (settings {digest[:8]})"
