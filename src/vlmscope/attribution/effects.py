"""Total effects of all sources on what a graph explains, by one backward sweep; no row of a feature is needed.

With active features responding linearly, a change of pre-activation is one of activation, so a change delta of sources
moves the targets by `J_t (I - J)^-1 delta`, J the direct effects between features, J_t those on the targets. Its
transpose is the adjoint's sweep with one addition: at each MLP the gradient also goes on through the features that the
layer reads,
    G <- G + s3 * sum_f (dt / da_f) W_enc[f],    dt / da_f = sum over the layers that f writes to of (s4 * G) . W_dec[f]
All targets are carried at once. Legend: as in `vlmscope.attribution.adjoint`; n active features.
"""

import torch
from torch import Tensor

from vlmscope.attribution.adjoint import Adjoint, Sweep
from vlmscope.attribution.sources import most_at_a_position, numbers_and_slots
from vlmscope.attribution.targets import Targets


class TotalAdjoint(Adjoint):
    """Rows of total effects, each times its source, in place of edges."""

    def _mlp(self, layer: int, sweep: Sweep) -> None:
        super()._mlp(layer, sweep)
        vectors, columns = self._readers(layer)
        # Complete by now: what a feature writes to, its own layer and later ones, lies above.
        effects = sweep.out[:, columns[sweep.at].flatten()].view(len(sweep.out), -1, columns.shape[1])
        sweep.gradient = torch.baddbmm(sweep.gradient, effects.transpose(0, 1), vectors[sweep.at])

    def _readers(self, layer: int) -> tuple[Tensor, Tensor]:
        """What carries an effect of one activation on into the stream: `[T, K, d]`, padded with zeros, and columns."""
        features, frozen = self.replacement.features[layer], self.replacement.layers[layer]
        n_positions, width = frozen.mlp_in_scale.shape
        vectors = frozen.mlp_in_scale.new_zeros(n_positions, most_at_a_position(features), width)
        columns = torch.full(vectors.shape[:2], -1, dtype=torch.int64, device=vectors.device)
        number, slot = numbers_and_slots(features)
        scale = frozen.mlp_in_scale[features.position] / features.activation[:, None]
        vectors[features.position, slot] = scale * features.w_enc[features.index]
        columns[features.position, slot] = self.columns.features(layer) + number
        return vectors, columns


def total_effects(adjoint: Adjoint, targets: Targets, some: slice = slice(None)) -> Tensor:
    """The total effect of each source on each target, times the source: what scaling a source by 1 + x moves, over x.

    Args:
        adjoint: of the replacement model; the vectors that it keeps are used.
        targets: what the graph explains.
        some: which of them, B.

    Returns:
        `[B, columns]`, over the columns of `vlmscope.attribution.columns`, 0 for sources above the targets.
    """
    sweeping = TotalAdjoint(adjoint.replacement, adjoint.sources)
    constants = targets.constants[some] if targets.layer < adjoint.columns.n_layers else None
    rows = sweeping.stream_rows(
        targets.layer,
        targets.vectors[some],
        torch.from_numpy(targets.positions[some]).to(targets.vectors.device),
        constants,
        after_attention=targets.after_attention,
    )
    return torch.nn.functional.pad(rows, (0, adjoint.columns.total - rows.shape[1]))
