"""Folders as publishers lay them out: image processors by their torchvision names, in files of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmscope.core.errors import UserError
from vlmscope.models.loading import load_vlm
from vlmscope.models.tiny import tiny_image, tiny_vlm

ANYRES = [[12, 12], [12, 24], [24, 12], [24, 24]]
TILES = {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 12}}
SQUARE = {"size": {"height": 12, "width": 12}}
# family: the image processor's class, its settings, the processor's own settings
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llava": (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}, "do_center_crop": True},
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        {**SQUARE, "image_grid_pinpoints": ANYRES},
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "paligemma": ("SiglipImageProcessor", {**SQUARE, "image_seq_length": 9}, {}),
    "idefics3": ("Idefics3ImageProcessor", TILES, {"image_seq_len": 4}),
    "smolvlm": ("SmolVLMImageProcessor", TILES, {"image_seq_len": 4}),
    "internvl": ("GotOcr2ImageProcessorFast", {**SQUARE, "max_patches": 4}, {"image_seq_length": 4}),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", {"patch_size": 3, "min_pixels": 144, "max_pixels": 600}, {}),
    "qwen3_vl": (
        "Qwen2VLImageProcessorFast",
        {"patch_size": 3, "size": {"shortest_edge": 144, "longest_edge": 600}, "merge_size": 2},
        {},
    ),
    "gemma4": (
        "Gemma4ImageProcessor",
        {"patch_size": 2, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        {"image_seq_length": 70, "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}},
    ),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_folder_gives_the_same_inputs_and_logits(family: str, tmp_path: Path) -> None:
    vlm = tiny_vlm(family, 5)
    name, images, settings = PUBLISHED[family]
    vlm.model.save_pretrained(tmp_path)
    vlm.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": name, **images}))
    if settings:
        (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    again = load_vlm(tmp_path)
    pictures = [tiny_image(0).resize((24, 16))]
    before, after = (each.prepare("what is this planet ?", pictures) for each in (vlm, again))
    assert before.input_ids == after.input_ids and before.patch_boxes == after.patch_boxes
    assert before.roles.tolist() == after.roles.tolist()
    with torch.no_grad():
        assert torch.allclose(again.model(**after.tensors).logits, vlm.model(**before.tensors).logits, atol=1e-6)


def test_the_folders_own_chat_template_is_used(tmp_path: Path) -> None:
    vlm = tiny_vlm("llava", 5)
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    content = "{% for item in messages[0]['content'] %}{{ item['text'] if item['type'] == 'text' else '<image>' }}"
    (tmp_path / "chat_template.jinja").write_text("USER: the other one " + content + "{% endfor %} and ASSISTANT:")
    inputs = load_vlm(tmp_path).prepare("what is the red one", [tiny_image(0)])
    text = "".join(token for token in inputs.tokens if not token.startswith("<"))
    assert text == "USER: the other one what is the red one and ASSISTANT:"
    question = [token for token, role in zip(inputs.tokens, inputs.roles, strict=True) if role == "question"]
    assert question == ["what", " is", " the", " red", " one"]
    assert inputs.tokens[:2] == ["<bos>", "USER"]


def test_a_template_for_text_alone_takes_a_string(tmp_path: Path) -> None:
    vlm = tiny_vlm("llava", 5)
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("USER: {{ messages[0]['content'] }} ASSISTANT:")
    inputs = load_vlm(tmp_path).prepare("what is the red one", [tiny_image(0)])
    assert inputs.is_image.sum() == 9 and inputs.tokens[-3:] == [" one", " ASSISTANT", ":"]
    template.write_text("USER: ASSISTANT:")
    with pytest.raises(UserError, match="chat template does not show the prompt with its 1 pictures"):
        load_vlm(tmp_path).prepare("what is the red one", [tiny_image(0)])
