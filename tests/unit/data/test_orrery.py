"""Scenes are seeded, show what they say, share nothing between splits, and survive being stored as shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiments.hierarchy import APPEARANCE, appearance

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.data import mixing
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import open_source
from vlmscope.data.orrery import dataset
from vlmscope.data.orrery.dataset import (
    ScenePool,
    build,
    colour_scenes,
    concept_scenes,
    counted_scenes,
    covered,
    digit_scenes,
    harder_scenes,
    object_mask,
    painted_mask,
    scene_shards,
)
from vlmscope.data.orrery.rendering import degrade, glyphs, make_scene, planet_scene
from vlmscope.data.orrery.scenes import (
    COMPOSED,
    KINDS,
    NUMBERS,
    PICTURED,
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
from vlmscope.models.boxes import grid_boxes


def image_of(scene: Scene) -> np.ndarray:
    assert scene.image is not None
    return scene.image


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


def test_orrery_2_adds_its_words_at_the_end() -> None:
    old, new = vocabulary(), vocabulary((*KINDS, *COMPOSED))
    assert new[: len(old)] == old and new[len(old) :] == ["larger", "no", "yes"]


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


def test_answers_that_are_not_there_are_as_frequent() -> None:
    for kind, group in (("objects", "exists"), ("duets", "present")):
        answers = [make_scene("val", kind, index).answer(group) for index in range(120)]
        assert answers.count("yes") / 120 == pytest.approx(0.5, abs=0.12)


def test_glyphs_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    whole = load_digits()
    for split in SPLITS:
        for digit, (pictures, sources) in enumerate(zip(*glyphs(split), strict=True)):
            assert (whole.target[sources] == digit).all()  # pyright: ignore[reportAttributeAccessIssue]
            assert (whole.images[sources] / 16 == pictures).all()  # pyright: ignore[reportAttributeAccessIssue]


def test_splits_use_different_glyphs() -> None:
    sources = {split: {int(i) for part in glyphs(split)[1] for i in part} for split in SPLITS}
    assert sum(map(len, sources.values())) == len(set.union(*sources.values())) == 1797


def test_hands_are_mostly_of_five_and_never_of_six() -> None:
    counts = [make_scene("train", "hands", i).facts["fingers"] for i in range(300)]
    assert counts.count("five") / 300 == pytest.approx(0.9, abs=0.06)
    assert set(counts) == {"one", "two", "three", "four", "five"}


@pytest.mark.parametrize("name", list(PLANETS))
def test_planet_box_holds_the_planet(name: str) -> None:
    scene = planet_scene(generator(5, name), name)
    left, top, right, bottom = (round(v * SIDE) for v in np.asarray(scene.facts["box"]))
    assert 0 <= left < right <= SIDE
    assert image_of(scene)[top:bottom, left:right].mean() > image_of(scene).mean()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("planets", ["name", "", "", "colour", "", "", "", "cover", ""]),
        ("digits", ["", "", "", "first", "", "second", ""]),
        ("shapes", ["count", "shape_colour", "shape", ""]),
        ("hands", ["", "", "", "fingers", "", ""]),
    ],
)
def test_words_of_captions_name_facts(kind: str, expected: list[str]) -> None:
    for index in range(12):
        scene = make_scene("test", kind, index)
        caption = scene.answer("caption").split()
        # "two digits , two and three": a number may stand for either, so that only the facts' own places count.
        if kind != "digits" or "two" not in caption[3:]:
            assert list(scene.facts_named(caption)) == expected


def test_appearance_is_measured_on_the_disc() -> None:
    names = ("mars", "earth", "neptune", "moon")
    looks = {name: np.mean([appearance(s) for s in concept_scenes(name, "train", 12)], 0) for name in names}
    red, texture = APPEARANCE.index("red"), APPEARANCE.index("texture")
    assert looks["mars"][red] > looks["moon"][red] > looks["neptune"][red]
    assert looks["earth"][texture] > looks["neptune"][texture]  # continents against an even disc
    scene = concept_scenes("mars", "train", 1)[0]
    left, _, right, _ = np.asarray(scene.facts["box"])
    assert appearance(scene)[APPEARANCE.index("size")] == pytest.approx((right - left) / 2)
    lighter = np.minimum(image_of(scene) * 1.0 + 20, 255).astype(np.uint8)
    assert appearance(Scene(scene.kind, scene.key, lighter, scene.facts))[0] > appearance(scene)[0]


@pytest.mark.parametrize("kind", PICTURED)
def test_objects_stand_out_from_what_is_around_them(kind: str) -> None:
    for index in range(6):
        scene = make_scene("test", kind, index, 7)
        mask = object_mask(scene)
        assert mask.shape == (64, 64) and 0.02 < mask.mean() < 0.9
        far = np.abs(image_of(scene).astype(float) - np.median(image_of(scene)[~mask], axis=0)).max(-1)
        assert far[mask].mean() > 5 * far[~mask].mean()


def test_a_digit_can_be_asked_for_alone() -> None:
    scene = make_scene("test", "digits", 0, 7)
    first, second, both = (object_mask(scene, group) for group in ("first", "second", "sum"))
    assert not first[:, 32:].any() and not second[:, :32].any() and first.any() and second.any()
    assert np.array_equal(first | second, both)


def test_a_box_counts_from_a_quarter_on() -> None:
    mask = np.zeros((8, 8), bool)
    mask[0, :4], mask[4:6, 4:6] = True, True
    assert covered(mask, grid_boxes(2, 2)).tolist() == [True, False, False, True]
    mask[0, 0] = False
    assert covered(mask, grid_boxes(2, 2)).tolist() == [False, False, False, True]


def test_painted_pixels_lie_in_the_boxes() -> None:
    scene = make_scene("test", "shapes", 3)
    painted = painted_mask(image_of(scene))
    assert painted.any()
    assert (painted & ~object_mask(scene)).mean() < 0.01  # a turned cross reaches a little out of its box


def test_counted_scenes_are_balanced_and_painted_as_they_say() -> None:
    pixels, facts = counted_scenes("test", 60, 0)
    count, shape, _ = facts.T
    assert np.bincount(count)[1:].tolist() == [10] * 6
    assert np.bincount(shape).tolist() == [12] * len(SHAPES)
    assert np.corrcoef(count, [painted_mask(one).sum() for one in pixels])[0, 1] > 0.8
    assert not np.array_equal(pixels[0], counted_scenes("train", 1, 0)[0][0])


def test_harder_scenes_are_test_scenes_with_their_answers() -> None:
    counts = {"planets": 2, "digits": 1, "shapes": 1, "hands": 12}
    scenes, again = (harder_scenes(counts, (0.2, 0.5), seed=4) for _ in range(2))
    assert all(map(same, scenes, again)) and len({scene.key for scene in scenes}) == 16
    assert [scene.key for scene in scenes[:2]] == ["test-planets-000000", "test-planets-000001"]
    for scene in scenes:
        level = scene.facts["level"]
        assert isinstance(level, float) and 0.2 <= level <= 0.5
        assert all(" " not in question.answer for question in scene.questions)  # captions are left out
    easy = make_scene("test", "planets", 1, 4)
    assert [q.answer for q in scenes[1].questions] == [q.answer for q in easy.questions[:3]]
    assert {scene.questions[0].answer for scene in scenes[4:]} == {"five", "six"}
    assert not same(scenes[0], harder_scenes(counts, (0.2, 0.5), seed=5)[0])


def test_a_level_makes_the_picture_smaller_darker_and_noisy() -> None:
    image, rng = image_of(make_scene("test", "shapes", 3)), np.random.default_rng
    np.testing.assert_array_equal(degrade(image, 0.0, rng(0)), image)
    hard = degrade(image, 1.0, rng(0))
    assert hard.shape == image.shape and hard.dtype == np.uint8
    assert hard.max() < image.max()
    corner = degrade(np.full_like(image, 128), 1.0, rng(1)).astype(float) / 255
    assert corner.mean() == pytest.approx(0.3 * 128 / 255, abs=0.02)  # clipping at black lifts it a little
    assert 0.08 < corner.std() < 0.12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_scene("dev", "planets", 0), "unknown split"),
        (lambda: make_scene("train", "cats", 0), "unknown scene kind"),
        (lambda: digit_scenes("three", "test", 1, second="ten"), "no digit 'ten'"),
        (lambda: colour_scenes("orange", "test", 1), "no colour of shapes 'orange'"),
        (lambda: harder_scenes({"text": 1}, (0, 1)), "no harder scenes of 'text': choose from planets"),
    ],
)
def test_unknown_words_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        call()


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
    monkeypatch.setattr(dataset, "COUNTS", counts)
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
        shards, scenes = ([row() for row in open_source("scenes", config, "val").open(WHOLE)] for config in configs)
        assert len(shards) == 6 and shards == scenes and [s.facts for s in shards] == [s.facts for s in scenes]


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
