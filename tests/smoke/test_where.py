"""`task=where`: what the files say agrees, every family with a tower passes, mistakes are one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmscope.app import main
from vlmscope.attention import load_maps
from vlmscope.data.orrery.rendering import make_scene

QUESTION = "which shape is this ?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "shapes.png"
    image = make_scene("test", "shapes", 3, seed=5).image
    assert image is not None
    Image.fromarray(image).save(path)
    return path


def asked(task: str, folder: Path, picture: Path, *more: str) -> int:
    return main([f"task={task}", f"image={picture}", f"hydra.run.dir={folder}", "tracking=none", *more])


def test_maps_metrics_and_records_agree(picture: Path, tmp_path: Path) -> None:
    more = ("task.top=2", f"prompt={QUESTION}", "where.pool=mean")
    assert asked("where", tmp_path, picture, *more, "task.curves=true", "where.draws=1", "where.counts=[8]") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    record = json.loads((tmp_path / "where.json").read_text())
    maps = load_maps(tmp_path / record["maps"])
    assert (tmp_path / "maps.safetensors").stat().st_size == pytest.approx(1000 * metrics["where/maps_kb"])
    assert [m.kind for m in maps.tokens] == ["rollout", "similarity"]
    rollout = maps.tokens[0].tiles[0]
    assert rollout.values.shape == (16, 8, 8)
    assert rollout.values.sum((1, 2)) == pytest.approx(np.ones(16), abs=0.05)
    names = [(one["feature"], one["kind"]) for one in record["order"]]
    kinds = ("rollout", "similarity", "vision_path", "activation")
    assert names == [(feature, kind) for feature in record["features"] for kind in kinds]
    by_name = dict(zip(names, maps.targets, strict=True))
    for feature, found in record["features"].items():
        key = f"where/{feature.replace('/', '_')}"
        total = metrics[f"{key}/activation"]
        assert 0 < total <= sum(found["activations"].values()) + 1e-6  # that of words too
        assert metrics[f"{key}/path_residual"] < 1e-5
        own = by_name[feature, "activation"]
        assert own.from_patches == pytest.approx(total, rel=0.01) and own.edge == pytest.approx(total)
        assert by_name[feature, "rollout"].edge == pytest.approx(total, rel=1e-4)  # rows sum to 1
        for kind in (*kinds, "random"):
            assert 0 <= metrics[f"{key}/{kind}/deletion"] < 3 and 0 <= metrics[f"{key}/{kind}/insertion"] < 3
    assert (tmp_path / "figures" / "where.png").stat().st_size > 5000
