"""A loaded model with its processor, and the making of its inputs from a prompt and pictures.

Hugging Face's processors without their video and audio halves.

A processor that takes videos owns a video processor, which cannot be built without torchvision, and one that takes
sound a feature extractor. Pictures need neither: their expansion of placeholders into soft tokens is what we want.

A loaded model with its processor, and the making of its inputs from a prompt and pictures.
"""

from __future__ import annotations

import inspect
import logging
import logging as python_logging
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from PIL.Image import Image
from torch import Tensor
from transformers import ProcessorMixin

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError, is_out_of_memory
from vlmscope.core.records import as_rgb, check_characters
from vlmscope.models.base import Adapter, ModelInputs, describe_inputs, written_by_user
from vlmscope.models.checkpoint import check_weights, read_config
from vlmscope.models.families import adapter_for, check_supported
from vlmscope.models.placement import DTYPES, OFFLOADS, Needs, check_device, check_memory, compute_on, offload_to_cpu

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


class _Classes(NamedTuple):
    """Names in `transformers`."""

    model: str
    processor: str


CLASSES = {
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
log = logging.getLogger(__name__)
_OF_A_LAYER = re.compile(r"\.(layers?|blocks)\.\d+\.")
# Tensors that old checkpoints carry and that are recomputed: leaving them out changes nothing.
_RECOMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")


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

    @property
    def chat_template(self) -> ChatTemplate:
        """What the model's turns are written with, and whose it is."""
        return chat_template(self.processor)

    def prepare(self, prompt: str, images: Sequence[Image] = ()) -> ModelInputs:
        """The inputs of one user turn.

        Args:
            prompt: what the user says, taken verbatim. If it spells image placeholders, there must be one a picture;
                if it spells none, the pictures come first.
            images: the pictures, in order, of any mode: `as_rgb` says what becomes of them.

        Raises:
            UserError: when the placeholders do not match the pictures, the model takes no pictures, the prompt has a
                word that the vocabulary lacks, `as_rgb` refuses a picture, or it is longer than the model's positions.
        """
        images = _upright(images)
        check_characters(prompt, "the prompt")
        with refused_in_one_line(prompt):
            _check_words(self.tokenizer, prompt)
        turn = self.adapter.wrap_prompt(prompt, len(images), self.tokenizer, self.chat_template.text)
        more = {"return_text_replacement_offsets": True} if self.adapter.has_vision else {}
        with refused_in_one_line(prompt, images):
            batch = self._processed(turn.text, images, return_offsets_mapping=True, **more)
        self._check_ids(batch["input_ids"])
        replaced = batch["text_replacement_offsets"][0] if images else []
        completed = self.adapter.completed_turn(turn, self.tokenizer)
        written = written_by_user(completed, replaced, batch["offset_mapping"][0].numpy())
        tensors = self._tensors(batch)
        self.adapter.check_length(tensors)
        sizes = [image.size for image in images]
        boxes = self.adapter.soft_token_boxes(tensors, sizes, getattr(self.processor, "image_processor", None))
        return describe_inputs(self.adapter.soft_token_id(), self.tokenizer, tensors, turn, boxes, written, sizes)

    def tokenised(self, text: str, images: Sequence[Image] = (), **settings: Any) -> dict[str, Tensor]:
        """What the model's forward takes for a text in its template, batch size 1, on the model's device.

        Args:
            text: special tokens and placeholders included.
            images: the pictures, in order.
            settings: more arguments for the processor.

        Raises:
            UserError: the text has a token that the model has no embedding for, or the processor refuses it.
        """
        images = _upright(images)
        check_characters(text, "the text")
        with refused_in_one_line(text, images):
            batch = self._processed(text, images, **settings)
        self._check_ids(batch["input_ids"])
        return self._tensors(batch)

    def _processed(self, text: str, images: Sequence[Image], **settings: Any) -> Any:
        """What the processor, or the tokenizer of a text-only model, makes of one text."""
        asked = {"return_tensors": "pt", "add_special_tokens": False, **settings}
        if self.adapter.has_vision:
            return self.processor(text=[text], **asked, **({"images": [list(images)]} if images else {}))
        batch = self.tokenizer([text], **asked)
        batch.pop("token_type_ids", None)
        return batch

    def _tensors(self, batch: Any) -> dict[str, Tensor]:
        """What the model's forward takes of a processed batch, on its device."""
        # What the processor adds for its own bookkeeping (num_crops) or for training (labels) is left out.
        names = set(inspect.signature(self.model.forward).parameters) - {"labels"}
        tensors = {name: batch[name].to(self.adapter.device) for name in batch if name in names}
        if "pixel_values" in tensors:
            tensors["pixel_values"] = tensors["pixel_values"].to(self.adapter.dtype)
        return tensors

    def _check_ids(self, ids: Tensor) -> None:
        """Gemma 3's text-only tokenizers have a token for pictures, beyond the last row of the embedding."""
        highest = int(ids.max())
        if highest >= self.adapter.vocab_size:
            token = self.tokenizer.decode([highest])
            raise UserError(
                f"token {token!r} has no embedding in {self.name} ({self.adapter.vocab_size:,} rows); leave it out of "
                "the prompt, or use the tokenizer that was saved with the model"
            )


def _upright(images: Sequence[Image]) -> list[Image]:
    """Pictures as every door gives them to the processor, so that a PIL object and its file are the same input."""
    found = []
    for number, image in enumerate(images, start=1):
        try:
            found.append(as_rgb(image))
        except UserError as error:
            raise UserError(f"picture {number}: {error}") from error
    return found


@contextmanager
def refused_in_one_line(said: str, images: Sequence[Image] = ()) -> Iterator[None]:
    """Whatever a Hugging Face processor or tokenizer raises, as a `UserError` that names the text and its pictures."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        what = f"{textwrap.shorten(said, 80)!r}" + (f" with a picture of {sizes} pixels" if images else "")
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"the model's processor refuses {what}: {reason}; change it, or leave it out") from error


def _check_words(tokenizer: Any, prompt: str) -> None:
    """Raise a `UserError` naming the first word that the tokenizer maps to its unknown token."""
    if tokenizer.unk_token_id is None:
        return
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == tokenizer.unk_token_id:
            raise UserError(f"the model does not know the word {prompt[start:end]!r} of the prompt; use another word")


def load_vlm(
    path: str | Path, dtype: str = "float32", device: str = "cpu", offload: str = "none", name: str | None = None
) -> VLM:
    """Load a model from a local folder in Hugging Face layout; nothing is fetched.

    Args:
        path: folder with `config.json`, weights as safetensors and processor files.
        dtype: dtype to compute in, whatever the weights are stored in.
        device: cpu, cuda, cuda:N or mps.
        offload: where the weights rest: on the device ("none"), in CPU memory ("cpu") or in the folder ("disk").
        name: short name for records; the folder's when None.

    Raises:
        UserError: when the folder is not a model, is incomplete, does not fit its own config or the memory, its type is
            not supported, or `dtype`, `device` or `offload` cannot be had.
    """
    folder = Path(path)
    model_type = str(read_config(folder)["model_type"])
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r} for the model at {folder}; choose one of: {', '.join(DTYPES)}")
    if offload not in OFFLOADS:
        raise UserError(f"unknown offload {offload!r} for the model at {folder}; choose one of: {', '.join(OFFLOADS)}")
    check_device(device, dtype)
    check_supported(model_type, str(folder / "config.json"))
    check_weights(folder)
    names = CLASSES[model_type]
    with _told_in_one_line(folder):
        empty = _dry_run(names.model, folder, dtype)
        processor = load_processor(names.processor, folder)
        check_processor(processor, empty.config, folder)
        template = chat_template(processor)
        check_memory(Needs.of(empty), f"the model at {folder}", dtype, device, offload)
        model = _load_weights(names.model, folder, dtype, device, offload)
    vlm = VLM(model, processor, adapter_for(model), name=name or folder.resolve().name, path=str(folder))
    if vlm.adapter.chat_template and template.chosen:
        log.info("chat template of %s: %s", vlm.name, template.chosen)
    return vlm


@contextmanager
def _told_in_one_line(folder: Path) -> Iterator[None]:
    """Loading errors of transformers as one line, and none of its tables and bars."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    python_logging.getLogger("accelerate.big_modeling").setLevel(python_logging.ERROR)  # "offloaded": as was asked for
    logging.disable_progress_bar()  # a local file takes a moment; the tasks' own bars should stand alone
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"transformers refuses {folder / 'config.json'}: {reason}; correct it") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        if is_out_of_memory(error):  # the files are not to blame
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the model at {folder}: {reason}; check its files") from error
    finally:
        logging.set_verbosity(before)


def _from_pretrained(name: str, folder: Path, **settings: Any) -> Any:
    """Only ever from a local folder, from safetensors, and without code from elsewhere."""
    import transformers

    model_class: Any = getattr(transformers, name)
    return model_class.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **settings
    )


def _dry_run(name: str, folder: Path, dtype: str) -> Any:
    """The model on `meta`, made to see that the weights fit the config, without reading them.

    A missing weight would stay at its random initial value and one too many would be dropped, unnoticed.
    """
    model, info = _from_pretrained(
        name,
        folder,
        dtype=DTYPES[dtype],
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
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
    if extra:  # a head that this class does not use, say
        log.warning("%s has %d weights that the model does not use, first %s", folder, len(extra), extra[0])
    return model


def _load_weights(name: str, folder: Path, dtype: str, device: str, offload: str) -> Any:
    """The model in evaluation mode with its weights where they shall rest."""
    place = "disk" if offload == "disk" else "cpu" if offload == "cpu" else device
    # Straight to a GPU, shard by shard: CPU memory need not hold the whole.
    device_map = None if place == "cpu" else {"": place}
    model = _from_pretrained(name, folder, dtype=DTYPES[dtype], device_map=device_map)
    model.eval().requires_grad_(False)
    _check_finite(model, folder, dtype)
    if offload == "cpu" and device != "cpu":
        offload_to_cpu(model, device)
    elif offload == "disk":
        compute_on(model, device)
    return model


def _check_finite(model: Any, folder: Path, dtype: str) -> None:
    """Raise a `UserError` for weights that are NaN or infinite; those left on disk (`meta`) are not read for it."""
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point() or not weight.numel():
            continue
        # No mask as large as the weight is made, and NaN comes through.
        if not all(bool(edge.isfinite()) for edge in weight.aminmax()):
            advice = "take bfloat16 or float32, or another copy" if dtype == "float16" else "take another copy"
            raise UserError(
                f"the model at {folder} holds values that are not finite in {dtype}, first in {name}; {advice}"
            )
