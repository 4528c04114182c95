"""Folders as publishers lay them out: image processors by their torchvision names, in files of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange
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


# where a template is saved: the files that say so, and how the choice is reported
OTHER = "no {{ messages[0]['content'] }}"
SAVED: dict[str, tuple[Callable[[str], dict[str, Any]], str]] = {
    "jinja": (lambda own: {"chat_template.jinja": own}, ""),
    "json": (lambda own: {"chat_template.json": {"chat_template": own}}, ""),
    "processor": (lambda own: {"processor_config.json": {"chat_template": own}}, ""),
    "tokenizer": (lambda own: {"tokenizer_config.json": {"chat_template": own}}, "the tokenizer's"),
    "named": (
        lambda own: {
            "tokenizer_config.json": {
                "chat_template": [{"name": "default", "template": own}, {"name": "rag", "template": OTHER}]
            }
        },
        "the tokenizer's, of default, rag the default",
    ),
    "folder": (
        lambda own: {"chat_template.jinja": own, "additional_chat_templates/rag.jinja": OTHER},
        "the processor's, of default, rag the default",
    ),
    "both": (
        lambda own: {"chat_template.json": {"chat_template": own}, "tokenizer_config.json": {"chat_template": OTHER}},
        "",
    ),
    "none": (lambda own: {}, "the family's usual one; the model came without"),
}


def save_with_template(family: str, folder: Path, files: dict[str, Any]) -> None:
    """A tiny model's folder with nothing about chat templates but what `files` say."""
    vlm = tiny_vlm(family, 5)
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        before = json.loads(path.read_text()) if path.suffix == ".json" and path.is_file() else {}
        path.write_text(body if isinstance(body, str) else json.dumps(before | body))


@pytest.mark.parametrize("where", SAVED)
@pytest.mark.parametrize(("family", "mark"), [("llava", "<image>"), ("gemma3", "<start_of_image>")])
def test_the_chat_template_is_the_one_that_hugging_face_takes(
    family: str, mark: str, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = (
        "{% for message in messages %}{{ message['role'].upper() + ': the other one ' }}"
        "{% for item in message['content'] %}{{ item['text'] if item['type'] == 'text' else MARK }}{% endfor %}"
        "{{ '<eos>' }}{% endfor %}{% if add_generation_prompt %}{{ ' and ASSISTANT:' }}{% endif %}"
    ).replace("MARK", repr(mark))
    files, told = SAVED[where]
    save_with_template(family, tmp_path, files(own))
    with caplog.at_level("INFO", "vlmscope"):
        vlm = load_vlm(tmp_path)
    assert caplog.messages == ([f"chat template of {tmp_path.name}: {told}"] if told else [])
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the red one"}]}]
    # Hugging Face's own answer; a template that the tokenizer alone has is its tokenizer's to render.
    theirs = getattr(transformers, type(vlm.processor).__name__).from_pretrained(tmp_path)
    theirs = theirs if theirs.chat_template else theirs.tokenizer
    if where == "none":
        assert theirs.chat_template is None
        return
    told_turn = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turn = vlm.adapter.wrap_prompt("what is the red one", 1, vlm.tokenizer, vlm.chat_template)
    assert (
        turn.text.removeprefix("<bos>")
        == told_turn
        == f"USER: the other one {mark}what is the red one<eos> and ASSISTANT:"
    )
    inputs = vlm.prepare("what is the red one", [tiny_image(0)])
    question = [token for token, role in zip(inputs.tokens, inputs.roles, strict=True) if role == "question"]
    assert "".join(question).strip() == "what is the red one" and inputs.is_image.sum() > 1
    said = [*turns, {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]
    (spoken,) = vlm.adapter.wrap_exchanges([Exchange("what is the red one", "blue")], 1, vlm.tokenizer, own)
    assert spoken.text.removeprefix("<bos>") == theirs.apply_chat_template(said, tokenize=False)


@pytest.mark.parametrize("family", ["llava", "gemma3", "gemma3_text"])
def test_named_templates_without_a_default_are_listed(family: str, tmp_path: Path) -> None:
    named = [{"name": name, "template": OTHER} for name in ("rag", "tools")]
    save_with_template(family, tmp_path, {"tokenizer_config.json": {"chat_template": named}})
    with pytest.raises(UserError, match="chat templates rag, tools and none called default; .* chat_template.jinja"):
        load_vlm(tmp_path)


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
