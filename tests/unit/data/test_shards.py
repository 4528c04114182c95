"""Shards survive a kill, are never half-written, and hold what was put in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.data import shards
from vlmscope.data.orrery.dataset import OrreryDataConfig, ScenePool, build
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import KINDS


def small(folder: Path, **changes) -> OrreryDataConfig:
    counts = dict.fromkeys(KINDS, 6)
    return OrreryDataConfig(
        **{"folder": str(folder), "shard_size": 4, "train": counts, "val": {}, "test": {}} | changes
    )


def test_scenes_come_back_as_they_were(tmp_path: Path) -> None:
    assert build(small(tmp_path)) == 10
    pool = ScenePool(tmp_path, "train")
    for kind in KINDS:
        for index, scene in enumerate(pool.scenes(kind)):
            original = make_scene("train", kind, index)
            assert scene.questions == original.questions
            assert scene.facts == original.facts
            assert (scene.image is None) == (original.image is None)
            if scene.image is not None and original.image is not None:
                assert np.array_equal(scene.image, original.image)


def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(small(tmp_path / "whole"))
    write = shards._write_shard
    done: list[str] = []

    def dies_at_the_fourth(path: Path, plan, make):
        if len(done) == 3:
            with shards.atomic_path(path) as temporary:
                temporary.write_bytes(b"half a shard")
                raise KeyboardInterrupt
        done.append(plan.name)
        return write(path, plan, make)

    monkeypatch.setattr(shards, "_write_shard", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        build(small(tmp_path / "cut"))
    assert sorted(p.name for p in (tmp_path / "cut").glob("*.tar")) == sorted(done)
    assert set(read_json(tmp_path / "cut" / "index.json")["shards"]) == set(done)
    monkeypatch.setattr(shards, "_write_shard", write)
    assert build(small(tmp_path / "cut")) == 7
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
    build(small(tmp_path))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    victim = tmp_path / "train-hands-0001.tar"
    harm(victim)
    with pytest.raises(UserError, match=r"train-hands-0001.tar is .*: run task=build_data again"):
        ScenePool(tmp_path, "train")
    assert build(small(tmp_path)) == 1
    for path, (content, time) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == time) == (path.name not in (victim.name, "index.json"))


def test_other_data_in_the_folder_are_refused(tmp_path: Path) -> None:
    build(small(tmp_path))
    with pytest.raises(UserError, match="describes other data"):
        build(small(tmp_path, seed=5))


def test_missing_index_kind_and_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no index.json"):
        ScenePool(tmp_path, "train")
    build(small(tmp_path))
    with pytest.raises(UserError, match="no shards of split 'val'"):
        ScenePool(tmp_path, "val")
    next(tmp_path.glob("train-hands-*.tar")).unlink()
    with pytest.raises(UserError, match="is in the index but missing"):
        ScenePool(tmp_path, "train")


def test_batches_depend_on_the_step_alone(tmp_path: Path) -> None:
    build(small(tmp_path))
    counts = {"planets": 2, "text": 1}
    first, second = (ScenePool(tmp_path, "train") for _ in range(2))
    second.batch(0, 1, counts)
    keys = [s.key for s in first.batch(0, 7, counts)]
    assert keys == [s.key for s in second.batch(0, 7, counts)]
    assert len(set(keys)) == 3


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    build(small(tmp_path))
    with pytest.raises(UserError, match="asks for 7 scenes of hands, the data have 6"):
        ScenePool(tmp_path, "train").batch(0, 0, {"hands": 7})
