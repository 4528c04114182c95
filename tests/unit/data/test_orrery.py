"""Scenes are seeded, show what they say, share nothing between splits, and survive being stored as shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.data import mixing
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import open_source
from vlmscope.data.orrery import dataset, scenes
from vlmscope.data.orrery.dataset import (
    ScenePool,
    build,
    scene_shards,
)
from vlmscope.data.orrery.rendering import glyphs, make_scene
from vlmscope.data.orrery.scenes import (
    COMPOSED,
    KINDS,
    NUMBERS,
    PLANETS,
    SHAPE_COLOURS,
    SHAPES,
    SIDE,
    SPLITS,
    YES_NO,
    Scene,
    vocabulary,
)
from vlmscope.data.samples import WHOLE


def same(one: Scene, other: Scene) -> bool:
    return one.questions == other.questions and one.facts == other.facts and np.array_equal(one.image, other.image)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [*KINDS, *COMPOSED])
def test_equal_arguments_give_equal_scenes_and_other_ones_differ(kind: str) -> None:
    one = make_scene("train", kind, 3, seed=1)
    assert same(one, make_scene("train", kind, 3, seed=1))
    for other in (make_scene("val", kind, 3, 1), make_scene("train", kind, 4, 1), make_scene("train", kind, 3, 2)):
        assert not same(one, other)
    if one.image is not None:
        assert (one.image.shape, one.image.dtype) == ((SIDE, SIDE, 3), np.uint8)


def test_every_word_of_every_scene_is_known() -> None:
    known = set(vocabulary(COMPOSED))
    for split in SPLITS:
        for kind in (*KINDS, *COMPOSED):
            for index in range(30):
                for q in make_scene(split, kind, index).questions:
                    assert set(q.question.split()) | set(q.answer.split()) <= known


def test_answers_to_questions_that_bind_follow_from_the_facts() -> None:
    asked = 0
    for index in range(60):
        scene = make_scene("train", "objects", index)
        things = [str(thing).split() for thing in scene.facts.values() if thing]
        for q in scene.questions:
            named = [word for word in q.question.split() if word in SHAPE_COLOURS]
            shape = next((shape for shape in SHAPES if any(word.startswith(shape) for word in q.question.split())), "")
            matching = [(c, s) for c, s in things if c in (named or [c]) and s == (shape or s)]
            expected = {
                "count_of": NUMBERS[len(matching)],
                "exists": YES_NO[bool(matching)],
                "colour_of": matching[0][0] if matching else "",
                "shape_of": matching[0][1] if matching else "",
            }
            assert q.answer == expected[q.group] and (q.group in ("count_of", "exists") or len(matching) == 1)
            asked += 1
    assert asked > 150
    for index in range(20):
        scene = make_scene("train", "tinted", index)
        values = [NUMBERS.index(str(scene.facts[name])) for name in ("first", "second")]
        larger = ("first", "second")[values[1] > values[0]]
        assert scene.answer("larger") == scene.facts[larger]
        assert scene.answer("larger_colour") == scene.facts[f"{larger}_colour"]
        scene = make_scene("train", "duets", index)
        assert scene.answer("right_cover") == PLANETS[str(scene.facts["right"])].cover
        named = next(name for name in PLANETS if name in scene.questions[-1].question.split())
        assert scene.answer("present") == YES_NO[named in scene.facts.values()]


def test_splits_use_different_glyphs() -> None:
    sources = {split: {int(i) for part in glyphs(split)[1] for i in part} for split in SPLITS}
    assert sum(map(len, sources.values())) == len(set.union(*sources.values())) == 1797


def small(folder: Path, **changes: Any) -> int:
    """Build six scenes of each kind, four a shard; how many shards were written."""
    counts = {"train": dict.fromkeys(KINDS, 6), "val": {}, "test": {}}
    return int(build(folder, counts, **{"shard_size": 4} | changes)["data/shards_written"])


def test_scenes_come_back_as_they_were(tmp_path: Path) -> None:
    assert small(tmp_path) == 10
    pool = ScenePool(tmp_path, "train")
    for kind in KINDS:
        for index, scene in enumerate(pool.scenes(kind)):
            assert same(scene, make_scene("train", kind, index))


def test_without_shards_the_same_scenes_are_rendered_when_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches and the rows of a study are those of the shards that task=build_data writes."""
    counts = {split: dict.fromkeys(KINDS, 6) for split in SPLITS}
    monkeypatch.setattr(scenes, "COUNTS", counts)
    monkeypatch.setattr(mixing, "COUNTS", counts)
    monkeypatch.chdir(tmp_path)
    dataset._say_rendered.cache_clear()
    assert scene_shards(dataset.DEFAULT_SHARDS[0]) is None and scene_shards(None) is None
    assert capsys.readouterr().out.count("rendered when they are drawn") == 1
    assert scene_shards("typo") == Path("typo")  # the user's own: refused when it is read
    build(Path(dataset.DEFAULT_SHARDS[0]), counts)
    folder = scene_shards(dataset.DEFAULT_SHARDS[0])
    assert folder is not None
    stored, rendered = ScenePool(folder, "train"), ScenePool(None, "train")
    drawn = [pool.batch(3, 5, {"planets": 2, "hands": 1, "text": 1}) for pool in (stored, rendered)]
    drawn += [pool.scenes("digits", 2) for pool in (stored, rendered)]
    for one, other in zip(drawn[0] + drawn[2], drawn[1] + drawn[3], strict=True):
        assert same(one, other)
    for kind in KINDS:
        configs = SourceConfig("shards", str(folder), stream=kind), SourceConfig("scenes", stream=kind)
        shards, rows = ([row() for row in open_source("scenes", config, "val").open(WHOLE)] for config in configs)
        assert len(shards) == 6 and shards == rows and [s.facts for s in shards] == [s.facts for s in rows]


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(tmp_path / "whole")
    done: list[str] = []
    to_sample = dataset.to_sample

    def dies_in_the_fourth_shard(scene: Scene) -> dict[str, Any]:
        done.append(scene.key)
        if len(done) == 4 + 2 + 4 + 1:
            raise KeyboardInterrupt
        return to_sample(scene)

    monkeypatch.setattr(dataset, "to_sample", dies_in_the_fourth_shard)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "cut")
    there = sorted(path.name for path in (tmp_path / "cut").glob("*.tar"))
    assert sorted(read_json(tmp_path / "cut" / "index.json")["shards"]) == there and len(there) == 3
    assert small(tmp_path / "cut") == 7
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip(path: Path) -> None:
    """One bit of the content; the length stays, and the tar can be read."""
    data = bytearray(path.read_bytes())
    data[data.index(b'"questions"') + 20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
def test_a_damaged_shard_is_refused_and_the_build_writes_it_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    small(tmp_path)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    victim = tmp_path / "train-hands-0001.tar"
    harm(victim)
    with pytest.raises(UserError, match=r"train-hands-0001.tar is .*: run task=build_data again"):
        ScenePool(tmp_path, "train")
    assert small(tmp_path) == 1
    for path, (content, time) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path.name not in (victim.name, "index.json"))


def test_batches_depend_on_the_step_alone_and_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no index.json"):
        ScenePool(tmp_path, "train")
    small(tmp_path)
    first, second = (ScenePool(tmp_path, "train") for _ in range(2))
    counts = {"planets": 2, "text": 1}
    second.batch(0, 1, counts)
    keys = [s.key for s in first.batch(0, 7, counts)]
    assert keys == [s.key for s in second.batch(0, 7, counts)] and len(set(keys)) == 3
    with pytest.raises(UserError, match="asks for 7 scenes of hands, the data have 6"):
        first.batch(0, 0, {"hands": 7})
    with pytest.raises(UserError, match="no shards of split 'val'"):
        ScenePool(tmp_path, "val")
    with pytest.raises(UserError, match="describes other data"):
        small(tmp_path, seed=5)
