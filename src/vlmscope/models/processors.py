"""Hugging Face's processors without their video and audio halves.

A processor that takes videos owns a video processor, which cannot be built without torchvision, and one that takes
sound a feature extractor. Pictures need neither: their expansion of placeholders into soft tokens is what we want.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import ProcessorMixin

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError

_LEFT_OUT = ("video_processor", "feature_extractor")
# What a tokenizer is saved as; one of these is enough.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Families whose processors are one and the same.
_SAME = {"SmolVLMProcessor": "Idefics3Processor"}


class _WithoutThem(ProcessorMixin):
    """Takes the place of `ProcessorMixin` above a processor that hands on the parts that are left out."""

    def __init__(self, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **{name: value for name, value in settings.items() if name not in _LEFT_OUT})


@cache
def picture_processor(name: str) -> type[Any]:
    """The processor class of this name in transformers, but that it takes, loads and saves pictures and text alone.

    A saved processor bears the name of Hugging Face's class, which is what loads it anywhere.
    """
    # SmolVLM's own asks for a package that writes the length of videos in words; pictures it expands as Idefics3's.
    base = getattr(transformers, "Idefics3Processor" if name == "SmolVLMProcessor" else name)
    if not hasattr(base, "get_attributes"):  # a tokenizer
        return base

    class PicturesOnly(base, _WithoutThem):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [attribute for attribute in base.get_attributes() if attribute not in _LEFT_OUT]

    if base.get_attributes()[0] in _LEFT_OUT:  # the others would move up into its place

        def pictures_first(self: Any, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
            base.__init__(self, None, image_processor, tokenizer, None, chat_template=chat_template)

        PicturesOnly.__init__ = pictures_first
    PicturesOnly.__name__ = name
    return PicturesOnly


def load_processor(name: str, folder: Path) -> Any:
    """The processor of a model's folder, taking each picture as a whole; a tokenizer for a text-only model.

    Gemma 3's pan-and-scan, which adds crops of long pictures, is always off: the paper has it off, and the soft tokens'
    boxes are those of the whole picture.

    Args:
        name: processor class in transformers.
        folder: of the model.

    Raises:
        UserError: when the folder has no tokenizer, or the processor of another family.
    """
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        raise UserError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS[:2])}); copy it from the model's repository"
        )
    if name != "AutoTokenizer":
        _check_family(name, folder)
    processor = picture_processor(name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    images = getattr(processor, "image_processor", None)
    if name == "Gemma3Processor":
        if images is None or not type(images).__name__.startswith("Gemma3"):
            raise UserError(
                f"{folder} has {type(images).__name__} where Gemma3ImageProcessor belongs; use the processor files "
                "that were saved with the model"
            )
        images.do_pan_and_scan = False
    return processor


class ChatTemplate(NamedTuple):
    """A chat template in Jinja, None where the model came without one.

    `chosen` says in words which one it is, where it is not simply the processor's only one.
    """

    text: str | None
    chosen: str = ""


def chat_template(processor: Any) -> ChatTemplate:
    """The template that `processor.apply_chat_template` takes: the processor's, or else its tokenizer's.

    Of several named templates it is the one called "default".

    Raises:
        UserError: none of several is.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    for owner, name in ((processor, "processor"), (tokenizer, "tokenizer")):
        found = getattr(owner, "chat_template", None)
        if isinstance(found, dict):
            names = ", ".join(sorted(found))
            if "default" not in found:
                raise UserError(
                    f"the {name} has the chat templates {names} and none called default; save the one to use as "
                    "chat_template.jinja"
                )
            return ChatTemplate(found["default"], f"the {name}'s, of {names} the default")
        if found:
            return ChatTemplate(found, "" if owner is processor else "the tokenizer's")
    return ChatTemplate(None, "the family's usual one; the model came without")


def check_processor(processor: Any, config: Any, folder: Path) -> None:
    """Raise a `UserError` when a processor's numbers are not those of the model's `config`.

    A tokenizer may have added tokens without a row in the embedding, as those of Gemma 3 270M and 1B have: only its own
    vocabulary is looked at here, `VLM.prepare` looks at the ids.
    """
    tokenizer, rows = getattr(processor, "tokenizer", processor), int(config.get_text_config().vocab_size)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer at {folder} knows {tokenizer.vocab_size:,} tokens, the model {rows:,}; use the tokenizer "
            "that was saved with the model"
        )
    ours = "; use the processor that was saved with the model"
    if config.model_type == "gemma3":
        made, asked = int(processor.image_seq_length), int(config.mm_tokens_per_image)
        if made != asked:
            raise UserError(
                f"the processor at {folder} makes {made} soft tokens of a picture, the model takes {asked}{ours}"
            )
    if config.model_type in ("gemma3", "paligemma"):
        size, side = processor.image_processor.size, int(config.vision_config.image_size)
        if (size["height"], size["width"]) != (side, side):
            raise UserError(
                f"the processor at {folder} makes pictures of {size['height']} x {size['width']} pixels, the model "
                f"takes {side} x {side}{ours}"
            )


def _check_family(name: str, folder: Path) -> None:
    """Raise a `UserError` when the files name another processor; transformers would go on with the wrong one."""
    for file in ("processor_config.json", "preprocessor_config.json"):
        path = folder / file
        record = read_json(path) if path.is_file() else {}
        found = record.get("processor_class") if isinstance(record, dict) else None
        if found is not None and _SAME.get(found, found) != _SAME.get(name, name):
            raise UserError(f"{path} is of a {found}, the model takes a {name}; use the files saved with the model")
