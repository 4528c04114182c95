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
    counts = dict.fromkeys((*KINDS, *COMPOSED), 4)
    build(folder / "data", dict.fromkeys(SPLITS, counts))
    command = ["task=study", f"data.path={folder / 'data'}", f"hydra.run.dir={folder / 'study'}", "tracking=none"]
    assert main([*command, "study.samples=4", "study.top=4", "study.logits=0"]) == 0
    return folder


def test_table_and_figure(
    made: Path, tmp_path: Path, refusal: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["task.items=20", f"hydra.run.dir={tmp_path}", "tracking=none"]
    assert main(["task=structure", f"study.path={made / 'study'}", *settings]) == 0
    assert "duplicates write own layer" in capsys.readouterr().out
    assert "other transcoders" in refusal("task=structure", f"study.path={made / 'study'}", "transcoder=random")
    features = pq.read_table(tmp_path / "structure.parquet")
    assert features.num_rows == 8 * 2048
    assert {"monosemanticity", "modality_group", "cosine_both_other_layers"} <= set(features.schema.names)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["monosemanticity/median"] > metrics["monosemanticity/shuffled_median"]
    assert (tmp_path / "figures" / "modality_by_layer.png").stat().st_size > 0
