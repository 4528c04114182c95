"""Rollout against loops that spell the paper's definition, in float64; and on every family with a tower."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlmscope.activations import capture_vision_attention
from vlmscope.attention import mixed_layer, own_map, soft_token_rollout, token_maps
from vlmscope.attribution.config import WhereConfig
from vlmscope.core.records import generator
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm

VISION = ("gemma3", *FAMILIES)
PROMPT = "what is this red planet ?"


def patterns(seed: int, n_layers: int = 3, heads: int = 7, tokens: int = 10) -> list[Tensor]:
    rng = generator(seed, "patterns")
    sharpness = rng.uniform(0.2, 4, (n_layers, heads, 1, 1))  # heads differ in how focused they are
    return list(torch.from_numpy(sharpness * rng.normal(size=(n_layers, heads, tokens, tokens))).softmax(-1))


def pooling_of(seed: int, soft: int = 3, tokens: int = 10) -> Tensor:
    """Rows that overlap, sum to 1, and leave a token out; the last is empty."""
    rng = generator(seed, "pooling")
    dense = rng.uniform(0.1, 1, (soft, tokens)) * (rng.uniform(size=(soft, tokens)) < 0.6)
    dense[:, 0] = 0
    dense[:, 1] = 0.3
    dense /= dense.sum(1, keepdims=True)
    dense[-1] = 0
    return torch.from_numpy(dense)


def looped(layers: list[Tensor], pooling: np.ndarray, share: float, identity: bool, pool: str) -> np.ndarray:
    """The definition in numpy, head by head and soft token by soft token."""
    product = np.eye(layers[0].shape[-1])
    for heads in (layer.numpy() for layer in layers):
        entropy = [-sum(p * math.log(p) for p in head.ravel().tolist() if p > 0) for head in heads]
        kept = sorted(range(len(heads)), key=entropy.__getitem__)[: max(1, round(share * len(heads)))]
        mixed = sum(heads[head] for head in kept) / len(kept) + identity * np.eye(len(product))
        product = mixed / mixed.sum(1, keepdims=True) @ product
    out = np.zeros((len(pooling), len(product)))
    for row, weights in zip(out, pooling, strict=True):
        if pool == "mean":
            row[:] = sum(weight * product[token] for token, weight in enumerate(weights))
        else:
            row[:] = product[weights > 0].max(0, initial=0.0)
    return out


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.01, 1.0])
def test_rollout_is_the_loop_over_its_definition(share: float, identity: bool, pool: str) -> None:
    layers, pooling = patterns(1), pooling_of(2)
    found = soft_token_rollout([mixed_layer(layer, share, identity) for layer in layers], pooling, pool)
    wanted = looped(layers, pooling.numpy(), share, identity, pool)
    assert found.dtype == torch.float64
    assert np.abs(found.numpy() - wanted).max() < 1e-12
    other = looped(layers[::-1], pooling.numpy(), share, identity, pool)
    assert np.abs(found.numpy() - other).max() > 1e-3  # the order of layers is seen
    assert pool == "max" or found.sum(-1).tolist() == pytest.approx([1, 1, 0])


@pytest.fixture(scope="module", params=VISION)
def vlm(request: pytest.FixtureRequest) -> VLM:
    return tiny_vlm(request.param, 5)


def pictures() -> list[Image.Image]:
    return [tiny_image(3).resize((72, 48)), tiny_image(4).resize((30, 48))]


def test_every_familys_soft_tokens_have_their_rollout(vlm: VLM) -> None:
    """Against the loop on patterns captured whole, tile by tile, with the family's own map to soft tokens."""
    inputs = vlm.prepare(PROMPT, pictures())
    captured = capture_vision_attention(vlm, inputs)
    config = WhereConfig(last_layers=2, head_share=0.5, pool="mean")
    found = token_maps(vlm, inputs, config)["rollout"]
    assert len(found) == 2
    for maps, picture in zip(found, captured, strict=True):
        n_soft, first = picture.pooling.shape[0], 0
        total = maps.class_token.copy()
        for tile, wanted in zip(maps.tiles, picture.tiles, strict=True):
            size, n_class = len(wanted.tile), wanted.tile.n_class
            layers = [pattern.double() for _, pattern in sorted(wanted.patterns.items())[-2:]]
            pooling = picture.pooling[:, first : first + size].toarray()
            first += size
            whole = looped(layers, pooling, 0.5, True, "mean") if size < 70 else None
            dense = np.zeros((n_soft, size - n_class))
            dense[tile.tokens] = tile.values.reshape(len(tile.tokens), -1)
            total += dense.sum(1)
            if whole is not None:
                assert np.abs(dense - whole[:, n_class:]).max() < 1e-5
            assert len(tile.boxes) == dense.shape[1] == wanted.tile.rows * wanted.tile.columns
        fed = picture.pooling.sum(axis=1)
        assert total == pytest.approx(fed, abs=1e-4)  # nothing is lost


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "llava", "llava_onevision", "idefics3"])
def test_states_enter_the_projector(family: str) -> None:
    """Families whose projector reads states token by token: what it is given is what was captured."""
    vlm = tiny_vlm(family, 5)
    inputs = vlm.prepare(PROMPT, pictures()[:1])
    model = vlm.model.model
    projector = model.connector if family == "idefics3" else model.multi_modal_projector
    given: list[Tensor] = []
    handle = projector.register_forward_pre_hook(
        lambda _m, args, kwargs: given.append(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
    )
    captured = capture_vision_attention(vlm, inputs, [0])
    handle.remove()
    rows = torch.cat([states.flatten(0, -2) for states in given])
    n_class = captured[0].tiles[0].tile.n_class
    states = torch.cat([t.states[n_class:] for t in captured[0].tiles])
    assert torch.allclose(rows, states, rtol=0, atol=1e-6)


def test_own_activations_are_shared_out_among_patches(vlm: VLM) -> None:
    inputs = vlm.prepare(PROMPT, pictures()[:1])
    (patches,) = vlm.adapter.picture_patches(inputs.tensors, inputs.sizes, vlm.processor.image_processor)
    values = generator(6, "own").uniform(size=patches.pooling.shape[0])
    found = own_map(values, patches, 0, "x")
    assert found.residual < 1e-12
    assert found.edge == pytest.approx(values.sum())
    one = np.zeros_like(values)
    token = int(np.flatnonzero(patches.pooling.sum(axis=1) > 0)[-1])
    one[token] = 2.0
    alone = own_map(one, patches, 0, "x")
    flat = np.concatenate([tile.values.ravel() for tile in alone.tiles])
    n_class = [tile.n_class for tile in patches.tiles]
    if not any(n_class):
        assert flat == pytest.approx(2 * patches.pooling[[token]].toarray()[0])


def test_a_features_map_is_the_sum_of_its_soft_tokens_maps(vlm: VLM) -> None:
    inputs = vlm.prepare(PROMPT, pictures()[:1])
    for maps in (token_maps(vlm, inputs, WhereConfig(pool=pool))["rollout"][0] for pool in ("max", "mean")):
        weights = generator(7, "weights").uniform(size=len(maps.class_token))
        found = maps.weighted(weights, "x")
        for tile, picture in zip(maps.tiles, found.tiles, strict=True):
            wanted = np.zeros(tile.values.shape[1:])
            for number, token in enumerate(tile.tokens):
                wanted += weights[token] * tile.values[number]
            assert np.allclose(picture.values, wanted, rtol=0, atol=1e-12)
        assert found.residual < 1e-12
