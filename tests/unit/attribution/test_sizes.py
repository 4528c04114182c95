"""The size of a graph, estimated before it is made, against graphs that were made."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.export import save_graph
from vlmscope.attribution.influence import prune
from vlmscope.attribution.memory import GraphSizes
from vlmscope.attribution.trace import attribute
from vlmscope.config.catalog import asset
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.loading import load_vlm
from vlmscope.models.sizes import attention_widths
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.replacement.model import build_replacement
from vlmscope.scope import Scope
from vlmscope.transcoders.formats import load_set
from vlmscope.transcoders.transcoder import random_set


def sizes(adapter: Adapter, inputs: ModelInputs, k: int, config: AttributionConfig, skip: bool = False) -> GraphSizes:
    soft = np.flatnonzero(inputs.is_image)
    queries, values = attention_widths(adapter)
    return GraphSizes(
        n_layers=adapter.n_layers,
        d_model=adapter.d_model,
        query_width=queries,
        value_width=values,
        n_tokens=len(inputs),
        image=(int(soft[0]), int(soft[-1]) + 1),
        k=k,
        skip=skip,
        config=config,
    )


@pytest.mark.parametrize("max_nodes", [7500, 1000])
def test_orrerys_graph_is_foreseen(max_nodes: int, tmp_path: Path) -> None:
    vlm, transcoders = load_vlm(asset("orrery")), load_set(asset("orrery_transcoders"))
    config = AttributionConfig(max_nodes=max_nodes)
    inputs = vlm.prepare("what planet is this ?", [tiny_image(1)])
    replacement = build_replacement(Scope(vlm, transcoders), inputs, torch.float32)
    tracemalloc.start()
    graph = attribute(replacement, config, vlm.tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    n_logits = len(graph.logit_tokens)
    found = sizes(vlm.adapter, inputs, 16, dataclasses.replace(config, max_logits=n_logits))
    assert found.active == graph.meta["n_active_features"]
    assert found.rows == found.active - graph.meta["n_left_out_features"] == min(found.active, max_nodes)
    assert found.nodes == len(graph.nodes.kind)
    assert found.columns == Adjoint(replacement).columns.total
    assert len(graph.weights) <= found.edges < 1.2 * len(graph.weights)
    path = tmp_path / "graph.safetensors"
    save_graph(path, prune(graph, 0.8, 0.98))
    assert path.stat().st_size == pytest.approx(found.file_bytes, rel=0.2)
    # numpy's memory, which is where rows are assembled; torch's is not traced.
    assert peak == pytest.approx(found.peak_bytes, rel=0.25)


def test_rows_and_sources_have_the_foreseen_shapes() -> None:
    vlm = tiny_gemma3(2)
    adapter, inputs = vlm.adapter, vlm.prepare("what is this planet ?", [tiny_image(1)])
    replacement = build_replacement(Scope(vlm, random_set(adapter.n_layers, adapter.d_model, 48, 4, skip=True)), inputs)
    adjoint = Adjoint(replacement)
    config = AttributionConfig(batch_size=3)
    found = sizes(adapter, inputs, 4, config, skip=True)
    rows = adjoint.stream_rows(
        adapter.n_layers, torch.randn(3, adapter.d_model), torch.full((3,), adjoint.columns.n_positions - 1)
    )
    assert rows.shape == (3, found.columns)
    # As swept in float32, absolute values, a mask and int64 places.
    assert found.row_buffer_bytes == rows.numel() * (4 + 4 + 1 + 8)
    assert adjoint.sources.cached
    held = [adjoint.sources.of(layer).vectors for layer in range(adapter.n_layers)]
    assert found.source_bytes == sum(vectors.numel() * 4 for vectors in held)


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from vlmscope.attribution.edges import feature_chunks

    vlm, transcoders = load_vlm(asset("orrery")), load_set(asset("orrery_transcoders"))
    inputs = vlm.prepare("what planet is this ?", [tiny_image(1)])
    replacement = build_replacement(Scope(vlm, transcoders), inputs, torch.float32)
    adjoint = Adjoint(replacement)
    found = sizes(vlm.adapter, inputs, 16, AttributionConfig())
    with FlopCounterMode(display=False) as counter:
        for _ in feature_chunks(adjoint, np.arange(found.active), 64, "float32"):
            pass
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.3)


def test_a_published_model_is_counted_by_hand() -> None:
    # 3 positions, 2 layers, k = 2, no picture: rows see 1, 2 and 3 positions.
    config = AttributionConfig(max_logits=1)
    found = GraphSizes(2, 8, 8, 4, 3, (0, 0), 2, False, config)
    assert (found.active, found.columns, found.nodes) == (12, 3 + 2 * (1 + 9), 3 + 2 * 4 + 12 + 1)
    layer_0 = 2 * (1 + 2 + 3) + 6  # embeddings and own bias of two rows a position
    layer_1 = 2 * (1 + 2 + 3) * (1 + 3) + 6 * 2
    assert found.edges == layer_0 + layer_1 + found.columns
