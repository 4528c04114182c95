"""Pictures that others drew: what the shipped tables promise, and how an icon becomes a picture."""

import numpy as np
import pandas as pd
import pytest

from vlmscope.core.errors import UserError
from vlmscope.data import icons
from vlmscope.data.config import PairsConfig, SourceConfig
from vlmscope.data.inputs import load_pairs
from vlmscope.data.samples import WHOLE
from vlmscope.data.tables import hf_source


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {split: icons.read_icons(split) for split in ("train", "val", "test")}


def test_no_artist_and_no_picture_is_in_two_splits(tables: dict[str, pd.DataFrame]) -> None:
    drawn = {split: table[table.kind != "planet"] for split, table in tables.items()}
    artists = [set(table.artist) for table in drawn.values()]
    assert sum(map(len, artists)) == len(set.union(*artists)) == 26
    pixels = [{np.asarray(image).tobytes() for image in table.image} for table in tables.values()]
    assert sum(map(len, pixels)) == len(set.union(*pixels))


def test_each_test_concept_was_drawn_in_training_and_pictures_show_something(tables: dict[str, pd.DataFrame]) -> None:
    known = set(zip(tables["train"].kind, tables["train"].label, strict=True))
    for split, table in tables.items():
        assert set(zip(table.kind, table.label, strict=True)) <= known, split
        assert all(image.size == (64, 64) and np.asarray(image)[..., 3].mean() > 10 for image in table.image)


def test_kinds_are_selected_and_wrong_ones_refused() -> None:
    assert set(icons.read_icons("val", ["country"]).kind) == {"country"}
    with pytest.raises(UserError, match="kinds"):
        icons.read_icons("val", ["countries"])


def test_the_tables_are_a_source_of_pictures_with_labels() -> None:
    config = SourceConfig(kind="hf_image_label", path=str(icons.pictures_folder()), templates=["{label}"])
    sample = next(hf_source("icons", config, "val").open(WHOLE))()
    row = icons.read_icons("val").iloc[0]
    assert sample.exchanges[0].assistant == row.label
    assert np.array_equal(np.asarray(sample.opened().images[0]), np.asarray(icons.on_ground(row.image)))


def test_an_icon_is_rendered_in_the_middle_of_a_transparent_square(tmp_path) -> None:
    pytest.importorskip("resvg_py")
    (tmp_path / "x-flags" / "package").mkdir(parents=True)
    (tmp_path / "x-flags" / "package" / "icons.json").write_text(
        '{"width": 4, "height": 2, "aliases": {"flag-other": {"parent": "flag-red"}, "gone": {"parent": "flag-red"}},'
        ' "icons": {"flag-red": {"body": "<path fill=\\"#f00\\" d=\\"M0 0h4v2H0z\\"/>"}}}'
    )
    concepts = {
        "sets": {"x": {"package": "@x/flags@1.0.0", "licence": "MIT", "split": "test", "flag": ["flag-{name}"]}},
        "country": {"Red": "rd", "Other": "ot", "Gone": "go"},
        "spelt": {"x": {"flag-Gone": None}},
    }
    rows = [row for row in icons.render(concepts, tmp_path) if row["kind"] == "country"]
    assert [row["label"] for row in rows] == ["Red", "Other"]
    pixels = np.asarray(icons.Image.open(icons.io.BytesIO(rows[0]["image"]["bytes"])).convert("RGBA"))
    assert (pixels[20:44] == (255, 0, 0, 255)).all() and (pixels[:14, :, 3] == 0).all()


def test_pairs_of_a_relation_are_known_and_not_shared_by_splits() -> None:
    asked = icons.read_relations(["capital", "currency"])
    sides = {split: list(icons.icon_pairs(asked, split, 30)) for split in ("train", "test")}
    pairs = [{frozenset(pair[:2]) for pair in found} for found in sides.values()]
    assert len(pairs[0]) == len(pairs[1]) == 30 and not pairs[0] & pairs[1]
    assert set().union(*pairs[0], *pairs[1]) <= asked["capital"].known
    loaded = load_pairs(PairsConfig(relations=["capital", "currency"], test=30), "test")
    for pair in loaded:
        names = pair.id.split(" to ")
        assert set(names) <= asked[pair.question].known
        assert [pair.original.answer, pair.counterfactual.answer] == [asked[pair.question].answers[n] for n in names]
    assert asked["capital"].asked("France") == "Country: France\nCapital:" and icons.PICTURE in asked["capital"].asked()


def test_relations_name_shown_concepts_and_other_settings_are_refused(tables: dict[str, pd.DataFrame]) -> None:
    for name, relation in icons.read_relations().items():
        assert relation.unknown <= set(relation.answers), name
        assert len(relation.known & set(tables["test"].label)) >= len(relation.known) - 2, name
    with pytest.raises(UserError, match="relations"):
        icons.read_relations(["capitals"])
    with pytest.raises(UserError, match="one of them"):
        PairsConfig(relations=["capital"], change="planet")
