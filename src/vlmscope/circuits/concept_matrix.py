"""Every concept turned into every other: one steering and one patching plan a cell, and what they did.

Legend: R rightly answered pictures of the recipient, B donor pictures, T positions, n features of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.plans import union
from vlmscope.core.intervention import Rate
from vlmscope.interventions.edits import Plan, without_layers
from vlmscope.interventions.named import donor_activations, matched_features, patch_plan
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import benjamini_hochberg, bootstrap_rate, paired_p
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope

METHODS = ("steer", "patch")
NO_LAST_LAYER = "steer/no_last_layer"  # steering once more, the last layer left alone


@dataclass(frozen=True)
class Cell:
    """One recipient, donor and question: a rate a method, and how surely it is above matched random features.

    `rates` has METHODS and NO_LAST_LAYER; `p` and, after `corrected`, `q` have METHODS. `features` is the number that
    steering edits.
    """

    recipient: str
    donor: str
    question: str
    rates: dict[str, Rate]
    p: dict[str, float]
    q: dict[str, float]
    features: int


def gifts(scope: Scope, donors: InputBatch, circuits: Sequence[Circuit]) -> dict[int, tuple[Tensor, Tensor]]:
    """The donors' activations of all features of any of the circuits: layer -> (features [n] ascending, [B, T, n])."""
    tables = [union(circuit) for circuit in circuits]
    layers = sorted({layer for table in tables for layer in table})
    features = {layer: torch.cat([t[layer] for t in tables if layer in t]).unique() for layer in layers}
    return donor_activations(scope, donors, features)


def carried(
    given: Mapping[int, tuple[Tensor, Tensor]], circuit: Circuit, rows: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """Of these, one circuit's features, picture `rows[i]` for recipient i: layer -> (features [n], [R, T, n])."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, features in union(circuit).items():
        held, values = given[layer]
        columns = torch.searchsorted(held, features.to(held.device))
        found[layer] = (features, values[rows][..., columns])
    return found


def measure(
    scope: Scope,
    batch: InputBatch,
    plans: Mapping[str, Plan],
    token: int,
    means: Mapping[int, Tensor],
    seed: int,
) -> tuple[dict[str, Rate], dict[str, float]]:
    """Rates and p-values of a cell in free mode; its controls are the same edits of matched random features.

    Args:
        scope: the model and its transcoders.
        batch: the recipient's pictures.
        plans: a plan for each of METHODS.
        token: the donor's answer.
        means: layer -> [F], by which controls are matched.
        seed: of the controls.
    """

    def hits(plan: Plan) -> np.ndarray:
        return (run_edited(scope, batch, plan, "free").argmax(-1) == token).cpu().numpy()

    rates: dict[str, Rate] = {}
    p: dict[str, float] = {}
    for method, plan in plans.items():
        done, control = hits(plan), hits(matched_features(plan, means, seed))
        rates[method] = bootstrap_rate(done, control=float(control.mean()))
        p[method] = paired_p(done, control)
    rates[NO_LAST_LAYER] = bootstrap_rate(hits(without_layers(plans["steer"], [scope.adapter.n_layers - 1])))
    return rates, p


def patching(
    given: Mapping[int, tuple[Tensor, Tensor]], circuit: Circuit, rows: Tensor, roles: np.ndarray, strength: float
) -> Plan:
    """Carry a circuit's activations from donor picture `rows[i]` modulo their number into recipient i."""
    donors = len(next(iter(given.values()))[1])
    return patch_plan(carried(given, circuit, rows % donors), roles, strength)


def corrected(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with q-values: the p-values of all cells and methods corrected together (Benjamini and Hochberg)."""
    q = benjamini_hochberg(np.array([[cell.p[method] for method in METHODS] for cell in cells]).reshape(-1, 2))
    return [replace(cell, q=dict(zip(METHODS, row.tolist(), strict=True))) for cell, row in zip(cells, q, strict=True)]


def mean_rate(cells: Sequence[Cell], method: str) -> Rate:
    """The mean over cells, each counted once, with an interval over pairs of concepts and the controls' mean.

    A pair's cells share one circuit and hang together, so pairs are drawn, not cells.
    """
    pairs = ["-".join(sorted((cell.recipient, cell.donor))) for cell in cells]
    controls = [control for cell in cells if (control := cell.rates[method].control) is not None]
    return bootstrap_rate(
        np.array([cell.rates[method].value for cell in cells]),
        control=float(np.mean(controls)) if controls else None,
        groups=pairs,
    )
