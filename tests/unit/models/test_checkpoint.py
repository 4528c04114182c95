"""Damaged, half-downloaded and mismatched model folders: each one line that names the file and says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmscope.app import main
from vlmscope.core.errors import UserError
from vlmscope.models.checkpoint import check_weights, is_complete, weight_files
from vlmscope.models.loading import load_vlm
from vlmscope.models.orrery import build_tokenizer
from vlmscope.models.tiny import tiny_gemma3, tiny_image, tiny_vlm


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Gemma 3 in several shards."""
    folder = tmp_path_factory.mktemp("sharded")
    vlm = tiny_gemma3(3)
    vlm.model.save_pretrained(folder, max_shard_size="20KB")
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-0000?-of-*.safetensors"))[1]


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def remove_shard(folder: Path) -> None:
    shard(folder).unlink()


def interrupt(folder: Path) -> None:
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    shard(folder).rename(folder / ".cache" / "huggingface" / "download" / "abc.incomplete")


def empty_shard(folder: Path) -> None:
    shard(folder).write_bytes(b"")


def cut_shard(folder: Path) -> None:
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[:-100])


def cut_header(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:30])


def page_instead(folder: Path) -> None:
    shard(folder).write_text("<html>Access to this model is restricted</html>")


def lfs_pointer(folder: Path) -> None:
    shard(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def lose_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def lead_outside(folder: Path) -> None:
    def change(record: dict) -> None:
        record["weight_map"]["lm_head.weight"] = "../other.safetensors"

    change_json(folder / "model.safetensors.index.json", change)


def only_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def wider_config(folder: Path) -> None:
    change_json(folder / "config.json", lambda c: c["text_config"].update(intermediate_size=40))


def shorter_config(folder: Path) -> None:
    def change(record: dict) -> None:
        text = record["text_config"]
        text["num_hidden_layers"] = 3
        text["layer_types"] = text["layer_types"][:3]

    change_json(folder / "config.json", change)


def lose_tensor(folder: Path) -> None:
    tensors = load_file(shard(folder))
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shard(folder), metadata={"format": "pt"})


def wordy_config(folder: Path) -> None:
    change_json(folder / "config.json", lambda c: c["text_config"].update(hidden_size="wide"))


def uneven_config(folder: Path) -> None:
    change_json(folder / "config.json", lambda c: c["text_config"].update(hidden_size=23))


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def typeless_config(folder: Path) -> None:
    change_json(folder / "config.json", lambda c: c.pop("model_type"))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def other_family(folder: Path) -> None:
    change_json(folder / "processor_config.json", lambda c: c.update(processor_class="LlavaProcessor"))


def other_image_processor(folder: Path) -> None:
    change_json(
        folder / "processor_config.json",
        lambda c: c["image_processor"].update(image_processor_type="CLIPImageProcessor"),
    )


def other_picture_size(folder: Path) -> None:
    change_json(
        folder / "processor_config.json", lambda c: c["image_processor"].update(size={"height": 20, "width": 20})
    )


def large_tokenizer(folder: Path) -> None:
    words = [f"word{number}" for number in range(1000)]
    build_tokenizer(words).save_pretrained(folder)


DAMAGES = [
    (remove_shard, r"model-00002-of-0000\d.safetensors is missing \(1 of \d weight files are\); download it again"),
    (interrupt, r"is missing \(1 of \d weight files are\) \(a download of it was interrupted\)"),
    (empty_shard, r"model-00002-of-0000\d.safetensors: not a complete safetensors file \(0 bytes; "),
    (cut_shard, r"00002-of-0000\d.safetensors: not a complete safetensors file .*file not fully covered.*; download"),
    (cut_header, r"00002-of-0000\d.safetensors: not a complete safetensors file \(30 bytes; "),
    (page_instead, r"00002-of-0000\d.safetensors: not a complete safetensors file"),
    (lfs_pointer, r"00002-of-0000\d.safetensors is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (lose_index, r"model.safetensors.index.json is missing beside model-00001"),
    (break_index, r"model.safetensors.index.json is not valid JSON"),
    (lead_outside, r"names '../other.safetensors', which does not lie in the folder"),
    (only_pickle, r"pytorch_model.bin, which is a pickle and never read; convert it to safetensors"),
    (no_weights, r"has no weights: model.safetensors is missing"),
    (
        wider_config,
        r"12 weights at .* do not fit its config.json, first model.language_model.layers.0.mlp.down_proj.weight: "
        r"it has shape \(24, 48\), the config asks for \(24, 40\)",
    ),
    (
        shorter_config,
        r"13 weights of layers that the model of .*config.json lacks, first model.language_model.layers.3.",
    ),
    (lose_tensor, r"lacks 1 weights, first model\."),
    (wordy_config, r"transformers refuses .*config.json: Validation error for field 'hidden_size'"),
    (uneven_config, r"transformers refuses .*config.json: .*hidden size \(23\)"),
    (bad_config, r"config.json is not valid JSON"),
    (list_config, r"config.json names no model_type"),
    (typeless_config, r"config.json names no model_type"),
    (no_tokenizer, r"has no tokenizer \(tokenizer.json, tokenizer.model\)"),
    (broken_tokenizer, r"cannot load the model at"),
    (other_family, r"processor_config.json is of a LlavaProcessor, the model takes a Gemma3Processor"),
    (other_image_processor, r"has CLIPImageProcessor\w* where Gemma3ImageProcessor belongs"),
    (other_picture_size, r"makes pictures of 20 x 20 pixels, the model takes 16 x 16"),
    (large_tokenizer, r"the tokenizer at .* knows 1,009 tokens, the model \d+;"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_folder_is_one_line(damage: Callable[[Path], None], words: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=words) as raised:
        load_vlm(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", [remove_shard, cut_shard, wider_config, other_family])
def test_from_the_command_line_it_is_exit_code_2(
    damage: Callable[[Path], None], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    asked = ["task=trace", "model=path", f"model.path={folder}", "prompt=what is this ?", "tracking=none"]
    assert main([*asked, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines


def test_a_whole_folder_is_whole(folder: Path) -> None:
    assert len(weight_files(folder)) > 5
    assert is_complete(folder)
    cut_shard(folder)
    assert not is_complete(folder)


def test_weights_and_logits_come_back_from_shards(folder: Path) -> None:
    before, after = tiny_gemma3(3), load_vlm(folder)
    inputs = before.prepare("what is this ?", [tiny_image(1)])
    with torch.no_grad():
        assert torch.equal(before.model(**inputs.tensors).logits, after.model(**inputs.tensors).logits)


def test_weights_in_one_file_and_in_shards_are_those_that_transformers_takes(folder: Path) -> None:
    """mlx-vlm#1464: a stray model.safetensors next to an index that names other files."""
    model = load_vlm(folder).model
    weights = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    assert weight_files(folder) == [folder / "model.safetensors"]
    theirs = type(model).from_pretrained(folder).state_dict()
    ours = load_vlm(folder).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="model.safetensors"):
        check_weights(folder)


def test_what_a_model_recomputes_may_lie_in_its_files(folder: Path) -> None:
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "extra.safetensors")

    def change(record: dict) -> None:
        record["weight_map"]["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = "extra.safetensors"

    change_json(folder / "model.safetensors.index.json", change)
    load_vlm(folder)


def test_a_head_that_the_class_does_not_use_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"model.vision_tower.head.probe": torch.ones(4)}, folder / "extra.safetensors")

    def change(record: dict) -> None:
        record["weight_map"]["model.vision_tower.head.probe"] = "extra.safetensors"

    change_json(folder / "model.safetensors.index.json", change)
    load_vlm(folder)
    assert "has 1 weights that the model does not use, first model.vision_tower.head.probe" in caplog.text


def test_a_processor_with_another_number_of_soft_tokens_is_one_line(folder: Path) -> None:
    change_json(folder / "processor_config.json", lambda c: c.update(image_seq_length=9))
    with pytest.raises(UserError, match="makes 9 soft tokens of a picture, the model takes 4"):
        load_vlm(folder)


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
    settings = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 8,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    change_json(folder / "processor_config.json", lambda c: c["image_processor"].update(settings))
    vlm = load_vlm(folder)
    assert vlm.processor.image_processor.do_pan_and_scan is False
    picture = tiny_image(0).resize((64, 16))
    assert len(vlm.processor.image_processor([picture], do_pan_and_scan=True)["pixel_values"]) == 5  # it could be cut
    inputs = vlm.prepare("what is this ?", [picture])
    assert inputs.tensors["pixel_values"].shape == (1, 3, 16, 16)
    assert int(inputs.is_image.sum()) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_one_line(value: float, folder: Path) -> None:
    """They would make every answer nan; the file is whole, so that nothing else notices."""
    tensors = load_file(shard(folder))
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, shard(folder), metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"holds values that are not finite in float32, first in .*{name.rpartition('layers.')[2]}"
    ):
        load_vlm(folder)
    with pytest.raises(UserError, match="not finite"):
        load_vlm(folder, dtype="bfloat16")


def test_weights_beyond_the_dtype_are_one_line(folder: Path) -> None:
    tensors = load_file(shard(folder))
    tensors[sorted(tensors)[0]].view(-1)[0] = 1e6
    save_file(tensors, shard(folder), metadata={"format": "pt"})
    load_vlm(folder)
    with pytest.raises(UserError, match=r"not finite in float16.*bfloat16 or float32"):
        load_vlm(folder, dtype="float16")
