"""A model's size from its `config.json` alone: no weights, no network.

The architecture is built on the `meta` device, where tensors have shapes but no memory. `published/NAME.json` holds the
numbers of `google/NAME`'s `config.json` in transformers' current spelling. Parameters and the recorded state of a
forward are exact; buffers inside a forward are an estimate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.core.hub import cached_folder, is_commit, is_hub_id
from vlmscope.models.base import Adapter
from vlmscope.models.checkpoint import read_config
from vlmscope.models.families import family_of

PUBLISHED = {f"google/{file.stem}": file for file in sorted(Path(__file__).with_name("published").glob("*.json"))}


def find_config(path: str, hub: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model from a folder, the hub's cache, or `PUBLISHED`; nothing is fetched."""
    if Path(path).is_dir():
        return read_config(Path(path))
    repo = hub or (path if is_hub_id(path) else None)
    if repo is not None and revision is not None and is_commit(revision):
        folder = cached_folder(repo, revision)
        if (folder / "config.json").is_file():
            return read_config(folder)
    if repo in PUBLISHED:
        return read_json(PUBLISHED[repo])
    raise UserError(
        f"no folder {path}, and of {repo or path} nothing is known here: its config.json alone, in a folder that "
        f"model.path= names, is enough; known without it: {', '.join(PUBLISHED)}"
    )


def empty_model(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face model of a `config.json` on the `meta` device: shapes, no memory."""
    model_type = str(config.get("model_type"))
    model_class: Any = getattr(transformers, family_of(model_type, "config.json").model)
    try:
        with torch.device("meta"):
            read = model_class.config_class.from_dict(config)
            return model_class._from_config(read, dtype=dtype).eval()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"transformers refuses the config.json of this {model_type} model: {reason}") from error


def parameters_by_part(adapter: Adapter) -> dict[str, int]:
    """Parameters by part, shared ones counted once, so that the parts add up to the last entry, `total`."""
    decoder: Any = adapter.decoder()
    seen: set[Any] = set()

    def count_new(*modules: Any) -> int:
        fresh = {parameter for module in modules for parameter in module.parameters()} - seen
        seen.update(fresh)
        return sum(parameter.numel() for parameter in fresh)

    # The order matters: shared parameters count for the first part that has them.
    parts = {"embeddings": count_new(decoder.embed_tokens), "decoder": count_new(decoder)}
    parts["head"] = count_new(adapter.lm_head())
    towers = ("vision_tower", "vision_model", "visual")
    parts["vision"] = count_new(*(m for name, m in adapter.model.named_modules() if name.rpartition(".")[2] in towers))
    parts["projector"] = count_new(adapter.model)  # all that is left
    return {**parts, "total": sum(parts.values())}


def n_patches(adapter: Adapter) -> int | None:
    """Patches of one picture in the vision tower, 0 for a text-only model; None where they depend on its size."""
    vision = getattr(adapter.model.config, "vision_config", None)
    if vision is None:
        return 0
    if getattr(vision, "image_size", None) is None:
        return None
    # Each is one number, or height and width.
    down, across = np.broadcast_to(vision.image_size, 2) // np.broadcast_to(vision.patch_size, 2)
    return int(down * across)


def soft_tokens(adapter: Adapter) -> int | None:
    """Soft tokens of one picture, or of one tile for models that cut tiles; None where they depend on its size."""
    config, patches = adapter.model.config, n_patches(adapter)
    if not adapter.has_vision:
        return 0
    if getattr(config, "mm_tokens_per_image", None):  # Gemma 3
        return int(config.mm_tokens_per_image)
    # Patches per soft token: InternVL's ratio of sides, or Idefics3's factor.
    ratio = getattr(config, "downsample_ratio", None)
    shrink = round(1 / float(ratio) ** 2) if ratio else int(getattr(config, "scale_factor", 1)) ** 2
    return None if patches is None else patches // shrink


def prompt_tokens(adapter: Adapter, tokens: int | None, images: int, text_tokens: int) -> tuple[int, int]:
    """Length of a prompt of `images` and `text_tokens`, or `tokens` in all, and its number of soft tokens."""
    per_image = soft_tokens(adapter) if images else 0
    if per_image is None:
        if tokens is None:
            raise UserError("how many soft tokens a picture has depends on its size here; say task.tokens=")
        return tokens, 0
    soft = per_image * images
    return (soft + text_tokens, soft) if tokens is None else (tokens, min(soft, max(tokens - text_tokens, 0)))


def attention_widths(adapter: Adapter) -> tuple[float, float]:
    """Width of all heads' queries and of all their values, the mean over the layers."""
    layers = range(adapter.n_layers)
    queries = sum(adapter.output_weight(layer).shape[1] for layer in layers)
    values = sum(adapter.value_weight(layer).shape[0] for layer in layers)
    return queries / len(layers), values / len(layers)


def state_elements(adapter: Adapter, n_tokens: int) -> dict[str, int]:
    """Exact number of elements in each tensor of `activations.ForwardState` for a prompt."""
    layers, d, t = adapter.n_layers, adapter.d_model, n_tokens
    normed = [layer for layer in range(layers) if adapter.value_norm(layer) is not None]
    vision = getattr(adapter.model.config, "vision_config", None)
    injected = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return {
        "embeddings": t * d,
        "patterns": layers * adapter.n_heads * t * t,
        "mlp_in": layers * t * d,
        "mlp_out": layers * t * d,
        "norm_scales": layers * 4 * t * d,
        "final_norm_scale": t * d,
        "logits": t * adapter.vocab_size,
        "value_scales": t * sum(adapter.value_weight(layer).shape[0] for layer in normed),
        "injections": injected * t * d,
    }


def forward_elements(adapter: Adapter, n_tokens: int, n_images: int) -> int:
    """An estimate of the elements alive at once inside one recorded forward.

    It holds scores, softmax (in float32) and pattern of all heads, and logits; a vision tower's kernel holds none.
    """
    d, hidden = adapter.d_model, int(adapter.model.config.get_text_config().intermediate_size)
    block = n_tokens * (4 * d + 3 * hidden) + 5 * adapter.n_heads * n_tokens**2
    most = max(block, n_tokens * (adapter.vocab_size + d))
    patches = n_patches(adapter)
    if not patches:
        return most
    vision = adapter.model.config.vision_config
    width = int(vision.hidden_size)
    return max(most, n_images * patches * (6 * width + 2 * int(getattr(vision, "intermediate_size", 4 * width))))


def forward_flops(adapter: Adapter, n_tokens: int, n_images: int) -> float:
    """Operations of one forward: two per weight and token, and those of unmasked attention; for pictures two per weight
    and patch.
    """
    parts, patches = parameters_by_part(adapter), n_patches(adapter)
    flops = 2.0 * parts["decoder"] * n_tokens + 2.0 * adapter.vocab_size * adapter.d_model * n_tokens
    flops += 4.0 * adapter.n_layers * attention_widths(adapter)[0] * n_tokens**2
    if not patches:
        return flops
    vision = adapter.model.config.vision_config
    depth = int(getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0))
    attention = 4.0 * depth * int(vision.hidden_size) * patches**2
    return flops + n_images * (2.0 * (parts["vision"] + parts["projector"]) * patches + attention)
