"""What training the transcoders of all layers keeps in memory, sends and writes, before anything runs.

Counted as `vlmscope.training` works. Exact, and tested against it: parameters, weights, gradients, moments, buffers,
checkpoint, set, and the bytes sent in a step. Estimates: the model's forward and the tensors of the layer in work.
Legend: N tokens of a step on all hosts, n those of one host, L layers, d model width, F features of a layer, k active
features of a token, P numbers of one layer's transcoder.
"""

from dataclasses import dataclass
from math import ceil

from vlmscope.training.layout import Layout

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
