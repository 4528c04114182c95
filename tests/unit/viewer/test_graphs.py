"""Graphs of the workbench: annotations that lose no update, scores of a pinned part, circuits, other files."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from tests.random_graphs import random_graph

from vlmscope.attribution.export import graph_to_json, node_id, save_graph
from vlmscope.attribution.influence import prune, scores, subgraph_scores
from vlmscope.core.graph import NodeKind
from vlmscope.viewer.graphs import feature_of, from_json
from vlmscope.viewer.server import create_app

HOST = "127.0.0.1:8600"
GRAPH = random_graph(4, 5, 20, left_out=True)
GRAPH.meta["max_nodes"] = 100
PRUNED = prune(GRAPH, 0.95, 0.99)
BODY = graph_to_json(PRUNED, "hostile <script>", "tiny", {})
FEATURES = [node["node_id"] for node in BODY["nodes"] if node["feature_type"] == "cross layer transcoder"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "trace" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("task:\n  name: trace\n")
    (folder / "graph.json").write_text(json.dumps(BODY))
    save_graph(folder / "graph.safetensors", PRUNED)
    return tmp_path


@pytest.fixture
def client(root: Path) -> TestClient:
    return TestClient(create_app(root), base_url=f"http://{HOST}", headers={"origin": f"http://{HOST}"})


def save(client: TestClient, version: int, graph: str = "trace/one", **values):
    body = {"pinned": [], "supernodes": [], "labels": {}, "notes": "", **values}
    return client.put(f"/api/graphs/{graph}/annotations", json=body, headers={"if-match": f'"{version}"'})


def test_annotations_are_kept_and_counted(client: TestClient, root: Path) -> None:
    assert client.get("/api/graphs/trace/one/annotations").json()["version"] == 0
    node = {"id": "a", "name": "</script>", "members": FEATURES[:2]}
    assert save(client, 0, pinned=FEATURES[:1], supernodes=[node], labels={"L1/2": "red"}).json()["version"] == 1
    kept = client.get("/api/graphs/trace/one/annotations").json()
    assert kept == json.loads((root / "trace/one/annotations.json").read_text())
    assert (kept["pinned"], kept["supernodes"], kept["labels"]) == (FEATURES[:1], [node], {"L1/2": "red"})


def test_a_save_from_an_old_version_changes_nothing_and_gets_the_new_one(client: TestClient) -> None:
    save(client, 0, notes="first tab")
    answer = save(client, 0, notes="second tab")
    assert answer.status_code == 409 and "merge" in answer.json()["error"]
    assert (answer.json()["current"]["notes"], answer.json()["current"]["version"]) == ("first tab", 1)
    assert save(client, 1, notes="both").json()["version"] == 2


def test_of_saves_at_once_exactly_one_counts(client: TestClient) -> None:
    codes: list[int] = []
    tabs = [
        threading.Thread(target=lambda n=n: codes.append(save(client, 0, notes=str(n)).status_code)) for n in range(8)
    ]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert sorted(codes) == [200] + 7 * [409]
    assert client.get("/api/graphs/trace/one/annotations").json()["version"] == 1


@pytest.mark.parametrize(
    "values",
    [{"pinned": "x"}, {"pinned": [1]}, {"supernodes": [{"id": "a"}]}, {"supernodes": 3}, {"labels": ["a"]},
     {"labels": {"a": 1}}, {"notes": "x" * 20_001}, {"pinned": ["x"] * 20_001}],
)  # fmt: skip
def test_annotations_of_another_shape_are_refused(values: dict, client: TestClient, root: Path) -> None:
    assert save(client, 0, **values).status_code == 422
    assert not (root / "trace/one/annotations.json").exists()


def test_what_is_no_json_object_or_no_version_is_refused(client: TestClient) -> None:
    for content in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        answer = client.put("/api/graphs/trace/one/annotations", content=content, headers={"if-match": "0"})
        assert answer.status_code in (400, 422) and answer.json()["error"]
    assert client.put("/api/graphs/trace/one/annotations", json={}).status_code == 428


def test_annotations_do_not_leave_through_a_link(client: TestClient, root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"notes": "secret"}')
    (root / "trace/one/annotations.json").symlink_to(tmp_path / "secret.json")
    assert client.get("/api/graphs/trace/one/annotations").status_code == 409
    assert save(client, 0).status_code == 409 and "secret" in (tmp_path / "secret.json").read_text()


def test_the_bundled_example_is_annotated_below_the_root(client: TestClient, root: Path) -> None:
    assert save(client, 0, "example", notes="mine").json()["version"] == 1
    assert (root / "workbench/example/annotations.json").is_file()
    assert client.get("/api/graphs/example/annotations").json()["notes"] == "mine"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_all_features_pinned_the_scores_are_the_graphs(seed: int) -> None:
    graph = random_graph(3, 4, 12, left_out=seed > 0, seed=seed)
    everything, nothing = np.ones(graph.n_nodes, bool), np.zeros(graph.n_nodes, bool)
    expected = scores(graph)
    assert subgraph_scores(graph, everything) == pytest.approx((expected.replacement, expected.completeness), abs=1e-12)
    assert subgraph_scores(graph, nothing).completeness < expected.completeness


def test_scores_of_a_pinned_part_equal_sums_over_paths() -> None:
    """On the dense matrix: (1 - A)^-1 with the rows of all nodes that are not pinned set to zero."""
    graph = PRUNED.graph
    kind = graph.nodes.kind
    rng = np.random.default_rng(0)
    pinned = (kind == NodeKind.FEATURE) & (rng.random(graph.n_nodes) < 0.5)
    dense = np.zeros((graph.n_nodes, graph.n_nodes))
    for node in range(graph.n_nodes):
        sources, weights = graph.incoming(node)
        dense[node, sources] = np.abs(weights)
        rest = np.flatnonzero(kind == NodeKind.LEFT_OUT)
        if graph.left_out_mass.shape[1]:
            present = rest[np.isin(rest, sources)]
            dense[node, present] = graph.left_out_mass[node, graph.nodes.layer[present]]
    sums = dense.sum(1, keepdims=True)
    dense = np.divide(dense, sums, out=np.zeros_like(dense), where=sums > 0)
    ends = np.isin(kind, (NodeKind.LOGIT, NodeKind.TARGET))
    dense[~(pinned | ends)] = 0
    start = np.zeros(graph.n_nodes)
    start[graph.nodes.ends()] = graph.end_weights
    flow = start @ np.linalg.inv(np.eye(graph.n_nodes) - dense) - start
    token = flow[kind == NodeKind.TOKEN].sum()
    unknown = flow[np.isin(kind, (NodeKind.ERROR, NodeKind.LEFT_OUT)) | ((kind == NodeKind.FEATURE) & ~pinned)].sum()
    expected = (token / (token + unknown), 1 - unknown / (flow.sum() + start.sum()))
    assert subgraph_scores(graph, pinned) == pytest.approx(expected, abs=1e-12)


def test_the_score_of_pins_is_of_the_whole_graph_or_of_the_file(client: TestClient, root: Path) -> None:
    graph = PRUNED.graph
    everything = [node_id(graph, node) for node in graph.nodes.of(NodeKind.FEATURE).tolist()]
    answer = client.post("/api/graphs/trace/one/score", json={"pinned": everything}).json()
    assert answer == pytest.approx({**answer, "replacement": scores(graph).replacement}) and answer["of"] == "whole"
    (root / "trace/one/graph.safetensors").unlink()
    answer = client.post("/api/graphs/trace/one/score", json={"pinned": FEATURES}).json()
    assert answer["of"] == "pruned" and 0 < answer["replacement"] <= 1
    assert client.post("/api/graphs/trace/one/score", json={"pinned": 1}).status_code == 422


def peer(**changes) -> dict:
    """A graph as circuit-tracer writes it: no key of ours."""
    node = {"feature": 1, "ctx_idx": 0, "clerp": "", "influence": 0.1, "activation": 1.0, "is_target_logit": False}
    kinds = {"E_5_0": ("embedding", "E"), "0_3_0": ("cross layer transcoder", "0")}
    kinds |= {"0_-1_0": ("mlp reconstruction error", "0"), "1_9_0": ("logit", "1")}
    nodes = [
        {**node, "node_id": name, "jsNodeId": name, "feature_type": kind, "layer": layer, "token_prob": 0.5}
        for name, (kind, layer) in reversed(kinds.items())
    ]
    links = [("E_5_0", "0_3_0", 2.0), ("0_3_0", "1_9_0", -1.0), ("0_-1_0", "1_9_0", 1.0), ("E_5_0", "1_9_0", 2.0)]
    body = {"metadata": {}, "qParams": {}, "nodes": nodes, "links": [
        {"source": source, "target": target, "weight": weight} for source, target, weight in links
    ]}  # fmt: skip
    return {**body, **changes}


def test_layers_of_the_vision_tower_are_below_the_embeddings() -> None:
    body = peer()
    node = body["nodes"][-1]  # the token
    patch = {**node, "node_id": "PATCH_9", "layer": "P"}
    feature = {**node, "node_id": "T10_3_9", "feature_type": "cross layer transcoder", "layer": "T10"}
    earlier = {**feature, "node_id": "T9_3_9", "layer": "T9"}
    ways = [("PATCH_9", "T9_3_9"), ("T9_3_9", "T10_3_9"), ("T10_3_9", "E_5_0")]
    links = [{"source": source, "target": target, "weight": 1.0} for source, target in ways]
    graph, ids = from_json({**body, "nodes": [*body["nodes"], feature, earlier, patch], "links": body["links"] + links})
    assert ids[:4] == ["PATCH_9", "T9_3_9", "T10_3_9", "E_5_0"]
    assert feature_of(feature) == "T10/3"


def test_a_graph_of_circuit_tracer_has_scores() -> None:
    graph, ids = from_json(peer())
    assert subgraph_scores(graph, np.array([name == "0_3_0" for name in ids])).replacement == pytest.approx(0.75)
    assert subgraph_scores(graph, np.zeros(4, bool)).replacement == pytest.approx(0.5)
    attention = json.loads(
        json.dumps(peer()).replace("cross layer transcoder", "lorsa").replace("mlp rec", "lorsa rec")
    )
    again, names = from_json(attention)
    assert names == ids and again.nodes.kind.tolist() == graph.nodes.kind.tolist()


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{}", '{"nodes": 1, "links": []}', json.dumps(peer(nodes=[1])), json.dumps(peer(nodes=[{"a": "x"}])),
     json.dumps(peer(links=[{"source": "E_5_0", "target": "none", "weight": 1}])),
     json.dumps(peer(links=[{"source": "1_9_0", "target": "E_5_0", "weight": 1}])),
     json.dumps(peer(links=[{"source": "E_5_0", "target": "1_9_0", "weight": "x"}])),
     json.dumps(peer()).replace("2.0", "NaN"), "[" * 100_000, "\x00"],
)  # fmt: skip
def test_malformed_graphs_are_one_clear_line(body: str, client: TestClient, root: Path) -> None:
    (root / "trace/one/graph.json").write_text(body)
    (root / "trace/one/graph.safetensors").unlink()
    answer = client.post("/api/graphs/trace/one/score", json={"pinned": []})
    assert answer.status_code in (400, 422) and len(answer.json()["error"]) < 400


def test_a_huge_graph_file_is_refused(client: TestClient, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmscope.viewer.graphs.MOST_BYTES", 1000)
    answer = client.get("/api/graphs/trace/one")
    assert answer.status_code == 413 and "attribution.max_nodes" in answer.json()["error"]
