"""What would this model need? Parameters, memory, one graph, training: sizes and least time, without any weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmscope.core.errors import UserError
from vlmscope.core.hardware import HARDWARE
from vlmscope.tasks.transcoders.plan import TrainingPlan

if TYPE_CHECKING:
    from vlmscope.attribution.memory import GraphSizes
    from vlmscope.config import AppConfig
    from vlmscope.models.base import Adapter
    from vlmscope.tasks.context import RunContext

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
        if self.device not in HARDWARE:
            raise UserError(
                f"task.device={self.device}: figures are known of {', '.join(HARDWARE)}; choose one of them"
            )
        for key, least in (("tokens", 1), ("images", 0), ("text_tokens", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"task.{key}={value}: it must be at least {least}")


class _Transcoders(NamedTuple):
    """Features a layer, active ones a position, whether there is a skip path, and where that is from."""

    widths: list[int]
    k: int
    skip: bool
    activation: str
    said: str


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Print the tables and return their numbers: `plan/...`, sizes in bytes, times in seconds."""
    from vlmscope.models.families import adapter_for
    from vlmscope.models.sizes import empty_model

    adapter = adapter_for(empty_model(_config(cfg), _dtype(cfg.model.dtype)))
    task, machine = cfg.task, HARDWARE[cfg.task.device]
    n_tokens, n_soft = _tokens(adapter, task)
    chosen = _transcoders(cfg, adapter, context.overrides)
    graph = _graph(cfg, adapter, chosen, n_tokens, n_soft)
    print(f"{cfg.model.name}: {adapter.n_layers} layers of width {adapter.d_model}; transcoders: {chosen.said}")
    print(f"prompt: {n_tokens:,} tokens, {n_soft:,} of them soft; machine: {machine.name}")
    sections = {
        "Parameters": _parameters(adapter, chosen),
        "Memory": _memory(cfg, adapter, chosen, graph),
        "One graph": _graph_rows(graph),
        "Least time (roofline; expect two to three times that)": _times(cfg, adapter, graph),
    }
    metrics: dict[str, float] = {}
    for title, rows in sections.items():
        print(f"\n{title}\n" + "\n".join(_line(*row) for row in rows))
        metrics |= {key: value for key, _, value, _ in rows}
    _verdict(metrics["plan/memory/trace"], machine.memory, task.device)
    return metrics | _training(cfg, adapter)


def _training(cfg: AppConfig, adapter: Adapter) -> dict[str, float]:
    """The plan of training new transcoders, printed; nothing for a set that is there."""
    from vlmscope.config.schema import TranscoderArchConfig
    from vlmscope.tasks.transcoders.plan import TrainingTables

    if not isinstance(cfg.transcoder, TranscoderArchConfig):
        return {}
    tables = TrainingTables(cfg, adapter, HARDWARE[cfg.task.device])
    print("\n".join(tables.lines()))
    return tables.metrics


_Row = tuple[str, str, float, str]  # metric, words, value, unit


def _line(_: str, words: str, value: float, unit: str) -> str:
    from vlmscope.models.placement import gb

    said = gb(value) if unit == "B" else f"{value:.3g} s" if unit == "s" else f"{value:,.0f}"
    return f"  {words:<58} {said:>16}"


def _verdict(needed: float, memory: float | None, device: str) -> None:
    from vlmscope.models.placement import gb

    if memory is not None and needed > memory:
        print(
            f"\nTracing needs more than the {gb(memory)} of {device}: model.offload=cpu or disk keeps the weights away,"
        )
        print("attribution.dtype=model avoids copies in float32, narrower transcoders need less.")


def _config(cfg: AppConfig) -> dict[str, Any]:
    from vlmscope.models.sizes import find_config

    if cfg.model.tiny is None:
        return find_config(cfg.model.path, cfg.model.hub, cfg.model.revision)
    from vlmscope.models.tiny import tiny_vlm

    return tiny_vlm(cfg.model.tiny, seed=cfg.seed).model.config.to_dict()


def _dtype(name: str) -> Any:
    from vlmscope.models.placement import DTYPES

    return DTYPES[name]


def _tokens(adapter: Adapter, task: Any) -> tuple[int, int]:
    """T, and how many of them are soft tokens."""
    from vlmscope.models.sizes import soft_tokens

    of_one = soft_tokens(adapter) if task.images else 0
    if of_one is None:
        if task.tokens is None:
            raise UserError("how many soft tokens a picture has depends on its size here; say task.tokens=")
        return task.tokens, 0
    soft = of_one * task.images
    total = soft + task.text_tokens if task.tokens is None else task.tokens
    return total, min(soft, max(total - task.text_tokens, 0)) if task.tokens is not None else soft


def _transcoders(cfg: AppConfig, adapter: Adapter, overrides: tuple[str, ...]) -> _Transcoders:
    """The set that the user named, if it is for this model; else new ones of the default architecture."""
    from vlmscope.config.schema import RandomTranscodersConfig, TranscoderArchConfig

    chosen, layers, d = cfg.transcoder, adapter.n_layers, adapter.d_model
    named = any(override.lstrip("+~").startswith("transcoder") for override in overrides)
    if isinstance(chosen, RandomTranscodersConfig):
        width = 4 * d if chosen.n_features is None else chosen.n_features
        return _Transcoders(
            [width] * layers,
            chosen.k,
            chosen.skip,
            chosen.activation,
            f"random, {width:,} features a layer, k={chosen.k}",
        )
    if not isinstance(chosen, TranscoderArchConfig):
        from vlmscope.tasks.wiring import trained_transcoders

        try:
            found = trained_transcoders(cfg, layers, d)
        except UserError:
            if named:
                raise
            chosen = TranscoderArchConfig()
        else:
            widths = [transcoder.config.n_features for transcoder in found.transcoders.values()]
            return _Transcoders(
                widths, found.config.k, found[0].W_skip is not None, found.config.activation, str(chosen.path)
            )
    width = chosen.expansion_factor * d
    said = f"new ones, {chosen.expansion_factor} times the width = {width:,} features a layer, k={chosen.k}"
    return _Transcoders([width] * layers, chosen.k, chosen.skip, chosen.activation, said)


def _graph(cfg: AppConfig, adapter: Adapter, chosen: _Transcoders, n_tokens: int, n_soft: int) -> GraphSizes:
    from vlmscope.attribution.memory import GraphSizes
    from vlmscope.models.sizes import attention_widths

    cfg.attribution.check()
    query_width, value_width = attention_widths(adapter)
    begin = min(5, n_tokens - n_soft)  # bos, start of turn, user, newline, begin of image
    bidirectional = n_soft if str(adapter.model.config.model_type) == "gemma3" else 0
    return GraphSizes(
        n_layers=adapter.n_layers,
        d_model=adapter.d_model,
        query_width=query_width,
        value_width=value_width,
        n_tokens=n_tokens,
        image=(begin, begin + bidirectional),
        k=min(chosen.k, min(chosen.widths)),
        skip=chosen.skip,
        config=cfg.attribution,
    )


def _transcoder_parameters(chosen: _Transcoders, d: int) -> int:
    from vlmscope.transcoders.config import TranscoderConfig
    from vlmscope.transcoders.transcoder import Transcoder

    total = 0
    for layer, width in enumerate(chosen.widths):
        config = TranscoderConfig(
            d_model=d,
            n_features=width,
            k=min(chosen.k, width),
            layer=layer,
            activation=chosen.activation,
            skip=chosen.skip,
        )
        total += sum(parameter.numel() for parameter in Transcoder(config, device="meta").parameters())
    return total


def _parameters(adapter: Adapter, chosen: _Transcoders) -> list[_Row]:
    from vlmscope.models.sizes import parameters_by_part

    parts = parameters_by_part(adapter)
    rows = [
        ("vision", "vision tower", parts.vision),
        ("projector", "projector", parts.projector),
        ("embeddings", "embeddings (and the unembedding, when it is shared)", parts.embeddings),
        ("decoder", "decoder layers and norms", parts.decoder),
        ("head", "unembedding of its own", parts.head),
        ("total", "the model", parts.total),
        ("transcoders", "transcoders of all layers", _transcoder_parameters(chosen, adapter.d_model)),
    ]
    return [(f"plan/parameters/{key}", words, float(value), "") for key, words, value in rows]


def _memory(cfg: AppConfig, adapter: Adapter, chosen: _Transcoders, graph: GraphSizes) -> list[_Row]:
    from vlmscope.models.sizes import forward_elements, parameters_by_part, state_elements

    own = _dtype(cfg.model.dtype).itemsize
    swept = own if cfg.attribution.dtype == "model" else graph.element
    model, extra = parameters_by_part(adapter).total, _transcoder_parameters(chosen, adapter.d_model)
    state = state_elements(adapter, graph.n_tokens)
    # What `build_replacement` holds in the sweep's dtype: another copy when that is not the model's.
    heads = graph.query_width + graph.value_width
    frozen = adapter.n_layers * adapter.d_model * heads + adapter.vocab_size * adapter.d_model + extra
    copies = (frozen + sum(state.values())) * swept if swept != own else 0
    forward = forward_elements(adapter, graph.n_tokens) * own
    sweep = graph.row_buffer_bytes + graph.gradient_bytes + graph.source_bytes
    trace = (model + extra + sum(state.values())) * own + copies + max(forward, sweep)
    rows = [
        ("weights_float32", "weights in float32", model * 4),
        ("weights_bfloat16", "weights in bfloat16", model * 2),
        ("transcoders_float32", "transcoders in float32", extra * 4),
        ("transcoders_bfloat16", "transcoders in bfloat16", extra * 2),
        ("forward", f"inside one forward, {cfg.model.dtype} (estimate)", forward),
        ("patterns", f"recorded attention patterns, {cfg.model.dtype}", state["patterns"] * own),
        ("state", f"all that is recorded of a forward, {cfg.model.dtype}", sum(state.values()) * own),
        ("copies", f"copies for the sweep in {cfg.attribution.dtype}", copies),
        ("rows", f"dense rows of a batch of {graph.batch_size}", graph.row_buffer_bytes),
        ("gradients", "gradients of a batch", graph.gradient_bytes),
        ("sources", "source vectors", graph.source_bytes),
        ("trace", "all of it on the device while a graph is traced", trace),
        ("assembly", "on the host while rows become a graph", graph.peak_bytes),
    ]
    return [(f"plan/memory/{key}", words, float(value), "B") for key, words, value in rows]


def _graph_rows(graph: GraphSizes) -> list[_Row]:
    counts = [
        ("active_features", "active features", graph.active),
        ("rows", "features with a row of their own", graph.rows),
        ("nodes", "nodes", graph.nodes),
        ("edges", "edges, at most", graph.edges),
    ]
    sizes = [
        ("csr", "edges in memory", graph.csr_bytes),
        ("file", "graph.safetensors, at most", graph.file_bytes),
    ]
    rows = [(f"plan/graph/{key}", words, float(value), "") for key, words, value in counts]
    return rows + [(f"plan/graph/{key}", words, float(value), "B") for key, words, value in sizes]


def _times(cfg: AppConfig, adapter: Adapter, graph: GraphSizes) -> list[_Row]:
    from vlmscope.models.sizes import forward_flops, parameters_by_part, state_elements

    machine, own = HARDWARE[cfg.task.device], _dtype(cfg.model.dtype).itemsize
    flops = forward_flops(adapter, graph.n_tokens, cfg.task.images)
    moved = (parameters_by_part(adapter).total + 2 * sum(state_elements(adapter, graph.n_tokens).values())) * own
    swept = {"model": cfg.model.dtype}.get(cfg.attribution.dtype, cfg.attribution.dtype)
    return [
        ("plan/forward/gflops", "forward, 10^9 operations", flops / 1e9, ""),
        ("plan/forward/seconds", "forward", machine.seconds(flops, moved, cfg.model.dtype), "s"),
        ("plan/sweep/gflops", "rows of the graph, 10^9 operations", graph.flops / 1e9, ""),
        ("plan/sweep/seconds", "rows of the graph", machine.seconds(graph.flops, graph.bytes_moved, swept), "s"),
    ]
