"""One layer's training: its starts, its loss, micro-batches, the filter of huge tokens, precision, cross-layer sets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.training.helpers import CONFIG, make_batch, settings, train
from torch import Tensor, nn

from vlmscope.metrics.dictionary import fvu
from vlmscope.models.loading import VLM
from vlmscope.scope import Scope
from vlmscope.training.batches import collect
from vlmscope.training.config import RecipeConfig
from vlmscope.training.evaluation import spliced
from vlmscope.training.layer_trainer import (
    LayerStep,
    LayerTrainer,
    aux_k,
    cross_layer_losses,
    dead_features,
    differentiate,
    start,
)
from vlmscope.training.transcoder_training import TranscoderModule
from vlmscope.transcoders.config import ACTIVATIONS, TranscoderConfig
from vlmscope.transcoders.transcoder import Transcoder, random_set


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- starting points


def test_the_start_from_samples_explains_something(gemma: VLM) -> None:
    activations = collect(gemma.adapter, make_batch(0))
    trainer = LayerTrainer(TranscoderConfig(24, 96, 8))
    trainer.standardise(*activations.by_layer[1])
    x, y = trainer.standard.apply(*activations.by_layer[1])
    trainer.start(x, [y], seed=0)
    with torch.no_grad():
        assert float(trainer.loss(*activations.by_layer[1])[1]) < 0.9


def test_jumprelu_and_relu_start_with_k_active_features() -> None:
    x = normal(600, 12, seed=0)
    y = x @ normal(12, 12, seed=1)
    for activation in ("jumprelu", "relu"):
        transcoder = Transcoder(TranscoderConfig(12, 90, 6, activation=activation))
        start(transcoder, x, [y], np.random.default_rng(0))
        code = transcoder.encode(x)
        fired = torch.bincount(code.indices[code.values > 0], minlength=90)
        assert set(fired.tolist()) <= {39, 40, 41}  # k N / F; the last ulp may tip one over
        thresholds = transcoder.activation.thresholds
        assert thresholds is None or bool((thresholds == 2).all())


# -- dead features


def test_only_dead_features_learn_from_the_auxiliary_loss_and_their_clock_is_right() -> None:
    trainer = LayerTrainer(TranscoderConfig(6, 20, 3), RecipeConfig(dead_after_tokens=60, aux_k=8))
    trainer.transcoder.load_state_dict(random_set(1, 6, 20, 3, seed=2)[0].state_dict())
    x, y = normal(30, 6, seed=0), normal(30, 6, seed=1)
    trainer.silent[[4, 7]] = 60  # two features are declared dead
    residual = (y - trainer.transcoder(x).reconstruction).detach()
    aux = aux_k(trainer.transcoder, x, residual, trainer.transcoder(x).pre, torch.tensor([4, 7]), 8)
    a = trainer.transcoder.pre_activations(x)[:, [4, 7]].relu()
    expected = fvu(residual, a @ trainer.transcoder.W_dec[[4, 7]])
    torch.testing.assert_close(aux, expected)
    gradient = torch.autograd.grad(aux, trainer.transcoder.W_dec)[0]
    assert (gradient[[4, 7]] != 0).any() and gradient.norm(dim=1).nonzero().flatten().tolist() == [4, 7]
    loss, unexplained, out = trainer.loss(x, y)
    torch.testing.assert_close(loss, unexplained + trainer.recipe.aux_coefficient * aux)
    fired = (out.code.dense(20) > 0).any(0)
    trainer.note(LayerStep(float(loss.detach()), 0.5, trainer.fired(out), len(x)), 0)
    assert (trainer.silent[fired] == 0).all()
    never = (~fired).nonzero().flatten().tolist()
    assert trainer.silent[never].tolist() == [90 if f in (4, 7) else 30 for f in never]


# -- micro-batches

D, F, K, N = 10, 60, 5, 97  # 97 tokens in micro-batches of 20: the last has 17


def _steps(activation: str, micro: int | None, skip: bool) -> tuple[list[Tensor], dict[str, Tensor], list[LayerStep]]:
    """Gradients before clipping, the state and what was noted, of three steps in float64."""
    random = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(N, D, generator=random, dtype=torch.float64)
    y = 2 - (x @ torch.randn(D, D, generator=random, dtype=torch.float64)).relu()
    recipe = RecipeConfig(micro_tokens=micro, dead_after_tokens=150, aux_k=8, clip=0.1, sparsity_coefficient=0.3)
    trainer = LayerTrainer(TranscoderConfig(D, F, K, 0, activation, skip, bandwidth=1.0), recipe).double()
    trainer.standardise(x, y)
    inputs, targets = trainer.standard.apply(x, y)
    trainer.start(inputs, [targets], seed=1)
    trainer.silent[[2, 3, 30]] = 200  # dead features, so that AuxK takes part
    with torch.no_grad():
        trainer.transcoder.b_enc[[2, 3, 30]] -= 3.0
    optimizer = torch.optim.AdamW(trainer.parameters(), lr=0.01)
    gradients, noted = [], []
    for number in range(3):
        optimizer.zero_grad()
        assert len(dead_features(trainer.silent, 150)) > 0
        noted.append(differentiate(trainer, x, y, Tensor.backward))
        gradients += [p.grad.clone() for p in trainer.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(trainer.parameters(), recipe.clip)
        optimizer.step()
        trainer.note(noted[-1], number)
    return gradients, dict(trainer.state_dict()), noted


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
def test_micro_batches_add_up_to_the_whole_batch(activation: str, skip: bool) -> None:
    gradients, state, noted = _steps(activation, None, skip)
    for micro in (20, 1) if activation == "topk" else (20,):
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


# -- bf16-mixed: features are chosen in bfloat16, everything that is learnt stays in float32

UNIT = 2.0**-9  # rounding to bfloat16 changes a number by this much of itself at most
TOKENS, WIDTH, FEATURES, ACTIVE = 300, 16, 256, 8


def _pair(
    activation: str = "topk", skip: bool = False, **recipe: Any
) -> tuple[LayerTrainer, LayerTrainer, Tensor, Tensor]:
    """The same layer twice, its product in bfloat16 and in float32, and activations [TOKENS, WIDTH]."""
    random = torch.Generator().manual_seed(3)
    x, y = torch.randn(TOKENS, WIDTH, generator=random), torch.randn(TOKENS, WIDTH, generator=random)
    found = []
    for dtype in (torch.bfloat16, None):
        config = TranscoderConfig(WIDTH, FEATURES, ACTIVE, activation=activation, skip=skip)
        trainer = LayerTrainer(config, RecipeConfig(**recipe), dtype)
        trainer.standardise(x, y)
        inputs, targets = trainer.standardised(x, y)
        trainer.start(inputs, [targets], seed=0)
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
    chosen = torch.zeros(TOKENS, FEATURES, dtype=torch.bool).scatter(1, ours.code.indices, True)
    exchanged = chosen & ~torch.zeros(TOKENS, FEATURES, dtype=torch.bool).scatter(1, theirs.code.indices, True)
    assert 0 < int(exchanged.sum()) < 0.02 * TOKENS * ACTIVE  # some are, or the test would show nothing
    assert bool((theirs.pre >= smallest - 2 * slack.amax(1, keepdim=True))[exchanged].all())
    # What is chosen has its value in float32, not in bfloat16.
    torch.testing.assert_close(ours.at_support, theirs.pre.gather(1, ours.code.indices), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("same_features", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_agree_with_float32(activation: str, same_features: bool) -> None:
    """About 6 UNIT of the entries are exchanged, each of which is gone and come: sqrt(12 UNIT) of the norm."""
    half, full, x, y = _pair(activation, True, dead_after_tokens=1, aux_k=8)
    if same_features:
        product = half.transcoder._product(half.standardised(x, y)[0], half.transcoder.W_enc, half.transcoder.b_enc)
        full.transcoder.activation.support = lambda pre: half.transcoder.activation.support(product)
    else:
        for trainer in (half, full):
            trainer.silent[: FEATURES // 4] = 10  # AuxK works too
    ours, theirs = (differentiate(one, x, y, Tensor.backward) for one in (half, full))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5 if same_features else 4 * UNIT)
    tolerance = 1e-4 if same_features else (12 * UNIT) ** 0.5
    for (name, one), (_, other) in zip(half.named_parameters(), full.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and one.grad.dtype == torch.float32
        assert float((one.grad - other.grad).norm()) <= tolerance * float(other.grad.norm()), name


# What can be trained: every nonlinearity with all that a single layer may have, and across layers.
KINDS = [{"activation": name, "skip": True} for name in ACTIVATIONS]
KINDS += [{"activation": "topk", "cross_layer": True, "skip": True}]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_mixed_precision_trains_everything_and_stays_in_float32(gemma: VLM, tmp_path: Path, kind: dict) -> None:
    half, metrics = train(gemma, tmp_path / "half", precision="bf16-mixed", **kind)
    full, before = train(gemma, tmp_path / "full", **kind)
    assert metrics["val/fvu"] == pytest.approx(before["val/fvu"], rel=0.05)  # six steps, from the same start
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    assert all(one.product_dtype is None or not one.training for one in half.transcoders.values())
    pairs = zip(half.parameters(), full.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)  # the product was not in float32


# -- cross-layer sets


@pytest.fixture
def module(gemma: VLM) -> TranscoderModule:
    module = TranscoderModule(gemma.adapter, settings(CONFIG, cross_layer=True, dead_after_tokens=10**9))
    module.initialise([collect(gemma.adapter, make_batch(0))])
    return module


def test_losses_and_gradients_are_those_of_the_dense_formula(gemma: VLM, module: TranscoderModule) -> None:
    module.double()
    activations = collect(gemma.adapter, make_batch(3))
    layers = range(gemma.adapter.n_layers)
    trainers = {layer: module.layer(layer) for layer in layers}
    by_layer = {layer: (x.double(), y.double()) for layer, (x, y) in activations.by_layer.items()}
    found = cross_layer_losses(trainers, by_layer)
    sum(loss for loss, _, _ in found.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    total, dense = torch.zeros((), dtype=torch.float64), {}
    for layer in layers:
        one = trainers[layer].transcoder
        x, y = trainers[layer].standard.apply(*(side.float() for side in by_layer[layer]))
        x, y = x.double(), y.double()
        pre = x @ one.W_enc.T + one.b_enc
        keep = pre.relu() >= pre.relu().topk(one.config.k).values[:, -1:]
        dense[layer] = pre.relu() * keep
        out = one.b_dec + sum(dense[low] @ trainers[low].transcoder.decoder(layer - low) for low in range(layer + 1))
        term = fvu(y, out)
        torch.testing.assert_close(found[layer][1], term, rtol=1e-9, atol=0)
        total = total + term
    total.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_splicing_rebuilds_every_layer_from_all_codes_below(gemma: VLM, module: TranscoderModule) -> None:
    finished, batch = module.finished_set(), make_batch(3)
    adapter = gemma.adapter
    outputs = {}
    with spliced(Scope(gemma, finished)):
        activations = collect(adapter, batch)
        handles = [
            adapter.mlp(n).register_forward_hook(lambda _m, _a, out, n=n: outputs.__setitem__(n, out))
            for n in range(adapter.n_layers)
        ]
        adapter.forward({name: t for name, t in batch.items() if name != "loss_mask"}, use_cache=False)
        for handle in handles:
            handle.remove()
    valid = batch["attention_mask"].bool()
    codes = finished.encode({layer: x for layer, (x, _) in activations.by_layer.items()})
    for layer, (x, _) in activations.by_layer.items():
        torch.testing.assert_close(outputs[layer][valid], finished.decode(layer, codes, x), rtol=1e-4, atol=1e-5)
