"""Tokens of huge norm are left out of a layer's start and loss, counted, and still judged in validation."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.unit.training.test_transcoder_training import CONFIG, _batch, _one_thread, _state, vlm  # noqa: F401
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.models.base import Adapter
from vlmscope.models.loading import VLM
from vlmscope.training.batches import Batch, LayerActivations
from vlmscope.training.layer_trainer import LayerTrainer, differentiate
from vlmscope.training.ranks import Ranks
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.transcoder import TranscoderConfig

FILTER = dataclasses.replace(CONFIG, max_norm_ratio=10.0)


@pytest.mark.parametrize("micro", [None, 16])
@pytest.mark.parametrize("which", ["input", "target"])
def test_a_huge_token_changes_neither_start_nor_gradient(which: str, micro: int | None) -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=random), torch.randn(50, 6, generator=random)
    huge = (x.clone(), y.clone())
    huge[0 if which == "input" else 1][7] *= 1000
    rest = torch.arange(50) != 7
    found = []
    for inputs, targets in (huge, (x[rest], y[rest])):
        trainer = LayerTrainer(TranscoderConfig(6, 24, 3), 10.0)
        trainer.standardise(*huge)
        start, goal = trainer.standard.apply(*trainer.within_limits(*huge))
        trainer.start(start, [goal], "samples", seed=0)
        step = differentiate(
            trainer, inputs, targets, dataclasses.replace(FILTER, micro_tokens=micro), None, Tensor.backward
        )
        found.append((step, trainer))
    (first, ours), (second, theirs) = found
    assert (first.n_tokens, first.n_left_out) == (49, 1) and (second.n_tokens, second.n_left_out) == (49, 0)
    assert first.loss == second.loss
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
    assert float(ours.scales.max()) < 2  # the huge token would have made one of them about 100


def test_what_is_left_out_is_logged_and_resumes_bit_for_bit(
    vlm: VLM,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Ranks.collect

    def collected(self: Ranks, adapter: Adapter, batch: Batch) -> LayerActivations:
        found = right(self, adapter, batch)
        x, y = (one.clone() for one in found.by_layer[1])
        x[::13] *= 1e4  # 6 of 78 tokens
        return dataclasses.replace(found, by_layer={**found.by_layer, 1: (x, y)})

    monkeypatch.setattr(Ranks, "collect", collected)
    config = dataclasses.replace(FILTER, pool_batches=1)
    whole, metrics = train_transcoders(vlm, _batch, [_batch(100)], config, tmp_path / "whole")
    assert metrics["train/filtered_frac"] == pytest.approx(6 / 78 / 4)  # in one layer of four

    def interrupted(number: int) -> dict[str, Tensor]:
        if number == 5:
            raise KeyboardInterrupt
        return _batch(number)

    with pytest.raises(KeyboardInterrupt):
        train_transcoders(vlm, interrupted, [], config, tmp_path / "parts")
    resumed, again = train_transcoders(vlm, _batch, [_batch(100)], config, tmp_path / "parts", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert _state(tmp_path / "whole") == _state(tmp_path / "parts")
    assert again["train/filtered_frac"] == metrics["train/filtered_frac"]


def test_a_ratio_that_would_leave_half_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_norm_ratio = 0\.5 must exceed 1, or be null"):
        dataclasses.replace(CONFIG, max_norm_ratio=0.5).check()
