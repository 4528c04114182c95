"""`task=check` and the models and transcoders made in memory, by the command line."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vlmscope import conformance
from vlmscope.app import main
from vlmscope.attribution.export import load_graph
from vlmscope.models.tiny import FAMILIES, tiny_image
from vlmscope.tracking.client import open_client

SMALL = ["task.sources=2", "task.positions=2", "task.new_tokens=2"]
# Without a tower and with one; the identities of all families are in tests/maths, and all names in `make test-slow`.
QUICK = {"gemma3_text", "smolvlm"}
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ("gemma3_text", *FAMILIES)]


def run(run_dir: Path, *arguments: str) -> int:
    tracking = [] if any(a.startswith("tracking") for a in arguments) else ["tracking=none"]
    return main([*arguments, *tracking, f"hydra.run.dir={run_dir}"])


def metrics(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "metrics.json").read_text())


@pytest.mark.parametrize("family", NAMES)
def test_every_family_is_checked_and_traced_by_name(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["model=tiny", f"model.family={family}"]
    assert run(tmp_path / "check", "task=check", *model, *SMALL, "task.targets=10") == 0
    assert f"tiny_{family}: " in capsys.readouterr().out
    numbers = metrics(tmp_path / "check")
    assert numbers["check/failed"] == 0 and numbers["check/held"] >= 6
    tiny_image(5).resize((30, 20)).save(tmp_path / "x.png")
    picture = [] if family.endswith("_text") else [f"image={tmp_path / 'x.png'}"]
    asked = [*model, *picture, "prompt=describe this picture, s'il te plaît", "attribution.max_nodes=200"]
    assert run(tmp_path / "run", "task=trace", *asked, "task.figure=false") == 0
    assert "transcoders: random, since the model is random" in capsys.readouterr().out
    graph = load_graph(tmp_path / "run" / "graph.safetensors").graph
    assert graph.residual.max() < 1e-4  # in float32
    assert graph.prompt == "describe this picture, s'il te plaît"
    assert graph.is_image.any() == bool(picture)


def test_orrery_is_checked_with_its_own_transcoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "task=check", *SMALL, "task.targets=20") == 0
    out = capsys.readouterr().out
    assert "orrery2_transcoders; 2 layers of the vision tower too; errors in float64" in out
    assert "total_effects, text: skipped, it needs all 2,112 active features, 20 have a row" in out


def test_an_identity_that_fails_is_named_and_recorded_as_a_failure(
    tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = conformance.make_subject

    def wrong(*arguments, **settings):
        subject = right(*arguments, **settings)
        features = [dataclasses.replace(f, b_dec=torch.zeros_like(f.b_dec)) for f in subject.replacement.features]
        replacement = dataclasses.replace(subject.replacement, features=features)
        return dataclasses.replace(subject, replacement=replacement)

    monkeypatch.setattr(conformance, "make_subject", wrong)
    model = ["model=tiny", "model.family=gemma3_text"]
    assert run(tmp_path / "run", "task=check", *model, *SMALL, f"tracking.uri={store}") == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in captured.err
    assert errors[0].startswith("error: tiny_gemma3_text fails parity on text (")
    assert "  NO  " in captured.out
    assert metrics(tmp_path / "run")["check/failed"] == 3  # and the sums of heads and of scores
    client = open_client(store)
    experiment = client.get_experiment_by_name("check")
    assert experiment is not None
    (recorded,) = client.search_runs([experiment.experiment_id])
    assert recorded.info.status == "FAILED" and recorded.data.metrics["check/text/parity/error"] > 1e-3
