"""task=study on the command line: killed and resumed, by three processes, and what users get wrong."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.processes import ROOT

from vlmscope.app import main

STUDY = [
    "task=study", "model=tiny", "data=folder", "study.top=3", "study.samples=4", "study.batch_size=2",
    "study.checkpoint_every=1", "tracking=none",
]  # fmt: skip


@pytest.fixture
def data(mixed_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed_data, tmp_path / "data"))


def _files(run: Path) -> dict[str, bytes]:
    folder = run / "study"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_three_processes_give_the_files_of_one(data: Path, tmp_path: Path) -> None:
    command = [*STUDY, f"data.path={data}"]
    assert main([*command, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    program = [*launch, str(ROOT / "run.py"), *command, f"hydra.run.dir={tmp_path / 'three'}"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert _files(tmp_path / "one") == _files(tmp_path / "three")


def test_mistakes_are_one_line(data: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    command, run = [*STUDY, f"data.path={data}"], tmp_path / "again"
    (run / "study").mkdir(parents=True)
    for arguments, message in (
        ([*command, "transcoder=orrery"], "transcoders for layers 0-7 (8), but the model has 4"),
        ([*command, "study.top=0"], "study.top=0"),
        ([*command, "prompt=what is this ?"], "leave out prompt="),
        (STUDY, "data.path is not set"),
        ([*command, f"hydra.run.dir={run}"], "trainer.resume=true"),
    ):
        assert message in refusal(*arguments)
    (data / "train.jsonl").write_text("")
    assert "holds no example" in refusal(*command)


@pytest.mark.parametrize(
    "arguments",
    [["task=study"], ["experiment=modality_by_layer"], ["task=find", "query=red"]],
    ids=lambda arguments: arguments[0],
)
def test_what_is_missing_is_said_before_anything_heavy_is_imported(arguments: list[str], tmp_path: Path) -> None:
    makes = arguments[0] in ("task=study", "experiment=modality_by_layer")
    missing = f"data.path={tmp_path}" if makes else f"study.path={tmp_path}"
    argv = [*arguments, missing, "tracking=none", f"hydra.run.dir={tmp_path / 'run'}"]
    code = (
        "import sys; from vlmscope.app import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'pyarrow', 'matplotlib') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    expected = "run vlmscope task=build_data first" if makes else "no study.json in"
    assert expected in done.stderr.splitlines()[-1]
