"""task=structure on a small study of the shipped model, and what users may get wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vlmscope.app import main
from vlmscope.data.orrery.dataset import build
from vlmscope.data.orrery.scenes import COMPOSED, KINDS, SPLITS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structure")
    counts = dict.fromkeys((*KINDS, *COMPOSED), 8)
    build(folder / "data", dict.fromkeys(SPLITS, counts))
    command = ["task=study", f"data.path={folder / 'data'}", f"hydra.run.dir={folder / 'study'}", "tracking=none"]
    assert main([*command, "study.samples=4", "study.top=4", "study.logits=0"]) == 0
    return folder


def test_tables_and_figures(
    made: Path, tmp_path: Path, refusal: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    named = made / "study" / "study" / "labels" / "hand.yaml"
    named.parent.mkdir()
    named.write_text("".join(f"L{layer}/{index}: a zebra\n" for layer in range(8) for index in range(2048)))
    settings = ["task.items=20", "task.per_item=6", f"hydra.run.dir={tmp_path}", "tracking=none"]
    assert main(["task=structure", f"study.path={made / 'study'}", *settings]) == 0
    assert "a zebra" in capsys.readouterr().out
    assert "other transcoders" in refusal("task=structure", f"study.path={made / 'study'}", "transcoder=random")
    features = pq.read_table(tmp_path / "structure.parquet")
    assert features.num_rows == 8 * 2048
    names = {"monosemanticity", "modality_group", "cosine_both_other_layers", "cluster"}
    assert names <= set(features.schema.names)
    clusters = pq.read_table(tmp_path / "clusters.parquet").to_pylist()
    assert all(row["size"] == len(row["features"]) >= 2 for row in clusters)
    assert any(row["name"] == "a zebra" for row in clusters), "the labels of the study"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["monosemanticity/median"] > metrics["monosemanticity/shuffled_median"]
    for name in ("modality_by_layer", "monosemanticity", "duplicates", "clusters"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 0
