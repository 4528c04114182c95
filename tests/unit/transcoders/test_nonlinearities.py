"""Every nonlinearity against its equation, written densely, and the penalties that go with some."""

import pytest
import torch
from torch import Tensor

from vlmscope.training.layer_trainer import l0_penalty
from vlmscope.transcoders import nonlinearities
from vlmscope.transcoders.config import ACTIVATIONS
from vlmscope.transcoders.nonlinearities import BatchTopK, JumpReLU
from vlmscope.transcoders.transcoder import Transcoder, random_set

D, F, K, N = 6, 20, 4, 17
FREE = ("batchtopk", "jumprelu", "relu")  # the number of active features is free


def one(activation: str, skip: bool = False) -> tuple[Transcoder, Tensor]:
    transcoder = random_set(1, D, F, K, skip=skip, seed=3, dtype=torch.float64, activation=activation)[0]
    return transcoder, torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense_code(transcoder: Transcoder, x: Tensor) -> Tensor:
    """[N, F]: the activations by the definition."""
    pre = x @ transcoder.W_enc.T + transcoder.b_enc
    thresholds = transcoder.activation.thresholds
    if transcoder.config.activation == "topk":
        return torch.where(pre >= pre.sort(-1).values[:, -K, None], pre, 0).relu()
    return torch.where(pre > (0 if thresholds is None else thresholds), pre, 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("skip", [False, True])
def test_codes_and_reconstructions_are_those_of_the_equation(activation: str, skip: bool) -> None:
    transcoder, x = one(activation, skip)
    expected = dense_code(transcoder, x)
    code = transcoder.encode(x)
    assert torch.allclose(code.dense(F), expected, rtol=0, atol=1e-14)
    assert all(len(set(row)) == len(row) for row in code.indices.tolist())
    skipped = 0 if transcoder.W_skip is None else x @ transcoder.W_skip.T
    assert torch.allclose(transcoder(x).reconstruction, expected @ transcoder.W_dec + transcoder.b_dec + skipped)
    if activation in FREE:
        counts = (expected > 0).sum(-1)
        assert counts.min() < counts.max() == code.indices.shape[-1]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_tokens_code_does_not_depend_on_its_batch(activation: str) -> None:
    transcoder, x = one(activation)
    together = transcoder.encode(x).dense(F)
    alone = torch.cat([transcoder.encode(row[None]).dense(F) for row in x])
    assert torch.equal(together > 0, alone > 0) and torch.allclose(together, alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("activation", ["batchtopk", "relu"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_the_dense_equation(activation: str, training: bool) -> None:
    transcoder, x = one(activation, skip=True)
    transcoder.train(training)
    g = torch.randn(N, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = [transcoder.W_enc, transcoder.b_enc, transcoder.W_dec, transcoder.b_dec]
    out = transcoder(x)
    sparse = torch.autograd.grad((out.reconstruction * g).sum(), weights)
    pre = x @ transcoder.W_enc.T + transcoder.b_enc
    code = torch.where(out.code.dense(F) > 0, pre, 0)
    skipped = 0 if transcoder.W_skip is None else x @ transcoder.W_skip.T
    dense = torch.autograd.grad(((code @ transcoder.W_dec + transcoder.b_dec + skipped) * g).sum(), weights)
    for ours, theirs in zip(sparse, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_batch_topk_keeps_the_largest_of_the_batch_and_remembers_the_smallest() -> None:
    transcoder, x = one("batchtopk")
    activation = transcoder.activation
    assert isinstance(activation, BatchTopK)
    activation.threshold.fill_(-1.0)
    transcoder.train()
    code = transcoder.encode(x).dense(F)
    pre = x @ transcoder.W_enc.T + transcoder.b_enc
    kept = pre.flatten().topk(K * N).values
    assert torch.equal(code > 0, pre >= kept[-1]) and int((code > 0).sum()) == K * N
    assert activation.threshold.item() == pytest.approx(kept[-1].item())
    transcoder.encode(x * 2)
    doubled = (2 * x @ transcoder.W_enc.T + transcoder.b_enc).flatten().topk(K * N).values[-1]
    assert float(activation.threshold) == pytest.approx(0.9 * kept[-1].item() + 0.1 * doubled.item())
    before = float(activation.threshold)
    transcoder.eval().encode(x)
    assert float(activation.threshold) == before


def test_jump_relus_gradients_are_the_papers_pseudo_derivatives() -> None:
    transcoder, x = one("jumprelu")
    transcoder.train()
    jump = transcoder.activation
    assert isinstance(jump, JumpReLU)
    jump.bandwidth = 0.6
    out = transcoder(x)
    g = torch.randn(N, F, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weighed = (out.code.values * g.gather(1, out.code.indices)).sum()
    found = torch.autograd.grad(weighed, [jump.threshold, transcoder.b_enc], retain_graph=True)
    pre, theta = (x @ transcoder.W_enc.T + transcoder.b_enc).detach(), jump.threshold.detach()
    kernel = ((pre - theta).abs() <= 0.3).double() / 0.6
    assert ((kernel > 0) & (pre < theta)).any() and ((kernel > 0) & (pre > theta)).any()
    torch.testing.assert_close(found[0], -(g * theta * kernel).sum(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], (g * (pre > theta)).sum(0), rtol=0, atol=1e-12)

    penalty = l0_penalty(jump, out.at_support, out.code.indices, K)
    mean = (pre > theta).double().sum(-1).mean()
    assert penalty.item() == pytest.approx(((mean / K - 1) ** 2).item())
    (pull,) = torch.autograd.grad(penalty, [jump.threshold])
    torch.testing.assert_close(pull, 2 * (mean / K - 1) / K * -kernel.sum(0) / N, rtol=0, atol=1e-12)


# -- the k largest by blocks against `torch.topk`


def numbers(n: int, f: int, seed: int = 0) -> Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


def by_blocks(pre: Tensor, k: int) -> Tensor:
    """The path under test, which must not have given up."""
    found = nonlinearities._by_blocks(pre, k, nonlinearities._block_size(pre.shape[1], k))
    assert found is not None
    return found


@pytest.mark.parametrize(("f", "k"), [(2048, 16), (1024, 32), (10240, 32), (1536, 1), (64, 4), (2048, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_come_in_order(f: int, k: int, dtype: torch.dtype) -> None:
    pre = numbers(300, f).to(dtype)
    assert nonlinearities._block_size(f, k) >= 4
    single = nonlinearities._single(pre)
    assert single is not None
    found, known = by_blocks(single, k), pre.topk(k)
    assert torch.equal(pre.gather(1, found), known.values)
    assert all(len(set(row)) == k for row in found.tolist())  # indices may differ from topk's where numbers are equal


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
