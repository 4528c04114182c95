"""Random circuits are as large as what they stand beside, and drawn anew under each seed."""

import numpy as np
import pytest

from vlmscope.circuits.discovery.controls import matched_circuit, matched_circuits
from vlmscope.circuits.discovery.nodes import Kind, Nodes, make_nodes


def candidates(count: int) -> Nodes:
    """An embedding and `count` features, half of them of each of two layers, at one role."""
    keys = [(int(Kind.FEATURE), i * 2 // count, 0, i) for i in range(count)]
    return make_nodes(("image",), [(int(Kind.EMBEDDING), -1, 0, -1), *keys])


def test_a_matched_circuit_is_as_large_and_shares_no_feature() -> None:
    nodes, members = candidates(20), np.arange(9)
    for seed in range(5):
        drawn = matched_circuit(nodes, members, np.ones(21), seed)
        assert len(set(drawn.tolist())) == len(members)
        assert set(drawn.tolist()) & set(members.tolist()) == {0}  # an embedding has no other like it


def test_seeds_share_no_draw() -> None:
    nodes, members, change = candidates(400), np.arange(9), np.ones(401)
    drawn = [matched_circuits(nodes, members, change, seed, 3) for seed in (0, 1, 2)]
    assert len({tuple(one.tolist()) for some in drawn for one in some}) == 9
    for draw, one in enumerate(drawn[0]):
        assert np.array_equal(one, matched_circuit(nodes, members, change, draw))


def test_a_circuit_of_most_features_has_no_matched_ones() -> None:
    members = np.arange(7)  # six features
    assert [len(one) for one in matched_circuits(candidates(12), members, np.ones(13), 0, 2)] == [7, 7]
    assert matched_circuits(candidates(11), members, np.ones(12), 0, 2) == []
    with pytest.raises(ValueError, match="6 features of the circuit, 5 others"):
        matched_circuit(candidates(11), members, np.ones(12), 0)
