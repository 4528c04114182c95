"""bf16-mixed: the choice of features is made in bfloat16, everything that is learnt stays in float32."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.training.test_transcoder_training import CONFIG, _batch, _one_thread, _state, vlm  # noqa: F401
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.models.loading import VLM
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.layer_trainer import LayerTrainer, differentiate
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.config import ACTIVATIONS
from vlmscope.transcoders.transcoder import TranscoderConfig

HALF = dataclasses.replace(CONFIG, precision="bf16-mixed")
UNIT = 2.0**-9  # rounding to bfloat16 changes a number by this much of itself at most
N, D, F, K = 300, 16, 256, 8

# What can be trained: every nonlinearity, alone and with everything that a single layer may have, and across layers.
KINDS = [{"activation": name} for name in ACTIVATIONS]
KINDS += [{"activation": name, "skip": True, "matryoshka": (0.25, 0.5)} for name in ACTIVATIONS]
KINDS += [{"activation": "topk", "cross_layer": True, "skip": True}, {"activation": "topk", "micro_tokens": 20}]
KINDS += [{"activation": "jumprelu", "micro_tokens": 20, "max_norm_ratio": 10.0}]


def _pair(activation: str = "topk", skip: bool = False) -> tuple[LayerTrainer, LayerTrainer, Tensor, Tensor]:
    """The same layer twice, its product in bfloat16 and in float32, and activations [N, D]."""
    random = torch.Generator().manual_seed(3)
    x, y = torch.randn(N, D, generator=random), torch.randn(N, D, generator=random)
    found = []
    for dtype in (torch.bfloat16, None):
        trainer = LayerTrainer(TranscoderConfig(D, F, K, activation=activation, skip=skip), None, dtype)
        trainer.standardise(x, y)
        inputs, targets = trainer.standardised(x, y)
        trainer.start(inputs, [targets], "samples", seed=0)
        found.append(trainer)
    return found[0], found[1], x, y


def test_features_are_exchanged_only_where_bfloat16_cannot_tell_them_apart() -> None:
    half, full, x, y = _pair()
    rows = full.standardised(x, y)[0]
    ours, theirs = half.transcoder(rows), full.transcoder(rows)
    assert (ours.pre.dtype, ours.code.values.dtype) == (torch.bfloat16, torch.float32)
    # Inputs, weights, bias and the sum are rounded once each.
    one = full.transcoder
    slack = 2 * UNIT * (rows.abs() @ one.W_enc.abs().T) + UNIT * (theirs.pre.abs() + one.b_enc.abs())
    slack = slack * (1 + 4 * UNIT) + 1e-6
    smallest = theirs.at_support.amin(1, keepdim=True)
    chosen = torch.zeros(N, F, dtype=torch.bool).scatter(1, ours.code.indices, True)
    exchanged = chosen & ~torch.zeros(N, F, dtype=torch.bool).scatter(1, theirs.code.indices, True)
    assert 0 < int(exchanged.sum()) < 0.02 * N * K  # some are, or the test would show nothing
    assert bool((theirs.pre >= smallest - 2 * slack.amax(1, keepdim=True))[exchanged].all())
    # What is chosen has its value in float32, not in bfloat16.
    torch.testing.assert_close(ours.at_support, theirs.pre.gather(1, ours.code.indices), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_with_the_same_features_gradients_are_those_of_float32(activation: str) -> None:
    half, full, x, y = _pair(activation, skip=True)
    product = half.transcoder._product(half.standardised(x, y)[0])
    full.transcoder.activation.support = lambda pre: half.transcoder.activation.support(product)
    config = dataclasses.replace(HALF, activation=activation, k=K, matryoshka=(0.25,))
    ours, theirs = (differentiate(one, x, y, config, None, Tensor.backward) for one in (half, full))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for (name, one), (_, other) in zip(half.named_parameters(), full.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert float((one.grad - other.grad).norm()) <= 1e-4 * float(other.grad.norm()), name


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_agree_with_float32(activation: str, skip: bool) -> None:
    """A share of about 4 UNIT of the entries is exchanged, each of which is gone and come: sqrt(8 UNIT) of the norm."""
    half, full, x, y = _pair(activation, skip)
    config = dataclasses.replace(HALF, activation=activation, k=K, matryoshka=(0.25,), dead_after_tokens=1, aux_k=8)
    for trainer in (half, full):
        trainer.silent[: F // 4] = 10  # AuxK works too
    ours, theirs = (differentiate(one, x, y, config, None, Tensor.backward) for one in (half, full))
    assert ours.loss == pytest.approx(theirs.loss, rel=4 * UNIT)
    for (name, one), (_, other) in zip(half.named_parameters(), full.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.dtype == torch.float32
        assert float((one.grad - other.grad).norm()) <= (8 * UNIT) ** 0.5 * float(other.grad.norm()), name


def _moved(trainer: LayerTrainer, x: Tensor, y: Tensor, steps: int, rounded: bool) -> Tensor:
    """How far W_dec went in some steps of a size that one bfloat16 weight cannot take; `rounded`: weights in it."""
    optimizer = torch.optim.SGD(trainer.parameters(), lr=1.0)
    before = trainer.transcoder.W_dec.detach().clone()
    config = dataclasses.replace(HALF, k=K, aux_coefficient=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        differentiate(trainer, x, y, config, None, Tensor.backward)
        grad = trainer.transcoder.W_dec.grad
        assert grad is not None
        grad *= 0.1 * UNIT * before.abs() / grad.abs().clamp_min(1e-12)  # a tenth of half a spacing, each weight
        for other in trainer.parameters():
            if other is not trainer.transcoder.W_dec:
                other.grad = None
        optimizer.step()
        if rounded:
            trainer.transcoder.W_dec.data = trainer.transcoder.W_dec.data.bfloat16().float()
    return trainer.transcoder.W_dec.detach() - before


def test_updates_below_bfloat16s_resolution_add_up() -> None:
    half, full, x, y = _pair()
    ours, theirs = (_moved(one, x, y, 40, rounded=False) for one in (half, full))
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=(8 * UNIT) ** 0.5)
    # The same steps on weights that are kept in bfloat16 come to nothing, so the bound above is no empty one.
    lost = _pair()[0]
    lost.transcoder.W_dec.data = lost.transcoder.W_dec.data.bfloat16().float()
    assert float(_moved(lost, x, y, 40, rounded=True).norm()) < 0.01 * float(theirs.norm())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_everything_trains_stays_in_float32_and_resumes_bit_for_bit(
    vlm: VLM,  # noqa: F811
    tmp_path: Path,
    kind: dict[str, Any],
) -> None:
    config = dataclasses.replace(HALF, **kind)

    def train(folder: str, upto: int = 99, resume: bool = False, config: TranscoderTrainingConfig = config):
        def batch(number: int) -> dict[str, Tensor]:
            if number == upto:
                raise KeyboardInterrupt
            return _batch(number)

        return train_transcoders(vlm, batch, [_batch(100)], config, tmp_path / folder, resume=resume)

    whole, metrics = train("whole")
    plain, before = train("plain", config=dataclasses.replace(config, precision="32"))
    assert metrics["val/fvu"] == pytest.approx(before["val/fvu"], rel=0.05)  # six steps, from the same start
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    assert all(one.product_dtype is None or not one.training for one in whole.transcoders.values())
    states = [load_file(file) for file in (tmp_path / "whole").rglob("layer_*.safetensors")]
    assert states and all(t.dtype != torch.bfloat16 for state in states for t in state.values())
    with pytest.raises(KeyboardInterrupt):
        train("parts", upto=5)
    resumed, _ = train("parts", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert _state(tmp_path / "whole") == _state(tmp_path / "parts")
    assert _state(tmp_path / "whole") != _state(tmp_path / "plain")  # the product was not in float32


def test_a_run_goes_on_only_in_its_precision(vlm: VLM, tmp_path: Path) -> None:  # noqa: F811
    train_transcoders(vlm, _batch, [], dataclasses.replace(HALF, max_steps=2), tmp_path)
    with pytest.raises(UserError, match="precision bf16-mixed -> 32"):
        train_transcoders(vlm, _batch, [], dataclasses.replace(CONFIG, max_steps=2), tmp_path, resume=True)
    with pytest.raises(UserError, match="precision '16' is unknown; choose 32 or bf16-mixed"):
        dataclasses.replace(CONFIG, precision="16").check()
