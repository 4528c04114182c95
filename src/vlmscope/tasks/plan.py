"""Needs of a model without its weights: parameters, memory, the size of one graph, and the least time it takes.

A model's size comes from its `config.json` alone: its architecture is built on the `meta` device, where tensors have
shapes but no memory. `models/published/NAME.json` holds the numbers of `google/NAME`'s in transformers' spelling.

Counts follow the code that would run. Exact: parameters, the recorded state of a forward, a graph's rows, columns and
nodes. Edges of a graph are those that causal attention can carry, with rows spread evenly over layers and positions.
Buffers inside a forward are estimates. Times are lower bounds by the roofline (Williams, Waterman and Patterson 2009):
the slower of arithmetic and memory.
Legend: T positions, d width, k active features of a position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from vlmscope import models
from vlmscope.attribution.config import AttributionConfig
from vlmscope.circuits.config import CircuitConfig, baselines_of
from vlmscope.config import AppConfig
from vlmscope.config.schema import RandomTranscodersConfig
from vlmscope.config.wiring import trained_transcoders
from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError, check_choice
from vlmscope.core.hub import cached_folder, gb, is_commit, is_hub_id
from vlmscope.models.base import Adapter
from vlmscope.models.checkpoint import DTYPES, read_config
from vlmscope.models.families import adapter_for, family_of
from vlmscope.models.tiny import tiny_vlm
from vlmscope.tasks.settings import RunContext
from vlmscope.training.config import TranscoderArchConfig

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PUBLISHED = {
    f"google/{file.stem}": file for file in sorted(Path(models.__file__).with_name("published").glob("*.json"))
}


class Machine(NamedTuple):
    """Rates in 10^12 operations a second (a multiply and an add are two), GB/s, and memory in GB (None: unbounded)."""

    name: str
    float64: float
    float32: float
    half: float
    bandwidth: float
    memory: float | None


# GPUs by NVIDIA's datasheets. float32 is of the plain units, not TF32; half precision of the tensor cores without
# sparsity. The CPU: measured with torch 2.13, one thread, best of 12, matmul of 2048 x 2048 and copy of 128 MiB.
MACHINES = {
    "h100": Machine("NVIDIA H100 SXM, 80 GB (by its datasheet)", 34, 67, 989, 3350, 80),
    "h200": Machine("NVIDIA H200 SXM, 141 GB (by its datasheet)", 34, 67, 989, 4800, 141),
    "a100": Machine("NVIDIA A100 SXM, 80 GB (by its datasheet)", 9.7, 19.5, 312, 2039, 80),
    "l4": Machine("NVIDIA L4, 24 GB (by its datasheet)", 0.5, 30.3, 121, 300, 24),
    "cpu": Machine("one core of an AMD EPYC, without half precision (measured)", 0.027, 0.072, 0.0007, 7.7, None),
}


class Work(NamedTuple):
    """Operations in a dtype, and bytes through memory."""

    flops: float = 0.0
    moved: float = 0.0
    dtype: str = "float32"


def least_time(work: Work, machine: Machine) -> tuple[float, str]:
    """The roofline: least seconds for the work, and which of the two rates bounds them."""
    rate = {"float64": machine.float64, "float32": machine.float32}.get(work.dtype, machine.half)
    return max((work.flops / (rate * 1e12), "arithmetic"), (work.moved / (machine.bandwidth * 1e9), "memory"))


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Print the tables and return their numbers: `plan/...`, sizes in bytes, times in seconds."""
    task, model = cfg.task, cfg.model
    check_choice("task.device", task.device, MACHINES)
    machine = MACHINES[task.device]
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
    if cfg.circuit is not None:
        metrics |= plan_experiment(cfg, cfg.circuit, *(metrics[f"{part}/seconds"] for part in ("forward", "sweep")))
    for group in dict.fromkeys(key.rpartition("/")[0] for key in metrics):
        rows = [_line(key, number) for key, number in metrics.items() if key.rpartition("/")[0] == group]
        print(f"\n{group.replace('/', ', ')}\n" + "\n".join(rows))
    print("\nTimes are lower bounds; expect two to three times as much.")
    numbers = {key: float(number[0] if isinstance(number, tuple) else number) for key, number in metrics.items()}
    limit = (machine.memory or np.inf) * 1e9
    if numbers["memory/trace"] > limit:
        advice = "give model.offload=cpu, attribution.dtype=model, or narrower transcoders"
        print(f"\nTracing needs more than the {gb(limit)} of {task.device}: {advice}.")
    return {f"plan/{key}": number for key, number in numbers.items()}


def _line(key: str, number: float | tuple[float, str]) -> str:
    """A line of the tables, its unit by the name of the metric; a time with its bound."""
    name = f"  {key.rpartition('/')[2].replace('_', ' '):<32}"
    if isinstance(number, tuple):
        return f"{name}{number[0]:>16.3g}  bound by {number[1]}"
    if "memory" in key:
        return f"{name}{gb(number):>16}"
    return f"{name}{f'{number:,.0f}' if number >= 100 else f'{number:.3g}':>16}"


def plan_experiment(
    cfg: AppConfig, circuit: CircuitConfig, forward: float | tuple[float, str], sweep: float | tuple[float, str]
) -> dict[str, float]:
    """Graphs that choose a circuit, and runs of its test pictures, with controls and baselines, at most.

    A run is a forward, or a whole answer.
    """
    asked = [len(question.of(circuit.concepts)) for question in circuit.questions.values()]
    cells = sum(1 if len(circuit.concepts) == 2 else n * (n - 1) for n in asked)
    runs = 0
    for setting in (each for each in cfg.settings.values() if each.cases in ("test", "wrong")):
        draws = setting.matched + setting.random_direction
        for trial in setting.of or cfg.trials:
            cases = min(setting.first or cfg.intervention.pictures, cfg.intervention.pictures)
            on = min(setting.draws_on or cases, cases)
            baselines = len(baselines_of(cfg.trials[trial], setting)) * min(setting.baselines_on or cases, cases)
            runs += cells * len(setting.combinations(1.0)) * (cases + draws * on + baselines)
    graphs = sum(asked) * circuit.graphs
    once, swept = (part[0] if isinstance(part, tuple) else part for part in (forward, sweep))
    times = {"experiment/seconds_of_graphs": graphs * (once + swept), "experiment/seconds_of_runs": runs * once}
    return {"experiment/graphs": graphs, "experiment/runs": runs} | times


def transcoder_numbers(d_model: int, n_features: int, skip: bool, activation: str) -> int:
    """Parameters: W_enc, W_dec [F, d], b_enc [F], b_dec [d], a skip path [d, d], and JumpReLU's thresholds [F]."""
    return (2 * n_features + 1 + d_model * skip) * d_model + n_features * (1 + (activation == "jumprelu"))


def _transcoders(cfg: AppConfig, adapter: Adapter, overrides: tuple[str, ...]) -> tuple[list[int], Any]:
    """Features of each layer, and k, skip and activation, of the set that fits the model, else of a new one."""
    chosen, layers, d = cfg.transcoder, adapter.n_layers, adapter.d_model
    if isinstance(chosen, RandomTranscodersConfig):
        return [chosen.n_features or 4 * d] * layers, chosen
    if not isinstance(chosen, TranscoderArchConfig):
        try:
            own_set = trained_transcoders(cfg, adapter)
            return [transcoder.config.n_features for transcoder in own_set.transcoders.values()], own_set[0].config
        except UserError:
            if chosen.n_features is not None:  # of a set that is not here yet
                k = chosen.k or TranscoderArchConfig().k
                return [chosen.n_features] * layers, TranscoderArchConfig(k=k, skip=bool(chosen.affine))
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
    cfg.attribution.check()
    dtype, machine = cfg.model.dtype, MACHINES[cfg.task.device]
    swept = dtype if cfg.attribution.dtype == "model" else cfg.attribution.dtype
    element, n_layers, d = BYTES[dtype], adapter.n_layers, adapter.d_model
    # Before the soft tokens come bos, start of turn, user, newline and begin of image.
    first = min(5, n_tokens - n_soft)
    soft = (first, first + n_soft * (adapter.model.config.model_type == "gemma3"))
    graph, swept_flops = graph_sizes(adapter, n_tokens, soft, min(kind.k, *widths), kind.skip, cfg.attribution)
    parts, state = parameters_by_part(adapter), state_elements(adapter, n_tokens)
    model, recorded = parts["total"], sum(state.values())
    extra = sum(transcoder_numbers(d, width, kind.skip, kind.activation) for width in widths)
    # The sweep needs copies of what is frozen where its dtype is not the model's.
    frozen = n_layers * d * sum(attention_widths(adapter)) + adapter.vocab_size * d + extra
    copies = (frozen + recorded) * BYTES[swept] if swept != dtype else 0
    forward = forward_elements(adapter, n_tokens, cfg.task.images) * element
    sweep = graph["memory/rows"] + graph["memory/gradients"] + graph["memory/sources"]
    flops = forward_flops(adapter, n_tokens, cfg.task.images)
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


# Sizes of a model and of its forward


def find_config(path: str, hub: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model from a folder, the hub's cache, or `PUBLISHED`; nothing is fetched."""
    if Path(path).is_dir():
        return read_config(Path(path))
    repo = hub or (path if is_hub_id(path) else None)
    if repo is not None and revision is not None and is_commit(revision):
        folder = cached_folder(repo, revision)
        if (folder / "config.json").is_file():
            return read_config(folder)
    if repo in PUBLISHED:
        return read_json(PUBLISHED[repo])
    raise UserError(
        f"no folder {path}, and of {repo or path} nothing is known here: its config.json alone, in a folder that "
        f"model.path= names, is enough; known without it: {', '.join(PUBLISHED)}"
    )


def empty_model(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face model of a `config.json` on the `meta` device: shapes, no memory."""
    model_type = str(config.get("model_type"))
    model_class: Any = getattr(transformers, family_of(model_type, "config.json").model)
    try:
        with torch.device("meta"):
            read = model_class.config_class.from_dict(config)
            return model_class._from_config(read, dtype=dtype).eval()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"transformers refuses the config.json of this {model_type} model: {reason}") from error


def parameters_by_part(adapter: Adapter) -> dict[str, int]:
    """Parameters by part, shared ones counted once, so that the parts add up to the last entry, `total`."""
    decoder: Any = adapter.decoder()
    seen: set[Any] = set()

    def count_new(*modules: Any) -> int:
        fresh = {parameter for module in modules for parameter in module.parameters()} - seen
        seen.update(fresh)
        return sum(parameter.numel() for parameter in fresh)

    # The order matters: shared parameters count for the first part that has them.
    parts = {"embeddings": count_new(decoder.embed_tokens), "decoder": count_new(decoder)}
    parts["head"] = count_new(adapter.lm_head())
    towers = ("vision_tower", "vision_model", "visual")
    parts["vision"] = count_new(*(m for name, m in adapter.model.named_modules() if name.rpartition(".")[2] in towers))
    parts["projector"] = count_new(adapter.model)  # all that is left
    return {**parts, "total": sum(parts.values())}


def n_patches(adapter: Adapter) -> int | None:
    """Patches of one picture in the vision tower, 0 for a text-only model; None where they depend on its size."""
    vision = getattr(adapter.model.config, "vision_config", None)
    if vision is None:
        return 0
    if getattr(vision, "image_size", None) is None:
        return None
    # Each is one number, or height and width.
    down, across = np.broadcast_to(vision.image_size, 2) // np.broadcast_to(vision.patch_size, 2)
    return int(down * across)


def soft_tokens(adapter: Adapter) -> int | None:
    """Soft tokens of one picture, or of one tile for models that cut tiles; None where they depend on its size."""
    config, patches = adapter.model.config, n_patches(adapter)
    if not adapter.has_vision:
        return 0
    if getattr(config, "mm_tokens_per_image", None):  # Gemma 3
        return int(config.mm_tokens_per_image)
    # Patches per soft token: InternVL's ratio of sides, or Idefics3's factor.
    ratio = getattr(config, "downsample_ratio", None)
    shrink = round(1 / float(ratio) ** 2) if ratio else int(getattr(config, "scale_factor", 1)) ** 2
    return None if patches is None else patches // shrink


def prompt_tokens(adapter: Adapter, tokens: int | None, images: int, text_tokens: int) -> tuple[int, int]:
    """Length of a prompt of `images` and `text_tokens`, or `tokens` in all, and its number of soft tokens."""
    per_image = soft_tokens(adapter) if images else 0
    if per_image is None:
        if tokens is None:
            raise UserError("how many soft tokens a picture has depends on its size here; say task.tokens=")
        return tokens, 0
    soft = per_image * images
    return (soft + text_tokens, soft) if tokens is None else (tokens, min(soft, max(tokens - text_tokens, 0)))


def attention_widths(adapter: Adapter) -> tuple[float, float]:
    """Width of all heads' queries and of all their values, the mean over the layers."""
    layers = range(adapter.n_layers)
    queries = sum(adapter.output_weight(layer).shape[1] for layer in layers)
    values = sum(adapter.value_weight(layer).shape[0] for layer in layers)
    return queries / len(layers), values / len(layers)


def state_elements(adapter: Adapter, n_tokens: int) -> dict[str, int]:
    """Exact number of elements in each tensor of `activations.ForwardState` for a prompt."""
    layers, d, t = adapter.n_layers, adapter.d_model, n_tokens
    normed = [layer for layer in range(layers) if adapter.value_norm(layer) is not None]
    vision = getattr(adapter.model.config, "vision_config", None)
    injected = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return {
        "embeddings": t * d,
        "patterns": layers * adapter.n_heads * t * t,
        "mlp_in": layers * t * d,
        "mlp_out": layers * t * d,
        "norm_scales": layers * 4 * t * d,
        "final_norm_scale": t * d,
        "logits": t * adapter.vocab_size,
        "value_scales": t * sum(adapter.value_weight(layer).shape[0] for layer in normed),
        "injections": injected * t * d,
    }


def forward_elements(adapter: Adapter, n_tokens: int, n_images: int) -> int:
    """An estimate of the elements alive at once inside one recorded forward.

    It holds scores, softmax (in float32) and pattern of all heads, and logits; a vision tower's kernel holds none.
    """
    d, hidden = adapter.d_model, int(adapter.model.config.get_text_config().intermediate_size)
    block = n_tokens * (4 * d + 3 * hidden) + 5 * adapter.n_heads * n_tokens**2
    most = max(block, n_tokens * (adapter.vocab_size + d))
    patches = n_patches(adapter)
    if not patches:
        return most
    vision = adapter.model.config.vision_config
    width = int(vision.hidden_size)
    return max(most, n_images * patches * (6 * width + 2 * int(getattr(vision, "intermediate_size", 4 * width))))


def forward_flops(adapter: Adapter, n_tokens: int, n_images: int) -> float:
    """Operations of a forward: two per weight and token (of pictures: and patch), and those of unmasked attention."""
    parts, patches = parameters_by_part(adapter), n_patches(adapter)
    flops = 2.0 * parts["decoder"] * n_tokens + 2.0 * adapter.vocab_size * adapter.d_model * n_tokens
    flops += 4.0 * adapter.n_layers * attention_widths(adapter)[0] * n_tokens**2
    if not patches:
        return flops
    vision = adapter.model.config.vision_config
    depth = int(getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0))
    attention = 4.0 * depth * int(vision.hidden_size) * patches**2
    return flops + n_images * (2.0 * (parts["vision"] + parts["projector"]) * patches + attention)
