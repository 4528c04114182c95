"""What would this model need? Parameters, memory, one graph, training: sizes and least time, without any weights.

The architecture comes from a `config.json` and is built on the `meta` device. Counts follow the code that would run:
exact are parameters, what is recorded of a forward, a graph's rows, columns and nodes, and what training keeps and
sends (tests/unit/tasks/test_plan.py); the edges of a graph are those that causal attention can carry, with rows evenly
over layers and positions; buffers inside a forward and inside a step are estimates. Times are bounds from below, by
the roofline (Williams, Waterman and Patterson 2009): the slowest of arithmetic, memory, link and network.

Legend: T positions, d width, L layers, k active features of a position, F features of a layer; n tokens of a step on
one host; P numbers of one layer's transcoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.hub import gb

if TYPE_CHECKING:
    from vlmscope.attribution.config import AttributionConfig
    from vlmscope.config import AppConfig
    from vlmscope.models.base import Adapter
    from vlmscope.tasks.registry import RunContext
    from vlmscope.training.config import TranscoderArchConfig
    from vlmscope.training.ranks import Layout

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT = 4  # training's parameters, gradients, moments and standardised activations are float32


class Machine(NamedTuple):
    """Rates in 10^12 operations a second (a multiply and an add are two), GB/s, and memory in GB (None: unbounded).

    `link` is what one device sends to the others of its host, `network` to other hosts (None: not known).
    """

    name: str
    float64: float
    float32: float
    half: float
    bandwidth: float
    memory: float | None
    link: float
    network: float | None = None


# By NVIDIA's datasheets of the GPU and of its DGX. float32 is that of the plain units, not TF32; half precision that of
# the tensor cores without sparsity. The link is half of the datasheet's NVLink (PCIe for L4), which counts both
# directions; the network is one adapter a GPU (ConnectX-7, 400 Gbit/s; ConnectX-6, 200 Gbit/s). The CPU: measured with
# torch 2.13, one thread, best of 12, matmul of 2048 x 2048 and copy of 128 MiB.
MACHINES = {
    "h100": Machine("NVIDIA H100 SXM, 80 GB (by its datasheet)", 34, 67, 989, 3350, 80, 450, 50),
    "h200": Machine("NVIDIA H200 SXM, 141 GB (by its datasheet)", 34, 67, 989, 4800, 141, 450, 50),
    "a100": Machine("NVIDIA A100 SXM, 80 GB (by its datasheet)", 9.7, 19.5, 312, 2039, 80, 300, 25),
    "l4": Machine("NVIDIA L4, 24 GB (by its datasheet)", 0.5, 30.3, 121, 300, 24, 32),
    "cpu": Machine("one core of an AMD EPYC, without half precision (measured)", 0.027, 0.072, 0.0007, 7.7, None, 7.7),
}


class Work(NamedTuple):
    """Operations in a dtype, and bytes that go through memory, the host's link and the network between hosts."""

    flops: float = 0.0
    moved: float = 0.0
    dtype: str = "float32"
    linked: float = 0.0
    networked: float = 0.0


def least_time(work: Work, machine: Machine) -> tuple[float, str]:
    """Seconds that the work takes at least on a machine, and what bounds it."""
    if work.networked and machine.network is None:
        raise UserError(f"no network between hosts is known of {machine.name}; plan one host")
    rate = {"float64": machine.float64, "float32": machine.float32}.get(work.dtype, machine.half)
    times = {
        "arithmetic": work.flops / (rate * 1e12),
        "memory": work.moved / (machine.bandwidth * 1e9),
        "link": work.linked / (machine.link * 1e9),
        "network": work.networked / ((machine.network or 1.0) * 1e9),
    }
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


@dataclass
class TrainingPlan:
    """A run that trains on `tokens` tokens, `images` pictures' soft tokens among them, each forward once.

    `gpus` is those of a host; `step_tokens` are on all hosts; texts are `context` long; the model runs once in
    `steps_per_batch` steps.
    """

    gpus: int = 8
    hosts: int = 1
    tokens: int = 100_000_000
    images: int = 0
    step_tokens: int = 8192
    context: int = 2048
    pool_batches: int = 8
    steps_per_batch: int = 2


USES = ("attribution",)


@dataclass
class Config:
    """The prompt is `tokens` long: by default `images` pictures' soft tokens and `text_tokens` of text.

    `device` names the machine whose time is estimated. With transcoder=arch, their training is planned as `training`
    says.
    """

    tokens: int | None = None
    images: int = 1
    text_tokens: int = 64
    device: str = "h100"
    training: TrainingPlan = field(default_factory=TrainingPlan)

    def __post_init__(self) -> None:
        if self.device not in MACHINES:
            raise UserError(f"task.device={self.device}: figures are known of {', '.join(MACHINES)}; choose one")
        counts = {"tokens": self.tokens, "images": self.images, "text_tokens": self.text_tokens}
        counts |= {f"training.{name}": value for name, value in vars(self.training).items()}
        for name, value in counts.items():
            least = 0 if name.endswith("images") else 1
            if value is not None and value < least:
                raise UserError(f"task.{name}={value}: it must be at least {least}")


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Print the tables and return their numbers: `plan/...`, sizes in bytes, times in seconds."""
    from vlmscope.models.families import adapter_for
    from vlmscope.models.placement import DTYPES
    from vlmscope.models.sizes import empty_model
    from vlmscope.training.config import TranscoderArchConfig

    task, machine = cfg.task, MACHINES[cfg.task.device]
    adapter = adapter_for(empty_model(_architecture(cfg), DTYPES[cfg.model.dtype]))
    n_tokens, n_soft = _prompt(adapter, task)
    transcoders = _transcoders(cfg, adapter, context.overrides)
    print(f"{cfg.model.name}: {adapter.n_layers} layers of width {adapter.d_model}; transcoders: {transcoders.words}")
    print(f"prompt: {n_tokens:,} tokens, {n_soft:,} of them soft; machine: {machine.name}")
    metrics: dict[str, float] = {}
    for title, (group, form, rows) in _sections(cfg, adapter, transcoders, n_tokens, n_soft).items():
        print(f"\n{title}\n" + "\n".join(_line(key, form(value)) for key, value in rows.items()))
        metrics |= {f"plan/{group}{key}": float(value) for key, value in rows.items()}
    if machine.memory is not None and metrics["plan/memory/trace"] > machine.memory * 1e9:
        print(
            f"\nTracing needs more than the {gb(machine.memory * 1e9)} of {task.device}: model.offload=cpu or disk "
            "keeps the weights away,\nattribution.dtype=model avoids copies in float32, narrower transcoders need less."
        )
    if isinstance(cfg.transcoder, TranscoderArchConfig):
        metrics |= plan_training(cfg, adapter, machine)
    return metrics


def _line(name: str, *shown: str) -> str:
    return f"  {name.replace('_', ' '):<32}" + "".join(f"{text:>14}" for text in shown)


def _architecture(cfg: AppConfig) -> dict[str, Any]:
    if cfg.model.family is None:
        from vlmscope.models.sizes import find_config

        return find_config(cfg.model.path, cfg.model.hub, cfg.model.revision)
    from vlmscope.models.tiny import tiny_vlm

    return tiny_vlm(cfg.model.family, seed=cfg.seed).model.config.to_dict()


def _prompt(adapter: Adapter, task: Config) -> tuple[int, int]:
    """T, and how many of them are soft tokens."""
    from vlmscope.models.sizes import soft_tokens

    per_image = soft_tokens(adapter) if task.images else 0
    if per_image is None:
        if task.tokens is None:
            raise UserError("how many soft tokens a picture has depends on its size here; say task.tokens=")
        return task.tokens, 0
    soft = per_image * task.images
    if task.tokens is None:
        return soft + task.text_tokens, soft
    return task.tokens, min(soft, max(task.tokens - task.text_tokens, 0))


def transcoder_numbers(d_model: int, n_features: int, skip: bool, activation: str) -> int:
    """P: W_enc, W_dec [F, d], b_enc [F], b_dec [d]; skip path [d, d], JumpReLU's thresholds [F]."""
    numbers = 2 * n_features * d_model + n_features + d_model
    return numbers + d_model**2 * skip + n_features * (activation == "jumprelu")


class _Transcoders(NamedTuple):
    """Features of each layer, active ones of a position, skip path, nonlinearity, and where they are from."""

    widths: list[int]
    k: int
    skip: bool
    activation: str
    words: str


def _transcoders(cfg: AppConfig, adapter: Adapter, overrides: tuple[str, ...]) -> _Transcoders:
    """The set that the user named, if it is for this model; else new ones of the default architecture."""
    from vlmscope.config.schema import RandomTranscodersConfig
    from vlmscope.tasks.wiring import trained_transcoders
    from vlmscope.training.config import TranscoderArchConfig

    chosen, layers, d = cfg.transcoder, adapter.n_layers, adapter.d_model
    if not isinstance(chosen, RandomTranscodersConfig | TranscoderArchConfig):
        try:
            found = trained_transcoders(cfg, layers, d)
        except UserError:
            if any(override.lstrip("+~").startswith("transcoder") for override in overrides):
                raise
            chosen = TranscoderArchConfig()
        else:
            widths, config = [each.config.n_features for each in found.transcoders.values()], found.config
            return _Transcoders(widths, config.k, found[0].W_skip is not None, config.activation, str(chosen.path))
    if isinstance(chosen, TranscoderArchConfig):
        width = chosen.expansion_factor * d
        words = f"new ones, {chosen.expansion_factor} times the width = {width:,} features a layer, k={chosen.k}"
    else:
        width = chosen.n_features or 4 * d
        words = f"random, {width:,} features a layer, k={chosen.k}"
    return _Transcoders([width] * layers, chosen.k, chosen.skip, chosen.activation, words)


def graph_sizes(
    adapter: Adapter, n_tokens: int, soft: tuple[int, int], k: int, skip: bool, config: AttributionConfig
) -> dict[str, float]:
    """Counts, bytes and operations of one graph; soft tokens from `soft[0]` to before `soft[1]` see each other."""
    from vlmscope.models.sizes import attention_widths

    n_layers, d, t = adapter.n_layers, adapter.d_model, n_tokens
    queries, values = attention_widths(adapter)
    element = 8 if config.dtype == "float64" else 4
    active = k * t * n_layers
    rows, batch = min(active, config.max_nodes), config.targets_at_once(t, d)
    left_out = rows < active
    columns = t + n_layers * (1 + t * (k + 1))
    nodes = t + n_layers * (1 + t + left_out) + rows + config.max_logits
    seen = np.arange(1, t + 1)
    seen[slice(*soft)] = soft[1]
    below = np.arange(n_layers)[:, None]

    def edges(features: float, shared: int) -> float:
        """Of all rows, where a position has so many columns of features in a layer, and a layer `shared` of its own."""
        per_feature = seen * (1 + below * (features + 1)) + below * (1 + shared) + 1
        per_logit = t + n_layers * (t * (features + 1) + 1 + shared)
        return float(per_feature.mean() * rows + per_logit * config.max_logits)

    def attention(seen: Any) -> Any:
        return 2.0 * seen * (d * (queries + values) + seen * queries)

    def mlp(seen: Any) -> Any:
        return 2.0 * seen * d * (k + 2 + d * skip)

    computed = edges(k, 0)
    # Features that were left out share a column per layer.
    stored = edges(k * rows / active, 1) if left_out else computed
    per_row = float(((below + 1) * attention(seen) + below * mlp(seen)).mean())
    gradients = batch * t * (2 * d + queries + 2 * values) * element
    weights_and_sources = (d * (queries + values) + t * (k + 2) * d) * element
    traffic = 2 * gradients * float(seen.mean()) / t + weights_and_sources
    sources = t * (k + 2) * d * element
    return {
        "active_features": active,
        "rows": rows,
        "columns": columns,
        "nodes": nodes,
        "edges": stored,
        "file": stored * (element + 5) + nodes * (52 + 8 * n_layers * left_out),
        "batch": batch,
        # As swept, absolute values, a byte for which are there, and int64 places of these.
        "row_buffer": batch * columns * (2 * element + 9),
        "gradients": gradients,
        # Of all layers when they fit `adjoint.CACHE_BYTES`, else of one at a time.
        "sources": sources * n_layers if sources * n_layers <= 1 << 30 else sources,
        "assembly": (computed + stored) * (element + 4),
        "flops": per_row * rows + n_layers * (attention(t) + mlp(t)) * config.max_logits,
        "moved": (rows + config.max_logits) / batch * traffic * n_layers / 2,
    }


def _sections(
    cfg: AppConfig, adapter: Adapter, transcoders: _Transcoders, n_tokens: int, n_soft: int
) -> dict[str, tuple[str, Callable[[float], str], dict[str, float]]]:
    """By title: the group of metrics, how they are shown, and the numbers of the model and of one graph."""
    from vlmscope.models import sizes

    cfg.attribution.check()
    dtype, machine = cfg.model.dtype, MACHINES[cfg.task.device]
    swept = dtype if cfg.attribution.dtype == "model" else cfg.attribution.dtype
    element, n_layers, d = BYTES[dtype], adapter.n_layers, adapter.d_model
    _, k, skip, activation, _ = transcoders
    # Before the soft tokens come bos, start of turn, user, newline and begin of image.
    first = min(5, n_tokens - n_soft)
    soft = (first, first + n_soft * (adapter.model.config.model_type == "gemma3"))
    graph = graph_sizes(adapter, n_tokens, soft, min(k, *transcoders.widths), skip, cfg.attribution)
    parts, state = sizes.parameters_by_part(adapter), sizes.state_elements(adapter, n_tokens)
    model, recorded = parts["total"], sum(state.values())
    extra = sum(transcoder_numbers(d, width, skip, activation) for width in transcoders.widths)
    # The sweep needs copies of what is frozen where its dtype is not the model's.
    frozen = n_layers * d * sum(sizes.attention_widths(adapter)) + adapter.vocab_size * d + extra
    copies = (frozen + recorded) * BYTES[swept] if swept != dtype else 0
    forward = sizes.forward_elements(adapter, n_tokens, cfg.task.images, recorded=True) * element
    sweep = graph["row_buffer"] + graph["gradients"] + graph["sources"]
    traced = (model + extra + recorded) * element + copies + max(forward, sweep)
    flops = sizes.forward_flops(adapter, n_tokens, cfg.task.images)
    forward_time, _ = least_time(Work(flops, (model + 2 * recorded) * element, dtype), machine)
    sweep_time, _ = least_time(Work(graph["flops"], graph["moved"], swept), machine)
    memory = {
        "weights_bfloat16": model * 2,
        "transcoders_bfloat16": extra * 2,
        "forward": forward,  # inside one, an estimate
        "patterns": state["patterns"] * element,
        "state": recorded * element,  # all that is recorded of a forward, patterns included
        "copies": copies,
        "rows": graph["row_buffer"],  # dense, of one batch of targets
        "gradients": graph["gradients"],
        "sources": graph["sources"],  # what features, errors and biases write
        "trace": traced,  # all of it, on the device
        "assembly": graph["assembly"],  # on the host, while rows become a graph
        "file": graph["file"],  # graph.safetensors
    }
    times = {
        "forward/gflops": flops / 1e9,
        "forward/seconds": forward_time,
        "sweep/gflops": graph["flops"] / 1e9,  # the rows of the graph
        "sweep/seconds": sweep_time,
    }
    counts = {name: graph[name] for name in ("active_features", "rows", "nodes", "edges")}
    return {
        "Parameters": ("parameters/", "{:,.0f}".format, {**parts, "transcoders": extra}),
        f"Memory (model in {dtype}, sweep in {swept}, {graph['batch']} targets at once)": ("memory/", gb, memory),
        "One graph, at most": ("graph/", "{:,.0f}".format, counts),
        "Least time (roofline; expect two to three times that)": (
            "",
            lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
            times,
        ),
    }


@dataclass(frozen=True)
class TrainingSizes:
    """What training the transcoders of all layers keeps, sends and computes.

    Each rank has a copy of the frozen model, `model_bytes` in `dtype`, which runs over its share of a batch with
    `forward_bytes` alive and `forward_flops` operations. `encoder_dtype` is that of the encoder's dense product.
    """

    layout: Layout
    d_model: int
    arch: TranscoderArchConfig
    plan: TrainingPlan
    dtype: str = "float32"
    encoder_dtype: str = "float32"
    model_bytes: int = 0
    forward_bytes: int = 0
    forward_flops: float = 0.0

    @property
    def n_features(self) -> int:
        """F."""
        return self.arch.expansion_factor * self.d_model

    @property
    def numbers(self) -> int:
        """P."""
        return transcoder_numbers(self.d_model, self.n_features, self.arch.skip, self.arch.activation)

    @property
    def host_tokens(self) -> int:
        """n."""
        return ceil(self.plan.step_tokens / self.layout.hosts)

    @property
    def rank_tokens(self) -> int:
        """Tokens of a batch that one rank's copy of the model sees, when rows come out even."""
        return ceil(self.plan.step_tokens / self.layout.world)

    @property
    def captured(self) -> int:
        """Bytes of a layer's input and output at one token."""
        return 2 * self.d_model * BYTES[self.dtype]

    def memory(self, rank: int) -> dict[str, int]:
        """Bytes on a rank's device by part; a single rank also gathers the set there, to validate and to save."""
        layout, own, n = self.layout, len(self.layout.layers(rank)), self.host_tokens
        weights, batch = _FLOAT * self.numbers, n * (self.captured * own + 1)
        # All layers of the own share, what is sent, received and joined; alone, with padding and then without.
        exchange = self.rank_tokens * (2 * layout.n_layers - own) + 2 * n * own
        exchange = exchange if layout.world > 1 else 2 * self.rank_tokens * layout.n_layers
        encoder = BYTES[self.encoder_dtype]
        # Pre-activations, where a mask chooses also that and a copy; ten tensors [n, d]; copies in half precision.
        work = n * self.n_features * (encoder + (0 if self.arch.activation == "topk" else 1 + encoder))
        work += 10 * n * self.d_model * _FLOAT
        if encoder != _FLOAT:
            work += encoder * (self.n_features * (self.d_model + 1) + n * self.d_model)
        return {
            "model": self.model_bytes,
            "weights": weights * own,
            "gradients": weights * own,
            "moments": 2 * weights * own,
            "pool": batch * (self.plan.pool_batches + (self.plan.pool_batches > 1)),
            "forward": self.forward_bytes,
            "exchange": self.captured * exchange,
            "work": work,
            "gathered": weights * (layout.n_layers if layout.world == 1 else 1),
        }

    def peak(self, rank: int) -> int:
        """Bytes at the worst moment: what stays, and the largest of what passes."""
        parts = self.memory(rank)
        passing = [parts[part] for part in ("forward", "exchange", "work", "gathered")]
        return sum(parts.values()) - sum(passing) + max(passing)

    def sent_in_host(self, rank: int, tokens: int | None = None) -> int:
        """Bytes that a rank sends to the others of its host for one captured batch, of `tokens` or an even share."""
        others = [other for other in self.layout.members(self.layout.host(rank)) if other != rank]
        per_token = sum(self.captured * len(self.layout.layers(other)) + 1 for other in others)
        return (self.rank_tokens if tokens is None else tokens) * per_token

    def summed_over_hosts(self, rank: int) -> int:
        """Bytes that a rank adds up with its peers in one step: three sums and a mean of FVU, gradients, what fired."""
        if self.layout.hosts == 1:
            return 0
        per_layer = _FLOAT * (self.d_model + 3 + self.numbers) + 8 * (self.n_features + 1)
        return len(self.layout.layers(rank)) * per_layer

    def layer_work(self) -> dict[str, Work]:
        """What one layer takes in one step; a tensor is read and written once.

        The encoder's product is dense; what follows the choice of features touches k rows a token: a bag and a gradient
        of the decoder, the gradient of the values, a gradient of the encoder, each gradient of [F, d] written whole.
        """
        n, d, f, k = self.host_tokens, self.d_model, self.n_features, self.arch.k
        element = BYTES[self.encoder_dtype]
        pre, rows, weight = n * f * element, n * d * _FLOAT, f * d * _FLOAT
        read, passes = weight + rows, 4
        if element != _FLOAT:  # copies of the operands; the chosen values are computed anew
            read, passes = read + 2 * element * (f * d + n * d), 5
        # The bags; to cast, to standardise, bias, residual, FVU, and their gradients; the skip path.
        loss = passes * n * k * d * _FLOAT + 2 * weight + 15 * rows + (4 * rows + 2 * d * d * _FLOAT) * self.arch.skip
        return {
            "encoder": Work(2.0 * n * f * d, read + pre, self.encoder_dtype),
            "choice": Work(0.0, pre + n * k * (8 + _FLOAT)),
            "sparse": Work(passes * 2.0 * n * k * d + 4.0 * n * d * d * self.arch.skip, loss),
            # Clipping reads and writes gradients; AdamW reads them, and reads and writes the weight and two moments.
            "optimiser": Work(0.0, 10 * _FLOAT * self.numbers),
        }

    def step_work(self) -> dict[str, Work]:
        """What rank 0, which owns the most layers, does in one step; the parts follow one another."""
        layers, share = len(self.layout.layers(0)), 1 / self.plan.steps_per_batch
        # Written by the forward, packed, unpacked and joined; then each step is drawn from the pool.
        handled = 3 * self.captured * (self.rank_tokens * self.layout.n_layers + self.host_tokens * layers) * share
        drawn = 4 * self.captured * self.host_tokens * layers * (self.plan.pool_batches > 1)
        read = self.model_bytes + self.forward_bytes
        parts = {
            "forward": Work(self.forward_flops * share, read * share, self.dtype),
            "exchange": Work(0.0, handled + drawn, linked=self.sent_in_host(0) * share),
        }
        for part, work in self.layer_work().items():
            parts[part] = work._replace(flops=work.flops * layers, moved=work.moved * layers)
        if hosts := self.layout.hosts - 1:  # in a ring each device sends 2 (H - 1) / H of a tensor
            summed = self.summed_over_hosts(0)
            parts["sums"] = Work(0.0, 3.0 * summed, networked=summed * 2 * hosts / (hosts + 1))
        return parts


def plan_training(cfg: AppConfig, adapter: Adapter, machine: Machine) -> dict[str, float]:
    """Print the plan of training new transcoders and return its metrics."""
    from vlmscope.models.sizes import forward_elements, forward_flops, parameters_by_part
    from vlmscope.training.ranks import Layout

    if cfg.transcoder.cross_layer:
        raise UserError("task=plan counts transcoders of single layers; leave out transcoder.cross_layer")
    plan, arch, element = cfg.task.training, cfg.transcoder, BYTES[cfg.model.dtype]
    layout = Layout(adapter.n_layers, plan.gpus * plan.hosts, plan.gpus)
    share = ceil(plan.step_tokens / layout.world)
    pictures = plan.images / plan.tokens * share
    sizes = TrainingSizes(
        layout,
        adapter.d_model,
        arch,
        plan,
        cfg.model.dtype,
        "bfloat16" if cfg.trainer.precision == "bf16-mixed" else "float32",
        model_bytes=parameters_by_part(adapter)["total"] * element,
        forward_bytes=forward_elements(adapter, share, ceil(pictures), recorded=False) * element,
        forward_flops=forward_flops(adapter, share, pictures, plan.context),
    )
    ranks, metrics = layout.members(0), {}
    counts = ", ".join(str(len(layout.layers(rank))) for rank in ranks)
    print(f"\nTraining on {plan.tokens:,} tokens and {plan.images:,} pictures, {plan.step_tokens:,} tokens a step")
    print(f"  layers of ranks 0 to {plan.gpus - 1} of each of {plan.hosts} hosts: {counts}")

    # Ranks with the same figures share a column, named by the first.
    shown = sorted({sizes.peak(rank): rank for rank in reversed(ranks)}.values())
    parts = {rank: sizes.memory(rank) for rank in shown}
    # What stays: the model, its layers' transcoders, activations of the pool and of the step. Then the largest of what
    # passes: a forward, the exchange of activations, the layer in work, the set gathered to validate and to save.
    print("\nMemory of a rank")
    print(_line("", *(f"rank {rank}" for rank in shown)))
    for part, size in parts[0].items():
        metrics[f"memory/{part}"] = size
        print(_line(part, *(gb(parts[rank][part]) for rank in shown)))
    print(_line("at the worst moment", *(gb(sizes.peak(rank)) for rank in shown)))
    metrics |= {f"peak/rank_{rank:02d}": sizes.peak(rank) for rank in ranks}
    needed, memory = sizes.peak(0), (machine.memory or np.inf) * 1e9  # rank 0 owns the most layers
    if needed > memory:
        print(
            f"\nTraining does not fit: a rank needs {gb(needed)} of the {gb(memory)} of {cfg.task.device}; choose a "
            "smaller task.training.step_tokens or transcoder.expansion_factor, or more task.training.gpus"
        )

    work, n_layers = sizes.step_work(), adapter.n_layers
    # BatchTopK's threshold is written for every feature of the set.
    stored = sizes.numbers + sizes.n_features * (arch.activation == "batchtopk")
    bytes_of = {
        "traffic/in_host": sizes.sent_in_host(0),  # of a captured batch
        "traffic/between_hosts": work.get("sums", Work()).networked,  # in a step
        "disk/checkpoint": 3 * _FLOAT * sizes.numbers * n_layers,  # two stand while one is written
        "disk/set": 2 * stored * n_layers,  # in bfloat16
        "disk/cache": plan.tokens * sizes.captured * n_layers,  # of all activations (task.cache), if wanted
    }
    print("\nSent by rank 0, and on disk\n" + "\n".join(_line(key, gb(size)) for key, size in bytes_of.items()))
    metrics |= bytes_of

    times = {part: least_time(needs, machine) for part, needs in work.items()}
    steps = ceil(plan.tokens / plan.step_tokens) * plan.steps_per_batch
    step = sum(seconds for seconds, _ in times.values())
    hours = step * steps / 3600
    print(
        f"\nLeast time of a step of rank 0 (roofline; {steps:,} steps, the encoder's product in {sizes.encoder_dtype})"
    )
    for part, (seconds, bound) in times.items():
        metrics[f"seconds/{part}"] = seconds
        print(_line(part, f"{seconds * 1e3:.3g} ms", f"{seconds / step:.0%}") + f", bound by {bound}")
    print(_line("all steps", f"{hours:.3g} h") + " at the least; expect two to three times that")
    metrics |= {"steps": steps, "hours": hours, "gpu_hours": hours * plan.gpus * plan.hosts}
    return {f"plan/training/{key}": float(value) for key, value in metrics.items()}
