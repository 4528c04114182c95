"""Needs of a model without its weights: parameters, memory, one graph, training: sizes and least times.

Counts follow the code that would run. Exact: parameters, the recorded state of a forward, a graph's rows, columns and
nodes, and the tensors that training keeps. Edges of a graph are those that causal attention can carry, with rows spread
evenly over layers and positions. Buffers inside a forward and a step are estimates. Times are lower bounds by the
roofline (Williams, Waterman and Patterson 2009): the slowest of arithmetic, memory and link.
Legend: T positions, d width, k active features of a position, F features of a layer; n tokens of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlmscope.core.errors import UserError, check_choice, check_least
from vlmscope.core.hub import gb
from vlmscope.training.config import BatchConfig, RecipeConfig

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

    `link` is what one device sends to the others.
    """

    name: str
    float64: float
    float32: float
    half: float
    bandwidth: float
    memory: float | None
    link: float


# GPUs by NVIDIA's datasheets of the GPU and of its DGX. float32 is of the plain units, not TF32; half precision of
# the tensor cores without sparsity. The link is half of the datasheet's NVLink (PCIe for L4), which counts both
# directions. The CPU: measured with torch 2.13, one thread, best of 12, matmul of 2048 x 2048 and copy of 128 MiB.
MACHINES = {
    "h100": Machine("NVIDIA H100 SXM, 80 GB (by its datasheet)", 34, 67, 989, 3350, 80, 450),
    "h200": Machine("NVIDIA H200 SXM, 141 GB (by its datasheet)", 34, 67, 989, 4800, 141, 450),
    "a100": Machine("NVIDIA A100 SXM, 80 GB (by its datasheet)", 9.7, 19.5, 312, 2039, 80, 300),
    "l4": Machine("NVIDIA L4, 24 GB (by its datasheet)", 0.5, 30.3, 121, 300, 24, 32),
    "cpu": Machine("one core of an AMD EPYC, without half precision (measured)", 0.027, 0.072, 0.0007, 7.7, None, 7.7),
}


class Work(NamedTuple):
    """Operations in a dtype, and bytes through memory and the host's link."""

    flops: float = 0.0
    moved: float = 0.0
    dtype: str = "float32"
    linked: float = 0.0


def least_time(work: Work, machine: Machine) -> tuple[float, str]:
    """The roofline: least seconds for the work, and which of the three rates bounds them."""
    rate = {"float64": machine.float64, "float32": machine.float32}.get(work.dtype, machine.half)
    return max(
        (work.flops / (rate * 1e12), "arithmetic"),
        (work.moved / (machine.bandwidth * 1e9), "memory"),
        (work.linked / (machine.link * 1e9), "link"),
    )


@dataclass
class TrainingPlan:
    """Machines and data of a training run that sees each token once; soft tokens of pictures are among the tokens.

    `tokens` None is what the steps come to (trainer.max_steps), `images` None what the sources of a mix come to.
    """

    gpus: int = 8  # of one host
    tokens: int | None = None
    images: int | None = None
    context: int = 2048  # length of a text


USES = ("attribution", "data", "optim")


@dataclass
class Config(RecipeConfig, BatchConfig):
    """The prompt is `tokens` long: by default `images` pictures' soft tokens and `text_tokens` of text.

    With transcoder=arch, their training is planned: of `task.tokens_per_batch` tokens and the other keys
    that task=train_transcoders has, so that `experiment=NAME task=plan` plans an experiment that trains.
    """

    tokens: int | None = None
    images: int = 1
    text_tokens: int = 64
    device: str = "h100"  # whose time is estimated
    training: TrainingPlan = field(default_factory=TrainingPlan)

    def __post_init__(self) -> None:
        RecipeConfig.__post_init__(self)
        BatchConfig.__post_init__(self)
        check_choice("task.device", self.device, MACHINES)
        check_least("task", self, tokens=1, images=0, text_tokens=1)
        check_least("task.training", self.training, gpus=1, tokens=1, images=0, context=1)


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Print the tables and return their numbers: `plan/...`, sizes in bytes, times in seconds."""
    from vlmscope.models.checkpoint import DTYPES
    from vlmscope.models.families import adapter_for
    from vlmscope.models.sizes import empty_model, find_config, prompt_tokens
    from vlmscope.models.tiny import tiny_vlm
    from vlmscope.training.config import TranscoderArchConfig

    task, model, machine = cfg.task, cfg.model, MACHINES[cfg.task.device]
    if model.family is None:
        config = find_config(model.path, model.hub, model.revision)
    else:
        config = tiny_vlm(model.family, seed=cfg.seed).model.config.to_dict()
    adapter = adapter_for(empty_model(config, DTYPES[model.dtype]))
    n_tokens, n_soft = prompt_tokens(adapter, task.tokens, task.images, task.text_tokens)
    widths, kind = _transcoders(cfg, adapter, context.overrides)
    print(f"{model.name}: {adapter.n_layers} layers of width {adapter.d_model}; machine: {machine.name}")
    print(f"{max(widths):,} features a layer, k={kind.k}; prompt: {n_tokens:,} tokens, {n_soft:,} of them soft")
    metrics = plan_graph(cfg, adapter, n_tokens, n_soft, widths, kind)
    if isinstance(cfg.transcoder, TranscoderArchConfig):
        metrics |= plan_training(cfg, adapter)
    for group in dict.fromkeys(key.rpartition("/")[0] for key in metrics):
        rows = [_line(key, number) for key, number in metrics.items() if key.rpartition("/")[0] == group]
        print(f"\n{group.replace('/', ', ')}\n" + "\n".join(rows))
    print("\nTimes are lower bounds; expect two to three times as much.")
    numbers = {key: float(number[0] if isinstance(number, tuple) else number) for key, number in metrics.items()}
    limit = (machine.memory or np.inf) * 1e9
    short = f"needs more than the {gb(limit)} of {task.device}"
    if numbers["memory/trace"] > limit:
        print(f"\nTracing {short}: give model.offload=cpu, attribution.dtype=model, or narrower transcoders.")
    if numbers.get("training/peak/rank_00", 0) > limit:  # it owns the most layers
        print(f"\nTraining {short}: choose a smaller task.tokens_per_batch or expansion_factor, or more GPUs.")
    return {f"plan/{key}": number for key, number in numbers.items()}


def _line(key: str, number: float | tuple[float, str]) -> str:
    """A line of the tables, its unit by the name of the metric; a time with its bound."""
    name = f"  {key.rpartition('/')[2].replace('_', ' '):<32}"
    if isinstance(number, tuple):
        return f"{name}{number[0]:>16.3g}  bound by {number[1]}"
    if any(part in key for part in ("memory", "peak", "traffic", "disk")):
        return f"{name}{gb(number):>16}"
    return f"{name}{f'{number:,.0f}' if number >= 100 else f'{number:.3g}':>16}"


def transcoder_numbers(d_model: int, n_features: int, skip: bool, activation: str) -> int:
    """Parameters: W_enc, W_dec [F, d], b_enc [F], b_dec [d], a skip path [d, d], and JumpReLU's thresholds [F]."""
    return (2 * n_features + 1 + d_model * skip) * d_model + n_features * (1 + (activation == "jumprelu"))


def _transcoders(cfg: AppConfig, adapter: Adapter, overrides: tuple[str, ...]) -> tuple[list[int], Any]:
    """Features of each layer, and k, skip and activation, of the set that fits the model, else of a new one."""
    from vlmscope.config.schema import RandomTranscodersConfig
    from vlmscope.config.wiring import trained_transcoders
    from vlmscope.training.config import TranscoderArchConfig

    chosen, layers, d = cfg.transcoder, adapter.n_layers, adapter.d_model
    if isinstance(chosen, RandomTranscodersConfig):
        return [chosen.n_features or 4 * d] * layers, chosen
    if not isinstance(chosen, TranscoderArchConfig):
        try:
            own_set = trained_transcoders(cfg, layers, d)
            return [transcoder.config.n_features for transcoder in own_set.transcoders.values()], own_set[0].config
        except UserError:
            if any(override.lstrip("+~").startswith("transcoder") for override in overrides):
                raise
        chosen = TranscoderArchConfig()
    return [chosen.expansion_factor * d] * layers, chosen


def graph_sizes(
    adapter: Adapter, n_tokens: int, soft: tuple[int, int], k: int, skip: bool, config: AttributionConfig
) -> tuple[dict[str, float], float]:
    """Counts and bytes of one graph, and operations of its sweeps.

    Soft tokens from `soft[0]` to before `soft[1]` see each other.
    """
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
        """Edges of all rows, with `features` columns per position and layer, and `shared` ones per layer."""
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
    sources = t * (k + 2) * d * element
    sizes = {
        # Dense, of one batch: as swept, absolute values, a byte for which are there, and int64 places of these.
        "memory/rows": batch * columns * (2 * element + 9),
        "memory/gradients": batch * t * (2 * d + queries + 2 * values) * element,
        # Of all layers when they fit `adjoint.CACHE_BYTES`, else of one at a time.
        "memory/sources": sources * n_layers if sources * n_layers <= 1 << 30 else sources,
        "memory/assembly": (computed + stored) * (element + 4),  # on the host, while rows become a graph
        "memory/file": stored * (element + 5) + nodes * (52 + 8 * n_layers * left_out),
        "graph/active_features": active,
        "graph/rows": rows,
        "graph/nodes": nodes,
        "graph/edges": stored,
    }
    return sizes, per_row * rows + n_layers * (attention(t) + mlp(t)) * config.max_logits


def plan_graph(
    cfg: AppConfig, adapter: Adapter, n_tokens: int, n_soft: int, widths: list[int], kind: Any
) -> dict[str, float | tuple[float, str]]:
    """Parameters, memory, size and least time of one graph."""
    from vlmscope.models import sizes

    cfg.attribution.check()
    dtype, machine = cfg.model.dtype, MACHINES[cfg.task.device]
    swept = dtype if cfg.attribution.dtype == "model" else cfg.attribution.dtype
    element, n_layers, d = BYTES[dtype], adapter.n_layers, adapter.d_model
    # Before the soft tokens come bos, start of turn, user, newline and begin of image.
    first = min(5, n_tokens - n_soft)
    soft = (first, first + n_soft * (adapter.model.config.model_type == "gemma3"))
    graph, swept_flops = graph_sizes(adapter, n_tokens, soft, min(kind.k, *widths), kind.skip, cfg.attribution)
    parts, state = sizes.parameters_by_part(adapter), sizes.state_elements(adapter, n_tokens)
    model, recorded = parts["total"], sum(state.values())
    extra = sum(transcoder_numbers(d, width, kind.skip, kind.activation) for width in widths)
    # The sweep needs copies of what is frozen where its dtype is not the model's.
    frozen = n_layers * d * sum(sizes.attention_widths(adapter)) + adapter.vocab_size * d + extra
    copies = (frozen + recorded) * BYTES[swept] if swept != dtype else 0
    forward = sizes.forward_elements(adapter, n_tokens, cfg.task.images, recorded=True) * element
    sweep = graph["memory/rows"] + graph["memory/gradients"] + graph["memory/sources"]
    flops = sizes.forward_flops(adapter, n_tokens, cfg.task.images)
    return {
        **{f"parameters/{part}": count for part, count in parts.items()},
        "parameters/transcoders": extra,
        "memory/weights_bfloat16": model * 2,
        "memory/transcoders_bfloat16": extra * 2,
        "memory/forward": forward,  # inside one, an estimate
        "memory/patterns": state["patterns"] * element,
        "memory/state": recorded * element,  # all that is recorded of a forward, patterns included
        "memory/copies": copies,
        "memory/trace": (model + extra + recorded) * element + copies + max(forward, sweep),  # on the device
        **graph,
        "forward/gflops": flops / 1e9,
        "forward/seconds": least_time(Work(flops, (model + 2 * recorded) * element, dtype), machine),
        "sweep/gflops": swept_flops / 1e9,
        "sweep/seconds": least_time(Work(swept_flops, dtype=swept), machine),
    }


def layer_work(n: int, d: int, arch: TranscoderArchConfig, encoder_dtype: str = "float32") -> dict[str, Work]:
    """Work of one layer's transcoder in one step on n tokens; each tensor is read and written once.

    The encoder's product is dense; what follows the choice of features touches k rows a token: a bag and a gradient of
    the decoder, the gradient of the values, a gradient of the encoder, each gradient of [F, d] written whole.
    """
    f, k, skip, element = arch.expansion_factor * d, arch.k, arch.skip, BYTES[encoder_dtype]
    pre, rows, weight = n * f * element, n * d * _FLOAT, f * d * _FLOAT
    read, passes = weight + rows, 4
    if element != _FLOAT:  # copies of the operands; the chosen values are computed anew
        read, passes = read + 2 * element * (f * d + n * d), 5
    # The bags; to cast, to standardise, bias, residual, FVU, and their gradients; the skip path.
    loss = passes * n * k * d * _FLOAT + 2 * weight + 15 * rows + (4 * rows + 2 * d * d * _FLOAT) * skip
    return {
        "encoder": Work(2.0 * n * f * d, read + pre, encoder_dtype),
        "choice": Work(0.0, pre + n * k * (8 + _FLOAT)),
        "sparse": Work(passes * 2.0 * n * k * d + 4.0 * n * d * d * skip, loss),
        # Clipping reads and writes gradients; AdamW reads them, and reads and writes the weight and two moments.
        "optimiser": Work(0.0, 10 * _FLOAT * transcoder_numbers(d, f, skip, arch.activation)),
    }


def rank_memory(
    layout: Layout, rank: int, d: int, arch: TranscoderArchConfig, recipe: Config, dtype: str, encoder_dtype: str
) -> dict[str, int]:
    """Bytes on a rank's device besides the frozen model, by part; the last three are temporary.

    The set is gathered, to validate and to save, on the device of a single rank; of several, on the CPU.
    """
    layers, n, share = len(layout.layers(rank)), recipe.tokens_per_batch, recipe.tokens_per_batch / layout.world
    f, encoder, captured = arch.expansion_factor * d, BYTES[encoder_dtype], 2 * d * BYTES[dtype]
    weights = _FLOAT * transcoder_numbers(d, f, arch.skip, arch.activation)
    # All layers of the own share, what is sent, received and joined; alone, with padding and then without.
    exchange = ceil(share) * (2 * layout.n_layers - layers) + 2 * n * layers
    # Of the layer in work: pre-activations, where a mask chooses also that and a copy; ten tensors [n, d]; in half
    # precision copies of weights and inputs.
    work = n * f * (encoder + (0 if arch.activation == "topk" else 1 + encoder)) + 10 * n * d * _FLOAT
    work += encoder * (f * (d + 1) + n * d) if encoder != _FLOAT else 0
    batches = recipe.pool_batches + (recipe.pool_batches > 1)  # those of the pool, and the step's
    return {
        "weights": weights * layers,
        "gradients": weights * layers,
        "moments": 2 * weights * layers,
        "pool": batches * n * (captured * layers + 1),
        "exchange": captured * (exchange if layout.world > 1 else 2 * n * layout.n_layers),
        "work": work,
        "gathered": weights * (layout.n_layers if layout.world == 1 else 1),
    }


def pictures_of(cfg: AppConfig, adapter: Adapter, tokens: int) -> int:
    """Pictures among the tokens of a mix: each source has its weight of them, a picture comes with `text_tokens`."""
    from vlmscope.models.sizes import soft_tokens

    sources, kinds = cfg.data.sources.values(), ("hf_image_label", "hf_cauldron")
    seen = sum(source.weight for source in sources if source.kind in kinds and source.images)
    per_picture = (soft_tokens(adapter) or 0) + cfg.task.text_tokens
    return round(tokens * seen / (sum(source.weight for source in sources) or 1) / per_picture)


def plan_training(cfg: AppConfig, adapter: Adapter) -> dict[str, float | tuple[float, str]]:
    """Ranks, memory, traffic, disk and least time of training new transcoders."""
    from vlmscope.models.sizes import forward_elements, forward_flops, parameters_by_part
    from vlmscope.training.ranks import Layout

    if cfg.transcoder.cross_layer:
        raise UserError("task=plan counts transcoders of single layers; leave out transcoder.cross_layer")
    recipe, plan, arch, dtype, d = cfg.task, cfg.task.training, cfg.transcoder, cfg.model.dtype, adapter.d_model
    half = "bfloat16" if cfg.trainer.precision == "bf16-mixed" else "float32"
    layout = Layout(adapter.n_layers, plan.gpus)
    ranks, layers = range(layout.world), len(layout.layers(0))  # rank 0 owns the most layers
    n, share = recipe.tokens_per_batch, ceil(recipe.tokens_per_batch / layout.world)
    steps, tokens = cfg.trainer.max_steps, plan.tokens
    if tokens is None:
        tokens = ceil(steps / recipe.steps_per_batch) * recipe.tokens_per_batch
    else:
        steps = ceil(tokens / recipe.tokens_per_batch) * recipe.steps_per_batch
    images = pictures_of(cfg, adapter, tokens) if plan.images is None else plan.images
    pictures = images / tokens * share
    # Every rank has a copy of the frozen model, which runs over its share of a batch.
    model = parameters_by_part(adapter)["total"] * BYTES[dtype]
    forward = forward_elements(adapter, share, ceil(pictures), recorded=False) * BYTES[dtype]
    memory = [{"model": model, **rank_memory(layout, rank, d, arch, recipe, dtype, half)} for rank in ranks]
    sizes = [list(parts.values()) for parts in memory]
    peaks = [sum(parts[:-3]) + max(forward, *parts[-3:]) for parts in sizes]  # what stays, the largest that passes
    captured = 2 * d * BYTES[dtype]  # bytes of a layer's input and output at one token
    sent = share * sum(captured * len(layout.layers(rank)) + 1 for rank in ranks[1:])
    # Activations are written by the forward, packed, unpacked and joined; then each step is drawn from the pool.
    handled = 3 * captured * (share * layout.n_layers + n * layers) / recipe.steps_per_batch
    drawn = 4 * captured * n * layers * (recipe.pool_batches > 1)
    flops = forward_flops(adapter, share, pictures, plan.context)
    work = {
        "forward": Work(flops / recipe.steps_per_batch, (model + forward) / recipe.steps_per_batch, dtype),
        "exchange": Work(0.0, handled + drawn, linked=sent / recipe.steps_per_batch),
    }
    for part, needs in layer_work(n, d, arch, half).items():
        work[part] = needs._replace(flops=needs.flops * layers, moved=needs.moved * layers)
    f, weights = arch.expansion_factor * d, memory[0]["weights"] // layers
    times = {part: least_time(needs, MACHINES[cfg.task.device]) for part, needs in work.items()}
    hours = sum(seconds for seconds, _ in times.values()) * steps / 3600
    # BatchTopK's threshold is written for every feature of the set, which is in bfloat16.
    stored = weights // 2 + 2 * f * (arch.activation == "batchtopk")
    return {
        **{f"training/layers/rank_{rank:02d}": len(layout.layers(rank)) for rank in ranks},
        "training/memory/forward": forward,
        **{f"training/memory/{part}": size for part, size in memory[0].items()},
        **{f"training/peak/rank_{rank:02d}": size for rank, size in enumerate(peaks)},
        "training/traffic": sent,  # sent by rank 0, of a captured batch
        "training/disk/checkpoint": 3 * weights * layout.n_layers,  # two stand while one is written
        "training/disk/set": stored * layout.n_layers,
        **{f"training/seconds/{part}": time for part, time in times.items()},  # of a step of rank 0
        "training/tokens": tokens,
        "training/images": images,
        "training/steps": steps,
        "training/hours": hours,
        "training/gpu_hours": hours * layout.world,
    }
