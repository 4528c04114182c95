"""`task=trace` on any picture: files agree, the answer leads back to the picture, and mistakes are refused."""

import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

import vlmscope
from vlmscope.app import main
from vlmscope.attribution.export import load_graph
from vlmscope.attribution.influence import reaches_image, top_features
from vlmscope.attribution.vision import load_maps
from vlmscope.core.graph import NodeKind
from vlmscope.data.orrery.dataset import concept_scenes

SCHEMA = Path(vlmscope.__file__).parent / "attribution" / "schema" / "neuronpedia-graph.schema.json"
QUESTION = "what planet is this ?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "mars, (1).png"
    image = concept_scenes("mars", "test", 1, seed=99)[0].image
    assert image is not None
    Image.fromarray(image).save(path)
    return path


def traced(folder: Path, picture: Path | None, *more: str, prompt: str = QUESTION) -> int:
    image = "image=null" if picture is None else f"image='{picture}'"
    return main(["task=trace", image, f"prompt={prompt}", f"hydra.run.dir={folder}", "tracking=none", *more])


@pytest.fixture(scope="module")
def run_dir(picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace") / "run"
    assert traced(folder, picture, "attribution.patches=true") == 0
    return folder


def metrics_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def graph_of(folder: Path) -> dict[str, Any]:
    body = json.loads((folder / "graph.json").read_text())
    jsonschema.validate(body, json.loads(SCHEMA.read_text()))
    return body


def test_json_and_arrays_are_the_same_graph(run_dir: Path) -> None:
    body, pruned = graph_of(run_dir), load_graph(run_dir / "graph.safetensors")
    assert len(body["nodes"]) == pruned.n_nodes == len({node["node_id"] for node in body["nodes"]})
    weights = sorted(link["weight"] for link in body["links"])
    assert np.array_equal(np.array(weights, np.float32), np.sort(pruned.graph.weights[pruned.edge_mask]))


def test_the_answer_leads_back_to_the_picture(run_dir: Path) -> None:
    pruned = load_graph(run_dir / "graph.safetensors")
    assert pruned.graph.logit_tokens[0] == "mars"
    assert reaches_image(pruned, int(pruned.graph.nodes.of(NodeKind.LOGIT)[0]))
    metrics = metrics_of(run_dir)
    assert metrics["graph/answer_sees_image"] == 1.0
    assert metrics["graph/max_residual"] < 1e-4


def test_maps_over_patches_sum_to_the_edges_of_the_picture(run_dir: Path) -> None:
    record, metrics = graph_of(run_dir)["vlmscope"]["patches"], metrics_of(run_dir)
    assert metrics["graph/patch_residual"] == max(one["residual"] for one in record["maps"]) < 1e-5
    for found, one in zip(load_maps(run_dir / record["file"], record["maps"]), record["maps"], strict=True):
        (tile,) = found.tiles
        assert tile.values.shape == (8, 8) and len(tile.boxes) == 64
        scale = np.abs(tile.values).sum() + sum(map(abs, found.remainder.values()))
        assert abs(found.edge - found.from_patches - sum(found.remainder.values())) < 1e-3 * scale  # float16
        assert abs(found.raster(64, 64).sum() - one["from_patches"]) < 1e-3 * scale
    assert {path.name for path in (run_dir / "figures").iterdir()} == {"graph.png", "patches.png"}


@pytest.mark.parametrize("mode", ["RGBA", "huge"])
def test_odd_pictures_are_traced_to_their_patches(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (4000, 700)) if mode == "huge" else Image.new(mode, (40, 50))
    image.save(tmp_path / "x.png")
    more = ("attribution.patches=true", "attribution.max_nodes=100")
    assert traced(tmp_path / "r", tmp_path / "x.png", *more) == 0
    assert metrics_of(tmp_path / "r")["graph/patch_residual"] < 1e-5


def test_the_console_says_the_answer_its_features_and_how_to_go_on(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that it offers is taken as it stands."""
    assert traced(tmp_path / "a b", picture, "task.figure=false") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "answer" and lines[1].startswith("  mars  p = ")
    pruned = load_graph(tmp_path / "a b" / "graph.safetensors")
    best, *_ = top_features(pruned.graph, 1)
    told = lines.index("features with most influence on it")
    assert lines[told + 2].split()[0] == str(best)
    on = np.flatnonzero(pruned.node_mask & (pruned.graph.nodes.kind == NodeKind.FEATURE))
    seen = int(pruned.graph.is_image[pruned.graph.nodes.position[on]].sum())
    scores = pruned.scores
    both = f"  replacement score {scores.replacement:.3f} ({scores.replacement_no_bias:.3f} without biases)"
    assert lines[lines.index("how much the graph explains") + 1].startswith(both)
    (line,) = (number for number, text in enumerate(lines) if text.startswith("on the picture: "))
    assert lines[line] == f"on the picture: {seen} of the {len(on)} features that pruning kept"
    strongest = next(text for text in lines[line:] if "strongest there: " in text)
    assert "(picture, " in strongest
    assert lines[-1] == str(tmp_path / "a b")
    page, steer, where = (
        shlex.split(text.removeprefix("next: vlmscope ")) for text in lines if text.startswith("next: ")
    )
    assert main([*steer, "tracking=none", f"hydra.run.dir={tmp_path / 'steer'}", "task.controls=1"]) == 0
    assert (tmp_path / "steer" / "steer.json").is_file()
    assert page[:2] == ["task=export", f"task.run={tmp_path / 'a b'}"]
    assert where == ["task=where", f"image={picture}", f"prompt={QUESTION}"]


def test_a_score_is_written_and_named(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert traced(tmp_path, picture, "attribution.attention=L4H0@last:max") == 0
    body = graph_of(tmp_path)
    ends = [node for node in body["nodes"] if node["node_id"].startswith("TARGET_")]
    assert len(ends) == 2 and all(node["clerp"].startswith("L4H0 ") for node in ends)
    assert [node["is_target_logit"] for node in ends] == [True, False]
    score = body["vlmscope"]["attention"]["scores"][0]
    assert (score["node"], score["layer"], score["head"]) == (ends[0]["node_id"], 4, 0)
    assert score["score"] == pytest.approx(metrics_of(tmp_path)["attention/score"])
    assert score["pair_wise_contributors"] == ends[0]["qk_tracing_results"]["pair_wise_contributors"]
    metrics = metrics_of(tmp_path)
    assert metrics["heads/score_residual"] < 1e-5 and metrics["heads/edge_residual"] < 1e-5
    assert "L4H0 looks from 'model' at 28 to picture" in capsys.readouterr().out


def test_a_graph_tells_its_heads_and_its_story(run_dir: Path) -> None:
    body, metrics = graph_of(run_dir), metrics_of(run_dir)
    attention, view = body["vlmscope"]["attention"], body["qParams"]
    assert attention["stays"] + sum(attention["heads"].values()) == pytest.approx(1, abs=2e-3)
    assert len(attention["scores"]) >= 2 and metrics["heads/edges"] == attention["edges"] > 500
    assert body["nodes"][-1]["node_id"] in view["pinnedIds"] and "picture" in [name for name, *_ in view["supernodes"]]
    assert 0 < body["vlmscope"]["pinned_scores"]["completeness"] < 1
