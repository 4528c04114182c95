"""Transcoders of the vision tower: the same batches, trainer and files as those of the decoder, on every family."""

from pathlib import Path

import pytest
import torch
from tests.unit.training.helpers import interrupted_at, make_batch, train
from tests.unit.training.test_transcoder_training import equal

from vlmscope.core.errors import UserError
from vlmscope.models.base import VisionStack, stack_of
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm
from vlmscope.replacement import build_replacement
from vlmscope.scope import Scope
from vlmscope.training.batches import collect, shown
from vlmscope.training.evaluation import evaluate_transcoders
from vlmscope.transcoders.formats import load_set, save_set


@pytest.mark.parametrize("family", ["gemma3", *FAMILIES])
def test_every_patch_of_every_picture_is_a_token_and_padding_is_none(family: str) -> None:
    vlm = tiny_vlm(family, 3)
    stack = VisionStack(vlm.adapter)
    sizes = [(20, 12), (12, 20)]
    inputs = vlm.prepare("what is this ?", [tiny_image(n).resize(size) for n, size in enumerate(sizes)])
    activations = collect(stack, inputs.tensors)
    pictures = vlm.adapter.picture_patches(inputs.tensors, inputs.sizes, vlm.processor.image_processor)
    assert activations.n_tokens == sum(len(tile) for picture in pictures for tile in picture.tiles)
    assert bool(activations.is_image.all()) and len(activations.by_layer) == stack.n_layers
    for layer, (x, y) in activations.by_layer.items():
        assert x.shape[1] == stack.d_model and y.shape == x.shape
        with torch.no_grad():
            torch.testing.assert_close(stack.mlp(layer)(x), y)


def test_training_resumes_bit_for_bit_and_the_set_says_where_it_belongs(gemma: VLM, tmp_path: Path) -> None:
    whole, metrics = train(gemma, tmp_path / "whole", site="tower")
    with pytest.raises(KeyboardInterrupt):
        train(gemma, tmp_path / "half", interrupted_at(4), site="tower")
    resumed, _ = train(gemma, tmp_path / "half", site="tower", resume=True)
    assert equal(whole, resumed) and whole.site == "tower" and whole.layers == [0, 1]
    assert {"val/fvu", "val/l0", "val/dead_frac", "val/ce_delta", "layers/fvu/layer_01"} <= metrics.keys()
    assert metrics["val/fvu"] == metrics["val/fvu_image"]  # patches are all that a tower has
    save_set(whole, tmp_path / "set")
    read = load_set(tmp_path / "set", 2, whole[0].config.d_model)
    assert equal(whole, read) and read.site == "tower"
    batches = [make_batch(9)]
    assert evaluate_transcoders(Scope(gemma, read), batches)["val/fvu"] == pytest.approx(metrics["val/fvu"], abs=1.0)


def test_text_alone_gives_a_tower_nothing(gemma: VLM) -> None:
    stack = stack_of(gemma.adapter, "tower")
    text = gemma.prepare("what is this ?", []).tensors
    assert not shown(stack, text) and collect(stack, text).n_tokens == 0


def test_what_has_no_tower_and_what_is_not_of_the_decoder_is_one_line(gemma: VLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes no pictures"):
        stack_of(tiny_vlm("gemma3_text").adapter, "tower")
    tower, _ = train(gemma, tmp_path, site="tower")
    with pytest.raises(UserError, match="tower_mlp_in to tower_mlp_out"):
        build_replacement(Scope(gemma, tower), gemma.prepare("what is this ?", [tiny_image(0)]))
