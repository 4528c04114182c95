"""Memory, traffic and least time of a training, counted before anything runs.

What training the transcoders of all layers keeps in memory, sends and writes, before anything runs.

Counted as `vlmscope.training` works. Exact, and tested against it: parameters, weights, gradients, moments, buffers,
checkpoint, set, and the bytes sent in a step. Estimates: the model's forward and the tensors of the layer in work.
Legend: N tokens of a step on all hosts, n those of one host, L layers, d model width, F features of a layer, k active
features of a token, P numbers of one layer's transcoder.

The least time of one training step on a machine, part by part, each with what bounds it (a roofline).

Operations and bytes are counted as `vlmscope.training` works, for the rank that owns the most layers: the others wait
for it. Bytes are those of tensors read and written once; launches, Python and waiting are not counted. Legend: as
`vlmscope.training.sizes`; n tokens of a step on a host, m dead features.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from vlmscope.core.hardware import Bound, Hardware
from vlmscope.training.ranks import Layout

_FLOAT = 4  # parameters, gradients and standardised activations are float32
_BYTES = {"bfloat16": 2, "float32": 4}
_MESSAGES = 3  # in a sum over hosts of FVU: the mean's count, the squared residuals, the squared deviations
_WINDOW = 64  # losses that a layer remembers
_WORKING = 10  # tensors [n, d] of the layer in work: inputs, targets, reconstruction, residuals and their gradients


def transcoder_numbers(d_model: int, n_features: int, skip: bool, activation: str) -> tuple[int, int]:
    """P, and in how many tensors they lie: W_enc, W_dec [F, d], b_enc [F], b_dec [d], skip [d, d], thresholds [F]."""
    numbers, tensors = 2 * n_features * d_model + n_features + d_model, 4
    if skip:
        numbers, tensors = numbers + d_model**2, tensors + 1
    if activation == "jumprelu":
        numbers, tensors = numbers + n_features, tensors + 1
    return numbers, tensors


@dataclass(frozen=True)
class TrainingSizes:
    """Sizes of one training run.

    Attributes:
        layout: layers, ranks and hosts.
        d_model: d.
        n_features: F.
        k: active features of a token.
        step_tokens: N.
        element: bytes of an activation, which has the model's dtype.
        model_bytes: the frozen model, a copy of which each rank has.
        forward_bytes: alive inside the model's forward over a rank's share.
        skip: whether there are skip paths.
        activation: one of `vlmscope.transcoders.config.ACTIVATIONS`.
        pool_batches: captured batches that are mixed.
        dead: share of features that are dead; AuxK works when it is not 0.
        aux_k: features that AuxK takes a token.
        state_bytes: bytes of a number of the optimiser's two moments.
        encoder_dtype: in which the encoder's dense product is computed and kept (`trainer.precision`).
        validates: whether rank 0 gathers the whole set on its device, as it does to validate and to save.
    """

    layout: Layout
    d_model: int
    n_features: int
    k: int
    step_tokens: int
    element: int
    model_bytes: int
    forward_bytes: int = 0
    skip: bool = False
    activation: str = "topk"
    pool_batches: int = 8
    dead: float = 0.0
    aux_k: int = 64
    state_bytes: int = _FLOAT
    encoder_dtype: str = "float32"
    validates: bool = True

    @property
    def numbers(self) -> int:
        """P."""
        return transcoder_numbers(self.d_model, self.n_features, self.skip, self.activation)[0]

    @property
    def encoder_bytes(self) -> int:
        """Bytes of a pre-activation."""
        return _BYTES[self.encoder_dtype]

    @property
    def host_tokens(self) -> int:
        """n: a step's tokens on one host."""
        return ceil(self.step_tokens / self.layout.hosts)

    @property
    def rank_tokens(self) -> int:
        """Tokens of a batch that one rank's copy of the model sees, when rows come out even."""
        return ceil(self.step_tokens / self.layout.world)

    @property
    def dead_features(self) -> int:
        """Dead features of a layer."""
        return int(self.dead * self.n_features)

    @property
    def buffer_bytes(self) -> int:
        """A layer's coordinates, clocks and remembered losses, with BatchTopK's threshold."""
        threshold = _FLOAT if self.activation == "batchtopk" else 0
        return 2 * _FLOAT * self.d_model + 2 * 8 + 8 * self.n_features + 8 + 8 * _WINDOW + threshold

    def batch_bytes(self, rank: int) -> int:
        """One captured batch as a rank keeps it: inputs and outputs of its layers, and which tokens are soft."""
        return self.host_tokens * (2 * self.d_model * len(self.layout.layers(rank)) * self.element + 1)

    def exchange_bytes(self, rank: int) -> int:
        """Alive while activations are exchanged: all layers of the own share, what is sent, received and joined."""
        own, layers = len(self.layout.layers(rank)), self.layout.n_layers
        a_layer = 2 * self.d_model * self.element
        if self.layout.world == 1:  # captured with padding, then without; no message
            return 2 * self.rank_tokens * layers * a_layer
        return a_layer * (self.rank_tokens * (layers + layers - own) + 2 * self.host_tokens * own)

    def work_bytes(self) -> int:
        """Of the layer in work: pre-activations [n, F], where a mask chooses also that and a copy; rows [n, d].

        In half precision the product also needs copies of weights and inputs.
        """
        own = self.encoder_bytes
        choice = 0 if self.activation == "topk" else 1 + own
        pre = self.host_tokens * self.n_features * (own + choice)
        rows = _WORKING * self.host_tokens * self.d_model * _FLOAT
        if own != _FLOAT:
            rows += own * (self.n_features * (self.d_model + 1) + self.host_tokens * self.d_model)
        if not self.dead_features:
            return pre + rows
        # AuxK takes the dead features' columns out, and its gradient stands beside that of the loss for a moment.
        return pre + rows + own * self.host_tokens * self.dead_features + _FLOAT * self.n_features * self.d_model

    def memory(self, rank: int) -> dict[str, int]:
        """Bytes on a rank's device by part.

        They are not all alive at once: `peak`. The set that is gathered to validate and to save lies on the device of
        a single rank; of several it goes to CPU memory (`host_bytes`), and a layer at a time comes to the device.
        """
        layers = len(self.layout.layers(rank))
        gathered = self.layout.n_layers if self.layout.world == 1 else 1
        return {
            "model": self.model_bytes,
            "weights": _FLOAT * self.numbers * layers,
            "gradients": _FLOAT * self.numbers * layers,
            "moments": 2 * self.state_bytes * self.numbers * layers,
            "buffers": self.buffer_bytes * layers,
            "pool": (self.pool_batches if self.pool_batches > 1 else 1) * self.batch_bytes(rank),
            "drawn": self.batch_bytes(rank) if self.pool_batches > 1 else 0,
            "forward": self.forward_bytes,
            "exchange": self.exchange_bytes(rank),
            "work": self.work_bytes(),
            "gathered": _FLOAT * self.numbers * gathered if self.validates else 0,
        }

    @property
    def host_bytes(self) -> int:
        """CPU memory of the gathered set where several ranks train: rank 0's host."""
        return _FLOAT * self.numbers * self.layout.n_layers if self.validates and self.layout.world > 1 else 0

    def peak(self, rank: int) -> int:
        """Bytes at the worst moment: what stays, and the most of forward, exchange, a layer's step, and validation."""
        parts = self.memory(rank)
        passing = ("forward", "exchange", "work", "gathered")
        stays = sum(size for part, size in parts.items() if part not in passing)
        return stays + max(parts[part] for part in passing)

    @property
    def worst_peak(self) -> int:
        """The largest peak of all ranks."""
        return max(self.peak(rank) for rank in range(self.layout.per_host))

    def sent_in_host(self, rank: int, tokens: int | None = None) -> int:
        """Bytes that a rank sends to the others of its host for one captured batch.

        Args:
            rank: the sender.
            tokens: of its share; None: an even share.
        """
        tokens = self.rank_tokens if tokens is None else tokens
        total = 0
        for other in self.layout.members(self.layout.host(rank)):
            if other != rank:
                layers = len(self.layout.layers(other))
                total += tokens * (2 * self.d_model * layers * self.element + 1)
        return total

    def summed_over_hosts(self, rank: int) -> int:
        """Bytes of the tensors that a rank adds up with its peers on other hosts in one step (without AuxK's)."""
        if self.layout.hosts == 1:
            return 0
        fvu = _FLOAT * (self.d_model + _MESSAGES)
        fired = 8 * (self.n_features + 1)
        return len(self.layout.layers(rank)) * (fvu + _FLOAT * self.numbers + fired)

    def sent_between_hosts(self, rank: int) -> float:
        """Bytes that a rank sends for those sums: in a ring each device sends 2 (H - 1) / H of a tensor."""
        hosts = self.layout.hosts
        return self.summed_over_hosts(rank) * 2 * (hosts - 1) / hosts

    @property
    def checkpoint_bytes(self) -> int:
        """Tensors of one checkpoint, all layers; while the next one is written, two stand."""
        _, tensors = transcoder_numbers(self.d_model, self.n_features, self.skip, self.activation)
        one = self.numbers * (_FLOAT + 2 * self.state_bytes) + _FLOAT * tensors + self.buffer_bytes
        return self.layout.n_layers * one

    @property
    def set_bytes(self) -> int:
        """Tensors of the finished set in bfloat16; BatchTopK's threshold is written for every feature."""
        numbers = self.numbers + (self.n_features if self.activation == "batchtopk" else 0)
        return 2 * numbers * self.layout.n_layers

    def cache_bytes(self, tokens: int) -> int:
        """Inputs and outputs of all layers at `tokens` tokens on disk, in the model's dtype."""
        return tokens * 2 * self.d_model * self.layout.n_layers * self.element


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
    (`vlmscope.transcoders.transcoder`): one bag and one gradient of the decoder, the gradient of the values, one
    gradient of the encoder. Each gradient of [F, d] is written whole. With the product in half precision its operands
    are copied first, and the chosen values are one more set of dot products.
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
