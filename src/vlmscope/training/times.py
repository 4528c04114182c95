"""The least time of one training step on a machine, part by part, each with what bounds it (a roofline).

Operations and bytes are counted as `vlmscope.training` works, for the rank that owns the most layers: the others wait
for it. Bytes are those of tensors read and written once; launches, Python and waiting are not counted. Legend: as
`vlmscope.training.sizes`; n tokens of a step on a host, m dead features.
"""

from typing import NamedTuple

from vlmscope.core.hardware import Bound, Hardware
from vlmscope.training.sizes import TrainingSizes

_FLOAT = 4
_INDEX = 8  # bytes of an index
_PASSES = 12  # over [n, d]: cast, standardise, the bias, residual, FVU, and their gradients
_MOMENTS = 4  # reads and writes of the optimiser's two moments; the weight is read and written, the gradient read


class Work(NamedTuple):
    """What a part of a step takes: operations and their dtype, bytes of memory, of the link, of the network."""

    flops: float = 0.0
    moved: float = 0.0
    dtype: str = "float32"
    linked: float = 0.0
    networked: float = 0.0

    def bound(self, machine: Hardware) -> Bound:
        """The least time on a machine."""
        return machine.bound(self.flops, self.moved, self.dtype, self.linked, self.networked)


def layer_work(sizes: TrainingSizes) -> dict[str, Work]:
    """What one layer takes in one step, by part.

    The encoder's product is dense; everything after the choice of features touches k rows a token
    (`vlmscope.transcoders.sparse`): one bag and one gradient of the decoder, the gradient of the values, one gradient
    of the encoder. Each gradient of [F, d] is written whole. With the product in half precision its operands are
    copied first, and the chosen values are one more set of dot products.
    """
    n, d, f, k = sizes.host_tokens, sizes.d_model, sizes.n_features, sizes.k
    pre, rows, weight = n * f * sizes.encoder_bytes, n * d * _FLOAT, f * d * _FLOAT
    bags, passes = n * k * d * _FLOAT, 4
    read = weight + rows
    if sizes.encoder_bytes != _FLOAT:
        read, passes = read + 2 * sizes.encoder_bytes * (f * d + n * d), passes + 1
    parts = {
        "encoder": Work(2.0 * n * f * d, read + pre, sizes.encoder_dtype),
        "choice": Work(0.0, pre + n * k * (_INDEX + _FLOAT)),
        "sparse": Work(passes * 2.0 * n * k * d, passes * bags + 2 * weight + 3 * rows),
        "elementwise": Work(0.0, _PASSES * rows),
        "clipping": Work(0.0, 3 * _FLOAT * sizes.numbers),
        "optimiser": Work(0.0, sizes.numbers * (3 * _FLOAT + _MOMENTS * sizes.state_bytes)),
    }
    if sizes.skip:
        parts["skip"] = Work(2 * 2.0 * n * d * d, 4 * rows + 2 * d * d * _FLOAT)
    m = sizes.dead_features
    if m:
        taken, aux = n * m * sizes.encoder_bytes, n * min(sizes.aux_k, m) * d * _FLOAT
        # Its gradients are written, then added to those of the loss.
        moved = 3 * taken + passes * aux + 2 * 4 * weight + 6 * rows
        parts["aux_k"] = Work(passes * 2.0 * n * min(sizes.aux_k, m) * d, moved)
    return parts


def step_work(
    sizes: TrainingSizes, forward_flops: float, model_dtype: str, steps_per_batch: int = 1
) -> dict[str, Work]:
    """What the busiest rank does in one step, by part; a captured batch serves `steps_per_batch` steps.

    Args:
        sizes: of the run.
        forward_flops: of the model over one rank's share of a batch, vision tower included.
        model_dtype: dtype of the model.
        steps_per_batch: steps between two captured batches.
    """
    layout, layers = sizes.layout, len(sizes.layout.layers(0))
    share = 1 / steps_per_batch
    captured = 2 * sizes.d_model * sizes.element
    # Written by the forward, packed, unpacked and joined.
    handled = captured * (3 * sizes.rank_tokens * layout.n_layers + 3 * sizes.host_tokens * layers)
    parts = {
        "forward": Work(forward_flops * share, (sizes.model_bytes + sizes.forward_bytes) * share, model_dtype),
        "exchange": Work(0.0, handled * share, linked=sizes.sent_in_host(0) * share),
    }
    if sizes.pool_batches > 1:
        parts["draw"] = Work(0.0, 4 * sizes.batch_bytes(0))
    for part, one in layer_work(sizes).items():
        parts[part] = Work(one.flops * layers, one.moved * layers, one.dtype)
    if layout.hosts > 1:
        summed = sizes.summed_over_hosts(0)
        parts["sums"] = Work(0.0, 3.0 * summed, networked=sizes.sent_between_hosts(0))
    return parts


def bounds(parts: dict[str, Work], machine: Hardware) -> dict[str, Bound]:
    """The least time of each part; they follow one another."""
    return {part: work.bound(machine) for part, work in parts.items()}
