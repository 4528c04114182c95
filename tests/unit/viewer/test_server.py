"""The workbench's server: what it lists, what it gives out, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from socket import gethostname

import pytest
import yaml
from starlette.testclient import TestClient

from vlmscope.viewer.safety import COOKIE, MOST_BODY, Refused, host_of, inside, is_loopback
from vlmscope.viewer.server import create_app

SRC = Path(__file__).resolve().parents[3] / "src"
HOST = "127.0.0.1:8600"


def run_folder(root: Path, name: str, task: str = "trace", metrics: dict | None = None, overrides=()) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    body = yaml.safe_dump({"task": {"figure": True, "name": task}, "seed": 0}, sort_keys=False)
    (folder / "config.yaml").write_text(body)
    (folder / "overrides.yaml").write_text(yaml.safe_dump([f"task={task}", *overrides]))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "outputs"
    metrics = {"graph/replacement_score": 0.9, "layers/fvu/layer_03": 0.25, "val/fvu": 0.5, "broken": None}
    first = run_folder(root, "trace/first", metrics=metrics, overrides=["prompt=a 'b'"])
    (first / "graph.json").write_text('{"nodes": [], "links": []}')
    (first / "report.html").write_text("<script>alert(1)</script>")
    run_folder(root, "study/second", "study")
    os.utime(first / "config.yaml", (1e9, 1e9))
    return root


@pytest.fixture
def client(root: Path) -> TestClient:
    return TestClient(create_app(root), base_url=f"http://{HOST}")


def test_runs_are_listed_newest_first_with_what_they_have(client: TestClient) -> None:
    second, first = client.get("/api/runs").json()["runs"]
    assert (first["id"], first["task"], first["status"]) == ("trace/first", "trace", "done")
    assert (second["id"], second["task"], second["status"]) == ("study/second", "study", "failed")
    assert first["metrics"]["graph/replacement_score"] == 0.9
    assert [name for name, there in first["has"].items() if there] == ["graph", "report"]


def test_the_details_of_a_run(client: TestClient) -> None:
    body = client.get("/api/runs/trace/first").json()
    assert body["fvu_by_layer"] == [0.25]
    assert body["command"].endswith("""task=trace 'prompt=a '"'"'b'"'"''""")
    assert body["graphs"] == ["trace/first"]
    assert {file["path"] for file in body["files"]} == {
        "config.yaml", "graph.json", "metrics.json", "overrides.yaml", "report.html",
    }  # fmt: skip
    (row,) = client.get("/api/fvu").json()["runs"]
    assert (row["id"], row["fvu"], row["fvu_by_layer"], row["l0"]) == ("trace/first", 0.5, [0.25], None)


def test_a_page_of_a_run_can_reach_nothing_of_the_workbench(client: TestClient) -> None:
    for path in ("/api/runs/trace/first/file?path=report.html", "/files/trace/first/report.html"):
        policy = client.get(path).headers["content-security-policy"]
        assert policy.startswith("sandbox ") and "allow-same-origin" not in policy
        assert "default-src 'none'" in policy and "connect-src" not in policy


def test_the_page_has_a_policy_without_inline_code(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy
    assert "access-control-allow-origin" not in client.get("/api/runs", headers={"origin": "http://evil"}).headers


@pytest.mark.parametrize(
    "name",
    ["..", "../x", "trace/../../x", "/etc/passwd", "trace//first", "trace/./first", ".hidden", "a\0b", "a\\b", "no",
     "trace/out", "trace/circle"],
)  # fmt: skip
def test_nothing_outside_the_root_is_given_out(name: str, client: TestClient, root: Path, tmp_path: Path) -> None:
    secret = run_folder(tmp_path, "secret", metrics={})
    (secret / "graph.json").write_text("{}")
    (tmp_path / "x").write_text("secret")
    (root / ".hidden").mkdir()
    (root / "trace/out").symlink_to(secret)
    (root / "trace/circle").symlink_to(root / "trace/circle")
    (root / "trace/first/out.txt").symlink_to(tmp_path / "x")
    with pytest.raises(Refused) as refused:
        inside(root, name)
    assert refused.value.status == 404 and str(tmp_path) not in str(refused.value)
    encoded = "".join(f"%{byte:02X}" for byte in name.encode())  # else the client would resolve the dots itself
    for path in (f"/api/graphs/{encoded}", f"/api/runs/{encoded}", f"/files/{encoded}"):
        assert client.get(path).status_code == 404
    for path in (name, "out.txt"):
        assert client.get("/api/runs/trace/first/file", params={"path": path}).status_code == 404
    assert "secret" not in client.get("/api/runs").text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "", "[::1", "a b"])
def test_another_host_is_refused(host: str, client: TestClient) -> None:
    answer = client.get("/api/runs", headers={"host": host})
    assert answer.status_code == 421 and "task=serve" in answer.json()["error"]


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8600", "LOCALHOST"])
def test_names_of_this_computer_are_served(host: str, client: TestClient) -> None:
    assert client.get("/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"origin": "http://evil"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9999"},
     {"origin": f"http://{HOST}", "sec-fetch-site": "cross-site"}],
)  # fmt: skip
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_pages_of_other_origins_change_nothing(method: str, headers: dict[str, str], client: TestClient) -> None:
    assert client.request(method, "/api/runs", headers=headers).status_code == 403
    assert client.request(method, "/api/runs", headers={"origin": f"http://{HOST}"}).status_code == 405


def test_a_large_request_is_refused(client: TestClient) -> None:
    answer = client.post("/api/runs", content=b"", headers={"origin": f"http://{HOST}", "content-length": "9" * 12})
    assert answer.status_code == 413 and f"{MOST_BODY >> 20} MB" in answer.json()["error"]


def test_a_wider_server_asks_for_its_token(root: Path) -> None:
    client = TestClient(create_app(root, "0.0.0.0", "s3cret"), base_url="http://10.0.0.1:8600")
    assert client.get("/api/runs").status_code == 401
    assert client.get("/api/runs?token=wrong").status_code == 401
    assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/api/runs", headers={"host": f"{gethostname()}:8600"}).status_code == 401
    answer = client.get("/?token=s3cret")
    assert answer.status_code == 200 and "HttpOnly; SameSite=Strict" in answer.headers["set-cookie"]
    assert client.cookies[COOKIE] == "s3cret" and client.get("/api/runs").status_code == 200


def test_errors_are_one_line_of_json(client: TestClient) -> None:
    assert client.get("/api/nothing").json() == {"error": "Not Found"}
    assert client.get("/api/runs/trace/first/file").json() == {"error": "query.path: Field required"}


def test_the_first_page_and_the_graph_need_no_torch(root: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from starlette.testclient import TestClient
from vlmscope.viewer.server import create_app
client = TestClient(create_app(Path({str(root)!r})), base_url="http://{HOST}")
for path in ("/", "/api/runs", "/api/example", "/api/graphs/trace/first"):
    assert client.get(path).status_code == 200, path
print([name for name in ("torch", "transformers", "mlflow", "matplotlib") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=SRC, capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n", result.stderr


def test_which_addresses_are_this_computers() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


@pytest.mark.parametrize(
    ("host", "name"), [("A.b:80", "a.b"), ("[::1]", "::1"), ("a:b", ""), ("a/b", ""), ("a@b", ""), ("x:1:2", "")]
)
def test_hosts_are_read_strictly(host: str, name: str) -> None:
    assert host_of(host) == name
