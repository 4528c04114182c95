"""What `task=plan` counts of training, against training itself on a tiny Gemma 3."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import Forked, all_codes

from vlmscope.core.errors import UserError
from vlmscope.core.hardware import HARDWARE, Hardware
from vlmscope.core.records import generator
from vlmscope.models.tiny import tiny_gemma3
from vlmscope.training.captures import ActivationStream, Captures
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.layer_trainer import LayerTrainer
from vlmscope.training.ranks import Layout, Ranks
from vlmscope.training.sizes import TrainingSizes, bounds, layer_work, step_work, transcoder_numbers
from vlmscope.training.transcoder_module import TranscoderModule
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.config import ACTIVATIONS
from vlmscope.transcoders.formats import save_set
from vlmscope.transcoders.transcoder import Transcoder, TranscoderConfig

D, L, ROWS, LENGTH = 24, 4, 6, 12
KINDS = [(activation, skip) for activation in ACTIVATIONS for skip in (False, True)]


def sizes(layout: Layout | None = None, **changes: Any) -> TrainingSizes:
    base = TrainingSizes(layout or Layout(L), D, 4 * D, 8, ROWS * LENGTH, 4, 1000, pool_batches=2)
    return dataclasses.replace(base, **changes)


def batch(step: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.from_numpy(generator(5, "batch", step).integers(9, 20, (ROWS, LENGTH)))}


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(("activation", "skip"), KINDS)
def test_numbers_of_a_transcoder_are_exact(activation: str, skip: bool) -> None:
    config = TranscoderConfig(D, 96, 8, activation=activation, skip=skip)
    parameters = list(Transcoder(config).parameters())
    assert transcoder_numbers(D, 96, skip, activation) == (sum(p.numel() for p in parameters), len(parameters))
    assert sizes(activation=activation, skip=skip).buffer_bytes == bytes_of(LayerTrainer(config).buffers())


@pytest.mark.parametrize(("activation", "skip"), [("topk", False), ("batchtopk", False), ("jumprelu", True)])
def test_memory_checkpoint_and_set_are_what_training_keeps_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: str, skip: bool
) -> None:
    kept: list[TranscoderModule] = []
    original = TranscoderModule.training_step

    def watched(self: TranscoderModule, *arguments: Any) -> Any:
        kept[:] = [self]
        return original(self, *arguments)

    monkeypatch.setattr(TranscoderModule, "training_step", watched)
    config = TranscoderTrainingConfig(
        expansion_factor=4, k=8, activation=activation, skip=skip, max_steps=2, init_batches=1, pool_batches=2,
        checkpoint_every=0, val_every=0, log_every=0,
    )  # fmt: skip
    found, _ = train_transcoders(tiny_gemma3(0, text_only=True), batch, [], config, tmp_path / "run")
    planned, module = sizes(activation=activation, skip=skip), kept[0]
    parts = planned.memory(0)
    parameters = list(module.parameters())
    assert parts["weights"] == bytes_of(parameters)
    assert parts["gradients"] == bytes_of(p.grad for p in parameters)
    moments = [state[name] for state in module.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert parts["moments"] == bytes_of(moments)
    assert parts["buffers"] == bytes_of(module.buffers())
    assert parts["gathered"] == bytes_of(found.parameters())
    written = [load_file(file) for file in tmp_path.rglob("layer_*.safetensors")]
    assert planned.checkpoint_bytes == sum(bytes_of(one.values()) for one in written)
    save_set(found, tmp_path / "set", dtype="bfloat16")
    stored = [load_file(file) for file in (tmp_path / "set").glob("*.safetensors")]
    assert planned.set_bytes == sum(bytes_of(one.values()) for one in stored)


def test_the_pool_is_what_the_stream_keeps() -> None:
    vlm = tiny_gemma3(0, text_only=True)
    config = TranscoderTrainingConfig(pool_batches=2, steps_per_batch=1, max_steps=3)
    stream = iter(ActivationStream(Captures(vlm.adapter, batch), config, lambda: 0))
    next(stream)
    drawn = next(stream)
    size = bytes_of([drawn.is_image, *(one for pair in drawn.by_layer.values() for one in pair)])
    parts = sizes().memory(0)
    assert (parts["drawn"], parts["pool"]) == (size, 2 * size)
    captured = Ranks.single(L).collect(vlm.adapter, batch(0))
    cached = bytes_of(one for pair in captured.by_layer.values() for one in pair)
    assert sizes().cache_bytes(captured.n_tokens) == cached


_WORKER = """
import sys, json, torch
import torch.distributed as dist
from vlmscope.core.errors import NotMainRank
from vlmscope.core.records import generator
from vlmscope.models.tiny import tiny_gemma3
from vlmscope.training.ranks import Ranks
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.batches import LayerActivations
from vlmscope.training.transcoder_module import TranscoderModule
from vlmscope.training.transcoder_training import train_transcoders

rank, world, per_host, init, out = sys.argv[1:6]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=init, rank=int(rank), world_size=int(world))
told = {"tokens": [], "sent": 0, "summed": 0, "steps": 0}
inside = False

def batch(step):
    ids = generator(5, "batch", step).integers(9, 20, (7, 12))
    return {"input_ids": torch.from_numpy(ids)}

exchange, send, reduce, step = Ranks._exchange, dist.batch_isend_irecv, dist.all_reduce, TranscoderModule.training_step

def watched_exchange(self, own):
    told["tokens"].append(own.n_tokens)
    return exchange(self, own)

def watched_send(operations):
    told["sent"] += sum(one.tensor.numel() * one.tensor.element_size() for one in operations if one.op is dist.isend)
    return send(operations)

def watched_reduce(tensor, *arguments, **settings):
    if inside:
        told["summed"] += tensor.numel() * tensor.element_size()
    return reduce(tensor, *arguments, **settings)

def watched_step(self, *arguments):
    global inside
    inside = True
    told["steps"] += 1
    found = step(self, *arguments)
    inside = False
    return found

Ranks._exchange, dist.batch_isend_irecv, dist.all_reduce = watched_exchange, watched_send, watched_reduce
TranscoderModule.training_step = watched_step
config = TranscoderTrainingConfig(expansion_factor=4, k=8, max_steps=2, init_batches=1, pool_batches=1,
    steps_per_batch=1, checkpoint_every=0, val_every=0, log_every=0)
try:
    train_transcoders(tiny_gemma3(0, text_only=True), batch, [], config, out, per_host=int(per_host))
except NotMainRank:
    pass
open(f"{out}_{rank}.json", "w").write(json.dumps(told))
"""


@pytest.mark.parametrize(("world", "per_host"), [pytest.param(3, 3, marks=pytest.mark.slow), (2, 1)])
def test_bytes_sent_are_those_that_ranks_send(tmp_path: Path, world: int, per_host: int) -> None:
    init = (tmp_path / "rendezvous").as_uri()
    rest = (world, per_host, init, tmp_path / "run")
    assert all_codes([Forked(_WORKER, rank, *rest) for rank in range(world)]) == [0] * world
    planned = sizes(Layout(L, world, per_host), step_tokens=7 * 12)
    for rank in range(world):
        told = json.loads((tmp_path / f"run_{rank}.json").read_text())
        assert len(told["tokens"]) == 3 and told["steps"] == 2
        assert told["sent"] == sum(planned.sent_in_host(rank, tokens) for tokens in told["tokens"])
        assert told["summed"] == 2 * planned.summed_over_hosts(rank)
    assert (planned.sent_in_host(0) > 0, planned.summed_over_hosts(0) > 0) == (per_host > 1, per_host < world)


def test_a_rank_with_more_layers_needs_more_and_rank_0s_host_the_whole_set() -> None:
    planned = sizes(Layout(L, 3, 3))
    assert planned.memory(0)["weights"] == 2 * planned.memory(2)["weights"]
    assert planned.memory(0)["gathered"] == planned.memory(2)["gathered"] == planned.host_bytes / L
    assert sizes().host_bytes == 0 and sizes().memory(0)["gathered"] == planned.host_bytes
    assert planned.worst_peak == planned.peak(0) > planned.peak(1) == planned.peak(2)
    half = sizes(Layout(L, 3, 3), state_bytes=2)
    assert half.memory(0)["moments"] * 2 == planned.memory(0)["moments"]
    assert sizes(dead=0.5).work_bytes() > sizes().work_bytes() < sizes(activation="relu").work_bytes()


def test_work_follows_the_sizes() -> None:
    planned = sizes()
    parts = layer_work(planned)
    assert parts["encoder"].flops == 2 * planned.step_tokens * 4 * D * D
    assert layer_work(sizes(n_features=8 * D))["encoder"].flops == 2 * parts["encoder"].flops
    assert set(layer_work(sizes(skip=True, dead=0.5))) - set(parts) == {"skip", "aux_k"}
    often, seldom = (step_work(planned, 1e9, "bfloat16", steps_per_batch=n)["forward"] for n in (1, 2))
    assert (often.flops, often.dtype) == (2 * seldom.flops, "bfloat16")
    two = sizes(Layout(L, 4, 2))
    between = step_work(two, 1e9, "float32")["sums"]
    assert between.networked == two.summed_over_hosts(0) > 0


def test_mixed_precision_halves_the_product_alone() -> None:
    full, half = sizes(n_features=64 * D), sizes(n_features=64 * D, encoder_dtype="bfloat16")
    n, f = half.step_tokens, half.n_features
    assert half.work_bytes() - full.work_bytes() == -2 * n * f + 2 * (f * (D + 1) + n * D)
    assert {part for part, size in half.memory(0).items() if size != full.memory(0)[part]} == {"work"}
    ours, theirs = layer_work(half), layer_work(full)
    assert (ours["encoder"].dtype, ours["encoder"].flops) == ("bfloat16", theirs["encoder"].flops)
    assert ours["choice"].moved < theirs["choice"].moved and ours["sparse"].flops == 1.25 * theirs["sparse"].flops
    assert ours["optimiser"] == theirs["optimiser"]


def test_what_bounds_a_part_is_named() -> None:
    machine = Hardware("a machine", {"float32": 10.0}, 5.0, None, 2.0, 1.0)
    assert machine.bound(100, 10, "float32") == (10.0, "arithmetic")
    assert machine.bound(100, 100, "float32") == (20.0, "memory")
    assert machine.bound(10, 10, "float32", linked=10) == (5.0, "link")
    assert machine.bound(10, 10, "float32", linked=10, networked=10) == (10.0, "network")
    with pytest.raises(UserError, match="no network between hosts is known of NVIDIA L4"):
        bounds(step_work(sizes(Layout(L, 4, 2)), 1e9, "float32"), HARDWARE["l4"])
