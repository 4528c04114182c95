"""The k largest by blocks against `torch.topk`."""

import pytest
import torch
from torch import Tensor

from vlmscope.transcoders.nonlinearities import select
from vlmscope.transcoders.nonlinearities.select import largest


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(n: int, f: int, seed: int = 0) -> Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


def by_blocks(pre: Tensor, k: int) -> Tensor:
    """The path under test, which must not have given up."""
    found = select._by_blocks(pre, k, select._block_size(pre.shape[1], k))
    assert found is not None
    return found


@pytest.mark.parametrize(("f", "k"), [(2048, 16), (1024, 32), (10240, 32), (1536, 1), (64, 4), (2048, 128)])
def test_the_largest_come_in_order(f: int, k: int) -> None:
    pre = numbers(300, f)
    assert select._block_size(f, k) >= 4
    found, known = by_blocks(pre, k), pre.topk(k)
    assert torch.equal(pre.gather(1, found), known.values)
    assert all(len(set(row)) == k for row in found.tolist())  # indices may differ from topk's where numbers are equal


def test_all_the_largest_in_one_block_and_all_in_different_ones() -> None:
    pre = numbers(200, 1024)
    pre[0, ::64] += 100  # the sixteen numbers of block 0
    pre[1, 64:80] += 100
    assert torch.equal(by_blocks(pre, 16), pre.topk(16).indices)


def test_rows_with_equal_numbers_or_nan_are_still_served() -> None:
    pre = numbers(300, 1024)
    pre[3] = 0.25
    pre[4, 100:120] = 9.0  # more than k, equal, in different blocks
    pre[5, 7] = torch.nan
    pre[6] = -torch.inf
    pre[7, 5:900] = -torch.inf
    found, known = by_blocks(pre, 8), pre.topk(8)
    assert torch.equal(pre.gather(1, found).nan_to_num(1e9), known.values.nan_to_num(1e9))
    assert all(len(set(row)) == 8 for row in found.tolist())


def test_a_matrix_full_of_equal_numbers_goes_to_topk() -> None:
    pre = torch.zeros(300, 2048)
    assert select._by_blocks(pre, 16, 8) is None
    assert all(len(set(row)) == 16 for row in largest(pre, 16).tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_widths_without_blocks_go_to_topk(dtype: torch.dtype) -> None:
    for pre in (numbers(200, 2048).to(dtype), numbers(300, 2047).to(dtype)):
        assert torch.equal(largest(pre, 16), pre.topk(16).indices)


def test_large_matrices_take_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = select._by_blocks
    monkeypatch.setattr(select, "_by_blocks", lambda pre, k, size: seen.append(size) or real(pre, k, size))
    pre = numbers(256, 2048)
    assert torch.equal(largest(pre, 16), pre.topk(16).indices)
    largest(pre[:8], 16)
    torch.set_num_threads(8)
    largest(pre, 16)
    assert seen == [16]
