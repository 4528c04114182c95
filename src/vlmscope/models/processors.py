"""Hugging Face's processors without their video and audio halves.

A processor that takes videos owns a video processor, which cannot be built without torchvision, and one that takes
sound a feature extractor. Pictures need neither: their expansion of placeholders into soft tokens is what we want.
"""

from functools import cache
from typing import Any

import transformers
from transformers import ProcessorMixin

_LEFT_OUT = ("video_processor", "feature_extractor")


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
