"""Settings of trainings: plain records, free of torch, for Hydra.

Settings of transcoder training: a plain record, free of torch, so that Hydra can register it.

Settings of Orrery's training: plain records, free of torch, so that Hydra can register them.

Learning-rate schedules as pure functions of the step, so that a resumed run cannot be off by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from vlmscope.core.errors import UserError

PRECISIONS = ("32", "bf16-mixed")
SCHEDULES = ("cosine", "linear", "constant")  # after the warm-up


@dataclass
class TranscoderTrainingConfig:
    """How the transcoders of all layers are trained.

    Attributes:
        expansion_factor: features of a layer = expansion_factor x model width.
        k, activation, skip, cross_layer: the architecture (`vlmscope.transcoders`).
        init: starting point, "samples" or "zero_decoder" (`vlmscope.training.layer_trainer`).
        init_batches: batches from which means, scales and the starting point are taken.
        pool_batches, steps_per_batch: how many captured batches are mixed, and how many steps pass between captures
            (`vlmscope.training.captures`; 1 and 1 = each step its own batch).
        epoch_batches: the first so many batches are gone through again and again (null: every batch is a new one).
        micro_tokens: the tokens of a step are encoded and differentiated so many at a time, which bounds memory and
            changes nothing else (`vlmscope.training.layer_trainer`); None: all at once.
        precision: "32", or "bf16-mixed": the encoder's dense product, from which the active features are chosen, in
            bfloat16; weights, moments, loss and the chosen features' activations stay float32.
        max_steps: optimiser steps; the rate falls to `lr_floor x lr` at the last one, unless the schedule is constant.
        lr, betas, weight_decay, schedule (one of `SCHEDULES`), warmup, lr_floor: AdamW and its schedule.
        matryoshka: fractions of the features that must do on their own (`vlmscope.training.losses.matryoshka`).
        sparsity_coefficient: weight of the penalty that JumpReLU (L0 aimed at k) and ReLU (L1) need; others have none.
        bandwidth: of JumpReLU's kernel, in pre-activations of standardised inputs.
        clip: largest gradient norm of one layer's transcoder.
        aux_coefficient, aux_k: weight and number of features of the loss that revives dead features.
        dead_after_tokens: a feature that has not fired for so many tokens is dead.
        max_norm_ratio: tokens whose input or target norm exceeds so many times the median of the starting batches are
            left out of that layer's start and loss, and counted; validation counts all tokens. None: none.
        explosion: a layer stops when its loss is so many times its running median (0: never) or not finite.
        checkpoint_every, val_every, log_every: in steps; 0 = never.
        seed: of the starting point.
        data: what the batches hang on beside the seed, in words; a run goes on only with the same. None: nothing.
    """

    expansion_factor: int = 16
    k: int = 16
    activation: str = "topk"
    skip: bool = False
    cross_layer: bool = False
    init: str = "samples"
    init_batches: int = 8
    pool_batches: int = 8
    steps_per_batch: int = 4
    epoch_batches: int | None = None
    micro_tokens: int | None = None
    precision: str = "32"
    max_steps: int = 4000
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int = 100
    lr_floor: float = 0.01
    matryoshka: tuple[float, ...] = ()
    sparsity_coefficient: float = 1.0
    bandwidth: float = 0.05
    clip: float = 1.0
    aux_coefficient: float = 1 / 32
    aux_k: int = 64
    dead_after_tokens: int = 100_000
    max_norm_ratio: float | None = None
    explosion: float = 1e3
    checkpoint_every: int = 200
    val_every: int = 500
    log_every: int = 20
    seed: int = 0
    data: str | None = None

    @property
    def batches(self) -> int:
        """How many different batches a run needs."""
        steps = max(self.init_batches, (self.max_steps - 1) // self.steps_per_batch + 1)
        return steps if self.epoch_batches is None else min(steps, self.epoch_batches)

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            UserError: with the setting's name and value.
        """
        positive = ("expansion_factor", "k", "init_batches", "pool_batches", "steps_per_batch", "max_steps", "lr")
        positive += ("clip", "aux_k", "dead_after_tokens")
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"transcoder training: {name} = {getattr(self, name)} must be positive; choose another")
        if self.max_norm_ratio is not None and self.max_norm_ratio <= 1:
            raise UserError(f"transcoder training: max_norm_ratio = {self.max_norm_ratio} must exceed 1, or be null")
        least = max(self.init_batches, self.pool_batches)
        if self.epoch_batches is not None and self.epoch_batches < least:
            raise UserError(
                f"transcoder training: epoch_batches = {self.epoch_batches} must be {least} at least, the batches that "
                "are mixed or started from, or null"
            )
        if self.micro_tokens is not None and self.micro_tokens < 1:
            raise UserError(f"transcoder training: micro_tokens = {self.micro_tokens} must be positive, or null")
        if self.micro_tokens is not None and self.activation == "batchtopk":
            raise UserError("batchtopk chooses among a whole batch; take micro_tokens=null, or topk")
        if self.sparsity_coefficient < 0 or self.bandwidth <= 0:
            raise UserError(
                f"transcoder training: sparsity_coefficient = {self.sparsity_coefficient} must not be negative and "
                f"bandwidth = {self.bandwidth} must be positive; choose others"
            )
        wrong = [fraction for fraction in self.matryoshka if not 0 < fraction <= 1]
        if wrong:
            raise UserError(f"transcoder training: matryoshka = {wrong[0]} must be a fraction in (0, 1]; correct it")
        alone = [name for name in ("matryoshka", "micro_tokens", "max_norm_ratio") if getattr(self, name)]
        if self.cross_layer and alone:
            raise UserError(f"transcoder training: {alone[0]} is of single layers; leave out it or cross_layer")
        if self.precision not in PRECISIONS:
            raise UserError(
                f"transcoder training: precision {self.precision!r} is unknown; choose {' or '.join(PRECISIONS)}"
            )
        if self.schedule not in SCHEDULES:
            choices = ", ".join(SCHEDULES)
            raise UserError(f"transcoder training: schedule {self.schedule!r} is unknown; choose one of {choices}")
        if self.init not in ("samples", "zero_decoder"):
            raise UserError(f"transcoder training: init {self.init!r} is unknown; choose samples or zero_decoder")


@dataclass
class StageConfig:
    """One training stage: steps, scenes of each kind in a batch, and the optimiser's settings."""

    max_steps: int
    batch: dict[str, int]
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.02
    clip: float = 1.0
    tower_rate: float = 1.0
    questions: int = 3  # at most so many a picture and step, drawn at random
    seed: int = 0
    exit_weight: float = 0.0  # of the early-exit loss
    exit_layers: int = 0  # how many layers early the answer must be readable (each of them adds a term)


@dataclass
class OrreryTrainingConfig:
    """The stages of `task=train_orrery`. `polish` gives counting and sums, which lag behind, a larger share."""

    tower: StageConfig = field(
        default_factory=lambda: StageConfig(2400, {"planets": 8, "digits": 24, "shapes": 10, "hands": 6})
    )
    vlm: StageConfig = field(
        default_factory=lambda: StageConfig(
            2800,
            {"planets": 5, "digits": 12, "shapes": 4, "hands": 2, "text": 2},
            lr=8e-4,
            tower_rate=0.25,
            seed=1,
            exit_weight=0.3,
            exit_layers=2,
        )
    )
    polish: StageConfig = field(
        default_factory=lambda: StageConfig(
            1400,
            {"planets": 4, "digits": 10, "shapes": 9, "hands": 3, "text": 2},
            lr=4e-4,
            tower_rate=0.5,
            seed=2,
            exit_weight=0.3,
            exit_layers=2,
        )
    )
    checkpoint_every: int = 200
    val_every: int = 400


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Factor of the peak rate: linear from 0 over `warmup` steps, then a cosine down to `floor` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
