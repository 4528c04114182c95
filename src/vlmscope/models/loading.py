"""A loaded model with its processor, and the making of its inputs from a prompt and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox
from vlmscope.models.base import Adapter, ModelInputs, adapter_for, check_supported

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
        text = self.adapter.wrap_prompt(prompt, len(images), self.tokenizer)
        if self.adapter.has_vision:
            pictures = {"images": [list(images)]} if images else {}
            batch = self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **pictures)
        else:
            batch = self.tokenizer([text], return_tensors="pt", add_special_tokens=False)
            batch.pop("token_type_ids", None)
        # What the processor adds for its own bookkeeping (num_crops) is no argument of the model.
        names = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
        tensors = {name: batch[name].to(self.adapter.device) for name in names if name in batch}
        if "pixel_values" in tensors:
            tensors["pixel_values"] = tensors["pixel_values"].to(self.adapter.dtype)
        return describe_inputs(self.adapter, self.tokenizer, tensors, prompt)


def _check_words(tokenizer: Any, prompt: str) -> None:
    """Raise a `UserError` naming the first word that the tokenizer maps to its unknown token."""
    if tokenizer.unk_token_id is None:
        return
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == tokenizer.unk_token_id:
            raise UserError(f"the model does not know the word {prompt[start:end]!r} of the prompt; use another word")


def describe_inputs(adapter: Adapter, tokenizer: Any, tensors: dict[str, torch.Tensor], prompt: str) -> ModelInputs:
    """Name every position of tokenised inputs: token string, picture, patch box and role."""
    ids = [int(token) for token in tensors["input_ids"][0]]
    is_image = np.array([token == adapter.soft_token_id() for token in ids])
    tokens = [tokenizer.decode([token]) for token in ids]
    boxes = adapter.soft_token_boxes()
    image_index = np.full(len(ids), -1, dtype=np.int64)
    patch_boxes: list[PatchBox | None] = [None] * len(ids)
    for count, position in enumerate(np.flatnonzero(is_image)):
        image_index[position], patch = divmod(count, len(boxes))
        patch_boxes[position] = boxes[patch]
    return ModelInputs(tensors, tokens, is_image, image_index, patch_boxes, _roles(tokens, is_image), prompt)


def _roles(tokens: list[str], is_image: np.ndarray) -> np.ndarray:
    """The role of every position; the template's own words are the one after `<start_of_turn>` and white space."""
    roles = []
    for position, token in enumerate(tokens):
        if is_image[position]:
            roles.append("image")
        elif (
            not token.strip()
            or (token.startswith("<") and token.endswith(">"))
            or (position > 0 and tokens[position - 1] == "<start_of_turn>")
        ):
            roles.append("special")
        else:
            roles.append("question")
    roles[-1] = "last"
    return np.array(roles)


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
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.utils import logging

    logging.disable_progress_bar()  # a local file takes a moment; the tasks' own bars should stand alone
    multimodal = model_type == "gemma3"
    model_class = Gemma3ForConditionalGeneration if multimodal else Gemma3ForCausalLM
    try:
        model, info = model_class.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            folder, dtype=dtype, local_files_only=True, attn_implementation="sdpa", output_loading_info=True
        )
        processor_class = Gemma3Processor if multimodal else AutoTokenizer
        processor = processor_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the model at {folder}: {reason}; check its files") from error
    # A missing weight would stay at its random initial value, which no one would notice.
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(f"the model at {folder} lacks {len(missing)} weights, first {missing[0]}; save it completely")
    return model, processor
