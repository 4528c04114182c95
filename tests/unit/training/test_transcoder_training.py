"""Training of transcoders on a tiny Gemma 3: it learns, resumes bit for bit, and what goes wrong stays where it is."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.training.helpers import CONFIG, interrupted_at, make_batch, settings, state, train
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.models.base import Adapter
from vlmscope.models.loading import VLM
from vlmscope.scope import Scope
from vlmscope.training.batches import Batch, LayerActivations, collect
from vlmscope.training.captures import ActivationStream, Captures
from vlmscope.training.config import OptimConfig, TrainerConfig, TranscoderArchConfig
from vlmscope.training.evaluation import evaluate_transcoders
from vlmscope.training.layer_trainer import LayerTrainer
from vlmscope.training.ranks import Ranks
from vlmscope.training.transcoder_training import TranscoderModule
from vlmscope.transcoders.formats import load_set, save_set
from vlmscope.transcoders.transcoder import TranscoderSet


def equal(ours: TranscoderSet, theirs: TranscoderSet) -> bool:
    one, other = ours.state_dict(), theirs.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def layers_equal(ours: TranscoderSet, theirs: TranscoderSet) -> list[bool]:
    pairs = [(ours[layer].state_dict(), theirs[layer].state_dict()) for layer in ours.layers]
    return [all(torch.equal(one[name], other[name]) for name in one) for one, other in pairs]


# -- tokens


def test_padding_is_dropped_and_soft_tokens_are_known(gemma: VLM) -> None:
    batch = make_batch(0)
    activations = collect(gemma.adapter, batch)
    assert activations.n_tokens == int(batch["attention_mask"].sum()) == 6 * 14 - 6
    assert int(activations.is_image.sum()) == 24
    x, y = activations.by_layer[2]
    with torch.no_grad():
        torch.testing.assert_close(gemma.adapter.mlp(2)(x), y)


def test_the_stream_depends_on_the_step_alone_and_mixes_the_last_batches(gemma: VLM) -> None:
    config = settings(CONFIG, pool_batches=2, steps_per_batch=2)
    asked: list[int] = []
    captures = Captures(gemma.adapter, lambda number: asked.append(number) or make_batch(number))
    whole = list(ActivationStream(captures, config, lambda: 0))
    assert asked == [0, 1, 2] and len(whole) == 6
    late = list(ActivationStream(Captures(gemma.adapter, make_batch), config, lambda: 3))
    for ours, theirs in zip(whole[3:], late, strict=True):
        assert torch.equal(ours.by_layer[1][0], theirs.by_layer[1][0])
        assert torch.equal(ours.by_layer[1][1], theirs.by_layer[1][1])
    sources = [collect(gemma.adapter, make_batch(n)) for n in range(3)]
    drawn = whole[5]
    assert drawn.n_tokens == sources[2].n_tokens
    # Every row, with its target and its kind, is a row of one of the last two batches, and both are drawn from.
    origins = set()
    for x, y, image in zip(*drawn.by_layer[2], drawn.is_image, strict=True):
        found = [n for n in range(3) for row in (sources[n].by_layer[2][0] == x).all(1).nonzero().flatten()
                 if torch.equal(sources[n].by_layer[2][1][row], y) and sources[n].is_image[row] == image]  # fmt: skip
        assert found
        origins.update(found)
    assert {1, 2} <= origins
    single = settings(CONFIG, pool_batches=1, steps_per_batch=1)
    first = next(iter(ActivationStream(Captures(gemma.adapter, make_batch), single, lambda: 0)))
    assert torch.equal(first.by_layer[0][0], sources[0].by_layer[0][0])


# -- learning


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_every_nonlinearity_learns_and_goes_to_disk_and_back(gemma: VLM, tmp_path: Path, activation: str) -> None:
    weight = {"relu": 0.003, "jumprelu": 0.3}.get(activation, 0.0)
    changes: dict[str, Any] = {"activation": activation, "sparsity_coefficient": weight, "checkpoint_every": 0}
    _, before = train(gemma, tmp_path / "a", max_steps=1, lr=1e-9, **changes)
    trained, after = train(gemma, tmp_path / "b", max_steps=70, **changes)
    for layer in range(4):
        assert after[f"layers/fvu/layer_{layer:02d}"] < 0.8 * before[f"layers/fvu/layer_{layer:02d}"]
    assert after["val/fvu"] < 0.7 * before["val/fvu"] and after["perf/tokens_per_s"] > 0
    if activation in ("jumprelu", "relu"):  # they start near k too
        assert before["val/l0"] == pytest.approx(8, rel=0.3)
    # JumpReLU's penalty aims at k; the threshold of BatchTopK's training nearly keeps k a token.
    if activation in ("jumprelu", "batchtopk"):
        assert after["val/l0"] == pytest.approx(8, rel=0.35)
    save_set(trained, tmp_path / "set")
    loaded = load_set(tmp_path / "set", n_layers=4, d_model=24)
    again = evaluate_transcoders(Scope(gemma, loaded), [make_batch(100)])
    assert {name: after[name] for name in again} == again


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1 / 2, 1, 1, 1, 1, 1]),
        ("linear", [1 / 2, 1, 1, 0.7525, 0.505, 0.2575]),
        ("cosine", [1 / 2, 1, 1, 0.01 + 0.99 * (1 + 0.5**0.5) / 2, 0.505, 0.01 + 0.99 * (1 - 0.5**0.5) / 2]),
    ],
)
def test_the_rate_follows_every_schedule(gemma: VLM, schedule: str, factors: list[float]) -> None:
    config = settings(CONFIG, schedule=schedule)  # 6 steps, 2 of them warm-up
    module = TranscoderModule(gemma.adapter, config, "tiny")
    rates = []
    for module.steps_done in range(6):
        rates.append(module.rate() / config.optim.lr)
    assert rates == pytest.approx(factors)


def test_layers_are_independent_of_each_other(gemma: VLM) -> None:
    """A layer that is clipped hard, or whose loss explodes, must not change another layer's step."""

    def one_step(scale: float) -> Tensor:
        module = TranscoderModule(gemma.adapter, CONFIG)
        activations = collect(gemma.adapter, make_batch(0))
        module.initialise([activations])
        with torch.no_grad():
            module.layer(0).transcoder.W_dec.mul_(scale)
        for layer in (0, 1):
            trainer = module.layer(layer)
            trainer.loss(*activations.by_layer[layer])[0].backward()
            torch.nn.utils.clip_grad_norm_(trainer.parameters(), CONFIG.recipe.clip)
        module.optimizer.step()
        return module.layer(1).transcoder.W_enc.detach().clone()

    assert torch.equal(one_step(1.0), one_step(1000.0))


# -- resumption


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"skip": True},
        {"cross_layer": True},
        {"activation": "batchtopk"},
        {"activation": "jumprelu"},
        {"precision": "bf16-mixed", "activation": "jumprelu", "micro_tokens": 20},
    ],
)
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(gemma: VLM, tmp_path: Path, changes: dict) -> None:
    class Stop(Exception):
        pass

    whole, metrics = train(gemma, tmp_path / "whole", **changes)
    with pytest.raises(Stop):
        train(gemma, tmp_path / "parts", interrupted_at(5, Stop), **changes)
    assert state(tmp_path / "parts") != state(tmp_path / "whole")
    resumed, resumed_metrics = train(gemma, tmp_path / "parts", resume=True, **changes)
    assert equal(whole, resumed) and state(tmp_path / "parts") == state(tmp_path / "whole")
    for figures in (metrics, resumed_metrics):
        figures.pop("perf/tokens_per_s")
    assert metrics == resumed_metrics


def test_an_interrupt_saves_the_step_that_was_reached(gemma: VLM, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(gemma, tmp_path / "parts", interrupted_at(5))
    asked: list[int] = []
    resumed, _ = train(gemma, tmp_path / "parts", lambda n: asked.append(n) or make_batch(n), resume=True)
    # The pool of three batches is captured anew and Lightning fetches one step ahead. From the last regular checkpoint,
    # at step 3, the first batch asked for would be 1.
    # Before that, batch 0 shows that the data are the same; after it, the last gives the figures of the data.
    assert asked[0] == 0 and asked[1:] == [*range(asked[1], 6), 5] and asked[1] > 1
    assert equal(train(gemma, tmp_path / "whole")[0], resumed)


def test_a_checkpoint_of_other_settings_is_refused_by_name(gemma: VLM, tmp_path: Path) -> None:
    train(gemma, tmp_path)
    with pytest.raises(UserError, match=r"\(k 8 -> 4, lr 0.003 -> 0.1\)"):
        train(gemma, tmp_path, resume=True, k=4, lr=0.1)
    with pytest.raises(UserError, match="precision 32 -> bf16-mixed"):
        train(gemma, tmp_path, resume=True, precision="bf16-mixed")


# -- trouble


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_layer_with_bad_numbers_stops_alone_with_its_last_good_weights(
    gemma: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, activation: str
) -> None:
    whole, _ = train(gemma, tmp_path / "whole", activation=activation)
    right, calls = LayerTrainer.loss, {"layer 2": 0}

    def poisoned(self, x, y, *rest):
        if self.transcoder.config.layer == 2:
            calls["layer 2"] += 1
            if calls["layer 2"] == 4:
                x = x * float("nan")
        return right(self, x, y, *rest)

    monkeypatch.setattr(LayerTrainer, "loss", poisoned)
    hit, metrics = train(gemma, tmp_path / "hit", activation=activation)
    assert layers_equal(hit, whole) == [True, True, False, True]
    assert metrics["train/stopped_layers"] == 1 and calls["layer 2"] == 4  # never asked again
    assert "layer 2 stopped before step 4 (" in caplog.text and " nan" in caplog.text  # its loss or its gradient
    assert "1 layers stopped early" in caplog.text
    assert all(bool(tensor.isfinite().all()) for tensor in hit[2].state_dict().values())
    marker = json.loads((tmp_path / "hit" / "transcoder_checkpoint" / "step_00000006" / "complete.json").read_text())
    assert marker["steps_done"] == 6
    # A finished run that is resumed still knows.
    assert train(gemma, tmp_path / "hit", resume=True, activation=activation)[1]["train/stopped_layers"] == 1


def test_a_layer_whose_loss_explodes_stops_alone(
    gemma: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From batch 10 on the targets of layer 1 are garbage, as large as it takes, but finite."""
    whole, _ = train(gemma, tmp_path / "whole", max_steps=14)
    with pytest.raises(KeyboardInterrupt):
        train(gemma, tmp_path / "short", interrupted_at(11), max_steps=14)  # Lightning fetches one step ahead
    (before,) = (tmp_path / "short" / "transcoder_checkpoint").glob("*/layer_01.safetensors")
    right = Ranks.collect
    numbers: list[int] = []

    def collected(self: Ranks, adapter: Adapter, batch: Batch) -> LayerActivations:
        found = right(self, adapter, batch)
        numbers.append(len(numbers) - CONFIG.recipe.init_batches)  # after those of the starting point: 0, 1, ..
        if numbers[-1] < 10:
            return found
        x, y = found.by_layer[1]
        return dataclasses.replace(found, by_layer={**found.by_layer, 1: (x * 1e6, y)})

    monkeypatch.setattr(Ranks, "collect", collected)
    hit, metrics = train(gemma, tmp_path / "hit", max_steps=14)
    assert layers_equal(hit, whole) == [True, False, True, True]
    (after,) = (tmp_path / "hit" / "transcoder_checkpoint").glob("*/layer_01.safetensors")
    # The weights, moments included, are those before the first garbage.
    assert before.parent.name == "step_00000010"
    ours, theirs = load_file(after), load_file(before)
    for name in theirs.keys() - {"module.stopped"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    assert int(ours["module.stopped"]) == 10
    assert metrics["train/stopped_layers"] == 1
    assert "layer 1 stopped before step 11 (loss " in caplog.text and "times the running median" in caplog.text


def test_trouble_in_one_layer_of_a_cross_layer_set_stops_all_and_keeps_the_weights(
    gemma: VLM, caplog: pytest.LogCaptureFixture
) -> None:
    module = TranscoderModule(gemma.adapter, settings(CONFIG, cross_layer=True))
    module.initialise([collect(gemma.adapter, make_batch(0))])
    activations = collect(gemma.adapter, make_batch(3))
    x, y = activations.by_layer[1]
    poisoned = LayerActivations({**activations.by_layer, 1: (x, y * float("nan"))}, activations.is_image)
    before = [p.detach().clone() for p in module.parameters()]
    module.optimizers = lambda: module.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    module.manual_backward = lambda loss: loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
    module.training_step(poisoned, 0)
    assert all(torch.equal(old, new) for old, new in zip(before, module.parameters(), strict=True))
    assert not any(module.layer(n).running for n in range(gemma.adapter.n_layers))
    assert "layer 1 stopped" in caplog.text and "with layer 1" in caplog.text


def test_a_full_disk_is_found_before_training(gemma: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"1e-06 GB free, and checkpoints and set take 0\.000\d+ GB; make room"):
        train(gemma, tmp_path / "run")


@pytest.mark.parametrize(
    ("record", "setting", "words"),
    [
        (OptimConfig, {"lr": 0.0}, r"optim\.lr=0\.0: it must be positive"),
        (OptimConfig, {"schedule": "steps"}, r"optim\.schedule=steps: no such choice"),
        (OptimConfig, {"betas": [0.9]}, "AdamW takes two numbers"),
        (TrainerConfig, {"max_steps": 0}, r"trainer\.max_steps=0: it must be at least 1"),
        (TrainerConfig, {"precision": "16"}, r"trainer\.precision=16: no such choice"),
        (TranscoderArchConfig, {"k": 0}, r"transcoder\.k=0: it must be at least 1"),
        (settings, {"micro_tokens": 16, "activation": "batchtopk"}, "batchtopk chooses among a whole batch"),
        (settings, {"cross_layer": True, "micro_tokens": 16}, r"task\.micro_tokens is for single layers"),
    ],
)
def test_impossible_settings_are_one_line(record: Any, setting: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        record(**setting)
    assert "\n" not in str(raised.value)
