"""Orrery's sizes: a plain record, free of torch, so that Hydra can register it."""

from dataclasses import dataclass, field


@dataclass
class OrreryConfig:
    """Sizes of Orrery. `global_layers` attend to everything, the others to a window of `sliding_window` tokens."""

    d_model: int = 128
    n_layers: int = 8
    d_mlp: int = 384
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    sliding_window: int = 10
    global_layers: list[int] = field(default_factory=lambda: [1, 4])
    vision_width: int = 128
    vision_layers: int = 4
    vision_mlp: int = 384
    vision_heads: int = 4
    image_size: int = 64
    patch_size: int = 8
    soft_tokens: int = 16
