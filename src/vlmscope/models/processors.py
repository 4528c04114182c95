"""Hugging Face's processors without their video half.

Processors that take videos own a video processor, which cannot be built without torchvision, though pictures need
none of it: their expansion of placeholders into soft tokens is what we want.
"""

from functools import cache
from typing import Any

import transformers


@cache
def picture_processor(name: str) -> type[Any]:
    """The processor class of this name in transformers, but that it neither takes, loads nor saves a video processor.

    A saved processor bears the name of Hugging Face's class, which is what loads it anywhere.
    """
    # SmolVLM's own asks for a package that writes the length of videos in words; pictures it expands as Idefics3's.
    base = getattr(transformers, "Idefics3Processor" if name == "SmolVLMProcessor" else name)
    if not hasattr(base, "get_attributes"):  # a tokenizer
        return base

    class PicturesOnly(base):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [attribute for attribute in base.get_attributes() if attribute != "video_processor"]

    PicturesOnly.__name__ = name
    return PicturesOnly
