"""One command that proves a GPU: does everything hold on it, how fast is it, and is the plan right?

`python benchmarks/gpu.py [--device cuda] [--out outputs/gpu.json]` takes at most 8 minutes; `--tiny` runs the same path
at toy sizes, on a CPU too. Parts, each with its own time bound:

rates       products and copies of this device, by which the plan and the rooflines below are computed
identities  docs/maths.md in float64, of every tiny family with random weights
parity      the replayed replacement model in bfloat16 against Hugging Face's logits, of every tiny family
training    one layer's step at Gemma-3-4B's width, against its roofline and, if installed, eai-sparsify
graph       Gemma-3-4B-it's exact configuration with random weights made on the device, against `task=plan`
generation  the same model's answer while features are steered at every token
streamed    a graph with a set that stays on disk, against the same set on the device
devices     where there are several: one graph by all GPUs against one, training by one process for each against one

A part that lacks memory, time or a package is skipped with a word. Exit code 1: something does not hold, or failed.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias, cast
from unittest.mock import patch

import torch
from measured import measured
from plan import copy_rate, layer_work, product_rate, seconds, step_of, timed_once
from random_model import Numbers, random_model, random_prompt, random_scope
from several import several
from started import started
from torch import Tensor
from training_kernels import peer_step

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import Trace, trace
from vlmscope.conformance import IDENTITIES, PROMPT, TOLERANCE, Limits, Subject, make_subject, noise_picture
from vlmscope.conformance import parity as replayed_logits
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError, first_line, is_out_of_memory
from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.run import editing
from vlmscope.models.base import Adapter, ModelInputs, exact_float64
from vlmscope.models.checkpoint import check_device, free_bytes
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_vlm
from vlmscope.replacement import build_replacement
from vlmscope.scope import Scope
from vlmscope.tasks import plan
from vlmscope.tasks.plan import find_config, parameters_by_part
from vlmscope.tasks.settings import PlanSettings
from vlmscope.training.config import TranscoderArchConfig
from vlmscope.transcoders.formats import load_set, save_set
from vlmscope.transcoders.transcoder import random_set

ROOT = Path(__file__).resolve().parents[1]
STREAMED = 8e9  # bytes of the set that is written and streamed: what a disk takes in seconds
HALF = 0.1  # largest error of bfloat16's logits, of the largest logit, that counts as equal (docs/numerics.md)
GB = 1e9


class TimeUp(BaseException):
    """The part's time is over; no `except Exception` on the way may swallow it."""


class Skipped(Exception):
    """A part, or the rest of it, does not apply here; the text says why."""


class Row(NamedTuple):
    """A line of the table: a number of this run, what the plan or the roofline says, and whether a claim holds."""

    what: str
    value: float | None = None
    unit: str = ""
    expected: float | None = None
    holds: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are Gemma-3-4B's, with the paper's k and prompt."""

    config: dict[str, Any] = field(default_factory=lambda: find_config("google/gemma-3-4b-it"))  # empty: a tiny one
    families: tuple[str, ...] = ("gemma3", "gemma3_text", *FAMILIES)
    limits: Limits = field(default_factory=lambda: Limits(sources=8, positions=3))
    product: int = 8192
    copied: int = 1 << 28
    repeat: int = 5
    d_model: int = 2560
    k: int = 48
    expansions: tuple[int, ...] = (16, 32)
    batch: int = 4096
    text_tokens: int = 22
    max_nodes: int = 7500
    new_tokens: int = 64
    minutes: float = 8.0


# The same path in seconds on a CPU.
TINY = Sizes(
    config={}, families=("gemma3",), limits=Limits(sources=2, positions=2), product=128, copied=1 << 16, repeat=2,
    d_model=32, k=4, expansions=(2, 4), batch=64, text_tokens=6, max_nodes=50, new_tokens=4, minutes=5.0,
)  # fmt: skip


@dataclass
class Bench:
    """The device with what parts share."""

    device: str
    sizes: Sizes

    @cached_property
    def machine(self) -> plan.Machine:
        """Rates of this device as `task=plan` takes them."""
        size, repeat = self.sizes.product, self.sizes.repeat
        float64 = product_rate(torch.float64, size // 2, repeat, self.device)
        float32, half = (product_rate(dtype, size, repeat, self.device) for dtype in (torch.float32, torch.bfloat16))
        moved = copy_rate(repeat, self.device, self.sizes.copied)
        return plan.Machine("this device", float64, float32, half, moved, free_bytes(self.device) / GB)

    @cached_property
    def model(self) -> Adapter:
        """The large model on the device."""
        return random_model(self.sizes.config, self.device)

    @cached_property
    def prompt(self) -> ModelInputs:
        """A picture's soft tokens between random tokens of text."""
        return random_prompt(self.model, self.sizes.text_tokens)

    def traced(self, scope: Scope, config: AttributionConfig) -> tuple[Trace, float, float, str]:
        """A graph with its seconds, its peak memory in GB, and what of the memory that is."""
        found: list[Trace] = []
        if self.device == "cpu":
            with measured() as used:
                found.append(trace(scope, self.prompt, config))
            return found[0], used["seconds"], used["added_mb"] / 1e3, "added to the process"
        torch.cuda.reset_peak_memory_stats()
        elapsed = timed_once(lambda: found.append(trace(scope, self.prompt, config)))
        return found[0], elapsed, torch.cuda.max_memory_allocated() / GB, "all that is allocated"

    @cached_property
    def scope(self) -> Scope:
        """The large model with the widest transcoders that fit next to it."""
        adapter = self.model
        for expansion in (self.sizes.expansions[-1] >> n for n in range(5)):
            numbers = plan.transcoder_numbers(adapter.d_model, expansion * adapter.d_model, False, "topk")
            if 6 * numbers * adapter.n_layers < 0.8 * free_bytes(self.device):  # a graph copies them to float32
                return random_scope(adapter, expansion, self.sizes.k)
        raise Skipped(f"{free_bytes(self.device) / GB:.0f} GB are too little for any transcoders of this model")


def rates(bench: Bench) -> Iterator[Row]:
    """What the device reaches, not what its maker states."""
    machine = bench.machine
    yield Row("product in float64", machine.float64, "TFLOP/s")
    yield Row("product in float32", machine.float32, "TFLOP/s")
    yield Row("product in bfloat16", machine.half, "TFLOP/s")
    yield Row("copy, read and written", machine.bandwidth, "GB/s")
    yield Row("free memory", machine.memory, "GB")


def tiny_subject(bench: Bench, family: str, dtype: torch.dtype, graph: torch.dtype) -> Subject:
    """A tiny random model with transcoders on the device, at one picture (text where it takes none)."""
    vlm = tiny_vlm(family, dtype=dtype)
    vlm.model.to(bench.device)
    vlm = replace(vlm, adapter=adapter_for(vlm.model))
    adapter = vlm.adapter
    transcoders = random_set(adapter.n_layers, adapter.d_model, 96, 8, skip=True).to(bench.device, dtype)
    inputs = vlm.prepare(PROMPT, [noise_picture(0)] if adapter.has_vision else [])
    return make_subject(Scope(vlm, transcoders.requires_grad_(False)), inputs, None, bench.sizes.limits, graph)


def identities(bench: Bench) -> Iterator[Row]:
    """Every identity of `task=check` in float64."""
    for family in bench.sizes.families:
        with exact_float64():
            subject = tiny_subject(bench, family, torch.float64, torch.float64)
            checks = [identity(subject) for identity in IDENTITIES]
        broken = [outcome.name for outcome in checks if not outcome.held]
        worst = max((outcome.error for outcome in checks if outcome.error is not None), default=None)
        yield Row(f"tiny {family}", worst, "error", TOLERANCE, not broken, ", ".join(broken))


def parity(bench: Bench) -> Iterator[Row]:
    """The forward in bfloat16, the replacement model in float32."""
    for family in bench.sizes.families:
        outcome = replayed_logits(tiny_subject(bench, family, torch.bfloat16, torch.float32))
        assert outcome.error is not None  # it is never skipped
        yield Row(f"tiny {family}, bfloat16", outcome.error, "error", HALF, outcome.error <= HALF)


def training(bench: Bench) -> Iterator[Row]:
    """A layer's whole step in tokens a second, and of the roofline of its parts at the measured rates."""
    sizes, n, d = bench.sizes, bench.sizes.batch, bench.sizes.d_model
    x, y = (torch.randn(n, d, device=bench.device) for _ in range(2))
    for expansion in sizes.expansions:
        arch = TranscoderArchConfig(expansion, sizes.k)
        trainer = started(d, expansion * d, sizes.k, x, y)
        gradient, update = step_of(trainer, x, y)

        def step(gradient: Callable[[], None] = gradient, update: Callable[[], None] = update) -> None:
            gradient()
            update()

        for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
            trainer.transcoder.product_dtype = dtype
            found = seconds(step, sizes.repeat)
            least = sum(plan.least_time(work, bench.machine)[0] for work in layer_work(n, d, arch, name).values())
            share = f"{least / found:.0%} of the roofline"
            yield Row(f"step, expansion {expansion}, {name}", n / found, "tokens/s", n / least, None, share)
        trainer.transcoder.product_dtype = None
        if importlib.util.find_spec("sparsify") is None:
            yield Row(f"eai-sparsify, expansion {expansion}", note="skipped: it is not installed")
            continue
        times = [seconds(work, sizes.repeat) for work in (gradient, peer_step(trainer, x, y))]
        note = f"of eai-sparsify {importlib.metadata.version('eai-sparsify')}: {n / times[1]:,.0f} tokens/s"
        yield Row(f"loss and gradient, expansion {expansion}", n / times[0], "tokens/s", None, None, note)


def graph(bench: Bench) -> Iterator[Row]:
    """One graph of the large model, with the plan of `task=plan` for the measured rates in the next column."""
    scope, inputs = bench.scope, bench.prompt
    adapter, n_soft = scope.adapter, int(inputs.is_image.sum())
    widths = list(scope.transcoders.widths.values())
    expansion = widths[0] // adapter.d_model
    config = AttributionConfig(max_nodes=bench.sizes.max_nodes)
    with patch.dict(plan.MACHINES, this=bench.machine):
        task = PlanSettings(device="this")
        cfg = cast(Any, SimpleNamespace(attribution=config, model=SimpleNamespace(dtype="bfloat16"), task=task))
        kind = TranscoderArchConfig(expansion, bench.sizes.k)
        found = plan.plan_graph(cfg, adapter, len(inputs), n_soft, widths, kind)
    planned = {key: number[0] if isinstance(number, tuple) else number for key, number in found.items()}

    shape = f"{n_soft} soft; {adapter.n_layers} layers of {adapter.d_model}, expansion {expansion}, k {kind.k}"
    yield Row("tokens of the prompt", len(inputs), "", None, None, shape)

    @torch.no_grad()
    def own() -> Tensor:
        return adapter.model(**inputs.tensors).logits[0].float()

    yield Row("forward", seconds(own, bench.sizes.repeat), "s", planned["forward/seconds"])
    logits = own()
    replayed = build_replacement(scope, inputs, torch.float32).replay().logits
    error = float((replayed - logits).abs().max() / logits.abs().max())
    yield Row("replayed logits against Hugging Face's", error, "error", HALF, error <= HALF)
    del replayed, logits
    traced, elapsed, peak, note = bench.traced(scope, config)
    metrics = traced.metrics()
    what = f"resident graph of {metrics['graph/nodes']:,.0f} nodes, {metrics['graph/edges']:,.0f} edges"
    least = planned["forward/seconds"] + planned["sweep/seconds"]
    yield Row(what, elapsed, "s", least, None, "forward, sweeps and pruning; the plan: a lower bound")
    yield Row("... peak memory of the device", peak, "GB", planned["memory/trace"] / GB, None, note)
    yield Row("... largest residual", metrics["graph/max_residual"], "error")


def streamed(bench: Bench) -> Iterator[Row]:
    """The widest set of at most `STREAMED` bytes, on the device and from disk: seconds, peak memory, the same graph?"""
    bench.__dict__.pop("scope", None)  # its memory would count
    adapter, config = bench.model, AttributionConfig(max_nodes=bench.sizes.max_nodes)
    for expansion in (bench.sizes.expansions[-1] >> n for n in range(6)):
        size = (
            2 * adapter.n_layers * plan.transcoder_numbers(adapter.d_model, expansion * adapter.d_model, False, "topk")
        )
        if expansion and size <= STREAMED:
            break
    else:
        raise Skipped("no set of this model is small enough to be written")
    with TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 2 * size:
            raise Skipped(f"{folder} has too little room for {size / GB:.1f} GB")
        scope = random_scope(adapter, expansion, bench.sizes.k)
        save_set(scope.transcoders, folder, dtype="bfloat16")
        graphs = []
        for name in ("resident", "streamed"):
            if name == "streamed":
                del scope
                read = load_set(folder, stream=True).requires_grad_(False)
                transcoders = read.to(device=adapter.device, dtype=adapter.dtype)
                scope = Scope(VLM(adapter.model, Numbers(), adapter, "random weights"), transcoders)
            found, elapsed, peak, note = bench.traced(scope, config)
            yield Row(f"{name}, expansion {expansion}, {size / GB:.3g} GB", elapsed, "s", None, None, "one graph")
            yield Row("... peak memory of the device", peak, "GB", None, None, note)
            graphs.append(found.graph)
            del found
        same = all((getattr(graphs[0], key) == getattr(graphs[1], key)).all() for key in ("indices", "weights"))
        yield Row("streamed graph against the resident one", 1.0 - same, "difference", 0.0, bool(same))


def generation(bench: Bench) -> Iterator[Row]:
    """Greedy tokens a second, the prompt's forward included, plain and with 16 features set at every token."""
    scope, inputs, count = bench.scope, bench.prompt, bench.sizes.new_tokens
    adapter, features = scope.adapter, torch.arange(16, device=bench.device)
    ones = torch.ones(16, dtype=adapter.dtype, device=bench.device)
    where = torch.ones(len(inputs), dtype=torch.bool)
    steered = {adapter.n_layers // 2: LayerEdit(features, ones, 0 * ones, where, ones[None])}
    parts = parameters_by_part(adapter)
    read = 2 * (parts["embeddings"] + parts["decoder"] + parts["head"])  # bytes, once a token
    for name, edits in (("plain", {}), ("steered", steered)):

        @torch.no_grad()
        def answer(edits: Mapping[int, LayerEdit] = edits) -> None:
            with editing(scope, edits):
                adapter.model.generate(
                    **inputs.tensors,
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    suppress_tokens=[adapter.soft_token_id()],  # for which the next step would expect a picture
                )

        answer()
        yield Row(name, count / timed_once(answer), "tokens/s", bench.machine.bandwidth * GB / read)


def devices(bench: Bench) -> Iterator[Row]:
    """The same graph by all devices as by one? The same transcoders of Orrery by torchrun as by one process?"""
    count = torch.cuda.device_count()
    names = ["cpu", "cpu"] if bench.device == "cpu" else [f"cuda:{number}" for number in range(count)]
    if len(names) < 2:
        raise Skipped("there is one device")
    config = AttributionConfig(dtype="float64", batch_size=8)
    with exact_float64():
        tiny = tiny_subject(bench, bench.sizes.families[0], torch.float64, torch.float64)
        one, every = (trace(tiny.scope, tiny.inputs, replace(config, devices=used)).graph for used in ([], names))
    same = (one.indices == every.indices).all() if len(one.indices) == len(every.indices) else False
    gap = float(abs(one.weights - every.weights).max() / abs(one.weights).max()) if same else float("inf")
    yield Row(f"graph in float64 on {len(names)} devices against one", gap, "difference", 1e-12, gap <= 1e-12)
    if bench.device == "cpu":
        raise Skipped("speed and training need several GPUs")
    large = AttributionConfig(max_nodes=bench.sizes.max_nodes)
    for used in ([], names):
        taken = timed_once(lambda used=used: trace(bench.scope, bench.prompt, replace(large, devices=used)))
        yield Row(f"graph of the large model on {len(used) or 1} devices", taken, "s")
    gap, times = several("cuda", count)
    note = f"{times[1]:.0f} s, one process {times[0]:.0f} s, starts included"
    yield Row(f"{count} processes against one, weights", gap, "difference", 1e-3, gap < 1e-3, note)


@contextmanager
def within(limit: float) -> Iterator[None]:
    """Raise `TimeUp` in the block after `limit` seconds, between two operations."""

    def stop(_number: int, _frame: object) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


Part: TypeAlias = Callable[[Bench], Iterator[Row]]
# Shares of the whole time; what a part leaves is not given to others, so the bound of each is known.
_SHARES = (rates, 0.06), (identities, 0.16), (parity, 0.08), (training, 0.18), (graph, 0.2), (generation, 0.08)
PARTS: dict[Part, float] = {**dict(_SHARES), streamed: 0.12, devices: 0.12}


def run_part(part: Part, bench: Bench, show: Callable[[Row], None]) -> None:
    """Show the part's rows, and one that says what stopped it."""
    limit = PARTS[part] * bench.sizes.minutes * 60
    try:
        with within(limit):
            for row in part(bench):
                show(row)
    except TimeUp:
        show(Row("the rest", note=f"skipped: its {limit:.0f} s are over"))
    except Skipped as reason:
        show(Row("the rest", note=f"skipped: {reason}"))
    except Exception as error:  # the other parts must still run
        if is_out_of_memory(error):
            show(Row("the rest", note="skipped: the device has too little memory"))
        else:
            show(Row("the rest", holds=False, note=f"failed: {type(error).__name__}: {first_line(error)}"))
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def described(device: str) -> dict[str, Any]:
    """Device and software."""
    gpu = device != "cpu"
    there = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or platform.machine(),
        "devices": torch.cuda.device_count() if gpu else 1,
        "memory_gb": (torch.cuda.get_device_properties(device).total_memory if gpu else free_bytes(device)) / GB,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: there.get(name) for name in ("torch", "transformers", "triton", "numpy", "eai-sparsify")},
    }


def shown(number: float | None) -> str:
    """A number for the console's table."""
    return "-" if number is None else f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, also on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu.json")
    given = parser.parse_args(arguments)
    try:
        check_device(given.device, "float64")
        if given.device == "cpu" and not given.tiny:
            raise UserError("torch sees no GPU here; give --tiny for the same path on a CPU, or install torch for CUDA")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = "cuda:0" if given.device == "cuda" else given.device
    if device != "cpu":
        torch.cuda.set_device(device)
    began, about = time.perf_counter(), described(device)
    print("; ".join(f"{name} {value}" for name, value in about.items() if value is not None) + "\n")
    print("| part | what | measured | unit | plan, roofline or bound | holds | note |\n|" + " --- |" * 7, flush=True)
    bench, rows = Bench(device, TINY if given.tiny else Sizes()), list[dict[str, Any]]()
    for part in PARTS:

        def show(row: Row, name: str = part.__name__) -> None:
            rows.append({"part": name, **row._asdict()})
            holds = {None: "-", True: "yes", False: "NO"}[row.holds]
            cells = name, row.what, shown(row.value), row.unit, shown(row.expected), holds, row.note
            print(f"| {' | '.join(cells)} |", flush=True)

        run_part(part, bench, show)
    took, broken = time.perf_counter() - began, sum(row["holds"] is False for row in rows)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, {"about": about, "sizes": asdict(bench.sizes), "seconds": took, "rows": rows})
    print(f"\n{took:.0f} s; {broken} of {len(rows)} lines do not hold; {given.out}")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
