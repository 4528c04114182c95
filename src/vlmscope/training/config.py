"""Settings of training, each with its one default: plain records without torch, so that Hydra can register them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vlmscope.core.errors import UserError, check_choice, check_least
from vlmscope.data.orrery.scenes import COMPOSED, KINDS
from vlmscope.transcoders.config import ACTIVATIONS, HOOKS

PRECISIONS = ("32", "bf16-mixed")
_SCHEDULES = ("cosine", "linear", "constant")  # after the warm-up


@dataclass
class TranscoderArchConfig:
    """Architecture of the transcoders; their width is `expansion_factor` times the model's.

    `k` features are active per token with topk, on average over a batch with batchtopk, and as the target of a penalty
    with jumprelu; the number for relu depends on its L1 penalty. `bandwidth` is that of JumpReLU's kernel, in
    pre-activations of standardised inputs. With `cross_layer` a feature writes to its own layer and every later one.
    `site` says whose MLPs are imitated: those of the "decoder" or of the vision "tower".
    """

    expansion_factor: int = 16
    k: int = 16
    activation: str = "topk"
    skip: bool = False
    cross_layer: bool = False
    bandwidth: float = 0.05
    site: str = "decoder"

    def __post_init__(self) -> None:
        check_choice("transcoder.site", self.site, tuple(HOOKS))
        check_choice("transcoder.activation", self.activation, ACTIVATIONS)
        check_least("transcoder", self, expansion_factor=1, k=1)
        if self.bandwidth <= 0:
            raise UserError(f"transcoder.bandwidth={self.bandwidth}: it must be positive")


@dataclass
class OptimConfig:
    """AdamW. The learning rate rises from zero over `warmup` steps and then falls by `schedule`."""

    lr: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int = 100

    def __post_init__(self) -> None:
        check_choice("optim.schedule", self.schedule, _SCHEDULES)
        check_least("optim", self, warmup=0)
        if self.lr <= 0:
            raise UserError(f"optim.lr={self.lr}: it must be positive")
        if len(self.betas) != 2:
            raise UserError(f"optim.betas={self.betas}: AdamW takes two numbers; write optim.betas=[0.9,0.999]")


@dataclass
class TrainerConfig:
    """Length and manner of a training; the `_every` keys count optimiser steps, and 0 switches them off.

    With several processes (docs/scaling.md), `rank_timeout` is how many minutes a process waits for another that does
    not answer. `precision` of transcoders is "32", or "bf16-mixed", which computes the encoder's dense product, from
    which the active features are chosen, in bfloat16; weights, moments, loss and the chosen activations stay float32.
    """

    max_steps: int = 1000
    seed: int = 0
    precision: str = "32"
    checkpoint_every: int = 500
    log_every: int = 20
    val_every: int = 500
    threads: int | None = None
    resume: bool = False
    rank_timeout: float = 30.0

    def __post_init__(self) -> None:
        check_choice("trainer.precision", self.precision, PRECISIONS)
        check_least("trainer", self, max_steps=1)
        if not self.rank_timeout > 0:
            raise UserError(f"trainer.rank_timeout={self.rank_timeout}: it is minutes; choose a number above 0")


@dataclass
class RecipeConfig:
    """Recipe of transcoders: starting point, batches of a step, and the terms of the loss (keys of `task`).

    Features start from the first `init_batches` batches. `pool_batches` captured batches are mixed, and
    `steps_per_batch` steps pass between captures (1 and 1: each step has its own batch). `micro_tokens` bounds memory:
    that many tokens of a step are encoded and differentiated at a time, with the same result (null: all).
    `aux_coefficient` weighs the loss that trains `aux_k` dead features per token, those that have not fired for
    `dead_after_tokens`. `sparsity_coefficient` weighs the penalty of jumprelu (L0, null: 1) and relu (L1, null: 0.003).
    `clip` is the largest gradient norm of one layer's transcoder.
    """

    init_batches: int = 8
    pool_batches: int = 8
    steps_per_batch: int = 2
    micro_tokens: int | None = None
    aux_coefficient: float = 1 / 32
    aux_k: int = 64
    dead_after_tokens: int = 100_000
    sparsity_coefficient: float | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        positive = dict.fromkeys(("init_batches", "pool_batches", "steps_per_batch", "aux_k", "dead_after_tokens"), 1)
        check_least("task", self, micro_tokens=1, sparsity_coefficient=0, **positive)
        if self.clip <= 0:
            raise UserError(f"task.clip={self.clip}: it must be positive")

    def sparsity_weight(self, activation: str) -> float:
        """`sparsity_coefficient`, or its default: L1 scales with the activations, L0's penalty is of order 1."""
        default = 0.003 if activation == "relu" else 1.0
        return default if self.sparsity_coefficient is None else self.sparsity_coefficient


@dataclass
class BatchConfig:
    """Batches for training and validation of transcoders (keys of `task`).

    Of Orrery's scenes `batch` is the number of each kind (those that the data lack are left out), `val_scenes` that of
    each kind for validation. With data=folder or a mix, a batch has about `tokens_per_batch` tokens, an example at most
    `max_tokens` (the rest is cut off), and validation uses at most `val_examples`.
    """

    batch: dict[str, int] = field(
        default_factory=lambda: {
            **{"planets": 10, "digits": 12, "shapes": 8, "hands": 4, "text": 6},
            **{"duets": 8, "tinted": 8, "objects": 8},
        }
    )
    val_scenes: int = 100
    tokens_per_batch: int = 2048
    max_tokens: int = 4096
    val_examples: int = 100

    def __post_init__(self) -> None:
        check_least("task", self, tokens_per_batch=1, max_tokens=1, val_examples=1)
        for kind in self.batch:
            check_choice("task.batch", kind, (*KINDS, *COMPOSED))


@dataclass
class TranscoderTrainingConfig:
    """Training of the transcoders of all layers: the groups transcoder, optim, trainer, and a recipe.

    `data` describes what the batches depend on besides the seed; a run resumes only with the same.
    """

    transcoder: TranscoderArchConfig = field(default_factory=TranscoderArchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    data: str | None = None

    def __post_init__(self) -> None:
        if self.recipe.micro_tokens is not None and self.transcoder.activation == "batchtopk":
            raise UserError("batchtopk chooses among a whole batch; take task.micro_tokens=null, or topk")
        if self.transcoder.cross_layer and self.recipe.micro_tokens is not None:
            raise UserError("task.micro_tokens is for single layers; leave out it or transcoder.cross_layer")

    def settings(self) -> dict[str, Any]:
        """The settings that decide the weights, by name; a run resumes only with the same."""
        recipe = {item.name: getattr(self.recipe, item.name) for item in fields(RecipeConfig)}
        del recipe["micro_tokens"]  # no number depends on it
        recipe["sparsity_coefficient"] = self.recipe.sparsity_weight(self.transcoder.activation)
        trainer = {name: getattr(self.trainer, name) for name in ("max_steps", "precision", "seed")}
        architecture = asdict(self.transcoder)
        if self.transcoder.site == "decoder":  # as in runs from before there were others
            del architecture["site"]
        return {**architecture, **asdict(self.optim), **trainer, **recipe, "data": self.data}


def rate_factor(step: int, total: int, warmup: int, floor: float, schedule: str = "cosine") -> float:
    """Factor of the peak rate: linear from 0 over `warmup` steps, then by `schedule` down to `floor` at `total`.

    It depends only on the step, so that a resumed run cannot be off by one.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    if schedule == "linear":
        return 1 - (1 - floor) * progress
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class StageConfig:
    """One stage of Orrery's training: steps, scenes of each kind in a batch, and the optimiser's settings.

    The vision tower learns at `tower_rate` times the rate; a step draws at most `questions` of a picture. The answer
    must be readable up to `exit_layers` layers early, each of which adds a term of weight `exit_weight`; the term that
    makes answers need the MLPs (`vlmscope.training.orrery.Need`) has the weight `need_weight`.
    """

    max_steps: int
    batch: dict[str, int]
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.02
    clip: float = 1.0
    tower_rate: float = 1.0
    questions: int = 3
    seed: int = 0
    exit_weight: float = 0.0
    exit_layers: int = 0
    need_weight: float = 0.0


@dataclass
class OrreryTrainingConfig:
    """The stages of `task=train_orrery`; `polish` has more of counting and sums, which learn more slowly.

    The first `tower_depth` layers of the decoder learn with the tower in its stage. Weights start from those of the
    model in the folder `start`, where it has a part of the same name and size. `precision` is "32", or "bf16-mixed",
    which computes products of matrices in bfloat16, except those of attention.
    """

    tower: StageConfig = field(
        default_factory=lambda: StageConfig(2400, {"planets": 8, "digits": 24, "shapes": 10, "hands": 6})
    )
    vlm: StageConfig = field(
        default_factory=lambda: StageConfig(
            2800, {"planets": 5, "digits": 12, "shapes": 4, "hands": 2, "text": 2},
            lr=8e-4, tower_rate=0.25, seed=1, exit_weight=0.3, exit_layers=2,
        )
    )  # fmt: skip
    polish: StageConfig = field(
        default_factory=lambda: StageConfig(
            1400, {"planets": 4, "digits": 10, "shapes": 9, "hands": 3, "text": 2},
            lr=4e-4, tower_rate=0.5, seed=2, exit_weight=0.3, exit_layers=2,
        )
    )  # fmt: skip
    tower_depth: int = 0
    start: str | None = None
    precision: str = "32"
    checkpoint_every: int = 200
    val_every: int = 400

    def __post_init__(self) -> None:
        check_choice("task.training.precision", self.precision, PRECISIONS)


@dataclass
class EyesTrainingConfig(StageConfig):
    """Training of eyes (`vlmscope.training.eyes`): `batch.pictures` pictures a step, of which `flags` are flags.

    `lr` is Muon's rate for the tower's matrices; all else learns at half of it with AdamW. `distance_weight` is the
    last weight of the distance of a picture's soft tokens to its concept's name.
    """

    max_steps: int = 12_000
    batch: dict[str, int] = field(default_factory=lambda: {"pictures": 32})
    lr: float = 2e-3
    weight_decay: float = 0.05
    distance_weight: float = 30.0
    flags: float = 0.4
    precision: str = "bf16-mixed"
    checkpoint_every: int = 500
    val_every: int = 1000

    def __post_init__(self) -> None:
        check_choice("training.precision", self.precision, PRECISIONS)
