"""Stage 2's loss: the answer, and the answer read early."""

import pytest
import torch
from torch.nn import functional as F

from vlmscope.core.records import generator
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import vocabulary
from vlmscope.data.packing import pack
from vlmscope.models.orrery import OrreryConfig, build_orrery, build_processor
from vlmscope.training.config import StageConfig
from vlmscope.training.orrery import VlmModule


@pytest.fixture(scope="module")
def parts():
    small = OrreryConfig(d_model=32, n_layers=4, d_mlp=48, head_dim=8, vision_width=32, vision_layers=1, vision_mlp=48)
    processor = build_processor(vocabulary(), small.image_size, small.soft_tokens)
    model = build_orrery(small, len(processor.tokenizer), 0).eval()
    scenes = [make_scene("train", kind, 2) for kind in ("planets", "digits", "text")]
    return model, processor, pack(scenes, processor.tokenizer, small.soft_tokens, generator(0, "order"))


@torch.no_grad()
def test_early_exit_loss_is_that_of_shortened_models(parts) -> None:
    """Each early term is the loss of the model without its last layers."""
    model, processor, batch = parts

    def plain() -> torch.Tensor:
        states, labels = VlmModule(StageConfig(1, {}), model, processor.tokenizer).answer_states(batch)
        return F.cross_entropy(model.lm_head(states), labels)

    module = VlmModule(StageConfig(1, {}, exit_weight=0.3, exit_layers=2), model, processor.tokenizer)
    got = module.training_step(batch, 0)
    decoder, expected = model.model.language_model, plain()
    whole = decoder.layers
    try:
        for early in (1, 2):
            decoder.layers = whole[:-early]
            decoder.config.num_hidden_layers = len(decoder.layers)
            expected = expected + 0.3 * plain()
    finally:
        decoder.layers, decoder.config.num_hidden_layers = whole, len(whole)
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)
    assert got > 1.5 * plain()
    assert torch.equal(VlmModule(StageConfig(1, {}), model, processor.tokenizer).training_step(batch, 0), plain())
