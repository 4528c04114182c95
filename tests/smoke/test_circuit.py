"""A declared circuit from the command line: found, drawn, loaded again, steered and patched; mistakes in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlmscope.app import main
from vlmscope.attribution.export import load_graph
from vlmscope.attribution.influence import subgraph_scores
from vlmscope.circuits.circuit import direct_edges, load_circuit, supernode_mask
from vlmscope.models.tiny import tiny_image

MODEL = ["model=tiny", "transcoder=random", "tracking=none"]
SPEC = """
name: mine
supernodes:
  left:
    contrast: {of: {images: [PICS/0.png, PICS/1.png]}, against: {images: [PICS/2.png, PICS/3.png]}}
    positions: {box: [0, 0, 0.5, 1]}
    count: 4
  named: {ids: [L1/3, L2/5], name: auto}
  strong: {influence: {share: 0.2}, positions: {roles: [last]}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, a declaration and a finished run."""
    folder = tmp_path_factory.mktemp("circuit")
    for number in range(4):
        tiny_image(number).save(folder / f"{number}.png")
    (folder / "mine.yaml").write_text(SPEC.replace("PICS", str(folder)))
    assert run(folder, "run", f"circuit_spec.path={folder / 'mine.yaml'}", "circuit_spec=file") == 0
    return folder


def run(folder: Path, name: str, *more: str) -> int:
    asked = [f"image={folder / '0.png'}", "prompt=what is this ?"]
    return main(["task=circuit", *MODEL, *asked, f"hydra.run.dir={folder / name}", *more])


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


def test_the_circuit_is_what_was_declared_and_its_edges_are_the_graphs(made: Path) -> None:
    circuit = load_circuit(made / "run" / "circuits" / "mine")
    left, named, strong = circuit.supernodes.values()
    assert len(left.features) == 4 and left.positions is not None and left.positions.box is not None
    assert [str(m.feature) for m in named.features] == ["L1/3", "L2/5"] and named.name != "auto"
    assert {m.role for m in strong.features} == {"last"}
    graph = load_graph(made / "run" / "graph.safetensors").graph
    again = direct_edges([graph], list(circuit.supernodes.values()), 1)
    assert again == circuit.edges and any(edge.source == "strong" for edge in again)
    found = metrics(made / "run")
    assert found["circuit/supernodes"] == 3 and found["circuit/left/features"] == 4
    assert 0 < found["circuit/influence_share"] < 1
    pinned = np.any([supernode_mask(graph, node) for node in circuit.supernodes.values()], axis=0)
    replacement, completeness = subgraph_scores(graph, pinned)
    assert (found["circuit/replacement_score"], found["circuit/completeness_score"]) == (replacement, completeness)
    page = (made / "run" / "report.html").read_text()
    assert "contrast of 2 images with 2 images" in page
    assert (made / "run" / "figures" / "circuit.png").stat().st_size > 10_000


def test_a_saved_circuit_is_drawn_with_its_own_edges_or_new_ones(made: Path) -> None:
    place = made / "run" / "circuits" / "mine"
    base = ["task=circuit", *MODEL, f"task.load={place}"]
    assert main([*base, f"hydra.run.dir={made / 'drawn'}"]) == 0
    drawn, saved = (load_circuit(folder) for folder in (made / "drawn" / "circuits" / "mine", place))
    assert (drawn.supernodes, drawn.edges, drawn.model) == (saved.supernodes, saved.edges, saved.model)
    assert metrics(made / "drawn")["circuit/graphs"] == 0
    rows = made / "rows.csv"
    rows.write_text("id,prompt,image\na,what is this ?,0.png\nb,what is this ?,1.png\n")
    assert main([*base, f"task.rows={rows}", f"hydra.run.dir={made / 'mean'}"]) == 0
    first, mean = (load_circuit(made / name / "circuits" / "mine") for name in ("drawn", "mean"))
    assert metrics(made / "mean")["circuit/graphs"] == 2
    assert first.supernodes == mean.supernodes and first.edges != mean.edges


def test_steering_and_patching_keep_to_the_supernodes_positions(made: Path) -> None:
    """The same edits as by hand: at the last position the supernode's features alone."""
    place = made / "run" / "circuits" / "mine"
    circuit = load_circuit(place)
    length = len(load_graph(made / "run" / "graph.safetensors").graph.tokens)
    base = [*MODEL, f"image={made / '0.png'}", "prompt=what is this ?", "task.new_tokens=2", "task.controls=1"]
    chosen = [f"task.circuit={place}", "task.supernodes=[strong]"]
    assert main(["task=steer", *base, *chosen, "task.value=5", f"hydra.run.dir={made / 'steer'}"]) == 0
    values = ", ".join(f"{member.feature}: 5" for member in circuit.supernodes["strong"].features)
    by_hand = [f"task.features={{{values}}}", f"task.positions=[{length - 1}]", f"hydra.run.dir={made / 'hand'}"]
    assert main(["task=steer", *base, *by_hand]) == 0
    steered, expected = metrics(made / "steer"), metrics(made / "hand")
    assert steered["steer/free/kl"] == pytest.approx(expected["steer/free/kl"], rel=1e-5)
    assert steered["steer/free/kl"] > 1e-6
    donor = f"task.donor_image={made / '2.png'}"
    assert main(["task=patch", *base, f"task.circuit={place}", donor, f"hydra.run.dir={made / 'patch'}"]) == 0
    assert metrics(made / "patch")["patch/features"] == circuit.size(*circuit.supernodes)
    assert metrics(made / "patch")["patch/free/kl_control"] >= 0


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("BAD {ids: [L1/30000]}", "a has L1/30000, which the transcoders do not have"),
        ("BAD {influence: {run: /no/run}}", "/no/run is neither a run folder nor a file"),
        ("BAD {influence: {target: nothing}}", "influence target 'nothing'"),
        ("BAD {label: {study: /no/study, query: red}}", "no study.json in /no/study"),
        ("BAD {contrast: {of: {concept: venuss}, against: {concept: mars}}}", "no planet 'venuss'"),
        ("BAD {contrast: {of: {images: [SAME]}, against: {images: [SAME, SAME]}}}", "finds no feature"),
        ("task=circuit", "no circuit: find one with pairs=planet, declare one"),
        ("task=circuit SPEC", "nothing to trace"),
        ("task=circuit SPEC task.load=MINE", "leave one of them out"),
        ("task=circuit task.load=/no/circuit", "cannot read /no/circuit/circuit.yaml"),
        ("task=circuit task.load=MINE transcoder.n_features=50", "other transcoders"),
        ("task=circuit task.load=MINE model.family=llava", "circuit of the model tiny_gemma3"),
        ("task=steer PROMPT task.circuit=MINE task.supernodes=[right]", "no supernode 'right'"),
        ("task=steer PROMPT task.supernodes=[left] task.features={L1/3:0}", "add task.circuit="),
        ("task=steer PROMPT task.circuit=MINE task.features={L1/3:0}", "give exactly one of"),
    ],
)
def test_mistakes_are_one_line(
    made: Path, tmp_path: Path, command: str, says: str, refusal: Callable[..., str]
) -> None:
    if command.startswith("BAD "):
        declared = command.removeprefix("BAD ").replace("SAME", str(made / "0.png"))
        (tmp_path / "bad.yaml").write_text(f"supernodes:\n  a: {declared}\n")
        command = f"task=circuit PROMPT circuit_spec=file circuit_spec.path={tmp_path / 'bad.yaml'}"
    words = {
        "SPEC": f"circuit_spec=file circuit_spec.path={made / 'mine.yaml'}",
        "MINE": str(made / "run" / "circuits" / "mine"),
        "PROMPT": f"image={made / '0.png'} prompt=what",
    }
    for word, text in words.items():
        command = command.replace(word, text)
    assert says in refusal(*MODEL, *command.split(), f"hydra.run.dir={tmp_path / 'r'}")
    assert not (tmp_path / "r" / "circuits").exists()
