"""Training of transcoders on a tiny Gemma 3: it learns, resumes bit for bit, and reports what it should."""

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmscope.config.schema import OptimConfig
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.metrics.dictionary import fvu
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_gemma3
from vlmscope.scope import Scope
from vlmscope.training.batches import collect
from vlmscope.training.captures import ActivationStream, Captures
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.evaluation import evaluate_transcoders
from vlmscope.training.layer_trainer import LayerTrainer, start
from vlmscope.training.losses.aux_k import aux_k
from vlmscope.training.losses.matryoshka import prefix_fvu
from vlmscope.training.transcoder_module import TranscoderModule
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.formats import load_set, save_set
from vlmscope.transcoders.transcoder import Transcoder, TranscoderConfig, TranscoderSet, random_set

SOFT, PAD = 8, 0
CONFIG = TranscoderTrainingConfig(
    expansion_factor=4, k=8, max_steps=6, warmup=2, init_batches=2, dead_after_tokens=150, aux_k=8, checkpoint_every=3,
    val_every=0, log_every=2, lr=3e-3, pool_batches=3, steps_per_batch=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny_gemma3(0)


def _batch(step: int) -> dict[str, Tensor]:
    """Six pictures with questions of two lengths, padded at the left, the last two tokens being the answer."""
    rng = generator(7, "batch", step)
    b, t = 6, 14
    ids = rng.integers(9, 20, (b, t))
    ids[:, 3], ids[:, 4:8], ids[:, 8] = 6, SOFT, 7
    mask = np.ones((b, t), dtype=np.int64)
    ids[:3, :2], mask[:3, :2] = PAD, 0
    loss_mask = np.zeros((b, t), dtype=bool)
    loss_mask[:, -2:] = True
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "token_type_ids": torch.from_numpy((ids == SOFT).astype(np.int64)),
        "pixel_values": torch.from_numpy(rng.standard_normal((b, 3, 16, 16)).astype(np.float32)),
        "loss_mask": torch.from_numpy(loss_mask),
    }


def _train(vlm: VLM, folder: Path, resume: bool = False, **changes: Any) -> tuple[TranscoderSet, dict[str, float]]:
    config = dataclasses.replace(CONFIG, **changes)
    return train_transcoders(vlm, _batch, [_batch(100)], config, folder, resume=resume)


def _state(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "transcoder_checkpoint").glob("*/layer_*.safetensors"))]


def test_padding_is_dropped_and_soft_tokens_are_known(vlm: VLM) -> None:
    batch = _batch(0)
    activations = collect(vlm.adapter, batch)
    assert activations.n_tokens == int(batch["attention_mask"].sum()) == 6 * 14 - 6
    assert int(activations.is_image.sum()) == 24
    x, y = activations.by_layer[2]
    with torch.no_grad():
        torch.testing.assert_close(vlm.adapter.mlp(2)(x), y)


def test_the_stream_depends_on_the_step_alone_and_mixes_the_last_batches(vlm: VLM) -> None:
    config = dataclasses.replace(CONFIG, pool_batches=2, steps_per_batch=2)
    asked: list[int] = []

    def record(number: int) -> dict[str, Tensor]:
        asked.append(number)
        return _batch(number)

    whole = list(ActivationStream(Captures(vlm.adapter, record), config, lambda: 0))
    assert asked == [0, 1, 2] and len(whole) == 6
    late = list(ActivationStream(Captures(vlm.adapter, _batch), config, lambda: 3))
    for ours, theirs in zip(whole[3:], late, strict=True):
        assert torch.equal(ours.by_layer[1][0], theirs.by_layer[1][0])
        assert torch.equal(ours.by_layer[1][1], theirs.by_layer[1][1])
    sources = [collect(vlm.adapter, _batch(n)) for n in range(3)]
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
    single = dataclasses.replace(CONFIG, pool_batches=1, steps_per_batch=1)
    first = next(iter(ActivationStream(Captures(vlm.adapter, _batch), single, lambda: 0)))
    assert torch.equal(first.by_layer[0][0], sources[0].by_layer[0][0])


def test_training_lowers_the_fvu_of_every_layer(vlm: VLM, tmp_path: Path) -> None:
    _, before = _train(vlm, tmp_path / "a", max_steps=1, lr=1e-9)
    _, after = _train(vlm, tmp_path / "b", max_steps=80, checkpoint_every=0)
    for layer in range(4):
        assert after[f"layers/fvu/layer_{layer:02d}"] < 0.8 * before[f"layers/fvu/layer_{layer:02d}"]
    assert after["perf/tokens_per_s"] > 0


@pytest.mark.parametrize("skip", [False, True])
def test_resuming_equals_an_uninterrupted_run_bit_for_bit(vlm: VLM, tmp_path: Path, skip: bool) -> None:
    whole, metrics = _train(vlm, tmp_path / "whole", skip=skip)

    class Stop(Exception):
        pass

    def until_five(number: int) -> dict[str, Tensor]:
        if number == 5:
            raise Stop
        return _batch(number)

    config = dataclasses.replace(CONFIG, skip=skip)
    with pytest.raises(Stop):
        train_transcoders(vlm, until_five, [], config, tmp_path / "parts")
    assert _state(tmp_path / "parts") != _state(tmp_path / "whole")
    resumed, resumed_metrics = _train(vlm, tmp_path / "parts", resume=True, skip=skip)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert _state(tmp_path / "parts") == _state(tmp_path / "whole")
    for figures in (metrics, resumed_metrics):
        figures.pop("perf/tokens_per_s")
    assert metrics == resumed_metrics


def test_an_interrupt_saves_the_step_that_was_reached(vlm: VLM, tmp_path: Path) -> None:
    def interrupted(step: int) -> dict[str, Tensor]:
        if step == 5:
            raise KeyboardInterrupt
        return _batch(step)

    with pytest.raises(KeyboardInterrupt):
        train_transcoders(vlm, interrupted, [], CONFIG, tmp_path / "parts")
    asked: list[int] = []

    def record(step: int) -> dict[str, Tensor]:
        asked.append(step)
        return _batch(step)

    resumed, _ = train_transcoders(vlm, record, [], CONFIG, tmp_path / "parts", resume=True)
    # The pool of three batches is captured anew and Lightning fetches one step ahead. From the last regular checkpoint,
    # at step 3, the first batch asked for would be 1.
    # Before that, batch 0 shows that the data are the same; after it, the last gives the figures of the data.
    assert asked[0] == 0 and asked[1:] == [*range(asked[1], 6), 5] and asked[1] > 1
    whole, _ = _train(vlm, tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_finished_run_resumes_to_the_same_set_without_a_step(vlm: VLM, tmp_path: Path) -> None:
    whole, _ = _train(vlm, tmp_path)
    again, metrics = _train(vlm, tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert "perf/tokens_per_s" not in metrics


def test_a_checkpoint_of_other_settings_is_refused_by_name(vlm: VLM, tmp_path: Path) -> None:
    _train(vlm, tmp_path)
    with pytest.raises(UserError, match=r"\(k 8 -> 4, lr 0.003 -> 0.1\)"):
        _train(vlm, tmp_path, resume=True, k=4, lr=0.1)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1 / 2, 1, 1, 1, 1, 1]),
        ("linear", [1 / 2, 1, 1, 0.7525, 0.505, 0.2575]),
        ("cosine", [1 / 2, 1, 1, 0.01 + 0.99 * (1 + 0.5**0.5) / 2, 0.505, 0.01 + 0.99 * (1 - 0.5**0.5) / 2]),
    ],
)
def test_the_rate_follows_every_schedule_that_the_configuration_takes(
    vlm: VLM, schedule: str, factors: list[float]
) -> None:
    OptimConfig(schedule=schedule)
    config = dataclasses.replace(CONFIG, schedule=schedule, lr_floor=0.01)  # 6 steps, 2 of them warm-up
    config.check()
    module = TranscoderModule(vlm.adapter, config, "tiny")
    rates = []
    for module.steps_done in range(6):
        rates.append(module.rate() / config.lr)
    assert rates == pytest.approx(factors)


def test_a_new_start_removes_the_checkpoints_of_the_run_before(vlm: VLM, tmp_path: Path) -> None:
    def stopped(step: int) -> dict[str, Tensor]:
        if step == 2:
            raise KeyboardInterrupt
        return _batch(step)

    _train(vlm, tmp_path)
    with pytest.raises(KeyboardInterrupt):  # before its own first checkpoint
        train_transcoders(vlm, stopped, [], dataclasses.replace(CONFIG, checkpoint_every=0), tmp_path)
    assert not list(tmp_path.rglob("step_00000006"))


@pytest.mark.parametrize(("name", "value"), [("lr", 0.0), ("schedule", "steps"), ("init", "magic"), ("max_steps", 0)])
def test_impossible_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        dataclasses.replace(CONFIG, **{name: value}).check()  # pyright: ignore[reportArgumentType]


def test_the_finished_set_is_the_trained_one_in_the_models_coordinates(vlm: VLM) -> None:
    module = TranscoderModule(vlm.adapter, CONFIG, "tiny")
    activations = collect(vlm.adapter, _batch(0))
    module.initialise([activations])
    finished = module.finished_set()
    assert finished.config.model_name == "tiny" and finished.layers == [0, 1, 2, 3]
    for layer, (x, y) in activations.by_layer.items():
        with torch.no_grad():
            _, unexplained, _ = module.layer(layer).loss(x, y, CONFIG)
            direct = fvu(y, finished[layer](x).reconstruction)
        assert float(direct) == pytest.approx(float(unexplained), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in finished.parameters())


def test_the_sample_start_explains_something_and_the_zero_start_nothing(vlm: VLM) -> None:
    activations = collect(vlm.adapter, _batch(0))
    figures = {}
    for method in ("samples", "zero_decoder"):
        trainer = LayerTrainer(TranscoderConfig(24, 96, 8))
        trainer.standardise(*activations.by_layer[1])
        x, y = trainer.standard.apply(*activations.by_layer[1])
        trainer.start(x, [y], method, seed=0)
        with torch.no_grad():
            figures[method] = float(trainer.loss(*activations.by_layer[1], CONFIG)[1])
        assert (trainer.transcoder.W_enc.norm(dim=1) > 0.1).all()
    assert figures["zero_decoder"] == pytest.approx(1.0, abs=1e-4)
    assert figures["samples"] < 0.9


def test_starting_points_cover_more_features_than_tokens() -> None:
    rng = np.random.default_rng(0)
    transcoder = Transcoder(TranscoderConfig(4, 10, 2))
    x = torch.tensor(rng.standard_normal((3, 4)), dtype=torch.float32)
    start(transcoder, x, [x], "samples", rng)
    assert len(torch.unique(transcoder.W_enc, dim=0)) == 10


@pytest.mark.parametrize("method", ["samples", "zero_decoder"])
def test_jumprelu_and_relu_start_with_k_active_features(method: str) -> None:
    x = torch.randn(600, 12, generator=torch.Generator().manual_seed(0))
    y = x @ torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    for activation in ("jumprelu", "relu"):
        transcoder = Transcoder(TranscoderConfig(12, 90, 6, activation=activation))
        start(transcoder, x, [y], method, np.random.default_rng(0))
        code = transcoder.encode(x)
        fired = torch.bincount(code.indices[code.values > 0], minlength=90)
        assert set(fired.tolist()) <= {39, 40, 41}  # k N / F; the last ulp may tip one over
        thresholds = transcoder.activation.thresholds
        assert thresholds is None or bool((thresholds == 2).all())


def test_rescaling_to_one_threshold_leaves_the_function_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for threshold in (1.0, 4.0):
        monkeypatch.setattr("vlmscope.training.layer_trainer._THRESHOLD", threshold)
        transcoder = Transcoder(TranscoderConfig(8, 40, 4, activation="jumprelu")).double()
        start(transcoder, x.double(), [x.double()], "samples", np.random.default_rng(0))
        outputs.append(transcoder(x[:50].double() * 1.01).reconstruction)
    assert bool((outputs[0].abs() > 0.1).any())
    torch.testing.assert_close(*outputs)


def test_only_dead_features_learn_from_the_auxiliary_loss_and_their_clock_is_right() -> None:
    trainer = LayerTrainer(TranscoderConfig(6, 20, 3))
    trainer.transcoder.load_state_dict(random_set(1, 6, 20, 3, seed=2)[0].state_dict())
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    y = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    config = dataclasses.replace(CONFIG, dead_after_tokens=60)
    trainer.silent[[4, 7]] = 60  # two features are declared dead
    residual = (y - trainer.transcoder(x).reconstruction).detach()
    aux = aux_k(trainer.transcoder, x, residual, trainer.transcoder(x).pre, torch.tensor([4, 7]), 8)
    a = trainer.transcoder.pre_activations(x)[:, [4, 7]].relu()
    expected = fvu(residual, a @ trainer.transcoder.W_dec[[4, 7]])
    torch.testing.assert_close(aux, expected)
    gradient = torch.autograd.grad(aux, trainer.transcoder.W_dec)[0]
    assert (gradient[[4, 7]] != 0).any() and gradient.norm(dim=1).nonzero().flatten().tolist() == [4, 7]
    loss, unexplained, out = trainer.loss(x, y, config)
    torch.testing.assert_close(loss, unexplained + config.aux_coefficient * aux)
    fired = (out.code.dense(20) > 0).any(0)
    trainer.note_fired(trainer.fired(out), len(x))
    assert (trainer.silent[fired] == 0).all()
    never = (~fired).nonzero().flatten().tolist()
    assert trainer.silent[never].tolist() == [90 if f in (4, 7) else 30 for f in never]


def test_a_layers_pre_activations_are_gone_before_the_next_one_makes_its_own(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[N, F] is the largest tensor of a step; one at a time is what `task=plan` counts."""
    made: list[weakref.ref[Tensor]] = []
    original = LayerTrainer.loss

    def watched(self: LayerTrainer, *arguments: Any) -> Any:
        assert not any(one() is not None for one in made)
        found = original(self, *arguments)
        made.append(weakref.ref(found[2].pre))
        return found

    monkeypatch.setattr(LayerTrainer, "loss", watched)
    _train(vlm, tmp_path, max_steps=2)
    assert len(made) == 8


def test_layers_are_independent_of_each_other(vlm: VLM, tmp_path: Path) -> None:
    """A layer that is clipped hard, or whose loss explodes, must not change another layer's step."""

    def one_step(scale: float) -> Tensor:
        module = TranscoderModule(vlm.adapter, CONFIG)
        activations = collect(vlm.adapter, _batch(0))
        module.initialise([activations])
        with torch.no_grad():
            module.layer(0).transcoder.W_dec.mul_(scale)
        for layer in (0, 1):
            trainer = module.layer(layer)
            trainer.loss(*activations.by_layer[layer], CONFIG)[0].backward()
            torch.nn.utils.clip_grad_norm_(trainer.parameters(), CONFIG.clip)
        module.optimizer.step()
        return module.layer(1).transcoder.W_enc.detach().clone()

    assert torch.equal(one_step(1.0), one_step(1000.0))


def test_a_trained_set_keeps_its_figures_through_a_file(vlm: VLM, tmp_path: Path) -> None:
    transcoders, metrics = _train(vlm, tmp_path)
    save_set(transcoders, tmp_path / "set")
    loaded = load_set(tmp_path / "set", n_layers=4, d_model=24)
    again = evaluate_transcoders(Scope(vlm, loaded), [_batch(100)])
    assert {name: metrics[name] for name in again} == again


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_every_nonlinearity_learns_and_goes_to_disk_and_back(vlm: VLM, tmp_path: Path, activation: str) -> None:
    weight = {"relu": 0.003, "jumprelu": 0.3, "batchtopk": 0.0}[activation]
    changes: dict[str, Any] = {"activation": activation, "sparsity_coefficient": weight, "checkpoint_every": 0}
    _, before = _train(vlm, tmp_path / "a", max_steps=1, lr=1e-9, **changes)
    found, after = _train(vlm, tmp_path / "b", max_steps=120, **changes)
    assert after["val/fvu"] < 0.7 * before["val/fvu"]
    if activation in ("jumprelu", "relu"):  # they start near k too
        assert before["val/l0"] == pytest.approx(8, rel=0.3)
    if activation == "jumprelu":  # its penalty aims at k
        assert after["val/l0"] == pytest.approx(8, rel=0.3)
    if activation == "batchtopk":  # by the threshold of training, which nearly keeps k a token
        assert after["val/l0"] == pytest.approx(8, rel=0.25)
    save_set(found, tmp_path / "set")
    again = load_set(tmp_path / "set", n_layers=4, d_model=24)
    x, _ = collect(vlm.adapter, _batch(100)).by_layer[2]
    with torch.no_grad():
        assert torch.equal(found[2](x).reconstruction, again[2](x).reconstruction)


@pytest.mark.parametrize(
    "changes", [{"activation": "batchtopk"}, {"activation": "jumprelu", "matryoshka": (0.25, 0.5)}]
)
def test_nonlinearities_resume_bit_for_bit(vlm: VLM, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, _ = _train(vlm, tmp_path / "whole", **changes)

    def interrupted(step: int) -> dict[str, Tensor]:
        if step == 5:
            raise KeyboardInterrupt
        return _batch(step)

    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(KeyboardInterrupt):
        train_transcoders(vlm, interrupted, [], config, tmp_path / "parts")
    resumed, _ = train_transcoders(vlm, _batch, [], config, tmp_path / "parts", resume=True)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("threshold" in name for name in ours)


def test_matryoshka_prefixes_explain_more_than_they_would_by_themselves(vlm: VLM, tmp_path: Path) -> None:
    fvus = {}
    for name, fractions in (("plain", ()), ("nested", (0.125, 0.25))):
        found, _ = _train(vlm, tmp_path / name, max_steps=80, checkpoint_every=0, matryoshka=fractions)
        x, y = collect(vlm.adapter, _batch(100)).by_layer[1]
        with torch.no_grad():
            fvus[name] = float(prefix_fvu(found[1], found[1].encode(x), x, y, [12, 24]))
    assert fvus["nested"] < 0.9 * fvus["plain"]


def test_bad_numbers_and_explosions_of_a_loss_are_seen(vlm: VLM) -> None:
    module = TranscoderModule(vlm.adapter, CONFIG)
    activations = collect(vlm.adapter, _batch(0))
    module.initialise([activations])
    trainer = module.layer(1)
    assert trainer.trouble(float("nan"), 1.0, CONFIG) and trainer.trouble(1.0, float("inf"), CONFIG)
    for step in range(8):
        trainer.note_loss(0.5, step)
    assert trainer.trouble(501.0, 1.0, CONFIG) and trainer.trouble(499.0, 1.0, CONFIG) is None
