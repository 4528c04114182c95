"""Training of eyes for a frozen text model: a vision tower and projector whose soft tokens mean what a name means.

No pass of the text model is needed. A concept's soft tokens should be its name's own embeddings, repeated to the
number of soft tokens (`name_embeddings`): the text model reads such a row as the name (31 of 32 capitals, as from the
name). With d_c the squared distance of a picture's soft tokens to those of concept c, over its mean between two
concepts, the loss is

    cross_entropy(-t d, concept) + w d_concept        t is learned; w grows from 0 to `distance_weight`.

The first term tells names apart. It leaves soft tokens on the right side of the names but far from them, where they
mean nothing to the text model; the second brings them near. The tower's matrices learn with Muon, which after 1,000
steps recognised as many pictures of the validation's artist as AdamW after 4,000 (`experiments/train_eyes.md`).

What a picture's country has for a capital is knowledge of the text model alone. Tower and projector learn, from
pictures of the training artists that are moved, turned, bent, recoloured and put on random grounds (`augmented`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmscope.core.artifacts import flat, folder_digest, write_json
from vlmscope.core.records import derive, generator
from vlmscope.data.icons import pictures_folder, read_icons
from vlmscope.models.eyes import EyesConfig, joined_folder, write_untrained, write_weights
from vlmscope.models.loading import load_vlm
from vlmscope.training.config import EyesTrainingConfig
from vlmscope.training.orrery import ScheduledModule, ValidationCallback, fit_stage
from vlmscope.training.resume import Checkpoints

_ONE_COLOUR = 0.15  # weight of one-colour drawings
_RAMP = 4000  # steps over which the augmentation grows from a third to its full strength
_SMOOTHING = 0.1  # of labels: a few pictures carry a wrong name


class Pictures(NamedTuple):
    """Pictures as tensors: [N, 4, S, S] RGBA in bytes, the number of the concept [N], and what augmentation asks."""

    rgba: Tensor
    labels: Tensor
    is_flag: Tensor  # [N]: must not be mirrored; artists show it round, too
    one_colour: Tensor  # [N]: black drawings, which get a random colour

    @classmethod
    def of(cls, table: pd.DataFrame, concepts: Sequence[str]) -> Pictures:
        """Those of a table of `read_icons`; a concept that is not in the list has the number -1."""
        rgba = torch.from_numpy(np.stack([np.asarray(image) for image in table.image])).permute(0, 3, 1, 2).contiguous()
        numbers = {name: number for number, name in enumerate(concepts)}
        labels = torch.tensor([numbers.get(name, -1) for name in table.label])
        shown = rgba[:, :3].where(rgba[:, 3:] > 30, 0)
        return cls(rgba, labels, torch.tensor((table.kind == "country").to_numpy()), shown.amax((1, 2, 3)) < 40)

    def rows(self, chosen: Tensor) -> Pictures:
        """Some of the pictures."""
        return Pictures(*(part[chosen] for part in self))

    def plain(self) -> Tensor:
        """Pixels [N, 3, S, S] of the pictures on white, as the processor makes them."""
        values = self.rgba.float() / 255
        return (values[:, :3] * values[:, 3:] + 1 - values[:, 3:]) * 2 - 1


class PicturePool:
    """Batches by step number: a share of flags, and of the others each concept as often, mostly drawn in colour.

    One-colour drawings teach shapes; as half of the pictures they kept the tower from learning at all for long.
    """

    def __init__(self, pictures: Pictures, flags: float) -> None:
        self.pictures = pictures
        labels, is_flag = pictures.labels.numpy(), pictures.is_flag.numpy()
        weights = 1 / np.bincount(labels)[labels] * np.where(pictures.one_colour.numpy(), _ONE_COLOUR, 1.0)
        for group, share in ((is_flag, flags), (~is_flag, 1 - flags)):
            weights[group] *= share / max(weights[group].sum(), 1e-9)
        self.weights = weights / weights.sum()

    def batch(self, seed: int, step: int, sizes: Mapping[str, int]) -> Pictures:
        """`sizes["pictures"]` pictures for a step."""
        drawn = generator(seed, "eyes", step).choice(len(self.weights), size=sizes["pictures"], p=self.weights)
        return self.pictures.rows(torch.from_numpy(drawn))


def augmented(pictures: Pictures, seed: int, strength: float = 1.0) -> Tensor:
    """Pixels [N, 3, S, S] in -1 to 1: moved, turned, bent, recoloured, on random grounds, noisy and partly covered.

    Flags are not mirrored and keep more of their colours; some are shown as discs. `strength` scales the changes.
    """
    rng = torch.Generator().manual_seed(seed)
    n, _, side, _ = pictures.rgba.shape
    flag = pictures.is_flag

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *(shape or (1, 1)), generator=rng) * (high - low) + low

    def sometimes(chance: float) -> Tensor:
        return torch.rand(n, 1, 1, generator=rng) < chance

    values = pictures.rgba.float() / 255
    alpha = values[:, 3:]
    colours = torch.where(pictures.one_colour[:, None, None, None], uniform(0, 1, 3, 1, 1), values[:, :3])
    is_flag, softer = flag[:, None, None], torch.where(flag, 0.5, 1.0)[:, None, None]

    # Where each pixel is taken from: position, scale, aspect, turn, shear, mirror; then waves, then discs.
    axis = torch.linspace(-1, 1, side)
    y, x = (part[None].expand(n, -1, -1) for part in torch.meshgrid(axis, axis, indexing="ij"))
    angle = uniform(-1, 1) * torch.where(is_flag, 0.2, 0.45) * strength
    scale = uniform(1 - 0.38 * strength, 1 + 0.15 * strength)
    aspect, shear = torch.exp(uniform(-0.25, 0.25) * strength), uniform(-0.2, 0.2) * softer * strength
    mirror = torch.where(sometimes(0.5) & ~is_flag, -1.0, 1.0)
    room = (1 - 0.8 * scale).clamp(min=0.08) * strength
    left, top = x - uniform(-1, 1) * room, y - uniform(-1, 1) * room
    turned = angle.cos() * left - angle.sin() * top, angle.sin() * left + angle.cos() * top
    across, down = mirror * turned[0] / (scale * aspect) + shear * turned[1], turned[1] * aspect / scale
    phase, rate = uniform(0, 2 * math.pi), uniform(2, 5)
    down = down + uniform(0, 0.09) * sometimes(0.4) * torch.sin(rate * across + phase)
    across = across + uniform(0, 0.07) * (sometimes(0.3) & ~is_flag) * torch.sin(rate * down + phase)
    disc = sometimes(0.35) & is_flag
    kept = ((across**2 + down**2 < 1) | ~disc)[:, None]
    zoom = torch.where(disc, uniform(0.55, 0.72), 1.0)  # a disc shows the middle of the flag, or squeezes it
    grid = torch.stack([across * zoom * torch.where(disc, uniform(1, 1.45), 1.0), down * zoom], -1)
    taken = (
        F.grid_sample(torch.cat([colours * alpha, alpha], 1), grid, padding_mode="zeros", align_corners=False) * kept
    )
    alpha = taken[:, 3:]
    colours = taken[:, :3] / alpha.clamp(min=1e-3)

    # Saturation, contrast, brightness, mixed channels.
    softer = softer[:, None] * strength
    grey = colours.mean(1, keepdim=True)
    colours = grey + (colours - grey) * torch.exp(uniform(-0.7, 0.5, 1, 1, 1) * softer)
    colours = (colours - 0.5) * torch.exp(uniform(-0.35, 0.35, 1, 1, 1) * softer) + 0.5
    colours = colours + uniform(-0.15, 0.15, 1, 1, 1) * softer
    mix = torch.eye(3) + torch.randn(n, 3, 3, generator=rng) * 0.12 * softer[:, 0]
    colours = torch.einsum("nij,njhw->nihw", mix / mix.sum(-1, keepdim=True).clamp(min=0.3), colours)
    colours = torch.where((sometimes(0.08) & ~is_flag)[:, None], grey, colours).clamp(0, 1)

    # A ground that is white, of one colour, or shaded; noise; a square that covers a part.
    first, second = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    shade = ((x * phase.cos() + y * phase.sin()) / 2 + 0.5).clamp(0, 1)[:, None]
    kind = uniform(0, 1, 1, 1, 1)
    ground = torch.where(kind < 0.7, first, first * (1 - shade) + second * shade)
    image = colours * alpha + torch.where(kind < 0.45, 1.0, ground) * (1 - alpha)
    image = image + torch.randn(image.shape, generator=rng) * uniform(0, 0.06, 1, 1, 1) * strength
    half = uniform(0.1, 0.35) * sometimes(0.3)
    covered = ((x - uniform(-1, 1)).abs() < half) & ((y - uniform(-1, 1)).abs() < half)
    return torch.where(covered[:, None], second, image).clamp(0, 1) * 2 - 1


def name_tokens(tokenizer: Any, name: str) -> list[int]:
    """The tokens of a name after a space."""
    return tokenizer(f" {name}", add_special_tokens=False).input_ids


def name_embeddings(model: Any, tokenizer: Any, names: Sequence[str]) -> Tensor:
    """`[C, S, d]`: each name's embeddings, repeated so that the soft tokens end with a whole name."""
    count, rows = int(model.config.mm_tokens_per_image), []
    for name in names:
        tokens = name_tokens(tokenizer, name)
        rows.append((tokens * count)[-max(count, len(tokens)) :][:count])
    with torch.no_grad():
        return model.get_input_embeddings()(torch.tensor(rows)).float()


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices at the rate `lr`, AdamW for other parameters at half of it.

    Muon's updates have the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982). Of the others only those of
    two dimensions or more decay.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], lr: float, decay: float):
        groups = [
            {"params": [p for p in others if (p.ndim >= 2) == decays], "weight_decay": decay * decays, "scale": 0.5}
            for decays in (True, False)
        ]
        self.parts = (
            torch.optim.Muon(
                [{"params": matrices, "scale": 1.0}], lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW([group for group in groups if group["params"]], lr, betas=(0.9, 0.98)),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


class EyesModule(ScheduledModule):
    """Tower and projector of a model whose other parts are frozen, and the names that pictures should mean."""

    config: EyesTrainingConfig

    def __init__(self, config: EyesTrainingConfig, vlm: Any, concepts: Sequence[str]) -> None:
        super().__init__(config)
        self.tower, self.projector = vlm.model.model.vision_tower, vlm.model.model.multi_modal_projector
        names = name_embeddings(vlm.model, vlm.tokenizer, concepts).flatten(1)
        self.register_buffer("names", names, persistent=False)
        self.names: Tensor
        apart = torch.cdist(names, names).square()
        self.mean_distance = float(apart.sum() / (len(names) * (len(names) - 1)))
        self.sharpness = nn.Parameter(torch.tensor(math.log(30.0)))
        for part in (self.tower, self.projector):
            part.requires_grad_(True)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Muon for the matrices of the tower's layers and AdamW for all else, made at first use."""
        if self._optimizer is None:
            matrices = [p for p in self.tower.encoder.parameters() if p.ndim == 2]
            taken = {id(p) for p in matrices}
            others = [p for p in self.parameters() if id(p) not in taken]
            self._optimizer = MuonAndAdamW(matrices, others, self.config.lr, self.config.weight_decay)
        return self._optimizer

    def collate(self, scenes: Any, step: int) -> tuple[Tensor, Tensor]:
        """Augmented pixels, and concepts."""
        strength = min(1.0, 1 / 3 + step / _RAMP)
        return augmented(scenes, derive(self.config.seed, "augment", step), strength), scenes.labels

    def soft_tokens(self, pixels: Tensor) -> Tensor:
        """`[B, S, d]` of pixels [B, 3, side, side]."""
        return self.projector(self.tower(pixel_values=pixels).last_hidden_state).float()

    def distances(self, soft: Tensor) -> Tensor:
        """`[B, C]`: squared distance to each concept's name, over its mean between two concepts."""
        return torch.cdist(soft.flatten(1), self.names).square() / self.mean_distance

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss, as the module's docstring states it."""
        pixels, labels = batch
        soft = self.soft_tokens(pixels)
        with torch.autocast("cpu", enabled=False):
            apart = self.distances(soft)
            loss = F.cross_entropy(-self.sharpness.exp() * apart, labels, label_smoothing=_SMOOTHING)
            weight = self.config.distance_weight * self.steps_done / self.config.max_steps
            return loss + weight * apart.gather(1, labels[:, None]).mean()


@torch.no_grad()
def nearest_names(module: EyesModule, pictures: Pictures) -> Tensor:
    """`[N]`: the concept whose name is nearest to each picture's soft tokens."""
    parts = [module.distances(module.soft_tokens(rows)).argmin(1) for rows in pictures.plain().split(128)]
    return torch.cat(parts)


def accuracies(module: EyesModule, split: str, concepts: Sequence[str], prefix: str) -> dict[str, float]:
    """Fraction of the split's pictures that are nearest to their own name, by kind, for flags and for all others."""
    table = read_icons(split)
    pictures = Pictures.of(table, concepts)
    right = (nearest_names(module, pictures) == pictures.labels).numpy()
    hits = pd.DataFrame(
        {"kind": table.kind, "group": np.where(table.kind == "country", "flags", "other"), "hit": right}
    )
    means = {**hits.groupby("group").hit.mean(), **hits.groupby("kind").hit.mean()}
    return {f"{prefix}{name}": float(value) for name, value in means.items()}


def train_eyes(
    architecture: EyesConfig, config: EyesTrainingConfig, run_dir: Path, logger: Any, resume: bool
) -> dict[str, float]:
    """Train a tower and projector, save them to `run_dir/model`, and return accuracies on unseen artists.

    With `resume` it continues from the checkpoint in `run_dir`, which is removed otherwise.
    """
    folder, checkpoint = run_dir / "model", run_dir / "checkpoint"
    if not resume:
        for old in (folder, checkpoint):
            shutil.rmtree(old, ignore_errors=True)
    if not folder.is_dir():
        write_untrained(architecture, folder, config.seed)
    vlm = load_vlm(joined_folder(folder))
    train = read_icons("train")
    concepts = sorted(set(train.label))
    module = EyesModule(config, vlm, concepts)
    choices = {key: value for key, value in asdict(config).items() if key not in ("checkpoint_every", "val_every")}
    settings = flat("training", choices) | flat("architecture", asdict(architecture))
    origin = {"data": folder_digest(pictures_folder())}
    checkpoints = Checkpoints(checkpoint, config.checkpoint_every, config.max_steps, settings, origin)
    if resume:
        checkpoints.restore(module)
    measure = partial(accuracies, module, "val", concepts, "val/nearest/")
    callbacks = [checkpoints, ValidationCallback(config.val_every, config.max_steps, measure)]
    pool = PicturePool(Pictures.of(train, concepts), config.flags)
    fit_stage(module, pool, callbacks, logger, config.precision)
    module.eval()
    for part in (module.tower, module.projector):  # what is shipped is float16: measure that
        part.half().float()
    metrics = accuracies(module, "test", concepts, "test/nearest/")
    write_weights(module.tower, module.projector, folder)
    write_json(folder / "metrics.json", metrics)
    return metrics
