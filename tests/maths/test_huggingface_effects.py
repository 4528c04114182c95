"""Edges against finite changes in the Hugging Face model itself, its patterns and norm scales frozen by hooks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tests.maths.maths_cases import TOLERANCE, Case, dense, key_of, read_targets, rows_of
from torch import Tensor, nn

from vlmscope.models.attention import replacing_patterns
from vlmscope.replacement import Replay

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


@contextmanager
def frozen_model(case: Case) -> Iterator[None]:
    """The Hugging Face model with the recorded attention patterns and norm scales."""
    adapter, state = case.vlm.adapter, case.replacement.state
    scales = {adapter.final_norm(): state.final_norm_scale}
    for layer in range(adapter.n_layers):
        for number, norm in enumerate(adapter.norms(layer)):
            if norm is not None:
                scales[norm] = state.norm_scales[layer, number]
        values, value_scale = adapter.value_norm(layer), state.value_scales[layer]
        if values is not None and value_scale is not None:
            heads = case.replacement.layers[layer].n_kv_heads
            scales[values] = value_scale.view(len(value_scale), heads, -1)

    def fix(scale: Tensor) -> Hook:
        return lambda _module, args, _output: args[0] * scale

    with ExitStack() as stack:
        stack.enter_context(replacing_patterns(adapter, {n: p.whole()[None] for n, p in enumerate(state.patterns)}))
        for norm, scale in scales.items():
            stack.callback(norm.register_forward_hook(fix(scale)).remove)
        yield


def run(case: Case, key: tuple[int, int, int], delta: float, respond: bool) -> Replay:
    """Change one feature at its MLP's output; the MLPs move with their skip path and, if asked, their active
    features.
    """
    adapter, state, replacement = case.vlm.adapter, case.replacement.state, case.replacement
    pre: dict[int, Tensor] = {}
    changes: dict[int, Tensor] = {}
    unembedded: list[Tensor] = []

    def mlp(layer: int) -> Hook:
        def hook(_module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
            transcoder = case.transcoders[layer]
            features = replacement.features[layer]
            moved = args[0][0] - state.mlp_in[layer]
            pre[layer] = (moved @ transcoder.W_enc.T)[features.position, features.index]
            change = torch.zeros(len(moved), transcoder.W_enc.shape[0], dtype=moved.dtype)
            if respond:
                change[features.position, features.index] = pre[layer]
            if layer == key[0]:
                change[key[1], key[2]] += delta
            changes[layer] = change
            out = state.mlp_out[layer]
            for lower, found in changes.items():
                if layer - lower < case.transcoders[lower].config.writes:
                    out = out + found @ case.transcoders[lower].decoder(layer - lower)
            return (out if transcoder.W_skip is None else out + moved @ transcoder.W_skip.T)[None]

        return hook

    with torch.no_grad(), frozen_model(case), ExitStack() as stack:
        for layer in range(adapter.n_layers):
            stack.callback(adapter.mlp(layer).register_forward_hook(mlp(layer)).remove)
        # Effects are those on the logits before a cap.
        head = adapter.lm_head().register_forward_hook(lambda _module, _args, output: unembedded.append(output[0]))
        stack.callback(head.remove)
        case.vlm.model(**case.inputs.tensors)
    moved = torch.cat([pre[layer] for layer in range(adapter.n_layers)])
    return Replay(moved, moved, unembedded[0] - state.logits)


def test_frozen_huggingface_model_is_itself(case: Case) -> None:
    with torch.no_grad(), frozen_model(case):
        logits = case.vlm.model(**case.inputs.tensors).logits[0]
    assert (logits - case.replacement.capped(case.replacement.state.logits)).abs().max() < 1e-12


@pytest.mark.parametrize("delta", [0.3, -2.0])
def test_direct_effects_in_huggingface(case: Case, delta: float) -> None:
    graph, rows = case.graph, rows_of(case.graph)
    matrix = dense(graph)
    scale = np.abs(matrix[rows]).sum(1)
    for source in case.subject.sources[::2]:
        moved = read_targets(graph, run(case, key_of(graph, source), delta, respond=False))
        expected = matrix[rows, source] / graph.nodes.activation[source] * delta
        assert (np.abs(moved - expected) <= TOLERANCE * scale).all()


def test_total_effects_in_huggingface(case: Case) -> None:
    graph = case.graph
    scale = np.abs(dense(graph)[rows_of(graph)]).sum(1)
    for source in case.subject.sources[::2]:
        key = key_of(graph, source)
        moved = read_targets(graph, run(case, key, 0.6, respond=True))
        expected = read_targets(graph, case.replacement.total({key: 0.6}))
        assert (np.abs(moved - expected) <= TOLERANCE * np.maximum(scale, np.abs(expected))).all()
