"""What `task=plan` counts, against models and graphs that were made."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmscope.activations import capture_state
from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.edges import feature_chunks
from vlmscope.attribution.export import save_graph
from vlmscope.attribution.influence import prune
from vlmscope.attribution.trace import attribute
from vlmscope.config.catalog import asset
from vlmscope.core.errors import UserError
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import load_vlm
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm
from vlmscope.replacement import build_replacement
from vlmscope.scope import Scope
from vlmscope.tasks.plan import (
    PUBLISHED,
    empty_model,
    find_config,
    forward_flops,
    graph_sizes,
    parameters_by_part,
    soft_tokens,
    state_elements,
    transcoder_numbers,
)
from vlmscope.transcoders.config import ACTIVATIONS
from vlmscope.transcoders.formats import load_set
from vlmscope.transcoders.transcoder import Transcoder, TranscoderConfig

# Total parameters as the models' pages state them (safetensors metadata).
COUNTS = {
    "google/gemma-3-270m-it": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-12b-it": 12_187_325_040,
    "google/gemma-3-27b-it": 27_432_406_640,
    "google/medgemma-4b-it": 4_300_079_472,
}
D = 24


def test_every_published_count_is_met() -> None:
    assert set(PUBLISHED) == set(COUNTS)
    for name, count in COUNTS.items():
        assert parameters_by_part(adapter_for(empty_model(find_config(name))))["total"] == count, name


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text", *sorted(FAMILIES)])
def test_parts_add_up_in_every_family(family: str) -> None:
    model = tiny_vlm(family).model
    parts = parameters_by_part(adapter_for(model))
    assert parts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert parts["decoder"] > 0 and parts["embeddings"] > 0
    assert (parts["vision"] > 0) == (family != "gemma3_text")
    assert (parts["head"] > 0) == (model.lm_head.weight is not model.get_input_embeddings().weight)
    assert parameters_by_part(adapter_for(empty_model(model.config.to_dict()))) == parts


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text", "llava", "paligemma", "idefics3", "smolvlm", "internvl"])
def test_soft_tokens_are_those_of_a_picture(family: str) -> None:
    vlm = tiny_vlm(family)
    made = int(vlm.prepare("what is this ?", [] if family == "gemma3_text" else [tiny_image(0)]).is_image.sum())
    per_image = soft_tokens(vlm.adapter)
    assert per_image is not None and made % max(per_image, 1) == 0 and (made > 0) == (per_image > 0)


def test_what_is_recorded_of_a_forward_is_counted_exactly() -> None:
    for vlm in (load_vlm(asset("orrery")), *map(tiny_vlm, ("qwen2_5_vl", "qwen3_vl", "gemma4"))):
        inputs = vlm.prepare("what is this planet ?", [tiny_image(1)])
        state = capture_state(vlm.adapter, inputs)
        held = {name: tensor.numel() for name, tensor in vars(state).items() if isinstance(tensor, torch.Tensor)}
        held["patterns"] = sum(block.values.numel() for pattern in state.patterns for block in pattern.blocks)
        held["value_scales"] = sum(scale.numel() for scale in state.value_scales if scale is not None)
        assert state_elements(vlm.adapter, len(inputs)) == held


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="of org/other nothing is known here: .* known without it: google/gemma-3"):
        find_config("org/other")
    with pytest.raises(UserError, match="transformers refuses the config.json of this gemma3 model"):
        empty_model({"model_type": "gemma3", "text_config": {"hidden_size": "wide"}})


@pytest.mark.parametrize("max_nodes", [7500, 1000])
def test_orrerys_graph_is_foreseen(max_nodes: int, tmp_path: Path) -> None:
    vlm, transcoders = load_vlm(asset("orrery")), load_set(asset("orrery_transcoders"))
    config = AttributionConfig(max_nodes=max_nodes, batch_size=64)
    inputs = vlm.prepare("what planet is this ?", [tiny_image(1)])
    replacement = build_replacement(Scope(vlm, transcoders), inputs, torch.float32)
    tracemalloc.start()
    graph = attribute(replacement, config, vlm.tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    soft = np.flatnonzero(inputs.is_image)
    config = dataclasses.replace(config, max_logits=len(graph.logit_tokens))
    sizes, _ = graph_sizes(vlm.adapter, len(inputs), (int(soft[0]), int(soft[-1]) + 1), 16, False, config)
    adjoint = Adjoint(replacement)
    assert sizes["graph/active_features"] == graph.meta["n_active_features"]
    assert sizes["graph/rows"] == min(sizes["graph/active_features"], max_nodes)
    assert sizes["graph/nodes"] == graph.n_nodes
    assert sizes["memory/rows"] == 64 * adjoint.columns.total * (4 + 4 + 1 + 8)
    held = [adjoint.sources.of(layer).vectors for layer in range(vlm.adapter.n_layers)]
    assert sizes["memory/sources"] == sum(vectors.numel() * 4 for vectors in held)
    assert graph.n_edges <= sizes["graph/edges"] < 1.2 * graph.n_edges
    save_graph(tmp_path / "graph.safetensors", prune(graph, 0.8, 0.98))
    assert (tmp_path / "graph.safetensors").stat().st_size == pytest.approx(sizes["memory/file"], rel=0.2)
    # numpy's memory, which is where rows are assembled; torch's is not traced.
    assert peak == pytest.approx(sizes["memory/assembly"], rel=0.25)


def test_operations_are_those_that_torch_counts() -> None:
    vlm, transcoders = load_vlm(asset("orrery")), load_set(asset("orrery_transcoders"))
    inputs = vlm.prepare("what planet is this ?", [tiny_image(1)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vlm.model(**inputs.tensors)
    assert forward_flops(vlm.adapter, len(inputs), 1) == pytest.approx(counter.get_total_flops(), rel=0.1)
    adjoint = Adjoint(build_replacement(Scope(vlm, transcoders), inputs, torch.float32))
    soft = np.flatnonzero(inputs.is_image)
    bidirectional = (int(soft[0]), int(soft[-1]) + 1)
    sizes, flops = graph_sizes(vlm.adapter, len(inputs), bidirectional, 16, False, AttributionConfig())
    with FlopCounterMode(display=False) as counter:
        for _ in feature_chunks(adjoint, np.arange(sizes["graph/active_features"]), 64, "float32"):
            pass
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.3)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_of_a_transcoder_are_exact(activation: str, skip: bool) -> None:
    made = Transcoder(TranscoderConfig(D, 96, 8, activation=activation, skip=skip))
    assert transcoder_numbers(D, 96, skip, activation) == sum(p.numel() for p in made.parameters())
