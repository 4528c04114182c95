"""Byte-level tokenizers of a few hundred tokens for tiny models: any text can be asked, and nothing is unknown.

The alphabet is the 256 bytes, so a word that is not in the vocabulary becomes as many tokens as it has bytes, as in the
byte-level BPE of GPT-2 and its heirs (Radford et al. 2019). Given words are one token each, with and without a space
before them, so that prompts made of them stay short.
"""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ("what", "is", "this", "?", "red", "blue", "planet", "and", "the", "other", "one", "two", "in")


def byte_tokenizer(
    special: Sequence[str],
    words: Iterable[str],
    *,
    named: dict[str, str],
    adds_bos: bool,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
) -> PreTrainedTokenizerFast:
    """A tokenizer with ids in the order: special tokens, the 256 bytes, words.

    Args:
        special: special tokens, among them `<pad>`, `<bos>` and `<eos>`.
        words: texts that become one token, or one for each of their parts: letters, digits and signs are parted.
        named: special tokens that the family's processor asks for by name, such as `image_token`.
        adds_bos: put `<bos>` before what is encoded with special tokens, as Llama's tokenizer does.
        inputs: names of the model's inputs that the tokenizer makes.
    """
    bytes_of = ByteLevel(add_prefix_space=False, use_regex=True)
    vocabulary = dict.fromkeys((*special, *sorted(ByteLevel.alphabet())))
    for word in words:
        for text in (word, " " + word):
            vocabulary |= dict.fromkeys(piece for piece, _ in bytes_of.pre_tokenize_str(text))
    # There are no merges: a piece is a token where the vocabulary has the whole of it, and else its bytes.
    model = BPE({token: number for number, token in enumerate(vocabulary)}, [], ignore_merges=True)
    core = Tokenizer(model)
    core.pre_tokenizer = bytes_of  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        bos = [("<bos>", special.index("<bos>"))]
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=named,
        model_input_names=list(inputs),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
