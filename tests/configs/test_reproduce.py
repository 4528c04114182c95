"""What task=reproduce runs: every tagged experiment states few numbers with ranges that say something, and composes."""

import shutil
from pathlib import Path

import pytest
from tests.configs.composing import composed

from vlmscope.config import catalog
from vlmscope.config.catalog import asset, conf_dir
from vlmscope.tasks.reproduce import work_digest

TAGGED = sorted(catalog.reproducible([conf_dir()]))


def test_experiments_that_train_are_not_tagged() -> None:
    assert {"mars_earth_patch", "six_fingers", "cross_modal", "visual_arithmetic"} <= set(TAGGED)
    for name in TAGGED:
        assert composed(f"experiment={name}").task.name == "experiment", name


@pytest.mark.parametrize("name", TAGGED)
def test_a_tagged_experiment_states_ranges_that_can_be_missed(name: str) -> None:
    app = composed(f"experiment={name}")
    assert app.reproduce and app.name == name and 2 <= len(app.headline) <= 6
    for metric, wanted in app.headline.items():
        assert wanted.says.strip() and (wanted.low, wanted.high) != (0, 1), metric
    # Where nothing happens, as with edits that are not applied, some number must be missed.
    assert any(wanted.low > 0 or wanted.high < 0 for wanted in app.headline.values())
    assert app.report


def test_other_content_of_a_file_of_ones_own_is_other_work(tmp_path: Path) -> None:
    picture, model = tmp_path / "a.png", tmp_path / "model"
    picture.write_bytes(b"one")
    shutil.copytree(asset("orrery"), model)
    given = [f"experiment={TAGGED[0]}", f"model.path={model}", f"images.mine=[{picture}]"]
    before = work_digest("", composed(*given))
    assert before == work_digest("", composed(*given))
    for file in (picture, model / "tokenizer_config.json"):
        was = file.read_bytes()
        file.write_bytes(was[:-1] + b" ")
        assert work_digest("", composed(*given)) != before, file
        file.write_bytes(was)
