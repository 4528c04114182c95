"""Duplicates across layers: planted ones are counted, and nothing else."""

import torch

from vlmscope.metrics.dictionary import duplicated_fraction, nearest_twins


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


def test_twins_are_those_of_the_whole_table_of_cosines() -> None:
    first, second = rows(0), torch.cat([rows(1, 20), 2.0 * rows(0)[7:9] + 0.2 * rows(5, 2), rows(0)[11:12]])
    alive = {0: torch.ones(40, dtype=torch.bool), 3: torch.ones(23, dtype=torch.bool)}
    alive[3][22] = False  # parallel to L0/11, but dead
    alive[0][30] = False
    cosines = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=-1)
    cosines[:, 22] = -1
    for block in (3, 2048):
        found = nearest_twins({0: [first], 3: [second]}, alive, own_layer=False, block=block)
        living = alive[0]
        torch.testing.assert_close(found[0].cosine[living], cosines.max(1).values[living])
        assert torch.equal(found[0].index[living], cosines.max(1).indices[living])
        assert found[0].cosine[30] == -1 and found[0].layer[30] == -1 and found[3].index[22] == -1
        assert found[3].index[20:22].tolist() == [7, 8] and found[3].layer[20:22].tolist() == [0, 0]
        assert (found[0].cosine >= 0.8).sum() == 2
