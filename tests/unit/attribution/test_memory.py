"""A stated amount of memory is kept to, edges on disk are the same graph, and what has no room says so in one line."""

import dataclasses
import os
import tracemalloc
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vlmscope.attribution import edges, memory, trace
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.export import load_graph, save_graph
from vlmscope.attribution.influence import prune
from vlmscope.attribution.memory import MemoryPlan, graph_costs, plan_memory
from vlmscope.attribution.storage import Disk
from vlmscope.attribution.targets import choose_targets
from vlmscope.attribution.trace import attribute
from vlmscope.config.catalog import asset
from vlmscope.core.artifacts import load_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.graph import PrunedGraph
from vlmscope.models.attention import Pattern
from vlmscope.models.loading import VLM, load_vlm
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.replacement import ReplacementModel, build_replacement
from vlmscope.scope import Scope
from vlmscope.transcoders.formats import load_set
from vlmscope.transcoders.transcoder import random_set


@contextmanager
def allocated() -> Iterator[dict[str, int]]:
    """Yield a record that holds, after the block, the peaks of `numpy` and `torch` above what there was before.

    The two need not come together, so that their sum is at least the peak of both. Files that are mapped are in
    neither.
    """
    found: dict[str, int] = {}
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            yield found
        found["numpy"] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    found["torch"] = peak


@pytest.fixture(scope="module")
def orrery() -> tuple[VLM, ReplacementModel]:
    vlm = load_vlm(asset("orrery"))
    inputs = vlm.prepare("what planet is this ?", [tiny_image(1)])
    return vlm, build_replacement(Scope(vlm, load_set(asset("orrery_transcoders"))), inputs)


@pytest.fixture(scope="module")
def tiny() -> tuple[VLM, ReplacementModel]:
    vlm = tiny_gemma3(2)
    adapter, inputs = vlm.adapter, vlm.prepare("what is this planet ?", [tiny_image(1)])
    return vlm, build_replacement(Scope(vlm, random_set(adapter.n_layers, adapter.d_model, 48, 4, skip=True)), inputs)


def made(vlm: VLM, replacement: ReplacementModel, config: AttributionConfig, plan: MemoryPlan) -> PrunedGraph:
    graph = attribute(replacement, config, vlm.tokenizer, plan=plan)
    return prune(graph, storage=plan.storage)


@pytest.mark.parametrize(("max_nodes", "choice"), [(7500, "influence"), (900, "influence"), (900, "total_effect")])
@pytest.mark.parametrize("memory_gb", [0.03, 0.2])
def test_a_stated_amount_is_kept_to(
    orrery: tuple[VLM, ReplacementModel], max_nodes: int, choice: str, memory_gb: float, tmp_path: Path
) -> None:
    vlm, replacement = orrery
    config = AttributionConfig(max_nodes=max_nodes, choice=choice, memory_gb=memory_gb)
    plan = plan_memory(replacement, choose_targets(replacement, config, vlm.tokenizer), config, tmp_path)
    with allocated() as found:
        made(vlm, replacement, config, plan)
    # All edges of the larger graph take twice 32 MB in memory.
    assert plan.storage.on_disk == (memory_gb < 0.1)
    assert 0.05 * memory_gb < (found["numpy"] + found["torch"]) / 1e9 <= memory_gb


@pytest.mark.parametrize("max_nodes", [7500, 60])
def test_edges_on_disk_are_the_same_graph(
    tiny: tuple[VLM, ReplacementModel], max_nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, replacement = tiny
    monkeypatch.setattr(edges, "_FILE", 1000)  # so that the edges need several
    config = AttributionConfig(max_nodes=max_nodes, update_every=16)
    paths = []
    for plan in (MemoryPlan(8), MemoryPlan(8, Disk(tmp_path), 0)):
        found = made(vlm, replacement, config, plan)
        assert (found.graph.weights.base is None) == (not plan.storage.on_disk)
        found.graph.meta["seconds"] = 0.0
        paths.append(tmp_path / f"{len(paths)}.safetensors")
        save_graph(paths[-1], found)
    (arrays, words), (other_arrays, other_words) = map(load_tensors, paths)
    assert words == other_words and arrays.keys() == other_arrays.keys() and load_graph(paths[1]).n_edges > 0
    for name, array in arrays.items():
        assert array.dtype == other_arrays[name].dtype and array.tobytes() == other_arrays[name].tobytes(), name


def test_too_little_memory_says_what_would_do(orrery: tuple[VLM, ReplacementModel], tmp_path: Path) -> None:
    vlm, replacement = orrery
    targets = choose_targets(replacement, AttributionConfig(), vlm.tokenizer)

    def plan(memory_gb: float) -> MemoryPlan:
        return plan_memory(replacement, targets, AttributionConfig(memory_gb=memory_gb), tmp_path)

    needed = graph_costs(replacement, targets, 7500).least_bytes(1)
    with pytest.raises(UserError, match=r"give (\S+) or more, or about \d+ tokens$") as told:
        plan(needed * 0.99 / 1e9)
    assert plan(float(str(told.value).split("give ")[1].split()[0])).batch_size >= 1
    with pytest.raises(UserError, match="must be above 0"):
        AttributionConfig(memory_gb=0.0).check()


def test_a_full_disk_says_how_many_nodes_fit(
    orrery: tuple[VLM, ReplacementModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, replacement = orrery
    config = AttributionConfig(memory_gb=0.05)
    targets = choose_targets(replacement, config, vlm.tokenizer)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**12, 0, 20_000_000))
    with pytest.raises(UserError, match=r"take up to 0\.113 GB in .*, which has 0\.02 GB free; choose") as told:
        plan_memory(replacement, targets, config, tmp_path)
    nodes = int(str(told.value).split("max_nodes=")[1].split(",")[0])
    more = float(str(told.value).split("memory_gb=")[1].split(",")[0])
    costs = graph_costs(replacement, targets, 7500)
    assert costs.disk_bytes(nodes) <= 20_000_000 < costs.disk_bytes(nodes + 1)
    plan_memory(replacement, targets, dataclasses.replace(config, max_nodes=nodes), tmp_path)
    plan = plan_memory(replacement, targets, dataclasses.replace(config, memory_gb=more), tmp_path)
    assert not plan.storage.on_disk


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot put 0\.004 GB of edges into .*: No space left on device; choose"):
        Disk(tmp_path).zeros(1_000_000, "int32")
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        Disk(tmp_path / "nowhere").zeros(10, "int32")


def test_positions_see_what_patterns_let_them(tiny: tuple[VLM, ReplacementModel]) -> None:
    _, replacement = tiny
    first, last = memory.visible(replacement)
    image, own = np.flatnonzero(replacement.inputs.is_image), np.arange(replacement.n_positions)
    assert (last[image] == image[-1]).all()  # soft tokens see each other
    after = image[-1] + 1
    assert (last[after:] == own[after:]).all() and (first == 0).all()
    steps = torch.zeros(2, 1, 4, 4)
    steps[0, 0, 1, 0] = steps[1, 0, 2, 1] = 1.0
    patterns = [Pattern.of(step) for step in steps]
    state = dataclasses.replace(replacement.state, patterns=patterns, embeddings=replacement.state.embeddings[:4])
    chain = memory.visible(dataclasses.replace(replacement, state=state))
    assert chain.tolist() == [[0, 0, 0, 3], [0, 1, 2, 3]]


MAPS = Path("/proc/self/maps")  # Linux alone tells of files without a name; that the folder is empty, every system


def _nameless() -> int:
    """How many files without a name this process has mapped."""
    return sum(line.endswith("(deleted)") for line in MAPS.read_text().splitlines()) if MAPS.exists() else 0


def test_files_go_with_the_graph(
    tiny: tuple[VLM, ReplacementModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, replacement = tiny
    plan, before, assemble = MemoryPlan(8, Disk(tmp_path), 0), _nameless(), trace.assemble

    def interrupted(*args: object) -> object:
        assert _nameless() == before + 2 * MAPS.exists() and not os.listdir(tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(vlm, replacement, AttributionConfig(), plan)
    assert _nameless() == before
    monkeypatch.setattr(trace, "assemble", assemble)
    found = made(vlm, replacement, AttributionConfig(), plan)
    assert _nameless() == before + 3 * MAPS.exists() and not os.listdir(tmp_path)
    del found
    assert _nameless() == before
