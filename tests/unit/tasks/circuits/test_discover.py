"""Supernodes of a discovered circuit by the answers that their features write, and pairs of many answers."""

from PIL import Image

from vlmscope.circuits.circuit import Circuit
from vlmscope.core.intervention import CircuitFeature, Supernode
from vlmscope.core.records import FeatureId, Positions
from vlmscope.data.pairs import Pair, Side
from vlmscope.tasks.circuits.discover import NAMED, by_answer, spread_answers


def node(role: str, influences: list[float], layer: int) -> Supernode:
    members = [CircuitFeature(FeatureId(layer, i), role, 1.0, influence) for i, influence in enumerate(influences)]
    return Supernode(f"name_{role}", tuple(members), Positions((role,)), "discovery")


def circuit(*nodes: Supernode) -> Circuit:
    return Circuit({one.name: one for one in nodes}, {})


def names(found: Circuit) -> dict[str, list[int]]:
    return {name: [member.feature.index for member in one.features] for name, one in found.supernodes.items()}


def test_features_of_the_last_position_are_grouped_by_the_answer_that_they_write() -> None:
    words = {FeatureId(1, 0): "mars", FeatureId(1, 1): "dust", FeatureId(1, 2): "earth", FeatureId(1, 3): "mars"}
    found = by_answer(circuit(node("image", [1.0], 0), node("last", [1, 2, -9, 1], 1)), ["mars", "earth"], words)
    assert names(found) == {"picture": [0], "last position": [1], "earth": [2], "mars": [0, 3]}
    assert found.node("mars").chosen == "discovery, writes mars" and found.node("mars").positions == Positions(
        ("last",)
    )
    assert found.node("picture").chosen == "discovery"


def test_only_so_many_answers_get_a_supernode_and_names_of_surroundings_are_avoided() -> None:
    answers = [f"a{i}" for i in range(NAMED + 2)]
    words = {FeatureId(1, i): answer for i, answer in enumerate(answers)}
    found = by_answer(circuit(node("last", [float(i) for i in range(NAMED + 2)], 1)), answers, words)
    assert names(found)["last position"] == [0, 1] and len(found.supernodes) == NAMED + 1
    found = by_answer(
        circuit(node("last", [1.0, 1.0], 1)),
        ["picture", "errors"],
        {FeatureId(1, 0): "picture", FeatureId(1, 1): "errors"},
    )
    assert names(found) == {"writes picture": [0], "writes errors": [1]}


def test_pairs_of_different_answers_come_first() -> None:
    def pair(number: int, answer: str) -> Pair:
        image = Image.new("RGB", (2, 2))
        return Pair(str(number), "q", "planet", Side("what ?", (image,), answer), Side("what ?", (image,), "moon"))

    pairs = [pair(i, answer) for i, answer in enumerate(["mars", "mars", "earth", "mars", "venus"])]
    assert [one.id for one in spread_answers(pairs, 3)] == ["0", "2", "4"]
    assert [one.id for one in spread_answers(pairs, 9)] == ["0", "2", "4", "1", "3"]
