"""A Gemma 3 text model in a GGUF file, as llama.cpp writes it: its configuration, weights and tokenizer.

llama.cpp stores each norm's weight plus one, where Hugging Face's Gemma 3 adds the one itself; the unembedding is the
embedding. The tokenizer is rebuilt from the tokens, their scores and types: two tokens merge in order of the score of
the token that they make.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens that are split off before the others
# llama.cpp's name of a tensor in a block -> Hugging Face's in a layer
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """`config.json`, the weights by their names in `Gemma3ForCausalLM`, in bfloat16, and `tokenizer.json`."""
    import torch
    from gguf import GGUFReader, dequantize
    from tqdm import tqdm
    from transformers import Gemma3TextConfig

    reader = GGUFReader(path)
    facts = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items()}
    config = Gemma3TextConfig(
        vocab_size=len(facts["ggml.tokens"]),
        hidden_size=facts["embedding_length"],
        intermediate_size=facts["feed_forward_length"],
        num_hidden_layers=facts["block_count"],
        num_attention_heads=facts["attention.head_count"],
        num_key_value_heads=facts["attention.head_count_kv"],
        head_dim=facts["attention.key_length"],
        query_pre_attn_scalar=facts["attention.key_length"],
        max_position_embeddings=facts["context_length"],
        sliding_window=facts["attention.sliding_window"],
        bos_token_id=facts["ggml.bos_token_id"],
        eos_token_id=facts["ggml.eos_token_id"],
        pad_token_id=facts["ggml.padding_token_id"],
        tie_word_embeddings=True,
    )
    weights: dict[str, Tensor] = {}
    for tensor in tqdm(reader.tensors, desc="dequantised", unit="tensor"):
        values = dequantize(tensor.data, tensor.tensor_type).reshape([int(size) for size in reversed(tensor.shape)])
        if tensor.name.endswith("norm.weight"):
            values = values - 1
        weights[_their_name(tensor.name)] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    record = {**config.to_dict(), "architectures": ["Gemma3ForCausalLM"], "dtype": "bfloat16"}
    return record, weights, tokenizer_record(facts)


def _their_name(name: str) -> str:
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}.weight"


def tokenizer_record(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` from GGUF's tokens, scores and types: byte-pair encoding with spaces as ▁, bytes as fallback."""
    tokens, scores, types = facts["ggml.tokens"], facts["ggml.scores"], facts["ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = []
    for number, token in enumerate(tokens):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [(-scores[number], vocabulary[left], vocabulary[right], [left, right]) for left, right in pairs]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = tokens[facts["ggml.bos_token_id"]]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, **plain, "special": types[number] == _CONTROL}
            for number, token in enumerate(tokens)
            if types[number] in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text[0]],
            "pair": [first, text[0], first, text[1]],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary[bos]], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": tokens[facts["ggml.unknown_token_id"]],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [pair for *_, pair in sorted(merges)],
        },
    }
