"""A circuit that task=circuit finds by pairs: discovered, named, traced and drawn; mistakes in one line."""

import json
from pathlib import Path

import pytest

from vlmscope.app import main
from vlmscope.attribution.export import load_graph
from vlmscope.circuits.build import concept_pictures
from vlmscope.circuits.circuit import load_circuit
from vlmscope.core.records import Positions

SMALL = [
    "tracking=none", "pairs.train=4", "pairs.test=4", "interchange.least=2", "attribution.max_nodes=100",
    "task.traces=2", "discovery.graphs=1", "discovery.steps=1", "discovery.methods=[eap_ig,random]",
    "discovery.modes=[free]", "discovery.edge_pairs=0", "discovery.draws=1", "discovery.minimality=2",
]  # fmt: skip
PAIRS = ["task=circuit", "pairs=planet", *SMALL]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a circuit found by pairs of Mars and Earth; no question was named."""
    folder = tmp_path_factory.mktemp("found") / "run"
    words = ["pairs.original=mars", "pairs.counterfactual=earth"]
    assert main([*PAIRS, *words, f"hydra.run.dir={folder}"]) == 0
    return folder


def test_the_first_question_that_moves_is_discovered_and_its_supernodes_are_named(made: Path) -> None:
    (folder,) = (made / "circuits").iterdir()
    assert folder.name == "name"
    circuit = load_circuit(folder)
    assert {"mars", "earth"} <= set(circuit.supernodes) <= {
        "mars", "earth", "last position", "picture", "question words", "special tokens"
    }  # fmt: skip
    assert circuit.node("mars").positions == Positions(("last",))
    assert circuit.node("mars").chosen == "discovery, writes mars"
    members = [(member.role, member.feature) for node in circuit.supernodes.values() for member in node.features]
    assert len(members) == len(set(members))
    found = json.loads((made / "metrics.json").read_text())["circuit/features"]
    assert found == len({feature for _, feature in members}) <= len(members)
    for node in circuit.supernodes.values():
        assert node.positions is not None and {member.role for member in node.features} == {*node.positions.roles}


def test_its_edges_end_at_the_difference_of_the_two_answers(made: Path) -> None:
    circuit = load_circuit(made / "circuits" / "name")
    assert {edge.target for edge in circuit.edges} - set(circuit.supernodes) == {"answer: mars - earth"}
    (into,) = [e for e in circuit.edges if (e.source, e.target) == ("mars", "answer: mars - earth")]
    assert into.weight > 0 and into.graphs == 2
    assert load_graph(made / "graph.safetensors").graph.logit_tokens == ["mars - earth"]


def test_an_input_of_ones_own_is_traced_instead_and_the_circuit_is_loaded_again(made: Path, tmp_path: Path) -> None:
    place = made / "circuits" / "name"
    again = ["task=circuit", "tracking=none", f"task.load={place}", "task.figure=false", "pairs=planet"]
    assert main([*again, f"hydra.run.dir={tmp_path / 'loaded'}"]) == 0
    assert load_circuit(tmp_path / "loaded" / "circuits" / "name").edges == load_circuit(place).edges
    own = ["prompt=what covers this planet ?", f"image={tmp_path / 'mars.png'}", "discovery.question=cover"]
    concept_pictures("mars", 1, 0)[0].save(tmp_path / "mars.png")
    assert main([*PAIRS, *own, "task.figure=false", f"hydra.run.dir={tmp_path / 'own'}"]) == 0
    circuit = load_circuit(tmp_path / "own" / "circuits" / "cover")
    assert {edge.target for edge in circuit.edges} - set(circuit.supernodes) == {"answer: dust"}
