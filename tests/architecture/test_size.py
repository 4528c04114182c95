"""The size of the house: a budget of files and lines per package, no long file, no circle of imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"
BUDGET = yaml.safe_load((Path(__file__).parent / "budget.yaml").read_text(encoding="utf-8"))
LONGEST = 600
LONGEST_EXPERIMENT = {".py": 150, ".yaml": 30}


def modules() -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(SRC).with_suffix("").parts) for path in SRC.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def package(path: Path) -> str:
    parts = path.relative_to(SRC / "vlmscope").parts
    return parts[0] if len(parts) > 1 else "."


@pytest.mark.parametrize("name", sorted({package(path) for path in modules().values()} | set(BUDGET) - {"tests"}))
def test_a_package_keeps_to_its_budget(name: str) -> None:
    """Raised by a deliberate line of a commit; lowered when a package shrinks by more than a tenth."""
    files = [path for path in modules().values() if package(path) == name]
    used = {"files": len(files), "lines": sum(map(lines, files))}
    for what, most in BUDGET[name].items():
        assert used[what] <= most, f"{name} has {used[what]} {what}; tests/architecture/budget.yaml allows {most}"
        assert used[what] >= 0.85 * most, f"{name} has only {used[what]} {what}: lower its budget from {most}"


def test_the_tests_keep_to_their_budget() -> None:
    used = sum(map(lines, (ROOT / "tests").rglob("*.py")))
    assert 0.85 * BUDGET["tests"]["lines"] <= used <= BUDGET["tests"]["lines"], used


def test_no_file_is_long() -> None:
    assert {path.name: lines(path) for path in modules().values() if lines(path) > LONGEST} == {}


@pytest.mark.parametrize("suffix", LONGEST_EXPERIMENT)
def test_an_experiment_is_short(suffix: str) -> None:
    """Python that is longer has a part that any experiment could use: it belongs into src."""
    files, most = (ROOT / "experiments").glob(f"*{suffix}"), LONGEST_EXPERIMENT[suffix]
    assert {path.name: lines(path) for path in files if lines(path) > most} == {}


def imports(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """All modules that a module imports, inside functions too; those of type checking alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        yield from imports(node, known)


def test_no_circle_of_imports() -> None:
    """Inside functions too: a circle that is hidden there is a circle."""
    known = modules()
    graph = {
        name: {one for one in imports(ast.parse(path.read_text(encoding="utf-8")), known) if one in known} - {name}
        for name, path in known.items()
    }
    while free := {name for name, needs in graph.items() if not needs}:
        graph = {name: needs - free for name, needs in graph.items() if name not in free}
    assert not graph, f"in a circle, or needing one: {', '.join(sorted(graph))}"
