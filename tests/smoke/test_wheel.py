"""The wheel alone, in an environment of its own and far from the clone: its files and its commands."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_MB = 80  # 45 of them are the transcoders of Gemma 3 270M with eyes


def run(*command: object, cwd: Path, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | env
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves its build folder next to the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "conf", "experiments", "assets"):
        shutil.copytree(ROOT / name, folder / "clone" / name, symlinks=True, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "clone")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder)
    run(*pip, folder / "clone", cwd=folder)
    shutil.rmtree(folder / "clone")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of a fresh environment with this wheel, and with the packages of this one but not its vlmscope."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    # A folder that a .pth file names is searched, but its own .pth files (an editable install has one) are not read.
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with nothing but a picture in it."""
    shutil.copy(ROOT / "assets" / "pictures" / "mars.png", tmp_path / "own.png")
    return tmp_path


def test_the_wheel_holds_every_shipped_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, place in (("conf", "conf"), ("experiments", "conf/experiment"), ("assets", "assets")):
        files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        shipped = {f"vlmscope/shipped/{place}/{path}" for path in files if "__pycache__" not in path.parts}
        assert shipped <= names, shipped - names
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "vlmscope").rglob("*") if path.is_file()}
    missing = {name for name in sources - names if "__pycache__" not in name}
    assert not missing
    assert not [name for name in names if "__pycache__" in name]
    assert wheel.stat().st_size < MOST_MB * 2**20


def test_the_command_works_far_from_the_clone(bin_dir: Path, elsewhere: Path) -> None:
    assert "vlmscope experiment=NAME" in run(bin_dir / "vlmscope", "--help", cwd=elsewhere)
    assert "mars_earth_patch" in run(bin_dir / "python", "-m", "vlmscope", "task=list", cwd=elsewhere)
    out = run(bin_dir / "vlmscope", "task=trace", "image=own.png", "prompt=what planet is this ?", cwd=elsewhere)
    assert "mars" in out
    (folder,) = (elsewhere / "outputs" / "trace").iterdir()
    assert (folder / "graph.json").is_file()
    assert (elsewhere / "outputs" / "mlflow.db").is_file()
    where = run(bin_dir / "python", "-c", "import vlmscope; print(vlmscope.__file__)", cwd=elsewhere)
    assert where.strip().startswith(str(bin_dir.parent))


@pytest.mark.slow
def test_an_experiment_runs_far_from_the_clone(bin_dir: Path, elsewhere: Path) -> None:
    run(
        bin_dir / "vlmscope", "experiment=mars_earth_patch", "debug=fast", "tracking=none", "hydra.run.dir=run",
        cwd=elsewhere,
    )  # fmt: skip
    assert (elsewhere / "run" / "report.html").is_file()
