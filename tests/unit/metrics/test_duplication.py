"""Duplicates across layers: planted ones are counted, and nothing else."""

import torch

from vlmscope.metrics.duplication import duplicated_fraction


def rows(seed: int, n: int = 40, d: int = 64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_planted_pairs_are_found_whatever_their_length_and_opposite_or_dead_ones_are_not() -> None:
    first, second, third = rows(0), rows(1), rows(2, n=30)
    second[:10] = 3.0 * first[5:15] + 0.1 * rows(3, 10)  # nearly parallel
    third[:4] = -first[:4]  # opposite
    third[4:6] = second[20:22]  # parallel, but dead
    alive = {
        0: torch.ones(40, dtype=torch.bool),
        4: torch.ones(40, dtype=torch.bool),
        7: torch.ones(30, dtype=torch.bool),
    }
    alive[7][4:6] = False
    found = duplicated_fraction({0: first, 4: second, 7: third}, alive)
    assert found == {0: 10 / 40, 4: 10 / 40, 7: 0.0}
    # Within one layer nothing counts, and a layer without a live feature has no figure.
    twins = torch.cat([first, first])
    assert duplicated_fraction({0: twins}, {0: torch.ones(80, dtype=torch.bool)}) == {0: 0.0}
    assert duplicated_fraction({0: first}, {0: torch.zeros(40, dtype=torch.bool)}) == {}


def test_a_sample_is_compared_with_everything() -> None:
    first = rows(0)
    other = torch.cat([rows(1, 100), first])
    alive = {0: torch.ones(40, dtype=torch.bool), 1: torch.ones(140, dtype=torch.bool)}
    assert duplicated_fraction({0: first, 1: other}, alive, sample=20) == {0: 1.0, 1: 0.0}
