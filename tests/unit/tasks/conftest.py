"""What steps on pairs read: a tiny random model with transcoders, and pairs of pictures."""

from types import SimpleNamespace
from typing import Any

import pytest

from vlmscope.circuits.pairs import PairSubject, pair_subject
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


@pytest.fixture(scope="session")
def made() -> tuple[Any, PairSubject]:
    """(bench, subject): three pairs, whose answers are the two words that the model thinks most probable."""
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 24, 5, seed=6).requires_grad_(False)
    sides = [[vlm.prepare("what is this planet ?", [tiny_image(i)]) for i in some] for some in (range(3), range(3, 6))]
    logits = vlm.adapter.forward(sides[0][0].tensors, use_cache=False).logits[0, -1, : vlm.adapter.vocab_size]
    first, second = (logits.topk(2).indices[i].repeat(3) for i in (0, 1))
    scope = Scope(vlm, transcoders)
    subject = pair_subject(scope, "name", sides[0], sides[1], first, second, 2, answerable=False)
    return SimpleNamespace(vlm=vlm, scope=scope, transcoders=transcoders, cfg=SimpleNamespace(seed=0)), subject
