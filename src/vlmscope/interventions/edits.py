"""What to change: new activations for chosen features at chosen positions.

`new = scale * current + value`. Setting is scale 0, scaling is value 0, ablation both 0. The edit adds
`g (new - current) * W_dec[f]` where the transcoder writes, so the error term stays as it is in the run; `g` is 1, or
a gate's value. Plans come from features that the user names, or from donors' activations.

Controls, of as many other features or of random directions of the same norm, are in `interventions.controls`.

Legend: B prompts, T positions, n features of a layer, F width of its transcoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, TranscoderSet


@dataclass(frozen=True)
class Gate:
    """Act only as far as some features are active in the edited run, so that one concept is exchanged where it is.

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
    # [B, T] or [1, 1], how far to act at each position, 1 in full; at generated tokens as at the last one
    openness: Tensor | None = None
    written_by: Tensor | None = None  # [n] int64, other features, which write the changes of these (a control)

    def to(self, device: torch.device) -> LayerEdit:
        """The same on a device, but for `where`, which indexes tensors of any device from the CPU."""

        def moved(record: LayerEdit | Gate) -> dict[str, Any]:
            return {
                key: value.to(device)
                for key, value in vars(record).items()
                if isinstance(value, Tensor) and key != "where"
            }

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
    kept: Tensor | None = None  # [F] bool, the features that are set; the others stay as they are. None sets all

    @property
    def features(self) -> Tensor:
        """[n] int64, those that are set."""
        every = torch.arange(self.width)
        return every if self.kept is None else every[self.kept.cpu()]


@dataclass(frozen=True)
class OutputEdit:
    """Vectors added to what a layer's MLP writes, whatever its features are."""

    value: Tensor  # [B, T, d], or [1, T, d] for all prompts
    where: Tensor  # [T] bool, prompt positions
    generated: Tensor | None = None  # [B, d] or [1, d], at tokens generated after the prompt; None leaves them alone
    features: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # none


Plan = Mapping[int, LayerEdit]  # layer -> edit
AnyPlan = Mapping[int, LayerEdit | WholeEdit | OutputEdit]  # what can be run
Edit = TypeVar("Edit", bound=LayerEdit | WholeEdit | OutputEdit)


def at_step(values: Tensor, rank: int, step: int) -> Tensor:
    """The values at generated token `step` (from 0): those of rank `rank` + 1 have a row for each step."""
    return values[min(step, len(values) - 1)] if values.ndim > rank else values


def merge(first: Plan, second: Plan) -> dict[int, LayerEdit]:
    """Join two ungated plans that act on the same positions and at generated tokens; where both name a feature the
    second wins.
    """
    return {**first, **{layer: _join(first[layer], e) if layer in first else e for layer, e in second.items()}}


def _join(first: LayerEdit, second: LayerEdit) -> LayerEdit:
    second = second.to(first.features.device)
    assert torch.equal(first.where, second.where) and first.generated is not None and second.generated is not None
    keep = ~torch.isin(first.features, second.features)

    def joined(a: Tensor, b: Tensor) -> Tensor:
        """Values of the features kept and of the second's, both broadcast to the same leading dimensions."""
        a = a.expand(*a.shape[:-1], len(first.features))[..., keep]
        b = b.expand(*b.shape[:-1], len(second.features))
        lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
        return torch.cat([a.expand(*lead, a.shape[-1]), b.expand(*lead, b.shape[-1])], -1)

    features = torch.cat([first.features[keep], second.features])
    value, scale = joined(first.value, second.value), joined(first.scale, second.scale)
    at, at_generated = (joined(a, b) for a, b in zip(first.places(), second.places(), strict=True))
    generated = joined(first.generated, second.generated)
    return LayerEdit(features, value, scale, first.where, generated, at=at, at_generated=at_generated)


def set_features(features: Tensor, value: Tensor, where: Tensor, generated: Tensor | None = None) -> LayerEdit:
    """Set activations to `value`, whatever they are."""
    return LayerEdit(features, value, value.new_zeros(len(features)), where, generated)


def ablation(features: Tensor, where: Tensor) -> LayerEdit:
    """Set features [n] to 0 at `where` [T] bool and at generated tokens."""
    return set_features(features, torch.zeros(len(features)), where, torch.zeros(len(features)))


def at_positions(plan: Mapping[int, Edit], where: Tensor) -> dict[int, Edit]:
    """The same plan, restricted to positions `where` [T] bool."""
    return {layer: replace(edit, where=edit.where & where) for layer, edit in plan.items()}


def scaled(plan: Mapping[int, LayerEdit], factor: float) -> dict[int, LayerEdit]:
    """The same plan, whose changes of activation are `factor` times as large."""
    one = torch.ones(1, 1)
    return {n: replace(e, openness=factor * (one if e.openness is None else e.openness)) for n, e in plan.items()}


def features_at(edit: LayerEdit, features: Tensor, where: Tensor, generated: bool) -> LayerEdit:
    """The same edit, in which `features` [m], some of the edit's, are edited only at positions `where` [T] bool and,
    if `generated`, at generated tokens; each keeps what it had been restricted to.
    """
    at, at_generated = edit.places()
    named = torch.isin(edit.features, features.to(edit.features.device))
    where = where.to(at.device)
    return replace(edit, at=at & (where[:, None] | ~named), at_generated=at_generated & (~named | generated))


def some_features(edit: LayerEdit, keep: Tensor) -> LayerEdit:
    """The same edit of those of its features that `keep` [n] bool names."""
    size = len(edit.features)

    def kept(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.expand(*values.shape[:-1], size)[..., keep.to(values.device)]

    names = ("features", "value", "scale", "generated", "at", "at_generated")
    return replace(edit, **{name: kept(getattr(edit, name)) for name in names})


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


def by_layer(transcoders: TranscoderSet, features: Iterable[FeatureId]) -> dict[int, Tensor]:
    """Features grouped by layer, [n] int64, each once, in the order of naming.

    Raises:
        UserError: the transcoders do not have one of them.
    """
    table: dict[int, list[int]] = {}
    for feature in dict.fromkeys(features):  # named twice, it is still one feature
        if feature.layer not in transcoders:
            raise UserError(f"feature {feature}: the transcoders have layers {transcoders.layers}")
        width = transcoders[feature.layer].config.n_features
        if feature.index >= width:
            raise UserError(f"feature {feature}: layer {feature.layer} has {width} features")
        table.setdefault(feature.layer, []).append(feature.index)
    return {layer: torch.tensor(indices) for layer, indices in table.items()}


def steer_plan(
    scope: Scope,
    values: Mapping[FeatureId, float],
    length: int,
    positions: Sequence[int] | None = None,
    factors: Mapping[FeatureId, float] | None = None,
) -> dict[int, LayerEdit]:
    """Set features to given activations (0 ablates) in a prompt of `length` tokens, and multiply others by `factors`.

    With `positions` the edit acts on these alone, and not on generated tokens; without them everywhere.

    Raises:
        UserError: a feature or position that is not there.
    """
    where = torch.ones(length, dtype=torch.bool)
    if positions is not None:
        bad = [p for p in positions if not 0 <= p < length]
        if bad:
            raise UserError(f"position {bad[0]}: the prompt has positions 0 to {length - 1}")
        where = torch.zeros_like(where)
        where[list(positions)] = True
    plan: dict[int, LayerEdit] = {}
    factors, like = factors or {}, {"dtype": scope.adapter.dtype, "device": scope.adapter.device}
    for layer, features in by_layer(scope.transcoders, [*values, *factors]).items():
        named = [FeatureId(layer, index) for index in features.tolist()]
        value = torch.tensor([values.get(feature, 0.0) for feature in named], **like)
        scale = torch.tensor([factors.get(feature, 0.0) for feature in named], **like)
        generated = value if positions is None else None
        plan[layer] = LayerEdit(features.to(scope.adapter.device), value, scale, where, generated)
    return plan


@torch.no_grad()
def codes(scope: Scope, batch: InputBatch, layers: Sequence[int] | None = None) -> dict[int, SparseCode]:
    """Layer -> the code [B, T, k] of a batch, from one forward; all layers when None."""
    inputs = scope.capture(batch, layers)
    return {layer: scope.transcoders[layer].encode(inputs.pop(layer)) for layer in sorted(inputs)}


def donor_activations(
    scope: Scope, donors: InputBatch | Mapping[int, SparseCode], features: Mapping[int, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """The donors' activations of chosen features: layer -> (features [n], activations [B, T, n]); `donors` are
    prompts, or their codes.
    """
    coded = codes(scope, donors, sorted(features)) if isinstance(donors, InputBatch) else donors
    activations: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in sorted(features):
        chosen = features[layer].to(coded[layer].indices.device)
        activations[layer] = (chosen, coded[layer].select(chosen, scope.transcoders[layer].config.n_features))
    return activations


def patch_plan(
    activations: Mapping[int, tuple[Tensor, Tensor]], roles: np.ndarray, strength: float = 1.0
) -> dict[int, LayerEdit]:
    """Carry activations (of `donor_activations`, row i the donor of recipient i) into a run of the same wording.

    They are multiplied by `strength`. Generated tokens get the donor's activations at its last position.
    """
    where, last = position_mask(roles, "all"), torch.from_numpy(roles == "last")
    plan: dict[int, LayerEdit] = {}
    for layer, (features, values) in activations.items():
        carried = values * strength
        plan[layer] = set_features(features, carried, where, carried[:, last][:, 0])
    return plan
