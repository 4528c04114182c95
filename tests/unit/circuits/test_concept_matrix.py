"""A matrix of concepts: what its configuration refuses, carried activations, and p-values over all cells."""

import numpy as np
import pytest
import torch

from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.concept_matrix import METHODS, Cell, carried, corrected
from vlmscope.circuits.config import QuestionConfig
from vlmscope.circuits.matrix_config import ConceptMatrixConfig
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import CircuitFeature, Rate, Supernode
from vlmscope.core.records import FeatureId

ASKED = {"name": QuestionConfig("what ?", {"a": "x", "b": "y"})}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"concepts": ["a"]}, "two or more"),
        ({"concepts": ["a", "a"]}, "two or more"),
        ({"concepts": ["a", "b", "c"]}, "answers lacks c"),
        ({"questions": {}}, "at least one question"),
        ({"test": 4}, "least=5 is more than"),
        ({"alpha": 1.0}, "between 0 and 1"),
        ({"graphs": 0}, "at least 1"),
    ],
)
def test_refused(changed: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ConceptMatrixConfig(**({"concepts": ["a", "b"], "questions": ASKED} | changed))


def test_each_recipient_gets_its_own_donors_activations() -> None:
    members = (FeatureId(0, 7), FeatureId(0, 2), FeatureId(3, 5))
    circuit = Circuit({"a": Supernode("a", tuple(CircuitFeature(f, "last", 1.0, 1.0) for f in members))}, {})
    values = torch.arange(2 * 3 * 4.0).view(2, 3, 4)  # two donors, three positions, features 1, 2, 5, 7
    given = {0: (torch.tensor([1, 2, 5, 7]), values), 3: (torch.tensor([5]), values[..., :1])}
    found = carried(given, circuit, torch.tensor([1, 0, 1]))
    assert found[0][0].tolist() == [2, 7] and found[3][0].tolist() == [5]
    for recipient, donor in enumerate((1, 0, 1)):
        assert torch.equal(found[0][1][recipient], values[donor][:, [1, 3]])


def test_all_cells_and_methods_are_corrected_together() -> None:
    """Three of six are 0.01: q = 0.01 * 6 / 3. Of the first method alone, two of three, it would be 0.015."""
    rate = Rate(1.0, 0.9, 1.0, 20)
    p = [(0.01, 0.5), (0.01, 0.5), (1.0, 0.01)]
    cells = [Cell("a", "b", "name", {"steer": rate}, dict(zip(METHODS, row, strict=True)), {}, 3) for row in p]
    q = np.array([[cell.q[method] for method in METHODS] for cell in corrected(cells)])
    np.testing.assert_allclose(q, [[0.02, 0.6], [0.02, 0.6], [1.0, 0.02]])
    assert corrected([]) == []
