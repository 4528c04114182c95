"""The direction of imports, and what an import may cost."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "vlmscope"


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_contracts_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [lint, "--no-cache", "--config", ROOT / "pyproject.toml"],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import vlmscope",
        "import vlmscope.app",
        "from vlmscope.config import catalog; from vlmscope.tasks.settings import TASKS; catalog.register(TASKS)",
        "from vlmscope.app import main; main(['--help'])",
    ],
)
def test_what_runs_before_a_task_imports_nothing_heavy(code: str) -> None:
    heavy = "('torch', 'transformers', 'mlflow', 'pytorch_lightning', 'matplotlib', 'pandas', 'sklearn', 'scipy')"
    assert python(f"import sys; {code}; print('loaded', [n for n in {heavy} if n in sys.modules])").endswith(
        "loaded []\n"
    )


def test_tasks_do_not_import_each_other() -> None:
    from vlmscope.tasks.settings import TASKS

    names = {task.module or name for name, task in TASKS.items()}
    for name in names:
        source = (PACKAGE / "tasks" / f"{name}.py").read_text(encoding="utf-8")
        for other in names - {name}:
            assert f"vlmscope.tasks.{other} " not in source, f"{name} imports {other}"
            assert f"from vlmscope.tasks import {other}\n" not in source, f"{name} imports {other}"


def test_nothing_reads_or_writes_pickles() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for word in (
            "import pickle",
            "torch.load(",
            "torch.save(",
            "allow_pickle=True",
            "joblib",
            "weights_only=False",
        ):
            assert word not in source, f"{path.name}: {word}"
