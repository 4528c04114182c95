"""The part of `task=plan` about training the transcoders of all layers: ranks, memory, traffic, disk, hours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.core.hardware import Hardware
    from vlmscope.models.base import Adapter
    from vlmscope.training.sizes import TrainingSizes

_STATES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ENCODERS = {"32": "float32", "bf16-mixed": "bfloat16"}


@dataclass
class TrainingPlan:
    """A run that trains on `tokens` tokens, `images` pictures' soft tokens among them, each forward once.

    `gpus` is those of a host; `step_tokens` are on all hosts; texts are `context` long; the model runs once in
    `steps_per_batch` steps. `dead` is the share of features that AuxK revives. `state_dtype` is that of the optimiser's
    moments (this project's training keeps float32).
    """

    gpus: int = 8
    hosts: int = 1
    tokens: int = 100_000_000
    images: int = 0
    step_tokens: int = 8192
    context: int = 2048
    pool_batches: int = 8
    steps_per_batch: int = 2
    dead: float = 0.0
    aux_k: int = 64
    state_dtype: str = "float32"

    def __post_init__(self) -> None:
        for key in ("gpus", "hosts", "tokens", "step_tokens", "context", "pool_batches", "steps_per_batch", "aux_k"):
            if getattr(self, key) < 1:
                raise UserError(f"task.training.{key}={getattr(self, key)}: it must be at least 1")
        if self.images < 0 or not 0 <= self.dead < 1:
            raise UserError(
                f"task.training.images={self.images}, dead={self.dead}: 0 or more pictures, and a share of features "
                "in [0, 1)"
            )
        if self.state_dtype not in _STATES:
            raise UserError(f"task.training.state_dtype={self.state_dtype}: choose one of {', '.join(_STATES)}")


class TrainingTables:
    """What the plan says, as lines to print and as metrics."""

    def __init__(self, cfg: AppConfig, adapter: Adapter, machine: Hardware) -> None:
        """Count everything.

        Raises:
            UserError: more GPUs on a host than layers, hosts of a machine whose network is not known, or a precision in
                which transcoders are not trained.
        """
        if cfg.trainer.precision not in _ENCODERS:
            raise UserError(f"trainer.precision={cfg.trainer.precision}: transcoders take {' or '.join(_ENCODERS)}")
        if cfg.transcoder.cross_layer:
            raise UserError("task=plan counts transcoders of single layers; leave out transcoder.cross_layer")
        self.cfg, self.plan, self.machine, self.adapter = cfg, cfg.task.training, machine, adapter
        self.sizes = training_sizes(cfg, self.plan, adapter, cfg.transcoder.expansion_factor)
        self.metrics: dict[str, float] = {}

    def lines(self) -> Iterator[str]:
        """Everything in order; `metrics` is filled on the way."""
        sizes, plan = self.sizes, self.plan
        counts = ", ".join(str(len(sizes.layout.layers(rank))) for rank in sizes.layout.members(0))
        yield f"\nTraining on {plan.tokens:,} tokens and {plan.images:,} pictures, {plan.step_tokens:,} tokens a step"
        yield f"  layers of ranks 0 to {plan.gpus - 1} of each of {plan.hosts} hosts: {counts}"
        yield from self._memory()
        yield from self._traffic_and_disk()
        yield from self._hours()
        yield from self._verdict()

    def _memory(self) -> Iterator[str]:
        from vlmscope.models.placement import gb

        sizes = self.sizes
        seen: dict[tuple[int, ...], int] = {}  # ranks with the same figures share a column, named by the first
        for rank in sizes.layout.members(0):
            seen.setdefault(tuple(sizes.memory(rank).values()), rank)
            self.metrics[f"plan/training/peak/rank_{rank:02d}"] = float(sizes.peak(rank))
        ranks = list(seen.values())
        yield "\nMemory of a rank, by part" + " " * 35 + "".join(f"{f'rank {rank}':>14}" for rank in ranks)
        for part, words in _PARTS.items():
            found = [sizes.memory(rank)[part] for rank in ranks]
            self.metrics[f"plan/training/memory/{part}"] = float(found[0])
            yield f"  {words:<58}" + "".join(f"{gb(size):>14}" for size in found)
        peaks = [sizes.peak(rank) for rank in ranks]
        yield f"  {'at the worst moment (of the starred, the largest)':<58}" + "".join(
            f"{gb(one):>14}" for one in peaks
        )
        if sizes.host_bytes:
            self.metrics["plan/training/host"] = float(sizes.host_bytes)
            yield f"  {'CPU memory of the host of rank 0: the gathered set':<58}{gb(sizes.host_bytes):>14}"

    def _traffic_and_disk(self) -> Iterator[str]:
        from vlmscope.models.placement import gb

        sizes, plan = self.sizes, self.plan
        rows = [
            ("traffic/in_host", "sent to others of the host, a captured batch and rank", sizes.sent_in_host(0)),
            ("traffic/between_hosts", "sent to other hosts, a step and rank", sizes.sent_between_hosts(0)),
            ("disk/checkpoint", "a checkpoint (two stand while one is written)", sizes.checkpoint_bytes),
            ("disk/set", "the finished set in bfloat16", sizes.set_bytes),
            ("disk/cache", "a cache of all activations (task.cache), if wanted", sizes.cache_bytes(plan.tokens)),
        ]
        yield "\nTraffic of rank 0 and disk"
        for key, words, size in rows:
            self.metrics[f"plan/training/{key}"] = float(size)
            yield f"  {words:<58} {gb(size):>16}"

    def _hours(self) -> Iterator[str]:
        from vlmscope.models.sizes import capture_flops
        from vlmscope.training.sizes import bounds, step_work

        sizes, plan, cfg = self.sizes, self.plan, self.cfg
        pictures = plan.images / plan.tokens * sizes.rank_tokens
        flops = capture_flops(self.adapter, sizes.rank_tokens, plan.context, pictures)
        found = bounds(step_work(sizes, flops, cfg.model.dtype, plan.steps_per_batch), self.machine)
        steps = ceil(plan.tokens / plan.step_tokens) * plan.steps_per_batch
        total = sum(one.seconds for one in found.values())
        said = f"{steps:,} steps, the encoder's product in {sizes.encoder_dtype}"
        yield f"\nLeast time of a step of rank 0 (roofline; {said})"
        for part, bound in found.items():
            self.metrics[f"plan/training/seconds/{part}"] = bound.seconds
            said = f"{bound.seconds * 1e3:.3g} ms"
            yield f"  {_WORK[part]:<58} {said:>16}  {bound.seconds / total:4.0%}, bound by {bound.by}"
        hours = total * steps / 3600
        self.metrics |= {"plan/training/steps": float(steps), "plan/training/hours": hours}
        self.metrics["plan/training/gpu_hours"] = hours * plan.gpus * plan.hosts
        yield f"  {'all steps':<58} {f'{hours:.3g} h':>16}  at the least; expect two to three times that"

    def _verdict(self) -> Iterator[str]:
        from vlmscope.models.placement import gb

        memory, needed = self.machine.memory, self.sizes.worst_peak
        if memory is None or needed <= memory:
            return
        said = " or ".join(self._alternatives(memory))
        yield (
            f"\nTraining does not fit: a rank needs {gb(needed)} of the {gb(memory)} of {self.cfg.task.device}; "
            + (f"would fit: {said}" if said else "no smaller batch, narrower transcoder or more GPUs a host would fit")
        )

    def _alternatives(self, memory: float) -> Iterator[str]:
        """One change each that makes it fit: the nearest batch, expansion and number of GPUs."""
        plan, factor = self.plan, self.cfg.transcoder.expansion_factor

        def fits(expansion: int = factor, **changes: int) -> bool:
            sizes = training_sizes(self.cfg, replace(plan, **changes), self.adapter, expansion)
            return sizes.worst_peak <= memory

        tokens = next((n for n in _halves(plan.step_tokens, 256) if fits(step_tokens=n)), None)
        narrower = next((n for n in _halves(factor, 1) if fits(n)), None)
        more = next((n for n in range(plan.gpus + 1, self.adapter.n_layers + 1) if fits(gpus=n)), None)
        if tokens is not None:
            yield f"task.training.step_tokens={tokens}"
        if narrower is not None:
            yield f"transcoder.expansion_factor={narrower}"
        if more is not None:
            yield f"task.training.gpus={more}"


def _halves(value: int, least: int) -> Iterator[int]:
    while (value := value // 2) >= least:
        yield value


def training_sizes(cfg: AppConfig, plan: TrainingPlan, adapter: Adapter, expansion: int) -> TrainingSizes:
    """The sizes of a run with the architecture of `transcoder=arch` and another expansion."""
    from vlmscope.models.placement import DTYPES
    from vlmscope.models.sizes import capture_elements, parameters_by_part
    from vlmscope.training.ranks import Layout
    from vlmscope.training.sizes import TrainingSizes

    own = DTYPES[cfg.model.dtype].itemsize
    layout = Layout(adapter.n_layers, plan.gpus * plan.hosts, plan.gpus)
    share = ceil(plan.step_tokens / layout.world)
    pictures = ceil(plan.images / plan.tokens * share)
    return TrainingSizes(
        layout=layout,
        d_model=adapter.d_model,
        n_features=expansion * adapter.d_model,
        k=cfg.transcoder.k,
        step_tokens=plan.step_tokens,
        element=own,
        model_bytes=parameters_by_part(adapter).total * own,
        forward_bytes=capture_elements(adapter, share, pictures) * own,
        skip=cfg.transcoder.skip,
        activation=cfg.transcoder.activation,
        pool_batches=plan.pool_batches,
        dead=plan.dead,
        aux_k=plan.aux_k,
        state_bytes=_STATES[plan.state_dtype],
        encoder_dtype=_ENCODERS[cfg.trainer.precision],
    )


_PARTS = {
    "model": "the frozen model",
    "weights": "weights of its layers' transcoders",
    "gradients": "their gradients",
    "moments": "the optimiser's moments",
    "buffers": "coordinates and clocks of features",
    "pool": "activations of the pool",
    "drawn": "activations of the step",
    "forward": "* inside the model's forward (estimate)",
    "exchange": "* activations while they are exchanged",
    "work": "* of the layer in work: all pre-activations, rows (estimate)",
    "gathered": "* the set, gathered to validate and to save",
}
_WORK = {
    "forward": "forward of the frozen model over its share",
    "exchange": "activations to their layers' owners",
    "draw": "drawing the step's tokens from the pool",
    "encoder": "encoder, the dense product",
    "choice": "choice of the active features",
    "sparse": "decoder and sparse gradients",
    "elementwise": "standardising, loss, its gradient",
    "skip": "skip path",
    "aux_k": "AuxK",
    "clipping": "gradient norm and clipping",
    "optimiser": "AdamW",
    "sums": "gradients and sums over hosts",
}
