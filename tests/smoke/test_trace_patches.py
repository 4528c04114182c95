"""`task=trace attribution.patches=true`: what the files say agrees, odd pictures pass, mistakes are one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmscope.app import main
from vlmscope.attribution.vision import load_maps
from vlmscope.data.orrery.rendering import make_scene

QUESTION = "which shape is this ?"


def traced(folder: Path, *pictures: Path, model: str = "orrery", more: tuple[str, ...] = ()) -> int:
    images = "image=[" + ",".join(map(str, pictures)) + "]" if pictures else "image=null"
    prompt = QUESTION if model == "orrery" else "what is this red planet ?"
    names = [f"model={model}", f"prompt={prompt}", images, f"hydra.run.dir={folder}", "tracking=none"]
    return main(["task=trace", "attribution.patches=true", "attribution.max_nodes=100", *names, *more])


def test_files_and_metrics_agree(tmp_path: Path) -> None:
    image = make_scene("test", "shapes", 3).image
    assert image is not None
    Image.fromarray(image).save(tmp_path / "x.png")
    assert traced(tmp_path / "r", tmp_path / "x.png") == 0
    record = json.loads((tmp_path / "r" / "graph.json").read_text())["vlmscope"]["patches"]
    maps = load_maps(tmp_path / "r" / record["file"], record["maps"])
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["graph/patch_residual"] == max(one["residual"] for one in record["maps"]) < 1e-5
    for found, one in zip(maps, record["maps"], strict=True):
        (tile,) = found.tiles
        assert tile.values.shape == (8, 8) and len(tile.boxes) == 64
        scale = np.abs(tile.values).sum() + sum(map(abs, found.remainder.values()))
        assert abs(found.edge - found.from_patches - sum(found.remainder.values())) < 1e-3 * scale  # float16
        assert abs(found.raster(64, 64).sum() - one["from_patches"]) < 1e-3 * scale
    assert (tmp_path / "r" / "figures" / "patches.png").stat().st_size > 5000


def test_two_pictures_have_a_map_each(tmp_path: Path) -> None:
    for number in range(2):
        Image.new("RGB", (30 + number, 40), (200, 40 * number, 10)).save(tmp_path / f"{number}.png")
    pictures = (tmp_path / "0.png", tmp_path / "1.png")
    assert (
        traced(tmp_path / "r", *pictures, model="tiny", more=("model.family=qwen3_vl", "attribution.max_logits=2")) == 0
    )
    record = json.loads((tmp_path / "r" / "graph.json").read_text())["vlmscope"]["patches"]
    assert [one["picture"] for one in record["maps"]] == [0, 1, 0, 1]
    assert max(one["residual"] for one in record["maps"]) < 1e-5


@pytest.mark.parametrize("mode", ["L", "RGBA", "1x1", "huge"])
def test_odd_pictures_are_followed(tmp_path: Path, mode: str) -> None:
    sizes = {"1x1": (1, 1), "huge": (4000, 2500)}
    Image.new("RGB" if mode in sizes else mode, sizes.get(mode, (40, 50))).save(tmp_path / "x.png")
    assert traced(tmp_path / "r", tmp_path / "x.png", more=("task.figure=true",)) == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["graph/patch_residual"] < 1e-5


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("attribution.patch_baseline=black",), "patch_baseline"),
        (("attribution.patch_rule=lrp",), "patch_rule"),
        (("attribution.patch_effect=some",), "patch_effect"),
        (("image=null",), "needs a picture"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    pictures = () if "image=null" in more else (tmp_path / "x.png",)
    assert traced(tmp_path / "r", *pictures, more=() if "image=null" in more else more) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0]
