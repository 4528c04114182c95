"""A tiny random model in float64 with random transcoders, and prompts as a batch."""

import pytest
import torch

from vlmscope.interventions.edits import LayerEdit
from vlmscope.models.base import exact_float64
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPT = "what is this planet ?"


@pytest.fixture(scope="session", params=["topk", "skip", "text_only", "llava", "paligemma", "qwen2_5_vl"])
def bench(request: pytest.FixtureRequest):
    """(scope, inputs, batch) with and without W_skip, with pictures and without, of several families."""
    text_only = request.param == "text_only"
    with exact_float64():
        family = request.param if request.param in FAMILIES else "gemma3_text" if text_only else "gemma3"
        vlm = tiny_vlm(family, 11, dtype=torch.float64)
        adapter = vlm.adapter
        skip = request.param in ("skip", *FAMILIES)
        transcoders = random_set(adapter.n_layers, adapter.d_model, 40, 6, skip=skip, seed=6, dtype=torch.float64)
        pictures = [[] if text_only else [tiny_image(i)] for i in range(3)]
        inputs = [vlm.prepare(PROMPT, found) for found in pictures]
        batch = make_batch(adapter, inputs)
    # Returned, not yielded from inside the context: the mode would else stay on for every later test of the session.
    return Scope(vlm, transcoders.requires_grad_(False)), inputs, batch


@pytest.fixture(autouse=True)
def exact():
    """Each test of this folder compares float64 computations."""
    with exact_float64():
        yield


def scaled(features: torch.Tensor, factor: float, where: torch.Tensor) -> LayerEdit:
    """Activations times a factor."""
    return LayerEdit(features, torch.zeros(len(features)), torch.full((len(features),), factor), where)
