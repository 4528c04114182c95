"""One recorded batch run, and contexts that freeze parts of the model to it.

`frozen_attention` freezes the patterns. `direct` freezes patterns, norm scales and MLP outputs, so that a change
reaches the logits through the residual stream and the value/output path only (and through W_skip, if the transcoder
has one): exactly the edges of the attribution graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmscope.activations.hook_points import target_module
from vlmscope.core.intervention import MODES
from vlmscope.models.attention import recording_patterns, replacing_patterns
from vlmscope.models.base import Adapter
from vlmscope.models.batching import InputBatch
from vlmscope.models.norms import all_norms
from vlmscope.transcoders.transcoder import TranscoderSet


@dataclass(frozen=True)
class BaseRun:
    """What an unedited run computed, as far as the modes that it was recorded for need it.

    Attributes:
        logits: [B, V] at the last position.
        patterns: layer -> [B, H, T, T]; for both frozen modes.
        mlp_in: layer -> [B, T, d], the transcoder's input; for direct, as all below.
        written: layer -> [B, T, d], the transcoder's target.
        inverse_rms: norm module -> [B, T, 1], of values [B, T, Hkv, 1], from which its scales follow.
    """

    logits: Tensor
    patterns: dict[int, Tensor]
    mlp_in: dict[int, Tensor]
    written: dict[int, Tensor]
    inverse_rms: dict[nn.Module, Tensor]


@torch.no_grad()
def base_run(
    adapter: Adapter, transcoders: TranscoderSet, batch: InputBatch, modes: Collection[str] = MODES
) -> BaseRun:
    """Run a batch unedited and keep what the modes freeze: for free nothing, for frozen_attention the patterns."""
    hook_name = transcoders.config.output_hook
    mlp_in: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    inverse_rms: dict[nn.Module, Tensor] = {}
    recorded: dict[int, Tensor] = {}
    with ExitStack() as stack:

        def watch(module: nn.Module, hook: Any) -> None:
            stack.callback(module.register_forward_hook(hook).remove)

        if "direct" in modes:
            for layer in range(adapter.n_layers):
                watch(adapter.mlp(layer), lambda _m, args, _o, layer=layer: mlp_in.__setitem__(layer, args[0]))
                target = target_module(adapter, layer, hook_name)
                watch(target, lambda _m, _a, out, layer=layer: written.__setitem__(layer, out))
            for norm in all_norms(adapter):
                watch(norm, lambda m, args, _o: inverse_rms.__setitem__(m, adapter.inverse_rms(m, args[0])))
        patterns = stack.enter_context(recording_patterns(adapter)) if {*modes} - {"free"} else {}
        logits = adapter.next_logits(batch.tensors)
        recorded.update(patterns)
    return BaseRun(logits, recorded, mlp_in, written, inverse_rms)


@contextmanager
def frozen_attention(adapter: Adapter, base: BaseRun) -> Iterator[None]:
    """Use the base run's attention patterns."""
    assert base.patterns, "the base run was not recorded for frozen attention"
    with replacing_patterns(adapter, base.patterns):
        yield


@contextmanager
def frozen_norms(adapter: Adapter, base: BaseRun) -> Iterator[None]:
    """Multiply by the base run's norm scales instead of normalising."""
    with ExitStack() as stack:
        for norm in all_norms(adapter):

            def hook(module: nn.Module, args: tuple, _out: Tensor) -> Tensor:
                return args[0] * adapter.norm_factor(module, base.inverse_rms[module], args[0].dtype)

            stack.callback(norm.register_forward_hook(hook).remove)
        yield
