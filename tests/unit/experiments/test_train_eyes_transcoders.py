"""The script that writes training data for transcoders of a model with eyes."""

import runpy
from pathlib import Path

import pytest


def test_a_wrong_folder_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "experiments/train_eyes_transcoders.py"
    monkeypatch.setattr("sys.argv", [script, str(tmp_path / "nothing"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and "nothing" in line
