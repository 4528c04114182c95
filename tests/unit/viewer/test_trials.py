"""Trials and pictures of the workbench: rates are those of `metrics.rates`, and nothing else is read."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from starlette.testclient import TestClient
from tests.unit.viewer.test_server import HOST, run_folder

from vlmscope.metrics.rates import rates
from vlmscope.viewer.server import create_app


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = run_folder(tmp_path / "outputs", "mine/first", "experiment", {})
    rows = []
    for strength in (1.0, 2.0):
        for case in range(10):
            shared = {"operation": "steer", "setting": "dose", "baseline": "", "mode": "free", "layers": "all"}
            shared |= {
                "positions": "all",
                "strength": strength,
                "question": "name",
                "cases": "test",
                "case": f"mars {case}",
            }
            shared |= {"features": 3, "weak": False}
            rows.append({**shared, "control": "", "draw": 0, "hit": case < 4 * strength})
            rows += [{**shared, "control": "matched", "draw": draw, "hit": case < draw} for draw in range(3)]
    pd.DataFrame(rows).to_parquet(folder / "trials.parquet")
    claim = {"operation": "steer", "setting": "dose", "claim": "sufficient", "shown": True, "question": "name"}
    claim |= {
        "value": 0.8,
        "ci_low": 0.4,
        "ci_high": 0.9,
        "decided_by": "half",
        "other": 0.5,
        "p": float("nan"),
        "reason": "",
    }
    pd.DataFrame([claim]).to_parquet(folder / "claims.parquet")
    body = yaml.safe_load((folder / "config.yaml").read_text())
    measured = {"trials": {"steer": {"measure": "hit"}}, "settings": {"dose": {"measures": []}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(body | measured | {"name": "mars_earth_patch"}, sort_keys=False))
    return folder


@pytest.fixture
def client(run: Path) -> TestClient:
    return TestClient(create_app(run.parents[1]), base_url=f"http://{HOST}")


def test_rates_stand_next_to_their_controls(client: TestClient, run: Path) -> None:
    body = client.get("/api/runs/mine/first/trials").json()
    table = pd.read_parquet(run / "trials.parquet")
    for strength, row in rates(table, ["strength"]).iterrows():
        own, control = (one for one in body["rows"] if one["strength"] == strength)
        assert (own["rate"], own["low"], own["high"], own["n"]) == (row.value, row.ci_low, row.ci_high, 10)
        assert (control["control"], control["draws"]) == ("matched", 3)
        assert (control["low"], control["rate"], control["high"]) == pytest.approx((0.0, 0.1, 0.2))
    (claim,) = body["claims"]
    assert claim["shown"] and claim["value"] == 0.8 and claim["p"] is None
    assert body["hypothesis"].endswith("?")


def test_a_run_without_trials_is_one_line(client: TestClient, run: Path) -> None:
    (run / "trials.parquet").write_bytes(b"PAR1")
    assert "cannot read trials.parquet" in client.get("/api/runs/mine/first/trials").json()["error"]
    (run / "trials.parquet").unlink()
    answer = client.get("/api/runs/mine/first/trials")
    assert answer.status_code == 404 and "has no trials.parquet" in answer.json()["error"]
