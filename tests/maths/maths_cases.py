"""Tiny float64 cases on which the identities must hold: text only, one and two pictures, skip paths, biases, GQA.

The identities themselves are `vlmscope.conformance`, which `task=check` runs too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import attribute
from vlmscope.conformance import TOLERANCE, Limits, Subject, make_subject
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.models.base import ModelInputs
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_gemma3, tiny_image, tiny_vlm
from vlmscope.replacement import ReplacementModel, Replay
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import TranscoderSet, random_set

__all__ = [
    "CASES",
    "PROMPT",
    "TOLERANCE",
    "Case",
    "case_of",
    "config",
    "dense",
    "key_of",
    "make_case",
    "read_targets",
    "rows_of",
]

PROMPT = "what is this planet ? red and blue"

CASES: dict[str, dict[str, Any]] = {
    "text_only_model": {"text_only": True, "images": 0, "skip": False},
    "text_in_multimodal": {"images": 0, "skip": True},
    "one_image": {"images": 1, "skip": False},
    "one_image_skip_biases": {"images": 1, "skip": True, "attention_bias": True},
    "two_images_skip": {"images": 2, "skip": True},
    "no_gqa": {"images": 1, "skip": False, "n_kv_heads": 4},
    # The window is shorter than the prompt; three layers of it still reach from the last position to the picture.
    "all_sliding": {"images": 1, "skip": False, "layer_types": ("sliding_attention",) * 3, "window": 7},
    # Nonlinearities beside TopK, which the frozen supports leave behind.
    "batchtopk": {"images": 1, "skip": True, "activation": "batchtopk"},
    "jumprelu": {"images": 1, "skip": True, "activation": "jumprelu"},
    "relu": {"images": 1, "skip": False, "activation": "relu"},
    # A feature writes to its own layer and to all later ones.
    "cross_layer": {"images": 1, "skip": True, "cross_layer": True},
    "cross_layer_text": {"text_only": True, "images": 0, "skip": False, "cross_layer": True, "activation": "relu"},
    "cross_layer_two_images": {"images": 2, "skip": True, "cross_layer": True, "activation": "jumprelu"},
    "cross_layer_qwen3_vl": {"family": "qwen3_vl", "images": 1, "skip": True, "cross_layer": True},
    # Families: one picture with skip paths, and where pictures add up in another way, two.
    "llava": {"family": "llava", "images": 1, "skip": True},
    "llava_two_images": {"family": "llava", "images": 2, "skip": False},
    "llava_onevision": {"family": "llava_onevision", "images": 1, "skip": True},
    "llava_onevision_two_images": {"family": "llava_onevision", "images": 2, "skip": False},
    "gemma4": {"family": "gemma4", "images": 1, "skip": True},
    "idefics3": {"family": "idefics3", "images": 1, "skip": True},
    "internvl": {"family": "internvl", "images": 1, "skip": True},
    "paligemma": {"family": "paligemma", "images": 1, "skip": True},
    "paligemma2": {"family": "paligemma2", "images": 1, "skip": True},
    "qwen2_5_vl": {"family": "qwen2_5_vl", "images": 1, "skip": True},
    "qwen3_vl": {"family": "qwen3_vl", "images": 1, "skip": True},
    "qwen3_vl_two_images": {"family": "qwen3_vl", "images": 2, "skip": False},
    "smolvlm": {"family": "smolvlm", "images": 1, "skip": True},
}
# Cases with pictures, skip paths and biases at once, one a family: the deliberate faults run on these.
WHOLE = ("one_image_skip_biases", *(name for name, settings in CASES.items() if settings.get("family") == name))


@dataclass(frozen=True)
class Case:
    """A tiny model at one prompt, in float64: what the checks take, and the graph that a user gets of it."""

    subject: Subject
    graph: AttributionGraph

    @property
    def vlm(self) -> VLM:
        return self.subject.scope.vlm

    @property
    def inputs(self) -> ModelInputs:
        return self.subject.inputs

    @property
    def transcoders(self) -> TranscoderSet:
        return self.subject.scope.transcoders

    @property
    def replacement(self) -> ReplacementModel:
        return self.subject.replacement


def config(**changes: Any) -> AttributionConfig:
    """Settings that keep every feature and explain several logits, in the batches of the checks: equal bit for bit."""
    size = Limits().batch_size
    return AttributionConfig(**{"dtype": "float64", "logit_mass": 1.0, "max_logits": 5, "batch_size": size, **changes})


def make_case(
    images: int, skip: bool, family: str = "", activation: str = "topk", cross_layer: bool = False, **model: Any
) -> Case:
    """Build a case; call it under `exact_float64`."""
    vlm = tiny_vlm(family, 3, dtype=torch.float64) if family else tiny_gemma3(3, dtype=torch.float64, **model)
    inputs = vlm.prepare(PROMPT, [tiny_image(number) for number in range(images)])
    other = vlm.prepare(PROMPT, [tiny_image(99 + number) for number in range(images)]) if images else None
    adapter = vlm.adapter
    settings = {"skip": skip, "seed": 4, "dtype": torch.float64, "activation": activation, "cross_layer": cross_layer}
    transcoders = random_set(adapter.n_layers, adapter.d_model, 40, 5, **settings)
    limits = Limits(sources=24, positions=12)
    subject = make_subject(Scope(vlm, transcoders), inputs, other, limits)
    return Case(subject, attribute(subject.replacement, config(), vlm.tokenizer))


def case_of(name: str, cases: dict[str, Case]) -> Case:
    """The case of `CASES` with this name, from `cases` when it was made before; call it under `exact_float64`."""
    if name not in cases:
        cases[name] = make_case(**CASES[name])
    return cases[name]


def dense(graph: AttributionGraph) -> np.ndarray:
    """The adjacency matrix, rows targets."""
    out = np.zeros((graph.n_nodes, graph.n_nodes))
    out[graph.edge_targets(), graph.indices] = graph.weights
    return out


def rows_of(graph: AttributionGraph) -> np.ndarray:
    """Nodes that have a row: features, then logits."""
    return np.concatenate([graph.nodes.of(NodeKind.FEATURE), graph.nodes.of(NodeKind.LOGIT)])


def read_targets(graph: AttributionGraph, replay: Replay) -> np.ndarray:
    """What a replay gives the graph's targets, in the order of `rows_of`."""
    logits = replay.logits[-1]
    centred = (logits - logits.mean()).numpy()[graph.nodes.index[graph.nodes.of(NodeKind.LOGIT)]]
    return np.concatenate([replay.pre_activation.numpy(), centred])


def key_of(graph: AttributionGraph, node: int) -> tuple[int, int, int]:
    table = graph.nodes
    return int(table.layer[node]), int(table.position[node]), int(table.index[node])
