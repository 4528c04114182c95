"""A random Gemma 3 text model of toy size, with a tokenizer as GGUF files describe it, as stand-in for Gemma 3 270M."""

from pathlib import Path
from string import ascii_letters
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from vlmscope.core.artifacts import write_json
from vlmscope.models.gguf import tokenizer_record

_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
_OTHER = ["<unused0>", "<start_of_image>", "<end_of_image>", "\n", "\n\n", "\n\n\n"]
_WORDS = ["▁", ":", ".", ",", *ascii_letters, "▁a", "ab", "▁ab", "▁abc", "bc", "é"]
_BYTES = ["<0xC3>", "<0xA9>"]
FACTS: dict[str, Any] = {
    "ggml.tokens": [*_SPECIAL, *_OTHER, *_WORDS, *_BYTES],
    "ggml.scores": [*[0.0] * len(_SPECIAL + _OTHER), *[-float(n) for n in range(len(_WORDS))], 0.0, 0.0],
    "ggml.token_type": [3] * len(_SPECIAL) + [4] * len(_OTHER) + [1] * len(_WORDS) + [6, 6],
    "ggml.bos_token_id": 2,
    "ggml.eos_token_id": 1,
    "ggml.unknown_token_id": 3,
    "ggml.padding_token_id": 0,
}
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 4,
    "num_attention_heads": 2,
}


def write_text_model(folder: Path) -> None:
    """The model as Hugging Face saves it."""
    torch.manual_seed(0)
    vocabulary = len(FACTS["ggml.tokens"])
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(vocab_size=vocabulary, num_key_value_heads=1, query_pre_attn_scalar=4, **SIZES)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    write_json(folder / "tokenizer.json", tokenizer_record(FACTS))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "bos_token": "<bos>"})
