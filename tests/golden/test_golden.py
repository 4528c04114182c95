"""Every experiment at the size of `debug=fast`: its numbers and files are those of `tests/golden/<experiment>.json`.

`pytest tests/golden --update-golden` writes these files and prints what changed. On the kind of machine that wrote a
file, numbers are equal to the last bit. On another, or with other threads, sums round otherwise: in the six experiments
tried, 2 threads, or AVX2 instead of AVX-512, moved no number further than `CLOSE` allows and no rate of answers at all.
"""

import json
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.published import paper_stand_in
from tests.text_model import write_text_model

from vlmscope.app import main
from vlmscope.config import catalog
from vlmscope.data.orrery.dataset import build
from vlmscope.data.orrery.scenes import COMPOSED, KINDS

FOLDER = Path(__file__).parent
EXPERIMENTS = sorted(catalog.options("experiment"))
# Sweeps run these jobs; the others take the settings of their experiment and differ in the same keys.
SWEEPS = {
    "cross_layer": ["transcoder.cross_layer=false,true"],
    "expansion_sweep": ["transcoder.expansion_factor=1,2"],
    "modality_mix": ["modality=text,mixed", "seed=1"],
    "sparsity_frontier": ["transcoder.activation=batchtopk,jumprelu", "transcoder.k=8"],
}
# Recipes of models whose weights a test cannot have run on a tiny one, and on Orrery's scenes.
TINY = ["model=tiny", "model.device=cpu", "model.dtype=float32", "data=mix_orrery"]
STAND_INS = {"train_eyes_transcoders": TINY, "gemma3_4b_transcoders": TINY, "gemma3_4b_transcoders_1gpu": TINY}
TEXT = "TEXT"  # the folder of a text model of toy size
EYES = {"text": TEXT, "vision_width": 8, "vision_layers": 1, "vision_mlp": 8, "vision_heads": 2}
STAND_INS["train_eyes"] = [f"task.architecture.{key}={value}" for key, value in EYES.items()]
# Random models answer nothing rightly, so their pairs and facts need no right answers.
STAND_INS["eyes_accuracy"] = ["model=tiny", "transcoder=random"]
STAND_INS["flag_capital"] = [
    *STAND_INS["eyes_accuracy"],
    "interchange.answerable=false",
    "pairs.relations=[capital,language]",
]
CLOSE = {"rel_tol": 1e-3, "abs_tol": 1e-5}
MACHINE_FACTS = ("seconds", "per_s", "_gb", "over_forward")  # in a metric's name: time and memory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    counts: dict[str, int] = dict.fromkeys((*KINDS, *COMPOSED), 24)
    build(folder, dict.fromkeys(("train", "val", "test"), counts))
    return folder


def machine() -> str:
    """What the last bits of a sum depend on."""
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in cpu.read_text().splitlines() if line.startswith("model name")]
    kind = f"{(names or [platform.machine()])[0]} {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, torch {torch.__version__}, numpy {np.__version__}"


def outcome(run_dir: Path) -> dict:
    """Numbers without times and memory, and all files; of a sweep, the numbers of each job."""
    numbers: dict[str, float | None] = {}
    for file in sorted(run_dir.rglob("metrics.json")):
        prefix = "" if file.parent == run_dir else f"{file.parent.name}/"
        found = json.loads(file.read_text())
        numbers |= {prefix + key: found[key] for key in found if not any(part in key for part in MACHINE_FACTS)}
    # graph.html is only where the workbench's page is built.
    found = (path for path in run_dir.rglob("*") if path.is_file() and path.name != "graph.html")
    files = sorted(str(path.relative_to(run_dir)) for path in found)
    return {"machine": machine(), "metrics": dict(sorted(numbers.items())), "files": files}


def changes(old: dict, new: dict, exact: bool) -> Iterator[str]:
    """A line for each metric and file that differs."""
    before, after = old["metrics"], new["metrics"]
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"{name}: {'new' if name in after else 'gone'} ({(before | after)[name]})"
            continue
        a, b = before[name], after[name]
        close = a == b if a is None or b is None else math.isclose(a, b, **CLOSE)
        if not close or (exact and a != b):
            yield f"{name}: {a} -> {b}{' (rounding)' if close else ''}"
    yield from (f"no file {name}" for name in sorted(set(old["files"]) - set(new["files"])))
    yield from (f"new file {name}" for name in sorted(set(new["files"]) - set(old["files"])))


def test_every_experiment_has_its_numbers_and_its_card() -> None:
    assert [path.stem for path in sorted(FOLDER.glob("*.json"))] == EXPERIMENTS
    cards = Path(__file__).resolve().parents[2] / "experiments"
    assert [name for name in EXPERIMENTS if not (cards / f"{name}.md").is_file()] == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_numbers(
    name: str,
    data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir, kind = tmp_path / "run", "sweep" if name in SWEEPS else "run"
    where = [f"hydra.{kind}.dir={run_dir}", "tracking=none", "trainer.threads=1"]
    if name == "train_eyes":
        monkeypatch.setenv("VLMSCOPE_CACHE", str(tmp_path / "cache"))
        write_text_model(tmp_path / TEXT)
    else:
        where.append(f"data.path={data}")
    stand_ins = STAND_INS.get(name, [])
    if name == "paper_gemma3_4b":
        (tmp_path / "published").mkdir()
        stand_ins = paper_stand_in(tmp_path / "published")
    given = [word.replace(TEXT, str(tmp_path / TEXT)) for word in (*SWEEPS.get(name, []), *stand_ins)]
    assert main([f"experiment={name}", "debug=fast", *given, *where]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run_dir)
    new, file = outcome(run_dir), FOLDER / f"{name}.json"
    old = json.loads(file.read_text()) if file.exists() else {"machine": None, "metrics": {}, "files": []}
    exact = old["machine"] == new["machine"] and os.environ["OMP_NUM_THREADS"] == "1"
    found = list(changes(old, new, exact))
    if request.config.getoption("--update-golden"):
        file.write_text(json.dumps(new, indent=0) + "\n")
        with capsys.disabled():
            print(f"\n{name}: {len(found)} changes", *(found if old["machine"] else []), sep="\n  ")
    elif found:
        pytest.fail(f"{name}: {len(found)} differ from {file.name}\n" + "\n".join(found), pytrace=False)
