"""Parameters and memory of a model from its configuration, without weights.

A model's architecture without its weights: from a folder, the hub's cache, or the facts kept here of published ones.

`published/NAME.json` holds the numbers of `google/NAME`'s `config.json` in transformers' present spelling, written down
for `task=plan` and the tests, so that both work without a network. The models' parameter counts, as published, agree:
`tests/unit/models/test_published_sizes.py`.

How large a model is, and what one forward over a prompt takes: from its shapes alone, on the `meta` device.

Legend: T positions, d width, H heads, D head width, L layers, V vocabulary, P patches of one picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.models.base import Adapter
from vlmscope.models.checkpoint import cached_folder, is_commit, is_hub_id, read_config
from vlmscope.models.families import check_supported
from vlmscope.models.loading import CLASSES

PUBLISHED = Path(__file__).with_name("published")


def published_models() -> list[str]:
    """Names of the models whose architecture is kept here."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


def find_config(path: str, hub: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model that need not be there; nothing is fetched.

    Args:
        path: a folder, or a hub id.
        hub: the hub id that belongs at `path`, if any.
        revision: the commit at which the hub's cache is looked into.

    Raises:
        UserError: when the architecture is known neither from a folder nor from here.
    """
    if Path(path).is_dir():
        return read_config(Path(path))
    repo = hub or (path if is_hub_id(path) else None)
    if repo is not None and revision is not None and is_commit(revision):
        folder = cached_folder(repo, revision)
        if (folder / "config.json").is_file():
            return read_config(folder)
    name = (repo or "").removeprefix("google/")
    if name in published_models():
        return read_json(PUBLISHED / f"{name}.json")
    known = ", ".join(f"google/{each}" for each in published_models())
    raise UserError(
        f"no folder {path}, and of {repo or path} nothing is known here: its config.json alone, in a folder that "
        f"model.path= names, is enough; known without it: {known}"
    )


def empty_model(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face model of a `config.json` on the `meta` device: shapes, no memory.

    Raises:
        UserError: when the type is not supported, or transformers does not accept the numbers.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type = str(config.get("model_type"))
    check_supported(model_type, "config.json")
    model_class: Any = getattr(transformers, CLASSES[model_type].model)
    try:
        with torch.device("meta"):
            return model_class._from_config(model_class.config_class.from_dict(config), dtype=dtype).eval()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"transformers refuses the config.json of this {model_type} model: {reason}") from error


@dataclass(frozen=True)
class Parts:
    """Parameters of a model by part, shared ones counted once, so that the parts add up to the model."""

    vision: int
    projector: int
    embeddings: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.vision + self.projector + self.embeddings + self.decoder + self.head


def parameters_by_part(adapter: Adapter) -> Parts:
    """The parameters of the vision tower, the projector, the embeddings, the decoder and an unembedding of its own."""
    decoder: Any = adapter.decoder()
    seen: set[torch.nn.Parameter] = set()

    def new(module: Any) -> int:
        found = [parameter for parameter in module.parameters() if parameter not in seen]
        seen.update(found)
        return sum(parameter.numel() for parameter in found)

    embeddings, rest, head = new(decoder.embed_tokens), new(decoder), new(adapter.lm_head())
    vision = sum(new(child) for name, child in adapter.model.named_modules() if name.rpartition(".")[2] in _TOWERS)
    return Parts(vision, new(adapter.model), embeddings, rest, head)


_TOWERS = ("vision_tower", "vision_model", "visual")


def soft_tokens(adapter: Adapter) -> int | None:
    """Soft tokens of one picture (of one tile, where pictures are cut into tiles); None where its size decides."""
    config = adapter.model.config
    if not adapter.has_vision:
        return 0
    if getattr(config, "mm_tokens_per_image", None):
        return int(config.mm_tokens_per_image)
    patches = n_patches(adapter)
    shrink = int(getattr(config, "scale_factor", 1)) ** 2
    if getattr(config, "downsample_ratio", None):
        shrink = round(1 / float(config.downsample_ratio) ** 2)
    return None if patches is None else patches // shrink


def n_patches(adapter: Adapter) -> int | None:
    """Patches of one picture in the vision tower, 0 for a text-only model; None where the picture's size decides."""
    vision = getattr(adapter.model.config, "vision_config", None)
    if vision is None:
        return 0
    if getattr(vision, "image_size", None) is None:
        return None
    height, width = _pair(vision.image_size), _pair(vision.patch_size)
    return (height[0] // width[0]) * (height[1] // width[1])


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def attention_widths(adapter: Adapter) -> tuple[float, float]:
    """Width of all heads' queries and of all their values (`H * D`, `Hkv * D`), the mean over the layers."""
    layers = range(adapter.n_layers)
    queries = sum(adapter.output_weight(layer).shape[1] for layer in layers)
    values = sum(adapter.value_weight(layer).shape[0] for layer in layers)
    return queries / len(layers), values / len(layers)


def state_elements(adapter: Adapter, n_tokens: int) -> dict[str, int]:
    """Numbers in each tensor of `activations.capture.ForwardState` for a prompt of `n_tokens`; exact."""
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


def forward_elements(adapter: Adapter, n_tokens: int) -> int:
    """Numbers alive at once inside one forward, the largest of decoder layer, unembedding and vision layer; estimate.

    The decoder's attention is the recording one, which holds scores, softmax (in float32) and pattern of all heads; a
    vision tower's kernel is taken not to hold its scores.
    """
    text, t = adapter.model.config.get_text_config(), n_tokens
    layer = t * (4 * adapter.d_model + 3 * int(text.intermediate_size)) + 5 * adapter.n_heads * t * t
    unembedding = t * (adapter.vocab_size + adapter.d_model)
    vision, patches = getattr(adapter.model.config, "vision_config", None), n_patches(adapter) or 0
    if vision is None or not patches:
        return max(layer, unembedding)
    width = int(vision.hidden_size)
    hidden = int(getattr(vision, "intermediate_size", 4 * width))
    return max(layer, unembedding, patches * (6 * width + 2 * hidden))


def forward_flops(adapter: Adapter, n_tokens: int, n_images: int) -> float:
    """Operations of one forward with logits at every position: two a weight and token, and those of attention."""
    head = 2.0 * adapter.vocab_size * adapter.d_model * n_tokens
    return capture_flops(adapter, n_tokens, n_tokens, n_images) + head


def capture_flops(adapter: Adapter, n_tokens: float, context: int, n_images: float) -> float:
    """Operations of forwards without logits over `n_tokens` in sequences of `context`; attention counted unmasked."""
    flops = 2.0 * parameters_by_part(adapter).decoder * n_tokens
    flops += 4.0 * adapter.n_layers * attention_widths(adapter)[0] * n_tokens * context
    return flops + n_images * picture_flops(adapter)


def picture_flops(adapter: Adapter) -> float:
    """Operations of vision tower and projector for one picture; 0 where its size decides."""
    parts = parameters_by_part(adapter)
    vision, patches = getattr(adapter.model.config, "vision_config", None), n_patches(adapter) or 0
    if vision is None or not patches:
        return 0.0
    depth = int(getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0))
    return 2.0 * (parts.vision + parts.projector) * patches + 4.0 * depth * int(vision.hidden_size) * patches**2


def capture_elements(adapter: Adapter, n_tokens: int, n_images: int) -> int:
    """Numbers alive at once inside a forward whose attention holds no scores, as `capture_mlp` runs it; estimate."""
    hidden = int(adapter.model.config.get_text_config().intermediate_size)
    layer = n_tokens * (4 * adapter.d_model + 3 * hidden)
    vision, patches = getattr(adapter.model.config, "vision_config", None), n_patches(adapter) or 0
    if vision is None or not patches:
        return layer
    width = int(vision.hidden_size)
    return max(layer, n_images * patches * (6 * width + 2 * int(getattr(vision, "intermediate_size", 4 * width))))
