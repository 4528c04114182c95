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
from vlmscope.attribution.graph_io import load_graph
from vlmscope.attribution.pruning import reaches_image
from vlmscope.core.graph import NodeKind
from vlmscope.data.orrery.concepts import concept_scenes

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
        (["attribution.logit_mass=2"], "logit_mass"),
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


@pytest.mark.parametrize("mode", ["L", "RGBA", "1x1", "wide"])
def test_odd_pictures_are_traced(tmp_path: Path, mode: str) -> None:
    sizes = {"1x1": (1, 1), "wide": (900, 7)}
    image = Image.new("RGB" if mode in sizes else mode, sizes.get(mode, (40, 50)), 120 if mode == "L" else None)
    image.save(tmp_path / "x.png")
    command = ["task=trace", f"image={tmp_path / 'x.png'}", f"prompt={QUESTION}", "tracking=none", "task.figure=false"]
    assert main([*command, f"hydra.run.dir={tmp_path / 'r'}", "attribution.max_nodes=100"]) == 0
