"""Model folders: damaged ones are one line that names the file, whole ones give the same model, however laid out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange
from vlmscope.models.checkpoint import check_weights, is_complete, weight_files
from vlmscope.models.loading import load_vlm
from vlmscope.models.orrery import build_tokenizer
from vlmscope.models.tiny import tiny_image, tiny_vlm

INDEX, LAST = "model.safetensors.index.json", "model.language_model.layers.3."


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-0000?-of-*.safetensors"))[1]


def change_json(path: Path, change: Callable[[dict], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def config(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", change)


def processor(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "processor_config.json", change)


def index(name: str, file: str) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / INDEX, lambda record: record["weight_map"].update({name: file}))


def shard_is(content: bytes) -> Callable[[Path], Any]:
    return lambda folder: shard(folder).write_bytes(content)


def file_is(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def remove(pattern: str) -> Callable[[Path], Any]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def cut_shard(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def interrupt(folder: Path) -> None:
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    shard(folder).rename(folder / ".cache" / "huggingface" / "download" / "abc.incomplete")


def only_pickle(folder: Path) -> None:
    remove("model*")(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def shorter(record: dict) -> None:
    record["text_config"] |= {"num_hidden_layers": 3, "layer_types": record["text_config"]["layer_types"][:3]}


def change_tensors(change: Callable[[dict, str], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(shard(folder))
        change(tensors, sorted(tensors)[0])
        save_file(tensors, shard(folder), metadata={"format": "pt"})

    return damage


def fill(value: float) -> Callable[[Path], None]:
    return change_tensors(lambda tensors, name: tensors[name].view(-1)[:1].fill_(value))


SHARD = r"model-00002-of-0000\d.safetensors"
DAMAGES = {
    "no shard": (lambda f: shard(f).unlink(), SHARD + r" is missing \(1 of \d weight files are\); download it again"),
    "interrupted": (interrupt, r"is missing \(1 of \d weight files are\) \(a download of it was interrupted\)"),
    "cut shard": (cut_shard, SHARD + ": not a complete safetensors file .*file not fully covered.*; download"),
    "pointer": (
        shard_is(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        SHARD + " is a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
    "no index": (remove(INDEX), f"{INDEX} is missing beside model-00001"),
    "bad index": (file_is(INDEX, "{"), f"{INDEX} is not valid JSON"),
    "outside": (index("x", "../other.safetensors"), "names '../other.safetensors', which does not lie in the folder"),
    "pickle": (only_pickle, "pytorch_model.bin, which is a pickle and never read; convert it to safetensors"),
    "no weights": (remove("model*"), "has no weights: model.safetensors is missing"),
    "wider": (
        config(lambda c: c["text_config"].update(intermediate_size=40)),
        r"12 weights at .* do not fit its config.json, first model.language_model.layers.0.mlp.down_proj.weight: "
        r"it has shape \(24, 48\), the config asks for \(24, 40\)",
    ),
    "shorter": (config(shorter), f"13 weights of layers that the model of .*config.json lacks, first {LAST}"),
    "no tensor": (change_tensors(lambda tensors, name: tensors.pop(name)), r"lacks 1 weights, first model\."),
    "nan": (fill(float("nan")), "holds values that are not finite in float32, first in "),
    "uneven": (config(lambda c: c["text_config"].update(hidden_size=23)), r"transformers refuses .*hidden size \(23\)"),
    "no type": (config(lambda c: c.pop("model_type")), "config.json names no model_type"),
    "no tokenizer": (remove("tokenizer*"), r"has no tokenizer \(tokenizer.json, tokenizer.model\)"),
    "bad tokenizer": (file_is("tokenizer.json", "{}"), "cannot load the model at"),
    "other family": (
        processor(lambda c: c.update(processor_class="LlavaProcessor")),
        "processor_config.json is of a LlavaProcessor, the model takes a Gemma3Processor",
    ),
    "other images": (
        processor(lambda c: c["image_processor"].update(image_processor_type="CLIPImageProcessor")),
        r"has CLIPImageProcessor\w* where Gemma3ImageProcessor belongs",
    ),
    "other size": (
        processor(lambda c: c["image_processor"].update(size={"height": 20, "width": 20})),
        "makes pictures of 20 x 20 pixels, the model takes 16 x 16",
    ),
    "large tokenizer": (
        lambda f: build_tokenizer([f"word{number}" for number in range(1000)]).save_pretrained(f),
        r"the tokenizer at .* knows 1,009 tokens, the model \d+;",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_one_line(name: str, folder: Path) -> None:
    damage, words = DAMAGES[name]
    assert is_complete(folder)
    damage(folder)
    with pytest.raises(UserError, match=words) as raised:
        load_vlm(folder)
    assert "\n" not in str(raised.value)


def test_weights_beyond_the_dtype_are_one_line(folder: Path) -> None:
    fill(1e6)(folder)
    load_vlm(folder)
    with pytest.raises(UserError, match=r"not finite in float16.*bfloat16 or float32"):
        load_vlm(folder, dtype="float16")


def test_weights_in_one_file_and_in_shards_are_those_that_transformers_takes(folder: Path) -> None:
    """mlx-vlm#1464: a stray model.safetensors next to an index that names other files."""
    model = load_vlm(folder).model
    weights = {name: (tensor * 0.5).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    assert weight_files(folder) == [folder / "model.safetensors"]
    theirs, ours = type(model).from_pretrained(folder).state_dict(), load_vlm(folder).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="model.safetensors"):
        check_weights(folder)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.language_model.layers.0.self_attn.rotary_emb.inv_freq", ""),  # recomputed
        ("model.vision_tower.head.probe", "has 1 weights that the model does not use, first model.vision_tower.head"),
    ],
)
def test_what_a_model_does_not_need_may_lie_in_its_files(
    name: str, told: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({name: torch.ones(4)}, folder / "extra.safetensors")
    index(name, "extra.safetensors")(folder)
    load_vlm(folder)
    assert told in caplog.text and bool(told) == bool(caplog.text)


def test_a_token_beyond_the_embedding_is_named(tmp_path: Path) -> None:
    # As published for Gemma 3 270M and 1B: one token more than the embedding has rows.
    vlm = tiny_vlm("gemma3_text")
    vlm.model.save_pretrained(tmp_path)
    vlm.tokenizer.add_special_tokens({"extra_special_tokens": ["<beyond>"]})
    vlm.tokenizer.save_pretrained(tmp_path)
    again = load_vlm(tmp_path)
    assert len(again.prepare("what is this ?").tokens) > 4
    with pytest.raises(UserError, match=r"token '<beyond>' has no embedding in .* \(\d+ rows\)"):
        again.prepare("what is <beyond> this ?")


def test_pan_and_scan_stays_off_whatever_the_folder_says(folder: Path) -> None:
    settings = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 4}
    settings["pan_and_scan_min_ratio_to_activate"] = 1.2
    processor(lambda c: c["image_processor"].update(settings))(folder)
    vlm = load_vlm(folder)
    picture = tiny_image(0).resize((64, 16))
    assert len(vlm.processor.image_processor([picture], do_pan_and_scan=True)["pixel_values"]) == 5  # it could be cut
    inputs = vlm.prepare("what is this ?", [picture])
    assert inputs.tensors["pixel_values"].shape == (1, 3, 16, 16) and int(inputs.is_image.sum()) == 4
    processor(lambda c: c.update(image_seq_length=9))(folder)
    with pytest.raises(UserError, match="made 9 soft tokens where the model's pictures have 4"):
        load_vlm(folder).prepare("what is this ?", [picture])


SQUARE = {"size": {"height": 12, "width": 12}}
TILES = {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 12}}
# As publishers lay folders out, image processors by their torchvision names, in files of their own. Family: the image
# processor's class, its settings, the processor's own settings.
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llava": (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}, "do_center_crop": True},
        {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        {**SQUARE, "image_grid_pinpoints": [[12, 12], [12, 24], [24, 12], [24, 24]]},
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
    before, after = (each.prepare("what is this planet ?", [tiny_image(0).resize((24, 16))]) for each in (vlm, again))
    assert before.input_ids == after.input_ids and before.patch_boxes == after.patch_boxes
    assert before.roles.tolist() == after.roles.tolist()
    with torch.no_grad():
        assert torch.allclose(again.model(**after.tensors).logits, vlm.model(**before.tensors).logits, atol=1e-6)


OTHER = "no {{ messages[0]['content'] }}"
# Where a template is saved: the files that say so, and how the choice is reported.
SAVED: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "jinja": (lambda own: {"chat_template.jinja": own}, ""),
    "tokenizer": (lambda own: {"tokenizer_config.json": {"chat_template": own}}, "the tokenizer's"),
    "named": (
        lambda own: {"tokenizer_config.json": {"chat_template": named(default=own, rag=OTHER)}},
        "the tokenizer's, of default, rag the default",
    ),
    "folder": (
        lambda own: {"chat_template.jinja": own, "additional_chat_templates/rag.jinja": OTHER},
        "the processor's, of default, rag the default",
    ),
    "none": (lambda own: {}, "the family's usual one; the model came without"),
}


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


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
    # Hugging Face's own answer; a template that the tokenizer alone has is its tokenizer's to render.
    theirs = getattr(transformers, type(vlm.processor).__name__).from_pretrained(tmp_path)
    theirs = theirs if theirs.chat_template else theirs.tokenizer
    if where == "none":
        assert theirs.chat_template is None
        return
    asked = "what is the red one"
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
    turn = vlm.adapter.wrap_prompt(asked, 1, vlm.tokenizer, vlm.chat_template).text.removeprefix("<bos>")
    assert turn == theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert turn == f"USER: the other one {mark}{asked}<eos> and ASSISTANT:"
    said = [*turns, {"role": "assistant", "content": [{"type": "text", "text": "blue"}]}]
    (spoken,) = vlm.adapter.wrap_exchanges([Exchange(asked, "blue")], 1, vlm.tokenizer, own)
    assert spoken.text.removeprefix("<bos>") == theirs.apply_chat_template(said, tokenize=False)


def test_named_templates_without_a_default_are_listed(tmp_path: Path) -> None:
    templates = {"chat_template": named(rag=OTHER, tools=OTHER)}
    save_with_template("llava", tmp_path, {"tokenizer_config.json": templates})
    with pytest.raises(UserError, match="chat templates rag, tools and none called default; .* chat_template.jinja"):
        load_vlm(tmp_path)
