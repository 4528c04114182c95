"""Parts of plans, and the rows of a batch that are answered rightly, for steps that are not trials yet."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vlmscope.interventions.edits import Edit, at_positions, position_mask, without_layers


def in_scope(plan: Mapping[int, Edit], scope: str, roles: np.ndarray, last_layer: int) -> Mapping[int, Edit]:
    """The plan restricted to a scope: 'all', 'no_last_layer', 'no_last_position', 'role_<role>'."""
    if scope == "no_last_layer":
        return without_layers(plan, [last_layer])
    return plan if scope == "all" else at_positions(plan, position_mask(roles, scope))


def correct_rows(subject_logits: Tensor, token: int) -> Tensor:
    """Rows whose unedited answer is `token`."""
    return torch.nonzero(subject_logits.argmax(-1) == token).flatten()
