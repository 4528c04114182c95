"""Running under edits: base runs and what modes freeze, edited forwards, generation.

One recorded batch run, and contexts that freeze parts of the model to it.

`frozen_attention` freezes the patterns. `direct` freezes patterns, norm scales and MLP outputs, so that a change
reaches the logits through the residual stream and the value/output path only (and through W_skip, if the transcoder
has one): exactly the edges of the attribution graph.

Run a batch under a plan of edits: `free`, `frozen_attention` or `direct` (DESIGN: three strengths).

Legend: B prompts, T positions, n edited features of a layer, F all, k slots of a code, d model width, V vocabulary.

Greedy generation under a plan of edits, with a KV cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmscope.activations.capture import target_module
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import MODES
from vlmscope.interventions.edits import AnyPlan, LayerEdit, WholeEdit, at_step
from vlmscope.models.attention import recording_patterns, replacing_patterns
from vlmscope.models.base import Adapter, ModelInputs, all_norms
from vlmscope.models.batching import InputBatch
from vlmscope.models.conversations import continued, generated
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, Transcoder, TranscoderSet


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
def base_run(scope: Scope, batch: InputBatch, modes: Collection[str] = MODES) -> BaseRun:
    """Run a batch unedited and keep what the modes freeze: for free nothing, for frozen_attention the patterns."""
    hook_name = scope.transcoders.config.output_hook
    mlp_in: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    inverse_rms: dict[nn.Module, Tensor] = {}
    recorded: dict[int, Tensor] = {}
    with ExitStack() as stack:

        def watch(module: nn.Module, hook: Any) -> None:
            stack.callback(module.register_forward_hook(hook).remove)

        if "direct" in modes:
            for layer in range(scope.adapter.n_layers):
                watch(scope.adapter.mlp(layer), lambda _m, args, _o, layer=layer: mlp_in.__setitem__(layer, args[0]))
                target = target_module(scope.adapter, layer, hook_name)
                watch(target, lambda _m, _a, out, layer=layer: written.__setitem__(layer, out))
            for norm in all_norms(scope.adapter):
                watch(norm, lambda m, args, _o: inverse_rms.__setitem__(m, scope.adapter.inverse_rms(m, args[0])))
        patterns = stack.enter_context(recording_patterns(scope.adapter)) if {*modes} - {"free"} else {}
        logits = scope.forward(batch)
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


@torch.no_grad()
def run_edited(
    scope: Scope,
    batch: InputBatch,
    plan: AnyPlan,
    mode: str = "free",
    base: BaseRun | None = None,
) -> Tensor:
    """Logits at the last position under a plan.

    Args:
        scope: the model and its transcoders.
        batch: B prompts.
        plan: edits by layer.
        mode: 'direct', 'frozen_attention' or 'free'.
        base: the unedited run of the same batch, recorded for this mode; needed by the two frozen modes.

    Returns:
        [B, V] float tensor.

    Raises:
        UserError: unknown mode, or features that the transcoders do not have.
    """
    if mode not in MODES:
        raise UserError(f"unknown intervention mode {mode!r}: choose one of {', '.join(MODES)}")
    _check(scope.transcoders, plan)
    with ExitStack() as stack:
        if mode != "free":
            assert base is not None, f"mode {mode!r} needs the base run"
            stack.enter_context(frozen_attention(scope.adapter, base))
        if mode == "direct":
            assert base is not None and base.written, "the base run was not recorded for direct mode"
            stack.enter_context(_direct(scope, plan, base))
            stack.enter_context(frozen_norms(scope.adapter, base))
        else:
            stack.enter_context(editing(scope, plan))
        return scope.forward(batch)


def _check(transcoders: TranscoderSet, plan: AnyPlan) -> None:
    for layer, edit in plan.items():
        if layer not in transcoders:
            raise UserError(f"the circuit names layer {layer}, but the transcoders have layers {transcoders.layers}")
        width = transcoders[layer].config.n_features
        if len(edit.features) and int(edit.features.max()) >= width:
            raise UserError(
                f"the circuit names feature {int(edit.features.max())} of layer {layer}, whose width is {width}"
            )


def activations(transcoder: Transcoder, x: Tensor, features: Tensor) -> Tensor:
    """Activations [.., n] of chosen features for MLP inputs [.., d]: 0 where the nonlinearity drops them."""
    return transcoder.encode(x).select(features, transcoder.config.n_features)


def watch_inputs(stack: ExitStack, adapter: Adapter, layers: Iterable[int]) -> dict[int, Tensor]:
    """A dict that every forward fills with the MLP inputs [B, T, d] of `layers`, until `stack` closes."""
    found: dict[int, Tensor] = {}
    for layer in layers:

        def hook(_module: nn.Module, args: tuple, layer: int = layer) -> None:
            found[layer] = args[0]

        stack.callback(adapter.mlp(layer).register_forward_pre_hook(hook).remove)
    return found


def watch_length(stack: ExitStack, adapter: Adapter) -> dict[str, int]:
    """A dict whose "tokens" is, during every forward, how many tokens the KV cache holds, until `stack` closes."""
    seen = {"tokens": 0}

    def count(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        seen["tokens"] = 0 if cache is None else int(cache.get_seq_length())

    stack.callback(adapter.decoder().register_forward_pre_hook(count, with_kwargs=True).remove)
    return seen


@contextmanager
def editing(scope: Scope, plan: AnyPlan) -> Iterator[None]:
    """Edit features in every forward inside the context, also token by token in `generate` with a KV cache.

    The first forward is the prompt; later ones are generated tokens, which only edits with `generated` touch.
    """
    with ExitStack() as stack:
        seen = watch_length(stack, scope.adapter)
        inputs = watch_inputs(stack, scope.adapter, plan)
        pending: dict[int, Tensor] = {}  # what edits of lower layers write to a later one (cross-layer transcoders)
        for layer in layers_written(scope.transcoders, plan):

            def hook(_m: Any, _args: Any, out: Tensor, layer: int = layer) -> Tensor:
                if layer in plan:
                    changes = edit_changes(scope.transcoders[layer], inputs.pop(layer), plan[layer], seen["tokens"])
                    add_ahead(pending, layer, changes)
                return out + pending.pop(layer) if layer in pending else out

            target = target_module(scope.adapter, layer, scope.transcoders.config.output_hook)
            stack.callback(target.register_forward_hook(hook).remove)
        yield


def layers_written(transcoders: TranscoderSet, plan: AnyPlan) -> list[int]:
    """The layers where a plan changes something, ascending."""
    return sorted({layer + ahead for layer in plan for ahead in range(transcoders[layer].config.writes)})


def add_ahead(pending: dict[int, Tensor], layer: int, changes: Sequence[Tensor]) -> None:
    """Add the changes that an edit of `layer` makes there and at the layers after it, in order."""
    for ahead, change in enumerate(changes):
        target = layer + ahead
        # A later layer may lie on another device, where the model is spread over several.
        pending[target] = pending[target].to(change.device) + change if target in pending else change


def edit_changes(transcoder: Transcoder, x: Tensor, edit: LayerEdit | WholeEdit, offset: int) -> list[Tensor]:
    """What an edit adds to the target [B, t, d] of each layer that its features write to, from their own upwards.

    `x` are the transcoder's inputs at positions offset..offset + t. Empty when the edit does nothing there.
    """
    if isinstance(edit, WholeEdit):
        return _whole_changes(transcoder, x, edit, offset)
    if len(edit.features) == 0:
        return []
    # Plans made of circuits and of names lie on the CPU.
    edit = edit.to(x.device)
    length, prompt, gate = x.shape[1], len(edit.where), edit.gate
    if offset >= prompt:
        if edit.generated is None:
            return []
        now = at_step(edit.generated, 2, offset - prompt)
        value = now.unsqueeze(-2) if now.ndim > 1 else now
        level = None if gate is None else at_step(gate.generated, 1, offset - prompt)
        return [c.to(x.dtype) for c in _written(transcoder, x, edit, value, level, edit.at_generated)]
    assert offset == 0 and length == prompt, f"the edit is for {prompt} positions, the run has {offset} + {length}"
    if not bool(edit.where.any()):
        return []
    value, scale = (v if v.ndim < 2 or v.shape[-2] == 1 else v[..., edit.where, :] for v in (edit.value, edit.scale))
    edit = replace(edit, scale=scale)
    level = None if gate is None else gate.level[edit.where]
    at = None if edit.at is None else edit.at[edit.where]
    return _placed(_written(transcoder, x[:, edit.where], edit, value, level, at), edit.where, x)


def _placed(written: Iterable[Tensor], where: Tensor, like: Tensor) -> list[Tensor]:
    """What is written [B, t, d] at positions `where` [T] bool, as [B, T, d] with zeros elsewhere."""
    changes = []
    for one in written:
        changes.append(like.new_zeros(like.shape))
        changes[-1][:, where] = one.to(like.dtype)
    return changes


def _whole_changes(transcoder: Transcoder, x: Tensor, edit: WholeEdit, offset: int) -> list[Tensor]:
    """`edit_changes` of all features."""
    length, prompt = x.shape[1], len(edit.where)
    if offset >= prompt:
        code = edit.generated
        if code is None:
            return []
        found = _exchanged(transcoder, x, code.indices[:, None], code.values[:, None])
        return [one.to(x.dtype) for one in found]
    assert offset == 0 and length == prompt, f"the edit is for {prompt} positions, the run has {offset} + {length}"
    if not bool(edit.where.any()):
        return []
    code = edit.code
    found = _exchanged(transcoder, x[:, edit.where], code.indices[:, edit.where], code.values[:, edit.where])
    return _placed(found, edit.where, x)


def _exchanged(transcoder: Transcoder, x: Tensor, indices: Tensor, values: Tensor) -> list[Tensor]:
    """What a code [B, t, k] writes minus what the live one does, [B, t, d] by layer written.

    One sum over the entries of both: in half precision the difference of two rounded sums would be mostly rounding.
    """
    live = transcoder.encode(x)
    lead = live.indices.shape[:-1]
    indices, values = (one.to(x.device).expand(*lead, one.shape[-1]) for one in (indices, values))
    both = SparseCode(torch.cat([indices, live.indices], -1), torch.cat([values.to(live.values), -live.values], -1))
    return [transcoder.write(both, ahead) for ahead in range(transcoder.config.writes)]


def _written(
    transcoder: Transcoder, x: Tensor, edit: LayerEdit, value: Tensor, level: Tensor | None, at: Tensor | None
) -> list[Tensor]:
    """`g (new - current) W_dec` [B, t, d] by layer written, at the given positions; `level` is the gate's there, if
    it has one, and `at` (broadcastable to [t, n]) says which features are edited where.
    """
    code, width = transcoder.encode(x), transcoder.config.n_features
    current = code.select(edit.features, width)
    delta = edit.scale * current + value - current
    if at is not None:
        delta = delta * at.to(delta)
    if edit.gate is not None and level is not None:
        norms = transcoder.write_norms()[edit.gate.features]
        delta = delta * edit.gate.openness(code.select(edit.gate.features, width), level, norms)
    delta = delta.to(transcoder.W_dec.dtype)
    return [delta @ transcoder.decoder(ahead)[edit.features] for ahead in range(transcoder.config.writes)]


@contextmanager
def _direct(scope: Scope, plan: AnyPlan, base: BaseRun) -> Iterator[None]:
    """Every transcoder target is the base run's, plus the edit at base activations, plus W_skip's response."""
    changes: dict[int, Tensor] = {}
    for layer, edit in plan.items():
        add_ahead(changes, layer, edit_changes(scope.transcoders[layer], base.mlp_in[layer], edit, 0))
    with ExitStack() as stack:
        inputs = watch_inputs(stack, scope.adapter, range(scope.adapter.n_layers))
        for layer in range(scope.adapter.n_layers):

            def hook(_m: Any, _args: Any, _out: Tensor, layer: int = layer) -> Tensor:
                out = base.written[layer]
                x = inputs.pop(layer)
                if layer in scope.transcoders:
                    skip = scope.transcoders[layer].W_skip
                    if skip is not None:
                        out = out + F.linear(x - base.mlp_in[layer], skip.to(x.dtype))
                return out + changes[layer] if layer in changes else out

            target = target_module(scope.adapter, layer, scope.transcoders.config.output_hook)
            stack.callback(target.register_forward_hook(hook).remove)
        yield


def generate_edited(scope: Scope, inputs: ModelInputs, plan: AnyPlan | None = None, max_new_tokens: int = 24) -> str:
    """The answer to one prompt, edited in the prompt and, where the plan says so, at every generated token.

    Args:
        scope: the model and its transcoders.
        inputs: one prompt with its pictures.
        plan: edits by layer; None generates freely.
        max_new_tokens: stop after so many tokens even without an end of turn.

    Returns:
        The text of the answer without special tokens.
    """
    ids = generate_ids(scope, inputs, plan, max_new_tokens)
    return scope.vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def generate_ids(scope: Scope, inputs: ModelInputs, plan: AnyPlan | None = None, max_new_tokens: int = 24) -> list[int]:
    """The token ids of the answer, its end token included; arguments as in `generate_edited`."""
    with editing(scope, plan) if plan else nullcontext():
        return generated(scope.adapter, inputs.tensors, max_new_tokens)[0].tolist()


@torch.no_grad()
def generate_batch(
    adapter: Adapter,
    inputs: Sequence[ModelInputs],
    max_new_tokens: int = 24,
    context: AbstractContextManager[None] | None = None,
) -> list[list[int]]:
    """The greedy answers to several prompts at once, each up to and with its end token.

    Args:
        adapter: the model.
        inputs: prompts of equal length, each with equally many pictures of equal size.
        max_new_tokens: stop after so many tokens.
        context: around the forwards, such as `editing` or `random_directions`.

    Raises:
        UserError: the prompts cannot be stacked, or `generated` refuses them.
    """
    names = inputs[0].tensors
    shapes = [{name: tensor.shape[1:] for name, tensor in one.tensors.items()} for one in inputs]
    if any(len(one) != len(inputs[0]) or shape != shapes[0] for one, shape in zip(inputs, shapes, strict=True)):
        raise UserError("prompts of a batch must have equal length and pictures of equal size: generate one by one")
    tensors = {name: torch.cat([one.tensors[name] for one in inputs]) for name in names}
    with context or nullcontext():
        found = generated(adapter, tensors, max_new_tokens).tolist()
    ends = adapter.model.generation_config.eos_token_id
    known: set[int] = {ends} if isinstance(ends, int) else {int(end) for end in ends or ()}
    return [_through_end(ids, known) for ids in found]


def without_special(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Token ids without special ones, such as the end of a turn."""
    special = {token for token, kind in tokenizer.added_tokens_decoder.items() if kind.special}
    return [token for token in ids if token not in special]


def whole_answers(
    scope: Scope, inputs: Sequence[ModelInputs], max_new_tokens: int = 24, batch: int = 64
) -> list[tuple[list[int], str]]:
    """The greedy answer to each prompt, `batch` at once: its tokens without special ones, and its text."""
    found = []
    for start in range(0, len(inputs), batch):
        for ids in generate_batch(scope.adapter, inputs[start : start + batch], max_new_tokens):
            words = without_special(scope.vlm.tokenizer, ids)
            found.append((words, scope.vlm.tokenizer.decode(words).strip()))
    return found


@torch.no_grad()
def log_likelihoods(scope: Scope, prompts: Sequence[ModelInputs], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """[n], mean log-probability of a token of each answer after its prompt, in nats.

    An empty answer counts with the log-probability of the token that the model gives last there: the worst.
    """
    found = np.zeros(len(answers))
    by_length: dict[int, list[int]] = {}
    for row, ids in enumerate(answers):
        by_length.setdefault(len(ids), []).append(row)
    for length, rows in by_length.items():
        whole = [continued(scope.adapter, prompts[row], answers[row][:-1], scope.vlm.tokenizer) for row in rows]
        tensors, kept = scope.batch(whole).tensors, max(length, 1)
        logits = scope.adapter.forward(tensors, use_cache=False, logits_to_keep=kept).logits[:, -kept:]
        logs = scope.adapter.finite(logits).double().log_softmax(-1)
        if length:
            tokens = torch.tensor([list(answers[row]) for row in rows], device=logs.device)
            logs = logs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        else:
            logs = logs[:, -1].min(-1, keepdim=True).values
        found[rows] = logs.mean(-1).numpy(force=True)
    return found


def _through_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to the first end token, itself included: what follows it in a batch is padding."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]
