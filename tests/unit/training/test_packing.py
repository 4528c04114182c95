"""A packed segment is the single-turn prompt: the same logits as Hugging Face gives the prompt alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlmscope.core.records import generator
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import Scene, vocabulary
from vlmscope.models.orrery import OrreryConfig, build_orrery, build_processor
from vlmscope.training.batches import chat_batch, pack, to_pixels
from vlmscope.training.config import StageConfig
from vlmscope.training.orrery import VlmModule


@pytest.fixture(scope="module")
def parts():
    processor = build_processor(vocabulary(), 64, 16)
    config = OrreryConfig(d_model=32, n_layers=3, d_mlp=32, head_dim=8, vision_width=16, vision_layers=1, vision_mlp=16)
    model = build_orrery(config, len(processor.tokenizer), seed=0).eval()
    with torch.no_grad():  # post-norms start at 0.2: let the blocks speak, or masks would hardly matter
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.fill_(0.5)
    return model, processor


def alone(model, processor, scene: Scene, question: str, answer: str) -> torch.Tensor:
    """Logits [answer length + 1, V] that predict the answer and the end of turn, by Hugging Face alone."""
    content = [{"type": "text", "text": question}]
    images = None
    if scene.image is not None:
        content.insert(0, {"type": "image"})
        images = [[Image.fromarray(scene.image)]]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(text=[prompt + answer], images=images, return_tensors="pt", add_special_tokens=False)
    names = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
    logits = model(**{k: batch[k] for k in names if k in batch}).logits[0]
    return logits[-(len(answer.split()) + 1) :]


@torch.no_grad()
def test_packed_logits_equal_single_turns(parts) -> None:
    model, processor = parts
    module = VlmModule(StageConfig(1, {}), model, processor.tokenizer)
    scenes = [make_scene("train", kind, 2) for kind in ("planets", "digits", "text", "shapes")]
    batch = pack(scenes, processor.tokenizer, 16, generator(0, "order"))
    states, labels = module.answer_states(batch)
    logits = model.lm_head(states)
    row = 0
    for scene, asked, segments in zip(scenes, batch.asked, batch.segments, strict=True):
        assert int(segments.max()) == len(asked) == min(len(scene.questions), 6) and set(asked) <= set(scene.questions)
        for question in asked:
            expected = alone(model, processor, scene, question.question, question.answer)
            got = logits[row : row + len(expected)]
            assert torch.allclose(got, expected, atol=2e-5), question
            row += len(expected)
    assert row == len(labels)


def test_pixels_equal_the_processor(parts) -> None:
    _, processor = parts
    scene = make_scene("train", "planets", 1)
    assert scene.image is not None
    wanted = processor.image_processor([Image.fromarray(scene.image)], return_tensors="pt")["pixel_values"]
    assert torch.allclose(to_pixels(scene.image[None]), wanted, atol=1e-6)


def test_chat_batch_marks_answers(parts) -> None:
    _, processor = parts
    scenes = [make_scene("train", kind, 5) for kind in ("planets", "text")]
    batch = chat_batch(scenes, processor.tokenizer, 16, np.random.default_rng(0))
    for row in range(2):
        marked = batch["input_ids"][row][batch["loss_mask"][row]]
        words = " ".join(processor.tokenizer.convert_ids_to_tokens(marked.tolist()))
        assert words in {q.answer for q in scenes[row].questions}
    assert batch["pixel_values"].shape[0] == 1
    assert int(batch["token_type_ids"].sum()) == 16
