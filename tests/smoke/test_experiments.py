"""Mistakes in an experiment are told before its first step; that each runs, and what it finds, is in `tests/golden`."""

from pathlib import Path

import pytest

from vlmscope.app import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["experiment=mars_earth_patch", "+images.mars=[/no/mars.png]"], "/no/mars.png: no such file"),
        (["experiment=find_circuits", "pairs.train=0"], "pairs.train=0 leaves no pair to choose a circuit by"),
        (["experiment=captioning", "analysis.swaps.mars_to_earth=[planet,mars]"], "[change, original, counterfactual]"),
        (["experiment=captioning", "analysis.swaps.mars_to_earth=[planet,mars,pink]"], "no value 'pink'"),
        (["experiment=captioning", "trials.steer.gate=0"], "trials: gate=0"),
    ],
)
def test_mistakes_are_told_before_any_step(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*arguments, f"hydra.run.dir={run_dir}", "tracking=none"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in error
    assert not [path for path in run_dir.rglob("*") if path.suffix not in (".yaml", ".log")]
