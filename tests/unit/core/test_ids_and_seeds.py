"""Ids survive a round trip; random streams are independent of each other and of the order of use."""

import numpy as np
import pytest

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, control_draws, derive, generator


def test_feature_ids_round_trip_and_sort_by_layer_then_index() -> None:
    ids = [FeatureId(10, 2), FeatureId(2, 11), FeatureId(2, 9)]
    assert [FeatureId.parse(f" {item} ") for item in ids] == ids
    assert [str(item) for item in sorted(ids)] == ["L2/9", "L2/11", "L10/2"]


@pytest.mark.parametrize("text", ["", "3/512", "L3", "L3/", "L-1/2", "L3/5/1", "l3/5", "L3/٥", "L3/512x"])
def test_what_is_no_feature_id_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="L<layer>/<index>"):
        FeatureId.parse(text)


def test_streams_depend_on_every_key_and_on_nothing_else() -> None:
    paths = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 1), ("a", "1"), (1,), (-1,), ("a", 1, 2), ("a", 12)]
    seeds = [derive(seed, *path) for seed in (0, 1) for path in paths]
    assert len(set(seeds)) == len(seeds)
    first = generator(3, "x", 5).normal(size=4)
    generator(3, "y").normal(size=100)
    np.testing.assert_array_equal(generator(3, "x", 5).normal(size=4), first)


def test_draws_of_controls_do_not_meet_under_two_seeds() -> None:
    assert list(control_draws(0, 3)) == [0, 1, 2]
    drawn = [draw for seed in range(4) for draw in control_draws(seed, 500)]
    assert len(set(drawn)) == len(drawn)
