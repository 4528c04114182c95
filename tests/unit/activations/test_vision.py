"""Attention patterns of vision towers: as Hugging Face computes them, and patches where the adapter says they are."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from vlmscope.activations import capture_vision_attention
from vlmscope.core.errors import UserError
from vlmscope.core.records import PatchBox, generator
from vlmscope.models import attention
from vlmscope.models.attention import recording_vision_patterns
from vlmscope.models.base import ModelInputs, exact_float64
from vlmscope.models.batching import make_batch
from vlmscope.models.boxes import PicturePatches, Tile
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm

VISION = ("gemma3", *FAMILIES)
PROMPT = "what is this red planet ?"
SIZES = ((48, 48), (72, 48), (48, 96))  # width and height


@pytest.fixture(scope="module", params=VISION)
def vlm(request: pytest.FixtureRequest) -> VLM:
    return tiny_vlm(request.param, 5)


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    return [tiny_image(3 + number).resize(size) for number, size in enumerate(sizes)]


def prepared(vlm: VLM, *images: Image.Image) -> ModelInputs:
    return vlm.prepare(PROMPT, list(images))


def patches_of(vlm: VLM, inputs: ModelInputs) -> list[PicturePatches]:
    return vlm.adapter.picture_patches(inputs.tensors, inputs.sizes, vlm.processor.image_processor)


def soft_tokens(vlm: VLM, inputs: ModelInputs) -> Tensor:
    batch = make_batch(vlm.adapter, [inputs])
    return batch.tensors["inputs_embeds"][0, torch.from_numpy(batch.is_image)]


def some(length: int, count: int = 12) -> list[int]:
    return sorted(generator(0, "some").permutation(length)[:count].tolist())


@contextmanager
def eager_calls(vlm: VLM) -> Iterator[dict[Any, list[Tensor]]]:
    """The patterns that Hugging Face's own eager attention computes, by module, in the order of its calls."""
    modules = vlm.adapter.vision_attention()
    source, config = sys.modules[type(modules[0]).__module__], vlm.model.config.vision_config
    eager, before, found = source.eager_attention_forward, config._attn_implementation, {m: [] for m in modules}

    def spy(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        output, weights = eager(module, *args, **kwargs)
        if module in found:
            found[module].append(weights)
        return output, weights

    config._attn_implementation = "eager"
    source.eager_attention_forward = spy  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        config._attn_implementation = before
        source.eager_attention_forward = eager  # pyright: ignore[reportAttributeAccessIssue]


def whole_pattern(calls: list[Tensor]) -> Tensor:
    """`[H, N, N]` over all N tokens of the tower, zero between tokens of different calls or batch rows."""
    blocks = [block for call in calls for block in call]
    return torch.stack([torch.block_diag(*heads) for heads in zip(*blocks, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recording_leaves_the_model_as_it_is(vlm: VLM, dtype: torch.dtype) -> None:
    model = vlm if dtype == torch.float32 else tiny_vlm(vlm.name.removeprefix("tiny_"), 5, dtype=dtype)
    inputs = prepared(model, *pictures((72, 48), (30, 48)))
    config = model.model.config.vision_config
    implementation = config._attn_implementation
    with exact_float64(), torch.no_grad():
        before = model.model(**inputs.tensors).logits
        with recording_vision_patterns(model.adapter, [0]) as found:
            during = model.model(**inputs.tensors).logits
    assert found[0] and found[0][0].dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert (during - before).abs().max() <= tolerance * before.abs().max()
    assert config._attn_implementation == implementation and not attention._recorders


def test_patterns_are_those_of_hugging_faces_eager_attention(vlm: VLM) -> None:
    inputs = prepared(vlm, *pictures((72, 48), (30, 48)))
    captured = capture_vision_attention(vlm, inputs)
    with eager_calls(vlm) as calls, torch.no_grad():
        vlm.model(**inputs.tensors)
    modules = vlm.adapter.vision_attention()
    assert len(captured) == 2 and [*captured[0].tiles[0].patterns] == list(range(len(modules)))
    covered: list[int] = []
    for picture in captured:
        for tile in picture.tiles:
            tokens = torch.from_numpy(tile.tile.tokens)
            covered += tokens.tolist()
            for layer, pattern in tile.patterns.items():
                theirs = whole_pattern(calls[modules[layer]])[:, tokens][:, :, tokens]
                assert pattern.shape == theirs.shape == (2, len(tokens), len(tokens))
                assert torch.allclose(pattern, theirs, rtol=0, atol=1e-6)
                assert torch.allclose(pattern.sum(-1), torch.ones(()), rtol=0, atol=1e-5)
                assert pattern.std() > 0.01 / len(tokens)  # not uniform, where any order would do
    total = sum(call.shape[0] * call.shape[-1] for call in calls[modules[0]])
    places = inputs.tensors.get("image_position_ids")  # Gemma 4's patches; padding, which the tower masks, is at -1
    padding = [] if places is None else torch.nonzero((places < 0).any(-1).flatten())[:, 0].tolist()
    assert sorted(covered + padding) == list(range(total))  # every token of the tower, once


def painted(picture: Image.Image, box: PatchBox) -> Image.Image:
    """The picture with the middle of a box in other colours."""
    left, top, right, bottom = box.pixels(*picture.size)
    dx, dy = (right - left) // 5, (bottom - top) // 5
    pixels = np.array(picture)
    pixels[top + dy : bottom - dy, left + dx : right - dx] ^= 128
    return Image.fromarray(pixels)


def entering(vlm: VLM, inputs: ModelInputs) -> Tensor:
    """What the tower's first attention reads, `[N, d]`: each token's own patch alone."""
    found: list[Tensor] = []

    def hook(_module: Any, args: tuple, kwargs: dict) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).flatten(0, -2))

    handle = vlm.adapter.vision_attention()[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        make_batch(vlm.adapter, [inputs])
    finally:
        handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("sizes", [*((size,) for size in SIZES), ((48, 48), (72, 48))])
def test_boxes_are_where_the_patches_look(vlm: VLM, sizes: tuple[tuple[int, int], ...]) -> None:
    """Of all patches of a tile, the one whose box is painted moves most."""
    *others, last = pictures(*sizes)
    inputs = prepared(vlm, *others, last)
    found = patches_of(vlm, inputs)
    before = entering(vlm, inputs)
    checked = 0
    for tile in found[-1].tiles:
        for number in some(len(tile.boxes)):
            box = tile.boxes[number]
            if (box.right - box.left) * last.width < 3 or (box.bottom - box.top) * last.height < 3:
                continue  # hardly anything but padding
            moved = (entering(vlm, prepared(vlm, *others, painted(last, box))) - before).norm(dim=1)
            assert int(moved[tile.tokens][tile.n_class :].argmax()) == number
            assert all(moved[tile.tokens].max() == 0 for picture in found[:-1] for tile in picture.tiles)
            checked += 1
    assert checked >= 4


@contextmanager
def nudged(vlm: VLM, token: int, module: int = -1) -> Iterator[None]:
    """Change one token of the tower behind an attention module, by default the last that the decoder reads from."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        changed = states.clone()
        changed.view(-1, states.shape[-1])[token] += torch.linspace(-2, 3, states.shape[-1])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = vlm.adapter.vision_attention()[module].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_pooling(vlm: VLM, inputs: ModelInputs) -> None:
    """A token of the tower moves exactly the soft tokens that list it."""
    before = soft_tokens(vlm, inputs)
    pooling = [picture.pooling.toarray() for picture in patches_of(vlm, inputs)]
    tokens = [np.concatenate([tile.tokens for tile in picture.tiles]) for picture in patches_of(vlm, inputs)]
    assert sum(len(rows) for rows in pooling) == len(before)
    listed = 0
    for number, rows in enumerate(pooling):
        total = rows.sum(axis=1)
        assert np.all(np.isclose(total, 1) | (total == 0)) and (rows >= 0).all()
        first = sum(len(rows) for rows in pooling[:number])
        for column in some(rows.shape[1], 20):
            expected = np.zeros(len(before), dtype=bool)
            expected[first : first + len(rows)] = rows[:, column] > 0
            with nudged(vlm, int(tokens[number][column])):
                moved = (soft_tokens(vlm, inputs) - before).abs().amax(dim=1).numpy()
            assert np.array_equal(moved > 1e-4, expected), (number, column)
            assert moved[~expected].max(initial=0.0) < 1e-6
            listed += expected.sum()
    assert listed >= 4


@pytest.mark.parametrize("sizes", [((72, 48),), ((30, 48), (48, 48))])
def test_soft_tokens_take_the_patches_that_they_list(vlm: VLM, sizes: tuple[tuple[int, int], ...]) -> None:
    check_pooling(vlm, prepared(vlm, *pictures(*sizes)))


def test_the_weights_of_resampled_tiles_are_those_of_the_model() -> None:
    """LLaVA-OneVision thins out the projected patches of many tiles by interpolation, which is linear."""
    vlm = tiny_vlm("llava_onevision", 5)
    vlm.model.config.vision_aspect_ratio = vlm.processor.vision_aspect_ratio = "anyres_max_1"
    inputs = prepared(vlm, *pictures((72, 48)))
    found: list[Tensor] = []
    handle = vlm.model.model.multi_modal_projector.register_forward_hook(lambda *args: found.append(args[2]))
    soft = soft_tokens(vlm, inputs)
    handle.remove()
    (picture,) = patches_of(vlm, inputs)
    weights = picture.pooling.toarray()
    assert len(np.unique(weights.round(6))) > 2  # not a mere choice of patches
    mixed = torch.from_numpy(weights).float() @ found[0].flatten(0, 1)
    kept = torch.from_numpy(weights.sum(axis=1) > 0)
    assert torch.allclose(mixed[kept], soft[kept], rtol=0, atol=1e-5)
    assert torch.equal(soft[~kept], vlm.model.model.image_newline.expand(int((~kept).sum()), -1))


def test_masked_patches_are_no_patches() -> None:
    """Idefics3 masks patches of padding alone: they are not in the grid and nothing attends to them."""
    vlm = tiny_vlm("idefics3", 5)
    inputs = prepared(vlm, *pictures((72, 48)))
    mask = inputs.tensors["pixel_attention_mask"].clone()
    mask[0, 1, :, 7:] = 0  # in the third patch of four the first pixel is seen
    mask[0, 4, 6:] = 0
    inputs = replace(inputs, tensors={**inputs.tensors, "pixel_attention_mask": mask})
    (picture,) = capture_vision_attention(vlm, inputs)
    assert [(t.tile.rows, t.tile.columns) for t in picture.tiles] == [(4, 4), (4, 3), (4, 4), (4, 4), (2, 4)]
    with eager_calls(vlm) as calls, torch.no_grad():
        vlm.model(**inputs.tensors)
    theirs = whole_pattern(calls[vlm.adapter.vision_attention()[0]])
    for tile in picture.tiles:
        tokens = torch.from_numpy(tile.tile.tokens)
        assert torch.allclose(tile.patterns[0], theirs[:, tokens][:, :, tokens], rtol=0, atol=1e-5)
        assert torch.allclose(tile.patterns[0].sum(-1), torch.ones(()), rtol=0, atol=1e-5)
    assert picture.tiles[1].tile.tokens.tolist() == [16 + n for n in (0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14)]
    tile = picture.tiles[1].tile
    assert tile.boxes[-1] == pytest.approx((0.5 + 1 / 3, 0.375, 1.0, 0.5))
    total = picture.pooling.toarray().sum(axis=1)
    assert total == pytest.approx(np.where(np.isin(np.arange(20), [18, 19]), 0, 1))


def same_window(tile: Tile, side: int) -> np.ndarray:
    row, column = np.divmod(np.arange(len(tile)), tile.columns)
    window = row // side * 1000 + column // side
    return window[:, None] == window[None]


def test_qwens_windows_attend_within_themselves_and_full_layers_everywhere() -> None:
    vlm = tiny_vlm("qwen2_5_vl", 5)
    captured = capture_vision_attention(vlm, prepared(vlm, *pictures((72, 48), (48, 96), (48, 48))))
    assert len({(p.tiles[0].tile.rows, p.tiles[0].tile.columns) for p in captured}) == 3
    for picture in captured:
        (tile,) = picture.tiles
        inside = torch.from_numpy(same_window(tile.tile, 4))
        assert 0 < inside.sum() < inside.numel()
        assert all(torch.equal(heads > 0, inside) for heads in tile.patterns[0])
        assert (tile.patterns[1] > 0).all()


def test_what_has_no_patterns_is_refused_by_name() -> None:
    text, vlm = tiny_vlm("gemma3_text"), tiny_vlm("gemma3")
    assert text.adapter.vision_attention() == []
    with pytest.raises(UserError, match="tiny_gemma3_text takes no pictures"):
        capture_vision_attention(text, text.prepare(PROMPT))
    with pytest.raises(UserError, match="the prompt has no picture"):
        capture_vision_attention(vlm, vlm.prepare(PROMPT))
    decoder = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    tower = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    with torch.device("meta"):
        pixtral = LlavaForConditionalGeneration(LlavaConfig(text_config=decoder, vision_config=tower))
    with pytest.raises(UserError, match="vision tower of type 'pixtral' cannot be recorded; .* clip_vision_model, "):
        adapter_for(pixtral).vision_attention()
