"""Micro-batches give the gradients and the weights of the whole batch."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.unit.training.test_transcoder_training import CONFIG, _batch, _one_thread, vlm  # noqa: F401
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.models.loading import VLM
from vlmscope.training.layer_trainer import LayerStep, LayerTrainer, differentiate
from vlmscope.training.losses.aux_k import dead_features
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.transcoder import TranscoderConfig

D, F, K, N = 10, 60, 5, 97  # 97 tokens in micro-batches of 20: the last has 17


def _steps(activation: str, micro: int | None, skip: bool) -> tuple[list[Tensor], dict[str, Tensor], list[LayerStep]]:
    """Gradients before clipping, the state and what was noted, of three steps in float64."""
    random = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(N, D, generator=random, dtype=torch.float64)
    y = 2 - (x @ torch.randn(D, D, generator=random, dtype=torch.float64)).relu()
    config = dataclasses.replace(
        CONFIG, k=K, activation=activation, micro_tokens=micro, dead_after_tokens=150, matryoshka=(0.2, 0.5), clip=0.1,
        sparsity_coefficient=0.3,
    )  # fmt: skip
    trainer = LayerTrainer(TranscoderConfig(D, F, K, 0, activation, skip, bandwidth=1.0)).double()
    trainer.standardise(x, y)
    inputs, targets = trainer.standard.apply(*trainer.within_limits(x, y))
    trainer.start(inputs, [targets], "samples", seed=1)
    trainer.silent[[2, 3, 30]] = 200  # dead features, so that AuxK takes part
    with torch.no_grad():
        trainer.transcoder.b_enc[[2, 3, 30]] -= 3.0
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=0.01)
    gradients, noted = [], []
    for _ in range(3):
        optimizer.zero_grad()
        assert len(dead_features(trainer.silent, 150)) > 0
        noted.append(differentiate(trainer, x, y, config, None, torch.Tensor.backward))
        gradients += [p.grad.clone() for p in trainer.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(trainer.parameters(), config.clip)
        optimizer.step()
        trainer.note_fired(noted[-1].fired, noted[-1].n_tokens)
    return gradients, dict(trainer.state_dict()), noted


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
def test_micro_batches_add_up_to_the_whole_batch(activation: str, skip: bool) -> None:
    gradients, state, noted = _steps(activation, None, skip)
    for micro in (20, N, 1):
        ours, our_state, our_noted = _steps(activation, micro, skip)
        assert len(ours) == len(gradients) > 0
        for one, other in zip(ours, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        for name, tensor in state.items():
            torch.testing.assert_close(our_state[name], tensor, rtol=0, atol=1e-12, equal_nan=True)
        for mine, whole in zip(our_noted, noted, strict=True):
            assert mine.loss == pytest.approx(whole.loss, rel=1e-12)
            assert mine.fvu == pytest.approx(whole.fvu, rel=1e-12)
            assert torch.equal(mine.fired, whole.fired)
    assert any(bool((gradient != 0).any()) for gradient in gradients)
    if activation == "jumprelu":
        threshold = [name for name, _ in LayerTrainer(TranscoderConfig(D, F, K, 0, activation)).named_parameters()]
        at = threshold.index("transcoder.activation.threshold")
        assert bool((gradients[at if not skip else at + 1] != 0).any())


def test_no_pass_of_training_sees_more_tokens_than_a_micro_batch(
    vlm: VLM,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vlmscope.transcoders.transcoder import Transcoder

    right, seen = Transcoder.pre_activations, []

    def counted(self: Transcoder, x: Tensor) -> Tensor:
        seen.append(len(x))
        return right(self, x)

    monkeypatch.setattr(Transcoder, "pre_activations", counted)
    config = dataclasses.replace(CONFIG, micro_tokens=16, activation="jumprelu", max_steps=2)
    train_transcoders(vlm, _batch, [], config, tmp_path)
    assert seen and max(seen) == 16


def test_batchtopk_refuses_micro_batches() -> None:
    with pytest.raises(UserError, match="batchtopk chooses among a whole batch; take micro_tokens=null"):
        dataclasses.replace(CONFIG, micro_tokens=16, activation="batchtopk").check()
