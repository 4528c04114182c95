"""The study that comes with Orrery 2: it fits model and transcoders, is found by their weights, and names features."""

import shutil
from pathlib import Path

from vlmscope.config.catalog import asset
from vlmscope.features.shipped import shipped_study
from vlmscope.features.study_files import StudyFolder
from vlmscope.transcoders.formats import load_set

MODEL, TRANSCODERS, STUDY = Path(asset("orrery2")), Path(asset("orrery2_transcoders")), Path(asset("orrery2_study"))


def test_the_shipped_study_is_of_the_shipped_model_and_transcoders() -> None:
    """Where this fails after a change of weights: `make study`."""
    assert shipped_study(MODEL, TRANSCODERS) == STUDY
    study = StudyFolder(STUDY)
    assert study.info.model == MODEL.name and study.info.n_features == load_set(TRANSCODERS).widths
    assert sum(path.stat().st_size for path in STUDY.rglob("*") if path.is_file()) < 5e6


def test_another_set_is_not_called_by_the_labels_of_this_one(tmp_path: Path) -> None:
    retrained = Path(shutil.copytree(TRANSCODERS, tmp_path / TRANSCODERS.name))
    assert shipped_study(MODEL, retrained) == STUDY  # moved, but the same
    weights = bytearray((retrained / "layer_3.safetensors").read_bytes())
    weights[-1] ^= 1
    (retrained / "layer_3.safetensors").write_bytes(weights)
    assert shipped_study(MODEL, retrained) is None
    assert shipped_study(tmp_path / "another_model", TRANSCODERS) is None
