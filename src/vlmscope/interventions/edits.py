"""What to change: new activations for chosen features at chosen positions.

`new = scale * current + value`. Setting is scale 0, scaling is value 0, ablation both 0. The edit adds
`g (new - current) * W_dec[f]` where the transcoder writes, so the error term stays as it is in the run; `g` is 1, or
what a gate says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.transcoders.transcoder import SparseCode


@dataclass(frozen=True)
class Gate:
    """Act only as far as some features are active, so that steering exchanges one concept for another where it is.

    `g = min(1, sum_f n_f a_f / (full sum_f n_f level_f))` at each position, n_f the norm of feature f's decoder row,
    a_f its activation in the edited run. Conditional steering (CAST, arXiv 2409.05907) with features as the condition,
    and without its hard threshold.
    """

    features: Tensor  # [m] int64, of the edit's layer
    level: Tensor  # [T, m], activations when the concept is there
    generated: Tensor  # [m], the same at generated tokens; or [S, m], for each in turn, the last for those after it
    full: float  # the share of the level at which the edit acts in full, > 0

    def openness(self, current: Tensor, level: Tensor, norms: Tensor) -> Tensor:
        """g [B, t, 1] in [0, 1] for activations [B, t, m], levels [t, m] or [m] and decoder norms [m].

        Where the level is 0 there is nothing to exchange: g is 0.
        """
        reference = self.full * (level.to(norms) @ norms)
        g = (current @ norms / reference.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
        return torch.where(reference > 0, g, torch.zeros_like(g)).unsqueeze(-1)


@dataclass(frozen=True)
class LayerEdit:
    """An edit of some features of one layer."""

    features: Tensor  # [n] int64, distinct
    value: Tensor  # broadcastable to [B, T, n]
    scale: Tensor  # broadcastable to [n]; or, where only the prompt is edited, to [B, T, n]
    where: Tensor  # [T] bool, prompt positions
    # At tokens generated after the prompt: [B, n], or [S, B, n] for each in turn, the last for later ones; or none.
    generated: Tensor | None = None
    gate: Gate | None = None  # how far to act at each position; None acts in full
    at: Tensor | None = None  # [T, n] bool, the positions of `where` at which each feature is edited; all when None
    at_generated: Tensor | None = None  # [n] bool, the same of generated tokens; it goes with `at`

    def to(self, device: torch.device) -> LayerEdit:
        """The same on a device, but for `where`, which indexes tensors of any device from the CPU."""

        def moved(of: LayerEdit | Gate) -> dict[str, Any]:
            return {key: one.to(device) for key, one in vars(of).items() if isinstance(one, Tensor) and key != "where"}

        gate = None if self.gate is None else replace(self.gate, **moved(self.gate))
        return replace(self, **moved(self), gate=gate)

    def places(self) -> tuple[Tensor, Tensor]:
        """`at` [T, n] and `at_generated` [n], also where all are meant."""
        every = torch.ones(len(self.where), len(self.features), dtype=torch.bool, device=self.features.device)
        generated = every[0] if self.at_generated is None else self.at_generated
        return (every if self.at is None else self.at), generated


@dataclass(frozen=True)
class WholeEdit:
    """Every feature of a layer set to what it is in given codes, which needs no [B, T, F]."""

    code: SparseCode  # [B, T, k], or [1, T, k] for all prompts
    width: int  # F
    where: Tensor  # [T] bool, prompt positions
    generated: SparseCode | None = None  # [B, k], at tokens generated after the prompt; None leaves them alone

    @property
    def features(self) -> Tensor:
        """[F] int64, all of them."""
        return torch.arange(self.width)


Plan = Mapping[int, LayerEdit]  # layer -> edit
AnyPlan = Mapping[int, LayerEdit | WholeEdit]  # what can be run
Edit = TypeVar("Edit", bound=LayerEdit | WholeEdit)


def at_step(values: Tensor, rank: int, step: int) -> Tensor:
    """The values at generated token `step` (from 0): those of rank `rank` + 1 have a row for each step."""
    return values[min(step, len(values) - 1)] if values.ndim > rank else values


def merge(plans: Iterable[Plan]) -> dict[int, LayerEdit]:
    """Join ungated plans that act on the same positions; where two name the same feature the later one wins."""
    merged: dict[int, LayerEdit] = {}
    for plan in plans:
        for layer, edit in plan.items():
            merged[layer] = _join(merged[layer], edit, layer) if layer in merged else edit
    return merged


def _join(first: LayerEdit, second: LayerEdit, layer: int) -> LayerEdit:
    if not torch.equal(first.where, second.where):
        raise UserError(f"two edits of layer {layer} act on different positions: give them as two runs")
    if first.gate is not None or second.gate is not None:
        raise UserError(f"two edits of layer {layer}, one of them gated: merge them first and gate the result")
    if (first.generated is None) != (second.generated is None):
        raise UserError(f"two edits of layer {layer} disagree on generated tokens: set both or neither")
    second = second.to(first.features.device)
    keep = ~torch.isin(first.features, second.features)

    def joined(a: Tensor, b: Tensor) -> Tensor:
        """Values of the features kept and of the second's, both broadcast to the same leading dimensions."""
        a = a.expand(*a.shape[:-1], len(first.features))[..., keep]
        b = b.expand(*b.shape[:-1], len(second.features))
        lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        return torch.cat([a.expand(*lead, a.shape[-1]), b.expand(*lead, b.shape[-1])], -1)

    generated = at = at_generated = None
    if first.generated is not None and second.generated is not None:
        generated = joined(first.generated, second.generated)
    if first.at is not None or second.at is not None:
        at, at_generated = (joined(a, b) for a, b in zip(first.places(), second.places(), strict=True))
    return LayerEdit(
        torch.cat([first.features[keep], second.features]),
        joined(first.value, second.value),
        joined(first.scale, second.scale),
        first.where,
        generated,
        at=at,
        at_generated=at_generated,
    )


def set_features(features: Tensor, value: Tensor, where: Tensor, generated: Tensor | None = None) -> LayerEdit:
    """Set activations to `value`, whatever they are."""
    return LayerEdit(features, value, value.new_zeros(len(features)), where, generated)


def at_positions(plan: Mapping[int, Edit], where: Tensor) -> dict[int, Edit]:
    """The same plan, restricted to positions `where` [T] bool."""
    return {layer: replace(edit, where=edit.where & where) for layer, edit in plan.items()}


def features_at(edit: LayerEdit, features: Tensor, where: Tensor, generated: bool) -> LayerEdit:
    """The same edit, in which `features` [m], some of the edit's, are edited only at positions `where` [T] bool and,
    if `generated`, at generated tokens; each keeps what it had been restricted to.
    """
    at, at_generated = edit.places()
    theirs = torch.isin(edit.features, features.to(edit.features.device))
    where = where.to(at.device)
    return replace(edit, at=at & (where[:, None] | ~theirs), at_generated=at_generated & (~theirs | generated))


def position_mask(roles: np.ndarray, positions: str) -> Tensor:
    """[T] bool for "all", "no_last" or a role.

    Raises:
        UserError: a role that the prompt does not have.
    """
    if positions == "all":
        return torch.ones(len(roles), dtype=torch.bool)
    if positions == "no_last":
        return torch.from_numpy(roles != "last")
    if not np.any(roles == positions):
        raise UserError(f"no position has role {positions!r}; this prompt has {', '.join(sorted(set(roles)))}")
    return torch.from_numpy(roles == positions)
