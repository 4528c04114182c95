"""Orrery's scenes as shards, and the shards as an in-memory pool that training draws from by step number."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmscope.core.conversation import Exchange
from vlmscope.core.errors import UserError
from vlmscope.core.seeds import derive, generator
from vlmscope.data.orrery.scene import KINDS, Question, Scene, make_scene
from vlmscope.data.raw import RawSample
from vlmscope.data.shards import ShardPlan, encode_png, plan_shards, read_samples, shard_files, write_shards

VERSION = 1  # raise when a renderer or template changes: old shards are then refused
LICENCE = (
    "pictures: Apache-2.0, from texture maps credited in assets/planet_textures/CREDITS.md and scikit-learn digits"
)


@dataclass
class OrreryDataConfig:
    """How many scenes of each kind to render, and where to."""

    folder: str = "outputs/data/orrery"
    seed: int = 0
    shard_size: int = 1000
    train: dict[str, int] = field(
        default_factory=lambda: {"planets": 10000, "digits": 28000, "shapes": 10000, "hands": 5000, "text": 2000}
    )
    val: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 400))
    test: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 1000))


def build(config: OrreryDataConfig, on_shard: Any = lambda _plan: None) -> int:
    """Write the shards that are still missing; return how many were written."""
    counts = _counts(config)
    meta = {"dataset": "orrery", "version": VERSION, "seed": config.seed, "counts": counts, "licence": LICENCE}

    def sample(split: str, kind: str, index: int) -> dict[str, Any]:
        return to_sample(make_scene(split, kind, index, config.seed))

    return write_shards(Path(config.folder), plans_of(config), sample, meta, on_shard)


def plans_of(config: OrreryDataConfig) -> list[ShardPlan]:
    """All shards of the dataset, written or not."""
    return plan_shards(_counts(config), config.shard_size)


def _counts(config: OrreryDataConfig) -> dict[str, dict[str, int]]:
    return {"train": config.train, "val": config.val, "test": config.test}


def to_sample(scene: Scene) -> dict[str, Any]:
    """A WebDataset sample: `<key>.json` with kind, facts and questions, and `<key>.png` unless the scene is text."""
    body = {
        "kind": scene.kind,
        "facts": scene.facts,
        "questions": [[q.group, q.question, q.answer] for q in scene.questions],
    }
    sample: dict[str, Any] = {"__key__": scene.key, "json": json.dumps(body).encode()}
    if scene.image is not None:
        sample["png"] = encode_png(scene.image)
    return sample


def from_sample(sample: dict[str, Any]) -> Scene:
    """The inverse of `to_sample`."""
    body = json.loads(sample["json"])
    image = None
    if "png" in sample:
        with Image.open(io.BytesIO(sample["png"])) as picture:
            image = np.asarray(picture.convert("RGB"))
    questions = tuple(Question(*q) for q in body["questions"])
    return Scene(body["kind"], sample["__key__"], image, body["facts"], questions)


def scene_row(sample: dict[str, Any]) -> RawSample:
    """A scene's sample as its picture, if it has one, with one of its questions, picked by the scene's key."""
    body, key = json.loads(sample["json"]), sample["__key__"]
    _, question, answer = body["questions"][derive(0, "question", key) % len(body["questions"])]
    pictures = (sample["png"],) if "png" in sample else ()
    return RawSample(pictures, (Exchange(question, answer),), "", key, plain_facts(body["kind"], body["facts"]))


def plain_facts(kind: str, facts: Mapping[str, Any]) -> dict[str, str | int]:
    """What a scene shows, in words and whole numbers: its kind and its facts, places left out."""
    return {"scene": kind} | {name: value for name, value in facts.items() if isinstance(value, str | int)}


class ScenePool:
    """All scenes of a split in memory (compressed), drawn by step number: batch `n` is the same after any resume."""

    def __init__(self, folder: Path, split: str, kinds: tuple[str, ...] = KINDS) -> None:
        self.samples = {kind: list(read_samples(shard_files(folder, split, kind))) for kind in kinds}

    def batch(self, seed: int, step: int, counts: dict[str, int]) -> list[Scene]:
        """Draw `counts[kind]` scenes of each kind for one step, without repeats within the batch.

        Raises:
            UserError: a batch asks for more scenes of a kind than there are.
        """
        scenes: list[Scene] = []
        for kind, count in counts.items():
            pool = self.samples[kind]
            if count > len(pool):
                raise UserError(
                    f"a batch asks for {count} scenes of {kind}, the data have {len(pool)}: build more data"
                )
            rng = generator(seed, "batch", step, kind)
            scenes += [from_sample(pool[int(i)]) for i in rng.choice(len(pool), count, replace=False)]
        return scenes

    def scenes(self, kind: str, limit: int | None = None) -> list[Scene]:
        """The first `limit` scenes of a kind, in order."""
        return [from_sample(s) for s in self.samples[kind][:limit]]
