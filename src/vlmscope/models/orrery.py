"""Orrery, the embedded VLM: Gemma 3 classes at toy size, with a word-level tokenizer.

Hugging Face's initial values keep most of the picture from the decoder (the projection starts at zero, post-norms at
full scale), so they are set here: projection std 1/sqrt(width), embeddings std 1/sqrt(d), post-norm weights -0.8
(scale 0.2, so that each block starts small).

torch and transformers are imported inside the functions, because the command line reads `OrreryConfig` without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
TURN, END_TURN = "<start_of_turn>", "<end_of_turn>"
BOI, EOI, SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
SPECIAL = (PAD, EOS, BOS, UNK, TURN, END_TURN, BOI, EOI, SOFT)


@dataclass
class OrreryConfig:
    """Sizes of Orrery. `global_layers` attend to everything, the others to a window of `sliding_window` tokens."""

    d_model: int = 128
    n_layers: int = 8
    d_mlp: int = 384
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    sliding_window: int = 10
    global_layers: list[int] = field(default_factory=lambda: [1, 4])
    vision_width: int = 128
    vision_layers: int = 4
    vision_mlp: int = 384
    vision_heads: int = 4
    image_size: int = 64
    patch_size: int = 8
    soft_tokens: int = 16


def build_orrery(config: OrreryConfig, vocab_size: int, seed: int) -> Any:
    """An untrained Orrery (`Gemma3ForConditionalGeneration`) in float32 with the initial values described above."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    ids = {token: number for number, token in enumerate(SPECIAL)}  # as `build_tokenizer` numbers them
    kinds = ["full_attention" if i in config.global_layers else "sliding_attention" for i in range(config.n_layers)]
    text = {
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "query_pre_attn_scalar": config.head_dim,
        "sliding_window": config.sliding_window,
        "layer_types": kinds,
        "max_position_embeddings": 512,
        "pad_token_id": ids[PAD],
        "eos_token_id": ids[EOS],
        "bos_token_id": ids[BOS],
        "tie_word_embeddings": True,
    }
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_mlp,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "vision_use_head": False,
    }
    ends: Any = [ids[EOS], ids[END_TURN]]
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=config.soft_tokens,
            boi_token_index=ids[BOI],
            eoi_token_index=ids[EOI],
            image_token_index=ids[SOFT],
            eos_token_id=ends,  # pyright: ignore[reportCallIssue]
            tie_word_embeddings=True,
        )
    )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = ids[PAD]
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(0, config.vision_width**-0.5)
        model.model.language_model.embed_tokens.weight.normal_(0, config.d_model**-0.5)
        for name, parameter in model.model.language_model.named_parameters():
            if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
                parameter.fill_(-0.8)
            elif name.endswith("_proj.weight"):
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def take_weights(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Start `model` from the Orrery in `folder`: parts of equal name and size, and the embeddings of equal words."""
    import torch
    from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

    given = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    words = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in given.named_parameters():
            if name.endswith("embed_tokens.weight") and own[name].shape[1] == values.shape[1]:
                common = [(number, words[word]) for word, number in tokenizer.get_vocab().items() if word in words]
                rows, theirs = (torch.tensor(numbers) for numbers in zip(*common, strict=True))
                own[name][rows] = values[theirs]
            elif name in own and own[name].shape == values.shape:
                own[name].copy_(values)


def build_tokenizer(words: Sequence[str]) -> Any:
    """A word-level tokenizer; ids are stable: special tokens first, then words in order.

    Words are split at white space (newlines vanish), so a text must put spaces around punctuation, as all templates do.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *words))}
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNK,
        extra_special_tokens={"boi_token": BOI, "eoi_token": EOI, "image_token": SOFT},
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_processor(words: Sequence[str], image_size: int, soft_tokens: int) -> Any:
    """A `Gemma3Processor` with the tokenizer of these words.

    Pictures become squares of `image_size` pixels and `soft_tokens` tokens each. It expands `<start_of_image>` to
    begin-of-image, soft tokens, end-of-image, and returns `token_type_ids` (1 on soft tokens), from which Gemma 3 makes
    its bidirectional image attention.
    """
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    from vlmscope.models.families import Gemma3Adapter

    size, half = {"height": image_size, "width": image_size}, [0.5, 0.5, 0.5]
    images = Gemma3ImageProcessorPil(size=size, image_mean=half, image_std=half, do_pan_and_scan=False)
    template = Gemma3Adapter.chat_template
    return Gemma3Processor(images, build_tokenizer(words), chat_template=template, image_seq_length=soft_tokens)
