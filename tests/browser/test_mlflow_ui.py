"""A sweep in the MLflow UI: one parent, its jobs compared, its figure. The pages are those of docs/screenshots.py."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import screenshots
from playwright.sync_api import expect
from tests.browser.conftest import Watched

from vlmscope.app import main

pytestmark = pytest.mark.browser
FACTORS = (2, 4)
SWEEP = [
    "-m", "task=train_transcoders", "model=tiny", "data=mix_orrery", "data.context=32", "transcoder=arch",
    "transcoder.k=4", f"transcoder.expansion_factor={FACTORS[0]},{FACTORS[1]}", "task.tokens_per_batch=80",
    "task.pool_batches=2", "task.val_examples=6", "optim.warmup=1", "trainer.max_steps=12", "trainer.val_every=4",
    "trainer.log_every=4", "name=tiny_sweep",
]  # fmt: skip


@pytest.fixture(scope="module")
def sweep_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    assert main([*SWEEP, f"hydra.sweep.dir={folder / 'sweep'}", f"tracking.uri=sqlite:///{folder}/m.db"]) == 0
    return folder / "sweep"


@pytest.fixture(scope="module")
def sweep(sweep_dir: Path) -> screenshots.Sweep:
    return screenshots.latest_sweep(f"sqlite:///{sweep_dir.parent}/m.db", "tiny_sweep")


@pytest.fixture(scope="module")
def address(sweep_dir: Path) -> Iterator[str]:
    with screenshots.mlflow_ui(f"sqlite:///{sweep_dir.parent}/m.db") as address:
        yield address


@pytest.fixture(scope="module")
def measured(sweep_dir: Path) -> dict[str, dict[str, float]]:
    """The metrics of each job, by the name that its run should have."""
    folders = {f"expansion_factor={factor}": sweep_dir / str(job) for job, factor in enumerate(FACTORS)}
    return {name: json.loads((folder / "metrics.json").read_text()) for name, folder in folders.items()}


@pytest.fixture
def ui(open_page: Callable[[int], Watched], address: str, sweep: screenshots.Sweep) -> screenshots.Ui:
    return screenshots.Ui(open_page(screenshots.WIDTH).page, address, sweep)


def test_jobs_stand_below_their_parent_and_charts_end_at_what_was_measured(
    ui: screenshots.Ui, measured: dict[str, dict[str, float]]
) -> None:
    assert list(ui.sweep.jobs.values()) == list(measured)
    ui.page.set_viewport_size({"width": screenshots.WIDTH, "height": screenshots.HIGH})
    ui.run_list()
    expect(ui.page.get_by_text("3 matching runs")).to_be_visible()
    ui.columns("val/fvu")
    for run, name in ui.sweep.jobs.items():
        cells = ui.page.locator(f"[row-id='{run}']").all_inner_texts()
        assert any(str(measured[name]["val/fvu"]) in text for text in cells), cells
    for search, count in (("val/fvu", 3), ("layers/fvu/", 4)):
        ui.charts(search)
        drawn = ui.drawn_values()
        assert len(drawn) == count and all(search in title for title in drawn)
        for title, series in drawn.items():
            assert set(series) == set(measured), title
            for name, values in series.items():
                assert len(values) >= 3, "a curve from validation to validation"
                assert values[-1] == pytest.approx(measured[name][title]), (title, name)
                assert values[0] != values[-1], "final figures stand at the end, not at the start"


def test_the_parent_shows_the_figure_of_the_sweep(ui: screenshots.Ui, sweep_dir: Path) -> None:
    picture = ui.parent_artifact("figures/sweep.png")
    width = picture.evaluate("async image => { await image.decode(); return image.naturalWidth; }")
    assert width == 1650
    expect(ui.page.get_by_text("sweep.csv")).to_be_visible()
