"""Vision towers whose attention can be recorded: where attention and patch embeddings are, and their class tokens.

The attention modules of all of them call transformers' attention interface, as `vlmscope.models.attention` needs.
"""

from typing import Any, NamedTuple

from torch import nn

from vlmscope.core.errors import UserError


class Tower(NamedTuple):
    """How a tower names its parts, and how many tokens it puts before the patches.

    `patches` is the linear map or convolution from pixels to patch embeddings, `positions` the parameter of learned
    position embeddings ("" where there is none), `class_token` that of class tokens, `norm` the norm of all tokens
    after the last layer ("" where there is none).
    """

    layers: str
    attention: str
    patches: str
    positions: str = ""
    n_class: int = 0
    class_token: str = ""
    norm: str = ""


_SIGLIP = Tower(
    "encoder.layers",
    "self_attn",
    "embeddings.patch_embedding",
    "embeddings.position_embedding.weight",
    norm="post_layernorm",
)
TOWERS = {
    # CLIP's norm is of the class token alone.
    "clip_vision_model": _SIGLIP._replace(n_class=1, class_token="embeddings.class_embedding", norm=""),
    "gemma4_vision": Tower(
        "encoder.layers", "self_attn", "patch_embedder.input_proj", "patch_embedder.position_embedding_table"
    ),
    "idefics3_vision": _SIGLIP,
    "internvl_vision": Tower(
        "encoder.layer",
        "attention",
        "embeddings.patch_embeddings.projection",
        "embeddings.position_embeddings",
        1,
        "embeddings.cls_token",
        "layernorm",
    ),
    "qwen2_5_vl_vision": Tower("blocks", "attn", "patch_embed.proj"),
    "qwen3_vl_vision": Tower("blocks", "attn", "patch_embed.proj", "pos_embed.weight"),
    "siglip_vision_model": _SIGLIP,
    "smolvlm_vision": _SIGLIP,
}


def tower_kind(tower: Any) -> Tower:
    """The entry of a vision tower in `TOWERS`.

    Raises:
        UserError: it has none.
    """
    kind = str(tower.config.model_type)
    if kind not in TOWERS:
        raise UserError(
            f"the attention of a vision tower of type {kind!r} cannot be recorded; choose a model with one of: "
            f"{', '.join(sorted(TOWERS))}"
        )
    return TOWERS[kind]


def tower_attention(tower: Any, read: int | list[int]) -> list[nn.Module]:
    """The attention modules of a vision tower from the first to the last that matters.

    Args:
        tower: the Hugging Face module.
        read: which of the tower's hidden states the decoder is given (0 is what enters the first layer, -1 what leaves
            the last), one or several; later layers change nothing and are left out.

    Raises:
        UserError: the tower is not one of `TOWERS`.
    """
    kind = tower_kind(tower)
    layers = tower.get_submodule(kind.layers)
    return [layer.get_submodule(kind.attention) for layer in layers[: _last_state(len(layers), read)]]


def tower_states(tower: Any, read: int | list[int], normed: bool) -> nn.Module:
    """The module whose output is the last hidden state that the decoder is given.

    Args:
        tower: the Hugging Face module.
        read: as for `tower_attention`.
        normed: whether the family reads the state after the last layer through the tower's own norm.

    Raises:
        UserError: the tower is not one of `TOWERS`.
    """
    kind = tower_kind(tower)
    layers = tower.get_submodule(kind.layers)
    last = _last_state(len(layers), read)
    if normed and kind.norm and last == len(layers):
        return tower.get_submodule(kind.norm)
    return layers[last - 1]


def _last_state(n_layers: int, read: int | list[int]) -> int:
    """The last of the states that are read, counted from 0, what enters the first layer."""
    states = [read] if isinstance(read, int) else read
    return max(state if state >= 0 else n_layers + 1 + state for state in states)
