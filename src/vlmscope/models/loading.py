"""Models with their processors, loaded from a folder and checked; and model inputs from a prompt and pictures."""

from __future__ import annotations

import inspect
import logging
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL.Image import Image
from torch import Tensor
from transformers import ProcessorMixin

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError, first_line, is_out_of_memory
from vlmscope.core.hub import is_hub_id
from vlmscope.core.records import PatchBox, as_rgb, check_characters
from vlmscope.models import checkpoint
from vlmscope.models.base import Adapter, ModelInputs, token_strings
from vlmscope.models.families import adapter_for, family_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VLM:
    """A model in evaluation mode, with its processor and adapter."""

    model: Any  # the Hugging Face model
    processor: Any  # its processor, or its tokenizer when it takes no pictures
    adapter: Adapter  # the family's adapter around `model`
    name: str  # short name for records
    path: str = ""  # folder it came from, "" for a model made in memory

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, inside the processor or itself the processor."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def chat_template(self) -> str | None:
        """The model's chat template in Jinja; None where it has none."""
        return chosen_template(self.processor)[0]

    def prepare(self, prompt: str, images: Sequence[Image] = ()) -> ModelInputs:
        """The inputs of one user turn, or a `UserError` for what the model cannot take.

        Args:
            prompt: the user's words, verbatim. If it spells image placeholders, there must be one per picture; if it
                spells none, the pictures come first.
            images: the pictures, in order, of any mode that `as_rgb` converts.
        """
        adapter, images = self.adapter, _upright(images)
        check_characters(prompt, "the prompt")
        with refused_in_one_line(prompt):
            _check_words(self.tokenizer, prompt)
        turn = adapter.wrap_prompt(prompt, len(images), self.tokenizer, self.chat_template)
        more = {"return_text_replacement_offsets": True} if adapter.has_vision else {}
        batch, tensors = self._processed(turn.text, images, prompt, return_offsets_mapping=True, **more)
        adapter.check_length(tensors)
        sizes = tuple(image.size for image in images)
        boxes = adapter.soft_token_boxes(tensors, sizes, getattr(self.processor, "image_processor", None))

        # Box and role of every position.
        ids = tensors["input_ids"][0].tolist()
        is_image = np.array([token == adapter.soft_token_id() for token in ids])
        places = [(picture, box) for picture, own_boxes in enumerate(boxes) for box in own_boxes]
        if len(places) != is_image.sum():
            raise UserError(
                f"the processor made {is_image.sum()} soft tokens where the model's pictures have {len(places)}; "
                "use the processor that was saved with the model"
            )
        image_index = np.full(len(ids), -1, dtype=np.int64)
        patch_boxes: list[PatchBox | None] = [None] * len(ids)
        for position, (picture, box) in zip(np.flatnonzero(is_image), places, strict=True):
            image_index[position], patch_boxes[position] = picture, box
        replaced = batch["text_replacement_offsets"][0] if images else []
        written = adapter.completed_turn(turn, self.tokenizer).written(replaced, batch["offset_mapping"][0].numpy())
        # Special tokens that the user spells count as the template's.
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        by_user = written & np.array([token not in special for token in ids])
        roles = np.select([is_image, by_user], ["image", "question"], "special").astype("<U8")
        roles[-1] = "last"
        tokens = token_strings(self.tokenizer, ids)
        return ModelInputs(tensors, tokens, is_image, image_index, patch_boxes, roles, prompt, sizes)

    def tokenised(self, text: str, images: Sequence[Image] = (), **settings: Any) -> dict[str, Tensor]:
        """Arguments of the model's forward for a text in its template, batch size 1, on the model's device.

        The text spells its special tokens and placeholders; `settings` are further arguments for the processor.
        """
        check_characters(text, "the text")
        return self._processed(text, _upright(images), text, **settings)[1]

    def _processed(
        self, text: str, images: Sequence[Image], shown: str, **settings: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The processor's output for a text in its template, and the tensors of it for the model's forward.

        Errors show the text `shown`.
        """
        settings = {"return_tensors": "pt", "add_special_tokens": False, **settings}
        with refused_in_one_line(shown, images):
            if self.adapter.has_vision:
                batch = self.processor(text=[text], **settings, **({"images": [list(images)]} if images else {}))
            else:
                batch = self.tokenizer([text], **settings)
                batch.pop("token_type_ids", None)
        # Gemma 3's text-only tokenizers have a token for pictures, beyond the last row of the embedding.
        highest = int(batch["input_ids"].max())
        if highest >= self.adapter.vocab_size:
            token = self.tokenizer.decode([highest])
            raise UserError(
                f"token {token!r} has no embedding in {self.name} ({self.adapter.vocab_size:,} rows); leave it out of "
                "the prompt, or use the tokenizer that was saved with the model"
            )
        # Drop what the processor adds for its own bookkeeping (num_crops) or for training (labels).
        names = set(inspect.signature(self.model.forward).parameters) - {"labels"}
        tensors = {name: batch[name].to(self.adapter.device) for name in batch if name in names}
        if "pixel_values" in tensors:
            tensors["pixel_values"] = tensors["pixel_values"].to(self.adapter.dtype)
        return batch, tensors


def _upright(images: Sequence[Image]) -> list[Image]:
    """Pictures in RGB; every entry point converts them here, so that a PIL object and its file are the same input."""
    upright = []
    for number, image in enumerate(images, start=1):
        try:
            upright.append(as_rgb(image))
        except UserError as error:
            raise UserError(f"picture {number}: {error}") from error
    return upright


@contextmanager
def refused_in_one_line(text: str, images: Sequence[Image] = ()) -> Iterator[None]:
    """Turn errors of a Hugging Face processor or tokenizer into a `UserError` that names the text and its pictures."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        what = f"{textwrap.shorten(text, 80)!r}" + (f" with a picture of {sizes} pixels" if images else "")
        reason = first_line(error).rstrip(".")
        raise UserError(f"the model's processor refuses {what}: {reason}; change it, or leave it out") from error


def _check_words(tokenizer: Any, prompt: str) -> None:
    """Raise a `UserError` naming the first word that the tokenizer maps to its unknown token."""
    if tokenizer.unk_token_id is None:
        return
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == tokenizer.unk_token_id:
            raise UserError(f"the model does not know the word {prompt[start:end]!r} of the prompt; use another word")


# Processors

# A processor for videos has a video processor, which needs torchvision; one for sound has a feature extractor. Pictures
# need neither.
_LEFT_OUT = ("video_processor", "feature_extractor")
# Files of a tokenizer; one of these is enough.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# SmolVLM's own needs a package that spells the length of videos; it expands pictures as Idefics3's does.
_SAME = {"SmolVLMProcessor": "Idefics3Processor"}


class _WithoutThem(ProcessorMixin):
    """Replaces `ProcessorMixin` as base, because a processor's class passes on the parts that are left out."""

    def __init__(self, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **{name: value for name, value in settings.items() if name not in _LEFT_OUT})


@cache
def picture_processor(name: str) -> type[Any]:
    """The processor class of this name in transformers, restricted to pictures and text.

    Saved processors have the name of Hugging Face's class, so that they load anywhere.
    """
    base = getattr(transformers, _SAME.get(name, name))
    if not hasattr(base, "get_attributes"):  # a tokenizer
        return base

    class PicturesOnly(base, _WithoutThem):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [attribute for attribute in base.get_attributes() if attribute not in _LEFT_OUT]

    if base.get_attributes()[0] in _LEFT_OUT:  # the positional arguments would shift

        def pictures_first(self: Any, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
            base.__init__(self, None, image_processor, tokenizer, None, chat_template=chat_template)

        PicturesOnly.__init__ = pictures_first
    PicturesOnly.__name__ = name
    return PicturesOnly


def _load_processor(name: str, folder: Path) -> Any:
    """The processor in a model's folder, without pan-and-scan; a tokenizer for a text-only model."""
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        raise UserError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS[:2])}); copy it from the model's repository"
        )
    for file in ("processor_config.json", "preprocessor_config.json") if name != "AutoTokenizer" else ():
        path = folder / file
        record = read_json(path) if path.is_file() else {}
        saved = record.get("processor_class") if isinstance(record, dict) else None
        if saved is not None and _SAME.get(saved, saved) != _SAME.get(name, name):
            # transformers would silently use the wrong class
            raise UserError(f"{path} is of a {saved}, the model takes a {name}; use the files saved with the model")
    processor = picture_processor(name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if name == "Gemma3Processor":
        images = processor.image_processor
        if not type(images).__name__.startswith("Gemma3"):
            raise UserError(
                f"{folder} has {type(images).__name__} where Gemma3ImageProcessor belongs; use the processor files "
                "that were saved with the model"
            )
        # Pan-and-scan, which adds crops of long pictures, is off in the paper, and the boxes are of the whole picture.
        images.do_pan_and_scan = False
    return processor


def _check_processor(processor: Any, config: Any, folder: Path) -> None:
    """Raise a `UserError` when a processor's numbers are not those of the model's `config`."""
    tokenizer, rows = getattr(processor, "tokenizer", processor), int(config.get_text_config().vocab_size)
    # `vocab_size` leaves out added tokens, which may have no row in the embedding, as in Gemma 3 270M and 1B.
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer at {folder} knows {tokenizer.vocab_size:,} tokens, the model {rows:,}; use the tokenizer "
            "that was saved with the model"
        )
    if config.model_type in ("gemma3", "paligemma"):
        size, side = processor.image_processor.size, int(config.vision_config.image_size)
        if (size["height"], size["width"]) != (side, side):
            raise UserError(
                f"the processor at {folder} makes pictures of {size['height']} x {size['width']} pixels, the model "
                f"takes {side} x {side}; use the processor that was saved with the model"
            )


def chosen_template(processor: Any) -> tuple[str | None, str]:
    """The chat template that `processor.apply_chat_template` uses, and a phrase that names its source.

    It is the processor's, else its tokenizer's; of several named ones "default". The phrase is "" for the processor's
    only one.
    """
    for owner, name in ((processor, "processor"), (getattr(processor, "tokenizer", None), "tokenizer")):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            names = ", ".join(sorted(template))
            if "default" not in template:
                raise UserError(
                    f"the {name} has the chat templates {names} and none called default; save the one to use as "
                    "chat_template.jinja"
                )
            return template["default"], f"the {name}'s, of {names} the default"
        if template:
            return template, "" if owner is processor else "the tokenizer's"
    return None, "the family's usual one; the model came without"


# Weights

_OF_A_LAYER = re.compile(r"\.(layers?|blocks)\.\d+\.")
# Tensors in old checkpoints that models recompute, so that leaving them out changes nothing.
_RECOMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")


def load_vlm(
    path: str | Path, dtype: str = "float32", device: str = "cpu", offload: str = "none", name: str | None = None
) -> VLM:
    """Load a model from a local folder in Hugging Face layout; nothing is fetched.

    Args:
        path: folder with `config.json`, weights as safetensors and processor files.
        dtype: dtype to compute in, whatever the weights are stored in.
        device: cpu, cuda, cuda:N or mps.
        offload: where the weights are stored: on the device ("none"), in CPU memory ("cpu") or in the folder ("disk").
        name: short name for records; the folder's when None.
    """
    folder = Path(path)
    model_type = str(checkpoint.read_config(folder)["model_type"])
    for key, value, choices in (("dtype", dtype, tuple(checkpoint.DTYPES)), ("offload", offload, checkpoint.OFFLOADS)):
        if value not in choices:
            raise UserError(f"unknown {key} {value!r} for the model at {folder}; choose one of: {', '.join(choices)}")
    checkpoint.check_device(device, dtype)
    family = family_of(model_type, str(folder / "config.json"))
    checkpoint.check_weights(folder)
    with _errors_in_one_line(folder):
        empty = _dry_run(family.model, folder, dtype)
        processor = _load_processor(family.processor, folder)
        _check_processor(processor, empty.config, folder)
        _, template = chosen_template(processor)
        checkpoint.check_memory(empty, f"the model at {folder}", dtype, device, offload)
        model = _load_weights(family.model, folder, dtype, device, offload)
    vlm = VLM(model, processor, adapter_for(model), name=name or folder.resolve().name, path=str(folder))
    if vlm.adapter.chat_template and template:
        log.info("chat template of %s: %s", vlm.name, template)
    return vlm


def load_named(
    path: str, hub: str | None, revision: str | None, dtype: str, device: str = "cpu", offload: str = "none"
) -> VLM:
    """`load_vlm` for a folder or a model of the hub, fetched if necessary, under its name there.

    Raises:
        UserError: as `model_folder` and `load_vlm`.
    """
    folder = checkpoint.model_folder(path, hub, revision)
    repo = hub or (path if is_hub_id(path) else None)
    # The folder of a cached model is named by its commit or digest.
    name = (repo or path).rpartition("/")[2] if folder != Path(path) else None
    return load_vlm(folder, dtype, device, offload, name)


@contextmanager
def _errors_in_one_line(folder: Path) -> Iterator[None]:
    """Turn loading errors of transformers into one line, and silence its tables and progress bars."""
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of offloading, which the user chose
    theirs = transformers.utils.logging
    theirs.disable_progress_bar()  # a local file takes a moment; the tasks' own bars should stand alone
    before = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"transformers refuses {folder / 'config.json'}: {reason}; correct it") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):  # not a fault of the files
            raise
        raise UserError(f"cannot load the model at {folder}: {first_line(error)}; check its files") from error
    finally:
        theirs.set_verbosity(before)


def _from_pretrained(name: str, folder: Path, **settings: Any) -> Any:
    """Load only from a local folder and safetensors, and run no code from it."""
    safe = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    return getattr(transformers, name).from_pretrained(folder, **safe, **settings)


def _dry_run(name: str, folder: Path, dtype: str) -> Any:
    """The model on `meta`, or a `UserError` where the weights in the files do not fit the config.

    Otherwise a missing weight would keep its random initial value and an extra one would be dropped, unnoticed.
    """
    checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = _from_pretrained(name, folder, dtype=checkpoint.DTYPES[dtype], device_map={"": "meta"}, **checked)
    config = folder / "config.json"
    if info["mismatched_keys"]:
        key, stored, expected = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"{len(info['mismatched_keys'])} weights at {folder} do not fit its config.json, first {key}: it has shape "
            f"{tuple(stored)}, the config asks for {tuple(expected)}; take both from the same model"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"the model at {folder} lacks {len(missing)} weights, first {missing[0]}; save it completely")
    extra = sorted(key for key in info["unexpected_keys"] if not key.endswith(_RECOMPUTED))
    layers = [key for key in extra if _OF_A_LAYER.search(key)]
    if layers:  # a model cut short would answer, wrongly
        raise UserError(
            f"{folder} has {len(layers)} weights of layers that the model of {config} lacks, first {layers[0]}; take "
            "both from the same model"
        )
    if extra:  # such as a head that this class does not use
        log.warning("%s has %d weights that the model does not use, first %s", folder, len(extra), extra[0])
    return model


def _load_weights(name: str, folder: Path, dtype: str, device: str, offload: str) -> Any:
    """The model in evaluation mode, its weights checked to be finite and stored where `offload` says."""
    place = device if offload == "none" else offload
    # Weights go straight to a GPU, shard by shard, so that CPU memory need not hold all of them.
    model = _from_pretrained(
        name, folder, dtype=checkpoint.DTYPES[dtype], device_map=None if place == "cpu" else {"": place}
    )
    model.eval().requires_grad_(False)
    for key, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point() or not weight.numel():  # on disk: not worth reading
            continue
        # aminmax needs no mask as large as the weight, and propagates NaN.
        if not all(bool(edge.isfinite()) for edge in weight.aminmax()):
            advice = "take bfloat16 or float32, or another copy" if dtype == "float16" else "take another copy"
            raise UserError(
                f"the model at {folder} holds values that are not finite in {dtype}, first in {key}; {advice}"
            )
    if offload == "cpu" and device != "cpu":
        checkpoint.offload_to_cpu(model, device)
    elif offload == "disk":
        checkpoint.compute_on(model, device)
    return model
