"""A word-level tokenizer and a `Gemma3Processor`, saved in Hugging Face layout.

Words are split at white space (newlines vanish), so `text` must put spaces around punctuation, as all templates do.
The processor is Hugging Face's own class: it expands `<start_of_image>` to begin-of-image, soft tokens, end-of-image,
and returns `token_type_ids` (1 on soft tokens), from which Gemma 3 makes its bidirectional image attention.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from vlmscope.models.gemma import Gemma3Adapter

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
TURN, END_TURN = "<start_of_turn>", "<end_of_turn>"
BOI, EOI, SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
SPECIAL = (PAD, EOS, BOS, UNK, TURN, END_TURN, BOI, EOI, SOFT)


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer over special tokens and `words`; ids are stable: special tokens first, then words in order."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *words))}
    core = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
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


def build_processor(words: Sequence[str], image_size: int, mm_tokens_per_image: int) -> Gemma3Processor:
    """`gemma3_processor` with the tokenizer of `words`."""
    return gemma3_processor(build_tokenizer(words), image_size, mm_tokens_per_image)


def gemma3_processor(tokenizer: PreTrainedTokenizerFast, image_size: int, mm_tokens_per_image: int) -> Gemma3Processor:
    """A Gemma 3 processor whose pictures are square of `image_size` pixels and become `mm_tokens_per_image` soft
    tokens.
    """
    images = Gemma3ImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_pan_and_scan=False,
    )
    return Gemma3Processor(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=Gemma3Adapter.chat_template,
        image_seq_length=mm_tokens_per_image,
    )
