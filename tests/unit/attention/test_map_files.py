"""Maps as files (how far values are off, how large, where they were), and the pictures and areas of their curves."""

from pathlib import Path

import numpy as np
import pytest

from vlmscope.attention import load_maps, save_maps
from vlmscope.core.artifacts import save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.graph import PictureMap, TileMap, TokenMaps, TokenTile, decode_maps, encode_maps, resample
from vlmscope.core.records import PatchBox, generator
from vlmscope.models.boxes import grid_boxes


def maps(side: int, soft: int, seed: int = 0, kind: str = "rollout") -> TokenMaps:
    values = generator(seed, "maps").exponential(size=(soft, side, side))
    tile = TokenTile(grid_boxes(side, side), np.arange(soft), values)
    return TokenMaps(kind, 0, [tile], np.zeros(soft))


@pytest.mark.parametrize("offset", [0.0, -3.0, 1e6])
def test_values_are_off_by_half_a_step_at_most(offset: float) -> None:
    values = generator(1, "values").normal(size=(50, 6, 9)) * 10.0 ** np.arange(-5, 5).repeat(5)[:, None, None] + offset
    grids = encode_maps(values)
    assert (grids.codes.dtype, grids.codes.nbytes, grids.low.nbytes + grids.step.nbytes) == (np.uint8, 50 * 54, 50 * 8)
    error = np.abs(decode_maps(grids) - values).max((1, 2))
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
