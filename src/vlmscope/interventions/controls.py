"""Controls of an edit: as many other features that are changed as much, where the edit acts.

The size of feature f at position t under an operation is what changing it writes there, over the B cases:

    s_f[t] = |W_dec[f]| sqrt(sum over cases of (new_f[t] - a_f[t])^2),      S_f[r]^2 = sum over t of role r of s_f[t]^2

at the positions t where the edit acts. Of an operation with a value for every feature (the donor's activation, or 0) a
control feature g takes its own, and is near f where their S are: gap(f, g) = |S_g - S_f| / |S_f|. Of any other
operation (exchange, shift, a level) g writes the very change that f would, so that its size is S_f |W_dec[g]| /
|W_dec[f]|, and it should be a feature that these prompts use where f is changed. Where too few others change at all, a
draw is smaller than the edit, which its displacement shows (`trials.WEAK`).

Legend: B cases, T positions, R roles, n edited features of a layer, G candidates, k slots of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial.distance import cdist

from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.interventions.edits import LayerEdit, Plan
from vlmscope.interventions.run import code_at, prompt_deltas

if TYPE_CHECKING:
    from vlmscope.interventions.trials import Cases, Operation
    from vlmscope.scope import Scope
    from vlmscope.transcoders.transcoder import SparseCode, Transcoder

NEAREST = 8  # candidates that a replacement is drawn from, at least
SLACK = 0.1  # further ones, whose gap is larger than that of the last of these by no more
CHUNK = 1024  # features whose changes are held at once


@dataclass(frozen=True)
class Pool:
    """The candidates of a layer's edited features, nearest first."""

    order: np.ndarray  # [n, G] feature indices
    gaps: np.ndarray  # [n, G], ascending
    size: np.ndarray  # [n], of the edited features

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """[n] distinct features, each from the nearest that are free; the largest edited feature chooses first."""
        taken = np.zeros(self.order.max() + 1, dtype=bool)
        drawn = np.empty(len(self.order), dtype=np.int64)
        for row in np.argsort(-self.size, kind="stable"):
            free = ~taken[self.order[row]]
            features, gaps = self.order[row][free], self.gaps[row][free]
            last = gaps[min(NEAREST, len(gaps)) - 1]
            drawn[row] = rng.choice(features[: np.searchsorted(gaps, last + SLACK, side="right")])
            taken[drawn[row]] = True
        return drawn


def matched_pools(scope: Scope, do: Operation, cases: Cases, strength: float, plan: Plan) -> dict[int, Pool]:
    """Layer -> the features that may stand for those that `plan` edits, which is what `do` does to the cases.

    Raises:
        UserError: a layer has too few other features.
    """
    pools: dict[int, Pool] = {}
    for layer, edit in plan.items():
        if not len(edit.features):
            continue
        width, edited = scope.transcoders[layer].config.n_features, edit.features.numpy(force=True)
        others = np.setdiff1d(np.arange(width), edited)
        if len(others) < len(edited):
            raise UserError(
                f"{len(edited)} of the {width} features of layer {layer} are edited, so no control can be "
                "drawn from the others; name fewer features, or draw no controls"
            )
        used = used_by_role(scope, cases, layer)  # [R, F]
        live = others[used[:, others].any(0)]
        others = live if len(live) >= len(edited) else others
        gaps, size = _gaps(scope, do, cases, strength, layer, edit, others, used)
        order = np.argsort(gaps, axis=1, kind="stable")
        pools[layer] = Pool(others[order], np.take_along_axis(gaps, order, 1), size)
    return pools


def matched_plan(
    scope: Scope, do: Operation, cases: Cases, strength: float, plan: Plan, pools: Mapping[int, Pool], draw: int
) -> dict[int, LayerEdit]:
    """The control of a plan: the edit at the same positions of features drawn from its pools, under seed `draw`."""
    drawn = {
        layer: plan[layer].features.new_tensor(pool.draw(generator(draw, "control", layer)))
        for layer, pool in pools.items()
    }
    if not do.own_values:
        return {layer: replace(plan[layer], written_by=features) for layer, features in drawn.items()}
    control: dict[int, LayerEdit] = {}
    for layer, other in do.plan(scope, cases, strength, drawn).items():
        edit = plan[layer]  # whose positions the fresh plan does not know
        assert isinstance(other, LayerEdit), "as of the features themselves"
        generated = None if edit.generated is None else other.generated
        places = {"where": edit.where, "at": edit.at, "at_generated": edit.at_generated}
        control[layer] = replace(other, generated=generated, **places)
    return control


def used_by_role(scope: Scope, cases: Cases, layer: int) -> np.ndarray:
    """[R, F] bool: which features of a layer some recipient or donor has at a position of each of the cases' roles."""
    if layer in cases.used:
        return cases.used[layer]
    runs = [(cases.codes(scope)[layer], cases.batch.roles)]
    if cases.donors is not None:
        roles = cases.donors.roles if cases.donor_at is None else cases.batch.roles
        runs.append((cases.donor_codes(scope)[layer], roles))
    roles = _roles(cases)
    used = np.zeros((len(roles), scope.transcoders[layer].config.n_features), dtype=bool)
    for code, role_of in runs:
        for row, role in enumerate(roles):
            part = code_at(code, torch.from_numpy(role_of == role))
            used[row, part.indices[part.active].numpy(force=True)] = True
    cases.used[layer] = used
    return used


def _roles(cases: Cases) -> list[str]:
    return list(dict.fromkeys(cases.batch.roles.tolist()))


def _gaps(
    scope: Scope,
    do: Operation,
    cases: Cases,
    strength: float,
    layer: int,
    edit: LayerEdit,
    others: np.ndarray,
    used: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """How far candidates [G] are from each edited feature, [n, G], and the sizes of these, [n]."""
    transcoder, code = scope.transcoders[layer], cases.codes(scope)[layer]
    by_role = np.stack([cases.batch.roles == role for role in _roles(cases)])  # [R, T]
    own = by_role @ _squares(transcoder, code, edit)  # [R, n], squares of S
    size = np.sqrt(own.sum(0))
    scale = np.where(size > 0, size, 1.0)[:, None]
    if not do.own_values:
        norms = transcoder.write_norms().double().numpy(force=True)
        wrong = np.abs(norms[others] / norms[edit.features.numpy(force=True)][:, None] - 1.0)
        return wrong + 1.0 - own.T @ used[:, others] / scale**2, size
    squares = np.empty((cases.batch.length, len(others)))
    for start in range(0, len(others), CHUNK):
        chunk = edit.features.new_tensor(others[start : start + CHUNK])
        other = do.plan(scope, cases, strength, {layer: chunk})[layer]
        assert isinstance(other, LayerEdit), "as of the features themselves"
        squares[:, start : start + CHUNK] = _squares(transcoder, code, replace(other, where=edit.where))
    gaps = np.empty((len(size), len(others)))
    # Features that are edited at the same positions are compared with the others there.
    places, group = np.unique(edit.places()[0].numpy(force=True), axis=1, return_inverse=True)
    for column in range(places.shape[1]):
        rows = group.ravel() == column
        theirs = (by_role & places[:, column]) @ squares
        gaps[rows] = cdist(np.sqrt(own.T[rows]), np.sqrt(theirs.T)) / scale[rows]
    return gaps, size


def _squares(transcoder: Transcoder, code: SparseCode, edit: LayerEdit) -> np.ndarray:
    """[T, n], squares of the sizes of an edit's features in the prompts of a code."""
    edit = edit.to(code.values.device)
    deltas = prompt_deltas(transcoder, code_at(code, edit.where), edit).double()
    norms = transcoder.write_norms()[edit.features].double()
    squares = np.zeros((len(edit.where), len(edit.features)))
    squares[edit.where.numpy()] = (deltas.square().sum(0) * norms.square()).numpy(force=True)
    return squares
