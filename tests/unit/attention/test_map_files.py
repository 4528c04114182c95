"""Maps as files (how far values are off, how large, where they were), and the pictures and areas of their curves."""

from pathlib import Path

import numpy as np
import pytest

from vlmscope.attention import CELLS, Painted, cell_values, load_maps, ranking, save_maps
from vlmscope.core.artifacts import save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.maps import PictureMap, TileMap, TokenMaps, TokenTile, coarse_shape, decode, encode, resample
from vlmscope.core.records import PatchBox, generator
from vlmscope.metrics.prediction import area_under, pointing_hit
from vlmscope.metrics.rates import bootstrap_mean
from vlmscope.models.boxes import grid_boxes


def maps(side: int, soft: int, seed: int = 0, kind: str = "rollout") -> TokenMaps:
    values = generator(seed, "maps").exponential(size=(soft, side, side))
    tile = TokenTile(grid_boxes(side, side), np.arange(soft), values)
    return TokenMaps(kind, 0, [tile], np.zeros(soft))


@pytest.mark.parametrize("offset", [0.0, -3.0, 1e6])
def test_values_are_off_by_half_a_step_at_most(offset: float) -> None:
    values = generator(1, "values").normal(size=(50, 6, 9)) * 10.0 ** np.arange(-5, 5).repeat(5)[:, None, None] + offset
    grids = encode(values)
    assert (grids.codes.dtype, grids.codes.nbytes, grids.low.nbytes + grids.step.nbytes) == (np.uint8, 50 * 54, 50 * 8)
    error = np.abs(decode(grids) - values).max((1, 2))
    bound = (values.max((1, 2)) - values.min((1, 2))) / 510
    rounding = 3e-7 * np.abs(values).max((1, 2))  # of float32
    assert (error <= bound + rounding).all()
    if not offset:
        assert (error > 0.8 * bound).any()  # the bound is no idle one


@pytest.mark.parametrize("old,new", [((8, 8), (4, 4)), ((64, 64), (15, 15)), ((3, 7), (2, 5)), ((4, 4), (4, 4))])
def test_resampling_keeps_the_sum_and_the_place(old: tuple[int, int], new: tuple[int, int]) -> None:
    values = generator(2, "old").normal(size=(3, *old))
    found = resample(values, *new)
    assert found.shape == (3, *new)
    assert found.sum((1, 2)) == pytest.approx(values.sum((1, 2)))
    if old == (8, 8):
        assert found == pytest.approx(values.reshape(3, 4, 2, 4, 2).sum((2, 4)))
    spot = np.zeros(old)
    spot[-1, 0] = 1.0
    assert np.unravel_index(resample(spot, *new).argmax(), new) == (new[0] - 1, 0)


@pytest.mark.parametrize("shape", [(64, 64), (30, 90), (1, 1000), (1000, 1), (3, 400), (15, 15), (27, 27), (7, 211)])
def test_coarse_grids_fit(shape: tuple[int, int]) -> None:
    rows, columns = coarse_shape(*shape, CELLS)
    assert rows * columns <= CELLS and 1 <= rows <= shape[0] and 1 <= columns <= shape[1]
    if shape[0] * shape[1] <= CELLS:
        assert (rows, columns) == shape
    if shape == (64, 64):
        assert (rows, columns) == (15, 15)


def test_a_picture_of_256_soft_tokens_and_4096_patches_is_at_most_64_kb(tmp_path: Path) -> None:
    size = save_maps(tmp_path / "maps.safetensors", tokens=[maps(64, 256)])
    assert 50_000 < size == (tmp_path / "maps.safetensors").stat().st_size <= 64_000
    study = save_maps(tmp_path / "study.safetensors", tokens=[maps(64, 256, seed) for seed in range(3)])
    assert study <= 3 * 64_000
    found = load_maps(tmp_path / "maps.safetensors").tokens[0]
    wanted = resample(maps(64, 256).tiles[0].values, 15, 15)
    bound = np.ptp(wanted, axis=(1, 2)) / 510 + 1e-5
    assert (np.abs(found.tiles[0].values - wanted).max((1, 2)) <= bound).all()
    assert found.tiles[0].boxes[16] == pytest.approx(grid_boxes(15, 15)[16])


def test_maps_come_back_as_they_were(tmp_path: Path) -> None:
    rng = generator(3, "target")
    window = PatchBox(-0.1, 0.0, 1.2, 0.7)
    tiles = [
        TileMap(grid_boxes(4, 6, window), rng.normal(size=(4, 6))),
        TileMap(grid_boxes(2, 2), rng.normal(size=(2, 2))),
    ]
    target = PictureMap("L3/5", 1, tiles, 2.5, {"bias": 0.5})
    part = TokenTile(grid_boxes(5, 5), np.array([2, 7]), rng.uniform(size=(2, 5, 5)))
    tokens = TokenMaps("similarity", 1, [part], rng.uniform(size=9))
    save_maps(tmp_path / "m.safetensors", [target], [tokens])
    (found,), (back,) = load_maps(tmp_path / "m.safetensors")
    assert (found.target, found.picture, found.edge, found.remainder) == ("L3/5", 1, 2.5, {"bias": 0.5})
    for one, other in zip(found.tiles, tiles, strict=True):
        assert np.array(one.boxes) == pytest.approx(np.array(other.boxes), abs=1e-6)
        assert one.values == pytest.approx(other.values, abs=np.ptp(other.values) / 510 + 1e-6)
    assert (back.kind, back.picture) == ("similarity", 1)
    assert back.class_token == pytest.approx(tokens.class_token, abs=1e-6)
    assert np.array_equal(back.tiles[0].tokens, [2, 7])
    assert back.tiles[0].values == pytest.approx(part.values, abs=1 / 510 + 1e-6)


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": np.zeros(2)})
    with pytest.raises(UserError, match="holds no maps of this layout"):
        load_maps(tmp_path / "x.safetensors")


def test_cells_have_what_lies_in_them() -> None:
    values = generator(0, "cells").normal(size=(4, 4))
    found = PictureMap("x", 0, [TileMap(grid_boxes(4, 4), values)], 0.0, {})
    assert cell_values(found, 4) == pytest.approx(values)
    assert cell_values(found, 2) == pytest.approx(values.reshape(2, 2, 2, 2).sum((1, 3)))
    fine = cell_values(found, 8)
    assert fine == pytest.approx(np.kron(values, np.full((2, 2), 0.25)))


def test_the_largest_come_first_and_equals_in_no_order_of_their_own() -> None:
    values = np.array([[1.0, 5.0], [-2.0, 3.0]])
    assert ranking(values, 0).tolist() == [1, 3, 0, 2]
    flat = [ranking(np.ones((4, 4)), seed).tolist() for seed in range(3)]
    assert all(sorted(order) == list(range(16)) for order in flat)
    assert len({tuple(order) for order in flat}) == 3 and flat[0] == ranking(np.ones((4, 4)) + 1e-13, 0).tolist()


def test_deleted_cells_are_grey_and_inserted_ones_are_all_that_is_left() -> None:
    image = generator(1, "image").integers(0, 256, (12, 20, 3)).astype(np.uint8)
    mean = image.mean((0, 1)).round().astype(np.uint8)
    order = np.array([3, 0, 2, 1])
    found = Painted(image, order, 2, [1, 3])
    deleted, inserted = list(found.deleted()), list(found.inserted())
    assert found.counts == (0, 1, 3, 4)
    assert np.array_equal(deleted[0], image) and np.array_equal(inserted[-1], image)
    assert (deleted[-1] == mean).all() and (inserted[0] == mean).all()
    one, other = deleted[1], inserted[1]
    assert (one[6:, 10:] == mean).all() and np.array_equal(other[6:, 10:], image[6:, 10:])
    assert np.array_equal(one[:6], image[:6]) and (other[:6] == mean).all()
    assert np.array_equal(deleted[2][:6, 10:], image[:6, 10:])  # the cell that goes last
    assert (deleted[2][:6, :10] == mean).all()


def test_areas_hits_and_means() -> None:
    assert area_under(np.array([0, 1, 4]), np.array([[2.0, 2, 2], [0, 1, 1]])) == pytest.approx([2, (0.5 + 3) / 4])
    on = np.array([[True, False], [False, False]])
    assert pointing_hit(np.array([[3.0, 1], [0, 2]]), on) == 1
    assert pointing_hit(np.array([[3.0, 4], [0, 2]]), on) == 0
    assert pointing_hit(np.zeros((2, 2)), on) == on.mean()
    values = generator(2, "means").normal(size=400) + 3
    rate = bootstrap_mean(values, control=1.5)
    spread = 1.96 * values.std() / 20
    assert rate.value == pytest.approx(values.mean()) and rate.control == 1.5 and rate.cases == 400
    assert rate.ci_low == pytest.approx(values.mean() - spread, abs=0.02)
    assert rate.ci_high == pytest.approx(values.mean() + spread, abs=0.02)
    with pytest.raises(ValueError, match="at least one case"):
        bootstrap_mean([])
