"""`experiment=./mine.yaml`: a file outside the clone, its paths, what it starts from, its Python, and its mistakes."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmscope.app import main
from vlmscope.config.catalog import adopt, module_file, own_files
from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError
from vlmscope.data.inputs import pictures_of_folders

MINE = """
# What becomes of Jupiter?
defaults: [/experiment/mars_earth_patch, _self_]
circuit: {concepts: [jupiter, saturn]}
images: {jupiter: jupiter.png, saturn: [./saturn.png, /elsewhere/saturn.png]}
study: {path: ../study}
"""


def composed(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--cfg", "job"]) == 0
    (tmp_path / "composed.yaml").write_text(capsys.readouterr().out)
    return read_yaml(tmp_path / "composed.yaml")


def test_a_file_starts_from_a_shipped_experiment_and_its_paths_are_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my experiments"
    folder.mkdir()
    file = folder / "mars_earth_patch.yaml"  # a name that a shipped experiment has too
    file.write_text(MINE)
    monkeypatch.chdir(folder)
    cfg = composed(capsys, tmp_path, "experiment=./mars_earth_patch.yaml", "intervention.pictures=7")
    assert cfg["circuit"]["concepts"] == ["jupiter", "saturn"] and cfg["circuit"]["per_layer"]["image"] > 0
    assert cfg["trials"]["steer"]["do"] == "exchange" and cfg["intervention"]["pictures"] == 7
    assert cfg["images"] == {
        "jupiter": [str(folder / "jupiter.png")],
        "saturn": [str(folder / "saturn.png"), "/elsewhere/saturn.png"],
    }
    assert Path(cfg["study"]["path"]).resolve() == tmp_path / "study"
    assert (cfg["name"], Path(cfg["experiment_file"])) == ("mars_earth_patch", file)
    assert module_file(cfg["experiment_file"]) is None
    file.with_suffix(".py").write_text("def analyse(bench): return {}")
    assert module_file(cfg["experiment_file"]) == file.with_suffix(".py")
    file.write_text("defaults: [/experiment/captioning, _self_]\nname: other")
    file.with_suffix(".py").unlink()
    found = module_file(str(file))
    assert found is not None and found.name == "captioning.py"
    (folder / "mine").mkdir()
    mine = folder / "mine" / file.name
    mine.write_text("defaults: [../mars_earth_patch.yaml, _self_]\nanalysis: {others: 3}")
    cfg = composed(capsys, tmp_path, f"experiment={mine}")
    assert (cfg["name"], cfg["analysis"]["others"], cfg["analysis"]["new_tokens"]) == ("mars_earth_patch", 3, 16)
    assert module_file(mine) == found


def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    for body, says in (
        (None, "no such file"),
        ("- a list", "holds no settings"),
        ("circuits: {}", "circuits"),
        ("defaults: [/experiment/mars_earth, _self_]", "mars_earth"),
        ("trials: {steer: {do: exchang}}\ndefaults: [{override /task: experiment}, _self_]", "did you mean 'exchange'"),
    ):
        if body is not None:
            file.write_text(body)
        assert main([f"experiment={file}", "tracking=none", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and says in errors[0], errors
    file.write_text("defaults: [./mine.yaml, _self_]")
    with pytest.raises(UserError, match="starts from itself"):
        adopt([f"experiment={file}"])
    with pytest.raises(UserError, match="files and names"):
        own_files(f"experiment={file},captioning")
    assert adopt(["experiment=captioning", "task=trace"]) == ["experiment=captioning", "task=trace"]


def test_a_folder_of_pictures_is_divided_into_those_that_choose_and_those_that_test(tmp_path: Path) -> None:
    def folder(name: str, count: int) -> str:
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
        return str(tmp_path / name)

    (Path(folder("cat", 5)) / "notes.txt").write_text("no picture")
    folder("dog/train", 2)
    folder("dog/test", 1)
    folder("more", 0)
    given = {name: [str(tmp_path / name)] for name in ("cat", "dog")}
    found = pictures_of_folders(given | {"cow_train": [folder("cow", 2)], "cow": ["/one.png"]})
    names = {key: [Path(path).relative_to(tmp_path).as_posix() for path in paths]
             for key, paths in found.items() if key != "cow"}  # fmt: skip
    assert names == {
        "cat": ["cat/0.png", "cat/2.png", "cat/4.png"],
        "cat_train": ["cat/1.png", "cat/3.png"],
        "dog": ["dog/test/0.png"],
        "dog_train": ["dog/train/0.png", "dog/train/1.png"],
        "cow_train": ["cow/0.png", "cow/1.png"],
    }
    assert found["cow"] == ["/one.png"]
    for wrong, says in (("more", "no pictures in this folder"), ("dog/test", "at least two")):
        with pytest.raises(UserError, match=says):
            pictures_of_folders({"cat": [str(tmp_path / wrong)]})
