"""The notebooks: as committed they show what they should, and they run."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 400_000  # bytes: outputs are read on GitHub, and pictures are small


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there_and_small(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(str(FOLDER.parent) not in str(output) for output in outputs)  # no path of one machine


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, as a kernel does it: cells in one namespace, the last expression of each shown."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code":
            continue
        *body, last = ast.parse(cell.source).body
        ends = isinstance(last, ast.Expr)
        exec(compile(ast.Module(body if ends else [*body, last], []), path, "exec"), names)
        value = eval(compile(ast.Expression(last.value), path, "eval"), names) if isinstance(last, ast.Expr) else None
        shown = {} if value is None else DisplayFormatter().format(value)[0]
        committed = {kind for output in cell.outputs for kind in output.get("data", {})}
        assert shown.keys() - {"image/jpeg"} == committed - {"image/jpeg"}, cell.source
