"""A loaded model with its processor, and the making of its inputs from a prompt and pictures."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.models.base import Adapter, ModelInputs, adapter_for, check_supported
from vlmscope.models.positions import describe_inputs, written_by_user
from vlmscope.models.processors import picture_processor


class _Classes(NamedTuple):
    """Names in `transformers`."""

    model: str
    processor: str


_CLASSES = {
    "gemma3": _Classes("Gemma3ForConditionalGeneration", "Gemma3Processor"),
    "gemma3_text": _Classes("Gemma3ForCausalLM", "AutoTokenizer"),
    "gemma4": _Classes("Gemma4ForConditionalGeneration", "Gemma4Processor"),
    "gemma4_text": _Classes("Gemma4ForCausalLM", "AutoTokenizer"),
    "idefics3": _Classes("Idefics3ForConditionalGeneration", "Idefics3Processor"),
    "internvl": _Classes("InternVLForConditionalGeneration", "InternVLProcessor"),
    "llava": _Classes("LlavaForConditionalGeneration", "LlavaProcessor"),
    "llava_onevision": _Classes("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor"),
    "paligemma": _Classes("PaliGemmaForConditionalGeneration", "PaliGemmaProcessor"),
    "qwen2_5_vl": _Classes("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "qwen3_vl": _Classes("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"),
    "smolvlm": _Classes("SmolVLMForConditionalGeneration", "SmolVLMProcessor"),
}
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class VLM:
    """A model in evaluation mode with what belongs to it.

    Attributes:
        model: the Hugging Face model.
        processor: its processor, or its tokenizer when it takes no pictures.
        adapter: the family's adapter around `model`.
        name: short name for records.
        path: folder it came from, "" for a model made in memory.
    """

    model: Any
    processor: Any
    adapter: Adapter
    name: str
    path: str = ""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, inside the processor or itself the processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    def prepare(self, prompt: str, images: Sequence[Image] = ()) -> ModelInputs:
        """The inputs of one user turn.

        Args:
            prompt: what the user says, taken verbatim. If it spells image placeholders, there must be one a picture;
                if it spells none, the pictures come first.
            images: the pictures, in order.

        Raises:
            UserError: when the placeholders do not match the pictures, the model takes no pictures, or the prompt has
                a word that the vocabulary lacks.
        """
        _check_words(self.tokenizer, prompt)
        template = getattr(self.processor, "chat_template", None)
        turn = self.adapter.wrap_prompt(prompt, len(images), self.tokenizer, template)
        asked = {"return_tensors": "pt", "add_special_tokens": False, "return_offsets_mapping": True}
        if self.adapter.has_vision:
            pictures = {"images": [list(images)]} if images else {}
            batch = self.processor(text=[turn.text], return_text_replacement_offsets=True, **asked, **pictures)
        else:
            batch = self.tokenizer([turn.text], **asked)
            batch.pop("token_type_ids", None)
        replaced = batch["text_replacement_offsets"][0] if images else []
        completed = self.adapter.completed_turn(turn, self.tokenizer)
        written = written_by_user(completed, replaced, batch["offset_mapping"][0].numpy())
        # What the processor adds for its own bookkeeping (num_crops) or for training (labels) is left out.
        names = set(inspect.signature(self.model.forward).parameters) - {"labels"}
        tensors = {name: batch[name].to(self.adapter.device) for name in batch if name in names}
        if "pixel_values" in tensors:
            tensors["pixel_values"] = tensors["pixel_values"].to(self.adapter.dtype)
        sizes = [image.size for image in images]
        boxes = self.adapter.soft_token_boxes(tensors, sizes, getattr(self.processor, "image_processor", None))
        return describe_inputs(self.adapter.soft_token_id(), self.tokenizer, tensors, turn, boxes, written, sizes)


def _check_words(tokenizer: Any, prompt: str) -> None:
    """Raise a `UserError` naming the first word that the tokenizer maps to its unknown token."""
    if tokenizer.unk_token_id is None:
        return
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == tokenizer.unk_token_id:
            raise UserError(f"the model does not know the word {prompt[start:end]!r} of the prompt; use another word")


def check_device(device: str) -> None:
    """Raise a `UserError` when a GPU is asked for that is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r} was asked for but no GPU is usable here; use device cpu")


def load_vlm(path: str | Path, dtype: str = "float32", device: str = "cpu") -> VLM:
    """Load a model from a local folder in Hugging Face layout; nothing is fetched.

    Args:
        path: folder with `config.json`, weights and processor files.
        dtype: dtype to compute in, whatever the weights are stored in.
        device: torch device.

    Raises:
        UserError: when the folder is not a model, its type is not supported, or `dtype` or `device` cannot be had.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"no model at {folder}: config.json is missing; give the folder of a Hugging Face model")
    if dtype not in _DTYPES:
        raise UserError(f"unknown dtype {dtype!r} for the model at {folder}; choose one of: {', '.join(_DTYPES)}")
    check_device(device)
    model_type = str(read_json(folder / "config.json").get("model_type"))
    check_supported(model_type, str(folder / "config.json"))
    model, processor = _from_folder(folder, model_type, _DTYPES[dtype])
    model = model.to(device).eval().requires_grad_(False)
    return VLM(model, processor, adapter_for(model), name=folder.resolve().name, path=str(folder))


def _from_folder(folder: Path, model_type: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and processor of a folder, with loading errors told in one line."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # a local file takes a moment; the tasks' own bars should stand alone
    names = _CLASSES[model_type]
    model_class: Any = getattr(transformers, names.model)
    try:
        model, info = model_class.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
        processor = picture_processor(names.processor).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the model at {folder}: {reason}; check its files") from error
    # A missing weight would stay at its random initial value, which no one would notice.
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(f"the model at {folder} lacks {len(missing)} weights, first {missing[0]}; save it completely")
    return model, processor
