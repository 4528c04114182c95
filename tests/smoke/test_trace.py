"""`task=trace` on any picture: files agree with each other, the answer leads back to the picture, mistakes are one
line.
"""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

import vlmscope
from vlmscope.app import main
from vlmscope.attribution.export import load_graph
from vlmscope.attribution.influence import reaches_image
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


@pytest.fixture(scope="module")
def run_dir(picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace") / "run"
    assert (
        main(["task=trace", f"image='{picture}'", f"prompt={QUESTION}", f"hydra.run.dir={folder}", "tracking=none"])
        == 0
    )
    return folder


def test_json_and_arrays_are_the_same_graph(run_dir: Path) -> None:
    body = json.loads((run_dir / "graph.json").read_text())
    jsonschema.validate(body, json.loads(SCHEMA.read_text()))
    pruned = load_graph(run_dir / "graph.safetensors")
    assert len(body["nodes"]) == pruned.n_nodes
    weights = sorted(link["weight"] for link in body["links"])
    kept = np.sort(pruned.graph.weights[pruned.edge_mask])
    assert np.array_equal(np.array(weights, np.float32), kept)
    assert len({node["node_id"] for node in body["nodes"]}) == len(body["nodes"])


def test_the_answer_leads_back_to_the_picture(run_dir: Path) -> None:
    pruned = load_graph(run_dir / "graph.safetensors")
    logits = pruned.graph.nodes.of(NodeKind.LOGIT)
    assert pruned.graph.logit_tokens[0] == "mars"
    assert reaches_image(pruned, int(logits[0]))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["graph/answer_sees_image"] == 1.0
    assert metrics["graph/max_residual"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["image=/no/such.png"], "no such file"),
        (["prompt=what planet is this zebra ?"], "zebra"),
        (["prompt=<start_of_image> <start_of_image> what planet is this ?"], "2 times but 1 picture"),
        # A Latin-1 byte on the command line, as Python passes it on.
        (["prompt=what planet is caf\udce9 ?"], r"prompt= has '\udce9' at character 19"),
        (["attribution.answer=caf\udce9"], "attribution.answer="),
        (["attribution.tokens=[mars,caf\udce9]"], "attribution.tokens="),
        (["attribution.logit_mass=2"], "logit_mass"),
        (["attribution.choice=best"], "influence, total_effect"),
        (["attribution.memory_gb=-1"], "must be above 0"),
        (["attribution.memory_gb=0.002"], "is too little for 29 tokens"),
        (["model=path", "model.path=/no/model"], "no model at"),
        (["transcoder=path", "transcoder.path=/no/set"], "/no/set"),
        (["hydra.run.dir=/proc/nothing/here"], "/proc/nothing"),
    ],
)
def test_mistakes_are_one_line(
    picture: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {a.partition("=")[0] for a in arguments}
    base = {
        "image": f"image='{picture}'",
        "prompt": f"prompt={QUESTION}",
        "hydra.run.dir": f"hydra.run.dir={tmp_path / 'r'}",
    }
    command = ["task=trace", "tracking=none", *(v for k, v in base.items() if k not in given), *arguments]
    assert main(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (tmp_path / "r" / "graph.json").exists()


def test_little_memory_gives_the_same_graph_and_leaves_no_files(picture: Path, run_dir: Path, tmp_path: Path) -> None:
    command = ["task=trace", f"image='{picture}'", f"prompt={QUESTION}", "tracking=none", f"hydra.run.dir={tmp_path}"]
    assert main([*command, "attribution.memory_gb=0.05"]) == 0
    first, second = (load_graph(folder / "graph.safetensors") for folder in (run_dir, tmp_path))
    assert np.array_equal(first.graph.indices, second.graph.indices)
    assert np.array_equal(first.edge_mask, second.edge_mask)
    np.testing.assert_allclose(first.graph.weights, second.graph.weights, rtol=0, atol=1e-6)
    names = [{path.name for path in folder.iterdir()} for folder in (run_dir, tmp_path)]
    assert names[0] == names[1]


@pytest.mark.parametrize("choice", ["influence", "total_effect"])
def test_what_is_left_out_is_in_the_metrics(picture: Path, run_dir: Path, tmp_path: Path, choice: str) -> None:
    command = ["task=trace", f"image='{picture}'", f"prompt={QUESTION}", "tracking=none", f"hydra.run.dir={tmp_path}"]
    assert main([*command, "attribution.max_nodes=500", f"attribution.choice={choice}", "task.figure=false"]) == 0
    metrics, whole = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, run_dir))
    pruned = load_graph(tmp_path / "graph.safetensors")
    kinds, flow = pruned.graph.nodes.kind, pruned.influence
    ending = ~np.isin(kinds, (NodeKind.FEATURE, NodeKind.LOGIT))
    share = flow[kinds == NodeKind.LEFT_OUT].sum() / flow[ending].sum()
    assert 0.01 < share < 0.5 and metrics["graph/left_out_share"] == pytest.approx(share)
    assert whole["graph/left_out_share"] == 0.0
    assert pruned.graph.meta["choice"] == choice


@pytest.mark.parametrize("mode", ["L", "RGBA", "1x1", "wide"])
def test_odd_pictures_are_traced(tmp_path: Path, mode: str) -> None:
    sizes = {"1x1": (1, 1), "wide": (900, 7)}
    image = Image.new("RGB" if mode in sizes else mode, sizes.get(mode, (40, 50)), 120 if mode == "L" else None)
    image.save(tmp_path / "x.png")
    command = ["task=trace", f"image={tmp_path / 'x.png'}", f"prompt={QUESTION}", "tracking=none", "task.figure=false"]
    assert main([*command, f"hydra.run.dir={tmp_path / 'r'}", "attribution.max_nodes=100"]) == 0


def test_a_score_and_heads_are_written_and_named(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "attribution.attention=L4H0@last:max",
        "task.head_edges=3",
        f"hydra.run.dir={tmp_path}",
        "tracking=none",
    ]
    assert main(["task=trace", f"image='{picture}'", f"prompt={QUESTION}", *arguments]) == 0
    body = json.loads((tmp_path / "graph.json").read_text())
    jsonschema.validate(body, json.loads(SCHEMA.read_text()))
    ends = [node for node in body["nodes"] if node["node_id"].startswith("TARGET_")]
    assert len(ends) == 2 and all(node["clerp"].startswith("L4H0 ") for node in ends)
    assert [node["is_target_logit"] for node in ends] == [True, False]
    score = json.loads((tmp_path / "attention.json").read_text())["scores"][0]
    assert score["sum_of_all_pairs"] == pytest.approx(score["score"], abs=1e-5 * score["sum_of_sizes"])
    assert score["pairs"][0]["term"] != 0 and str(score["place"]) in capsys.readouterr().out
    edges = json.loads((tmp_path / "heads.json").read_text())["edges"]
    ids = {node["node_id"] for node in body["nodes"]}
    for edge in edges:
        assert {edge["source"], edge["target"]} <= ids
        for way in ("first", "last"):
            size = abs(edge["direct"]) + sum(map(abs, edge[way].values()))
            assert edge["direct"] + sum(edge[way].values()) == pytest.approx(edge["weight"], abs=1e-4 * size)
    assert len(edges) == 3 and (tmp_path / "figures" / "graph.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attribution.tokens=[marz]"], "the nearest is 'mars'"),
        (["attribution.feature=L5/9999"], "features 0 to 2047"),
        (["attribution.attention=L9H9"], "layers 0 to 7"),
        (["attribution.difference=[mars]"], "takes two"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_line(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["task=trace", f"prompt={QUESTION}", f"hydra.run.dir={tmp_path}", "tracking=none"]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and error.count("\n") == 0
