"""Every Python snippet of README and docs runs as it is written, on the shipped model."""

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest

import vlmscope
from vlmscope.config.catalog import asset

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
DOCUMENTS = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
             if BLOCK.search(path.read_text(encoding="utf-8"))]  # fmt: skip
NETWORK = ("push_to_hub",)  # of a block with these only the imports run
MINE = {"/my/a.png": "mars.png", "/my/b.png": "earth.png", "/my/": f".{os.sep}"}
QUESTION = "what planet is this ?"


@pytest.fixture(scope="module")
def orrery() -> Any:
    return vlmscope.load(check=False)


@pytest.fixture(scope="module")
def place(orrery: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents' readers have: the shipped files, pictures, a trace of two rows, a study."""
    folder = tmp_path_factory.mktemp("snippets")
    (folder / "assets").symlink_to(Path(asset("pictures")).parent)
    for name in ("mars", "earth"):
        (folder / f"{name}.png").symlink_to(asset(f"pictures/{name}.png"))
        traced = vlmscope.trace(orrery, QUESTION, asset(f"pictures/{name}.png"), max_nodes=100)
        traced.save(folder / "outputs" / "planets" / "rows" / f"{name}_0")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text('{"text": "this planet is mars"}\n{"text": "this planet is earth"}\n')
    study = vlmscope.study_data(orrery, folder / "data", folder / "outputs" / "study" / "...", top=2, samples=0)
    assert study.info.items == 2
    return folder


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_snippets_run(document: Path, orrery: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one namespace; the model that a reader would load is the shipped one."""
    monkeypatch.setattr("vlmscope.api.load", lambda *_, **__: orrery)
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    for code in BLOCK.findall(document.read_text(encoding="utf-8")):
        tree = ast.parse(code)
        if any(word in code for word in NETWORK):
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        mine = ast.unparse(tree)
        for theirs, ours in MINE.items():
            mine = mine.replace(theirs, ours)
        exec(compile(mine, str(document), "exec"), names)
