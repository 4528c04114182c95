"""Running under edits: base runs and what modes freeze, edited forwards, generation, and many single edits of one
prompt run as a batch.

Three modes, from strict to loose. `direct` freezes attention patterns, norm scales and MLP outputs, so that a change
reaches the logits through the residual stream and the value/output path only (and through W_skip, if the transcoder
has one): exactly the edges of the attribution graph. `frozen_attention` freezes the patterns alone. `free` nothing.

Legend: B prompts, T positions, n edited features of a layer, F all, k slots of a code, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmscope.activations import hooked, target_module, watching_mlp_inputs
from vlmscope.core.errors import UserError, check_choice
from vlmscope.core.records import generator
from vlmscope.core.results import MODES
from vlmscope.interventions.edits import AnyPlan, LayerEdit, OutputEdit, WholeEdit, at_step
from vlmscope.models.attention import recording_patterns, replacing_patterns
from vlmscope.models.base import Adapter, ModelInputs, all_norms
from vlmscope.models.batching import InputBatch, continued, generated
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, Transcoder

# Of what an edit adds: of each forward (the prompt's, then those of generated tokens), layer written to -> [B, t].
Norms = list[dict[int, Tensor]]


@dataclass(frozen=True)
class BaseRun:
    """What an unedited run computed, as far as the modes that it was recorded for need it."""

    logits: Tensor  # [B, V] at the last position
    patterns: dict[int, Tensor]  # layer -> [B, H, T, T]; for both frozen modes
    mlp_in: dict[int, Tensor]  # layer -> [B, T, d], the transcoder's input; for direct, as all below
    written: dict[int, Tensor]  # layer -> [B, T, d], the transcoder's target
    inverse_rms: dict[nn.Module, Tensor]  # norm -> [B, T, 1], of values [B, T, Hkv, 1]: its scales follow from it
    codes: dict[int, SparseCode] = field(default_factory=dict, init=False)  # of `mlp_in`, kept for the next plan

    def mapped(self, change: Callable[[Tensor], Tensor]) -> BaseRun:
        """The run with every tensor changed alike, as to other prompts."""
        tables = {
            key: {entry: change(values) for entry, values in table.items()}
            for key, table in vars(self).items()
            if key not in ("logits", "codes")
        }
        return replace(self, logits=change(self.logits), **tables)


@torch.no_grad()
def base_run(scope: Scope, batch: InputBatch, modes: Collection[str] = MODES) -> BaseRun:
    """Run a batch unedited and keep what the modes freeze: for free nothing, for frozen_attention the patterns."""
    mlp_in: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    inverse_rms: dict[nn.Module, Tensor] = {}

    def scale(norm: nn.Module, args: tuple, _out: Tensor) -> None:
        inverse_rms[norm] = scope.adapter.inverse_rms(norm, args[0])

    with ExitStack() as stack:
        if "direct" in modes:
            mlp_in = watch_inputs(stack, scope.adapter, range(scope.adapter.n_layers))
            hook_targets(stack, scope, range(scope.adapter.n_layers), written.__setitem__)
            stack.enter_context(hooked(dict.fromkeys(all_norms(scope.adapter), scale)))
        patterns = stack.enter_context(recording_patterns(scope.adapter)) if {*modes} - {"free"} else {}
        logits = scope.forward(batch)
    return BaseRun(logits, patterns, mlp_in, written, inverse_rms)


@torch.no_grad()
def run_edited(
    scope: Scope,
    batch: InputBatch,
    plan: AnyPlan,
    mode: str = "free",
    base: BaseRun | None = None,
    norms: Norms | None = None,
    known: Mapping[int, SparseCode] | None = None,
) -> Tensor:
    """Logits [B, V] at the last position of a batch under a plan.

    The two frozen modes need `base`, the unedited run of the same batch, recorded for them. `norms` and `known` are as
    in `editing`.

    Raises:
        UserError: unknown mode.
    """
    check_choice("mode", mode, MODES)
    with ExitStack() as stack:
        if mode == "free":
            stack.enter_context(editing(scope, plan, norms, known))
            return scope.forward(batch)
        assert base is not None and base.patterns, f"the base run was not recorded for mode {mode}"
        stack.enter_context(replacing_patterns(scope.adapter, base.patterns))
        if mode == "frozen_attention":
            stack.enter_context(editing(scope, plan, norms, known))
        else:
            assert base.written, "the base run was not recorded for mode direct"
            stack.enter_context(_direct(scope, plan, base, norms))
            stack.enter_context(_frozen_norms(scope.adapter, base))
        return scope.forward(batch)


def direct_gradients(scope: Scope, batch: InputBatch, base: BaseRun, tokens: Tensor) -> dict[int, Tensor]:
    """Layer -> [B, T, d], the gradient of the logit of each prompt's token [B] minus the mean logit, with respect to
    what the layer writes, in mode direct, where logits are affine in it: its product with what a feature writes is the
    feature's direct effect.
    """
    written = {layer: out.detach().requires_grad_() for layer, out in base.written.items()}
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(replacing_patterns(scope.adapter, base.patterns))
        stack.enter_context(_direct(scope, {}, replace(base, written=written), None))
        stack.enter_context(_frozen_norms(scope.adapter, base))
        logits = scope.adapter.next_logits(batch.tensors)
        end = (logits[torch.arange(len(tokens)), tokens] - logits.mean(-1)).sum()
        gradients = torch.autograd.grad(end, list(written.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(written, gradients, strict=True))


@contextmanager
def _frozen_norms(adapter: Adapter, base: BaseRun) -> Iterator[None]:
    """Multiply by the base run's norm scales instead of normalising."""

    def hook(module: nn.Module, args: tuple, _out: Tensor) -> Tensor:
        return args[0] * adapter.norm_factor(module, base.inverse_rms[module], args[0].dtype)

    with hooked(dict.fromkeys(all_norms(adapter), hook)):
        yield


@contextmanager
def _direct(scope: Scope, plan: AnyPlan, base: BaseRun, norms: Norms | None) -> Iterator[None]:
    """Every transcoder target is the base run's, plus the edit at base activations, plus W_skip's response."""
    changes: dict[int, Tensor] = {}
    for layer, edit in plan.items():
        x = base.mlp_in[layer]
        if layer not in base.codes:
            base.codes[layer] = scope.transcoders[layer].encode(x)
        _add_ahead(changes, layer, edit_changes(scope.transcoders[layer], x, edit, 0, base.codes[layer]))
    if norms is not None:
        norms.append({layer: change.norm(dim=-1) for layer, change in changes.items()})
    with ExitStack() as stack:
        inputs = watch_inputs(stack, scope.adapter, range(scope.adapter.n_layers))

        def replaced(layer: int, _out: Tensor) -> Tensor:
            out = base.written[layer]
            x = inputs.pop(layer)
            skip = scope.transcoders[layer].W_skip if layer in scope.transcoders else None
            if skip is not None:
                out = out + F.linear(x - base.mlp_in[layer], skip.to(x.dtype))
            return out + changes[layer] if layer in changes else out

        hook_targets(stack, scope, range(scope.adapter.n_layers), replaced)
        yield


@contextmanager
def editing(
    scope: Scope, plan: AnyPlan, norms: Norms | None = None, known: Mapping[int, SparseCode] | None = None
) -> Iterator[None]:
    """Edit features in every forward inside the context, also token by token in `generate` with a KV cache.

    The first forward is the prompt; later ones are generated tokens, which only edits with `generated` touch. `norms`
    is filled with the norms of what is added; `known` are codes [B, T, k] of the unedited prompts by layer, which serve
    the lowest layer that is edited.
    """
    seen = {"tokens": 0}  # that the KV cache holds before each forward

    def count(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        seen["tokens"] = 0 if cache is None else int(cache.get_seq_length())
        if norms is not None:
            norms.append({})

    with ExitStack() as stack:
        stack.callback(scope.adapter.decoder().register_forward_pre_hook(count, with_kwargs=True).remove)
        inputs = watch_inputs(stack, scope.adapter, plan)
        pending: dict[int, Tensor] = {}  # what edits of lower layers write to a later one (cross-layer transcoders)
        written = {layer + ahead for layer in plan for ahead in range(scope.transcoders[layer].config.writes)}
        first = {layer: code for layer, code in (known or {}).items() if layer == min(plan, default=-1)}

        def edited(layer: int, out: Tensor) -> Tensor:
            if layer in plan:
                code = None if seen["tokens"] else first.get(layer)
                changes = edit_changes(scope.transcoders[layer], inputs.pop(layer), plan[layer], seen["tokens"], code)
                _add_ahead(pending, layer, changes)
            if layer not in pending:
                return out
            change = pending.pop(layer)
            if norms is not None:
                norms[-1][layer] = change.norm(dim=-1)
            return out + change

        hook_targets(stack, scope, sorted(written), edited)
        yield


@contextmanager
def adding_random(scope: Scope, norms: Norms, seed: int) -> Iterator[None]:
    """Add to each layer's target a random direction, at every position as long as `norms` say, forward by forward.

    Forwards beyond those of `norms` take the last of them.
    """
    forwards = iter(range(len(norms)))
    now: dict[int, Tensor] = {}

    def count(_module: nn.Module, _args: tuple) -> None:
        step = next(forwards, len(norms) - 1)
        now.clear()
        now.update(norms[step])

    def added(layer: int, out: Tensor) -> Tensor:
        if layer not in now:
            return out
        return out + now[layer].to(out).unsqueeze(-1) * units[layer].to(out)

    layers, units = sorted({layer for by_layer in norms for layer in by_layer}), {}
    for layer in layers:
        vector = generator(seed, "direction", layer).standard_normal(scope.adapter.d_model)
        units[layer] = F.normalize(torch.from_numpy(vector).to(scope.adapter.dtype), dim=0)
    with ExitStack() as stack:
        stack.callback(scope.adapter.decoder().register_forward_pre_hook(count).remove)
        hook_targets(stack, scope, layers, added)
        yield


def watch_inputs(stack: ExitStack, adapter: Adapter, layers: Iterable[int]) -> dict[int, Tensor]:
    """A dict that every forward fills with the MLP inputs [B, T, d] of `layers`, until `stack` closes."""
    inputs: dict[int, Tensor] = {}
    stack.enter_context(watching_mlp_inputs(adapter, [*layers], inputs.__setitem__))
    return inputs


def hook_targets(
    stack: ExitStack, scope: Scope, layers: Iterable[int], hook: Callable[[int, Tensor], Tensor | None]
) -> None:
    """Call `hook(layer, output)` at the transcoder target of each layer in every forward, until `stack` closes.

    A tensor that the hook returns replaces the output.
    """
    for layer in layers:

        def at_layer(_module: nn.Module, _args: tuple, out: Tensor, layer: int = layer) -> Tensor | None:
            return hook(layer, out)

        target = target_module(scope.adapter, layer, scope.transcoders.config.output_hook)
        stack.callback(target.register_forward_hook(at_layer).remove)


def _add_ahead(pending: dict[int, Tensor], layer: int, changes: Sequence[Tensor]) -> None:
    """Add the changes that an edit of `layer` makes there and at the layers after it, in order."""
    for target, change in enumerate(changes, layer):
        # A later layer may lie on another device, where the model is spread over several.
        pending[target] = pending[target].to(change.device) + change if target in pending else change


def edit_changes(
    transcoder: Transcoder,
    x: Tensor,
    edit: LayerEdit | WholeEdit | OutputEdit,
    offset: int,
    code: SparseCode | None = None,
) -> list[Tensor]:
    """What an edit adds to the target [B, t, d] of each layer that its features write to, from their own upwards.

    `x` are the transcoder's inputs at positions offset..offset + t, and `code` theirs, where it is known. Empty when
    the edit does nothing there.
    """
    if isinstance(edit, OutputEdit):
        return _added(x, edit, offset)
    if isinstance(edit, LayerEdit):
        if not len(edit.features):
            return []
        edit = edit.to(x.device)  # plans made of circuits and of names lie on the CPU
    length, prompt, where = x.shape[1], len(edit.where), edit.where
    if offset >= prompt:
        if edit.generated is None:
            return []
        live, step = transcoder.encode(x), offset - prompt
        if isinstance(edit, WholeEdit):
            carried = SparseCode(edit.generated.indices[:, None], edit.generated.values[:, None])
            written = _exchanged(transcoder, live, carried, edit.kept)
        else:
            target = at_step(edit.generated, 2, step)
            local = replace(edit, value=target.unsqueeze(-2) if target.ndim > 1 else target, at=edit.at_generated)
            level = None if edit.gate is None else at_step(edit.gate.generated, 1, step)
            deltas = _deltas(transcoder, live, local, level)
            written = _written(
                transcoder, edit, deltas if edit.openness is None else deltas * edit.openness[:, -1:, None]
            )
        return [change.to(x.dtype) for change in written]
    assert offset == 0 and length == prompt, f"the edit is for {prompt} positions, the run has {offset} + {length}"
    if not bool(where.any()):
        return []
    live = transcoder.encode(x[:, where]) if code is None else code_at(code, where)
    if isinstance(edit, WholeEdit):
        written = _exchanged(transcoder, live, code_at(edit.code, where), edit.kept)
    else:
        written = _written(transcoder, edit, prompt_deltas(transcoder, live, edit))
    changes = []
    for change in written:
        changes.append(x.new_zeros(x.shape))
        changes[-1][:, where] = change.to(x.dtype)
    return changes


def code_at(code: SparseCode, where: Tensor) -> SparseCode:
    """A code [B, T, k] at some positions [T] bool."""
    return SparseCode(code.indices[:, where], code.values[:, where])


def _added(x: Tensor, edit: OutputEdit, offset: int) -> list[Tensor]:
    """The vectors of an `OutputEdit` as `edit_changes` gives what features write, x [B, t, d]."""
    if offset >= len(edit.where):
        return [] if edit.generated is None else [edit.generated[:, None].to(x).expand(x.shape)]
    change = edit.value.to(x) * edit.where.to(x.device)[:, None]
    return [change.expand(x.shape)] if bool(edit.where.any()) else []


def _exchanged(transcoder: Transcoder, live: SparseCode, code: SparseCode, kept: Tensor | None = None) -> list[Tensor]:
    """What a code [B, t, k] writes minus what the live one does, [B, t, d] by layer written; of all features or of
    those `kept` [F].
    """
    lead, device = live.indices.shape[:-1], live.indices.device
    indices, values = (entries.to(device).expand(*lead, entries.shape[-1]) for entries in (code.indices, code.values))
    # One sum over the entries of both: in half precision the difference of two rounded sums would be mostly rounding.
    both = SparseCode(torch.cat([indices, live.indices], -1), torch.cat([values.to(live.values), -live.values], -1))
    if kept is not None:
        both = SparseCode(both.indices, both.values * kept.to(device)[both.indices])
    return [transcoder.write(both, ahead) for ahead in range(transcoder.config.writes)]


def prompt_deltas(transcoder: Transcoder, code: SparseCode, edit: LayerEdit) -> Tensor:
    """By how much an edit changes its features [B, t, n] at the t positions `where` of the prompt, whose code is given;
    the edit's tensors lie on the code's device.
    """
    where = edit.where
    value, scale = (v if v.ndim < 2 or v.shape[-2] == 1 else v[..., where, :] for v in (edit.value, edit.scale))
    local = replace(edit, value=value, scale=scale, at=None if edit.at is None else edit.at[where])
    deltas = _deltas(transcoder, code, local, None if edit.gate is None else edit.gate.level[where])
    if edit.openness is None:
        return deltas
    return deltas * edit.openness.expand(-1, len(where))[:, where, None]


def _deltas(transcoder: Transcoder, code: SparseCode, edit: LayerEdit, level: Tensor | None) -> Tensor:
    """`g (new - current)` [B, t, n] of an edit whose tensors are those of the positions of the live `code`; `level` is
    the gate's there, if it has one.
    """
    width = transcoder.config.n_features
    current = code.select(edit.features, width)
    delta = edit.scale * current + edit.value - current
    if edit.at is not None:
        delta = delta * edit.at.to(delta)
    if edit.gate is not None and level is not None:
        norms = transcoder.write_norms()[edit.gate.features]
        delta = delta * edit.gate.openness(code.select(edit.gate.features, width), level, norms)
    return delta


def _written(transcoder: Transcoder, edit: LayerEdit, delta: Tensor) -> list[Tensor]:
    """What changes of activation [B, t, n] write, [B, t, d] by layer written."""
    rows = edit.features if edit.written_by is None else edit.written_by
    delta = delta.to(transcoder.W_dec.dtype)
    return [delta @ transcoder.decoder(ahead)[rows] for ahead in range(transcoder.config.writes)]


def generate_edited(scope: Scope, inputs: ModelInputs, plan: AnyPlan | None = None, max_new_tokens: int = 24) -> str:
    """Greedy answer to one prompt, without special tokens, under a plan, which may also edit every generated token;
    None generates without edits.
    """
    ids = generate_batch(scope.adapter, [inputs], max_new_tokens, editing(scope, plan) if plan else None)[0]
    return scope.vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def generate_batch(
    adapter: Adapter,
    inputs: Sequence[ModelInputs],
    max_new_tokens: int = 24,
    context: AbstractContextManager[None] | None = None,
) -> list[list[int]]:
    """Greedy answers to several prompts at once, each up to and with its end token; the forwards run in `context`, such
    as `editing`.

    Raises:
        UserError: the prompts differ in length or in their pictures' sizes, or `generated` refuses them.
    """
    names = inputs[0].tensors
    shapes = [{name: tensor.shape[1:] for name, tensor in prompt.tensors.items()} for prompt in inputs]
    if any(len(prompt) != len(inputs[0]) or shape != shapes[0] for prompt, shape in zip(inputs, shapes, strict=True)):
        raise UserError("prompts of a batch must have equal length and pictures of equal size: generate one by one")
    tensors = {name: torch.cat([prompt.tensors[name] for prompt in inputs]) for name in names}
    with context or nullcontext():
        rows = generated(adapter, tensors, max_new_tokens).tolist()
    ends = adapter.model.generation_config.eos_token_id
    stop_ids: set[int] = {ends} if isinstance(ends, int) else {int(end) for end in ends or ()}
    # What follows the first end token in a batch is padding.
    stops = [next((i for i, token in enumerate(ids) if token in stop_ids), len(ids) - 1) for ids in rows]
    return [ids[: stop + 1] for ids, stop in zip(rows, stops, strict=True)]


def without_special(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Token ids without special ones, such as the end of a turn."""
    special = {token for token, kind in tokenizer.added_tokens_decoder.items() if kind.special}
    return [token for token in ids if token not in special]


def whole_answers(
    scope: Scope, inputs: Sequence[ModelInputs], max_new_tokens: int = 24, batch: int = 64
) -> list[tuple[list[int], str]]:
    """Greedy answer to each prompt, `batch` at once: its tokens without special ones, and its text."""
    answers = []
    for start in range(0, len(inputs), batch):
        for ids in generate_batch(scope.adapter, inputs[start : start + batch], max_new_tokens):
            words = without_special(scope.vlm.tokenizer, ids)
            answers.append((words, scope.vlm.tokenizer.decode(words).strip()))
    return answers


@torch.no_grad()
def log_likelihoods(scope: Scope, prompts: Sequence[ModelInputs], answers: Sequence[Sequence[int]]) -> np.ndarray:
    """[n], mean log-probability of a token of each answer after its prompt, in nats.

    An empty answer counts with the log-probability of the token that the model gives last there: the worst.
    """
    means = np.zeros(len(answers))
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
        means[rows] = logs.mean(-1).numpy(force=True)
    return means


BATCH = 96  # edits of one forward


@dataclass(frozen=True)
class SingleEdits:
    """n edits: row i makes feature `index[i]` of `layer[i]` at `position[i]` `scale[i] * current + value[i]`.

    Attributes:
        layer, position, index: [n] int64.
        scale, value: [n] float64.
    """

    layer: np.ndarray
    position: np.ndarray
    index: np.ndarray
    scale: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.layer)


def single_plan(edits: SingleEdits, size: int, length: int, like: Tensor) -> dict[int, LayerEdit]:
    """A plan for `size` >= n rows of `length` tokens in which row i has edit i alone; rows beyond the edits stay as
    they are. `like` has the dtype and the device of the model.
    """
    plan: dict[int, LayerEdit] = {}
    for layer in np.unique(edits.layer).tolist():
        rows = np.flatnonzero(edits.layer == layer)
        features, slot = np.unique(edits.index[rows], return_inverse=True)
        cells = (torch.from_numpy(rows), torch.from_numpy(edits.position[rows]), torch.from_numpy(slot))
        scale, value = like.new_ones(size, length, len(features)), like.new_zeros(size, length, len(features))
        scale[cells] = torch.from_numpy(edits.scale[rows]).to(like)
        value[cells] = torch.from_numpy(edits.value[rows]).to(like)
        where = torch.zeros(length, dtype=torch.bool)
        where[cells[1]] = True
        plan[layer] = LayerEdit(torch.from_numpy(features).to(like.device), value, scale, where)
    return plan


def single_effects(
    scope: Scope, batch: InputBatch, base: BaseRun, edits: SingleEdits, mode: str, tokens: tuple[int, int]
) -> np.ndarray:
    """[n] float64, how far each edit of one prompt moves the logit of a token minus that of another at the last
    position.

    Every forward has one more row, unedited, which is subtracted: rounding that depends on the batch's size cancels.
    Differences are of logits before the model's soft cap, if it has one.
    """
    assert batch.size == 1, f"single edits are of one prompt, not of {batch.size}"
    effects = []
    for begin in range(0, len(edits), BATCH):
        chunk = SingleEdits(*(values[begin : begin + BATCH] for values in vars(edits).values()))
        size = len(chunk) + 1  # the last row stays unedited
        plan = single_plan(chunk, size, batch.length, base.logits)
        copies = batch.select([0] * size)
        repeated = base.mapped(lambda values, size=size: values.expand(size, *values.shape[1:]))  # without copies
        logits = run_edited(scope, copies, plan, mode, repeated)[:, list(tokens)].double()
        cap = scope.adapter.logit_softcap
        if cap is not None:
            logits = cap * torch.atanh(logits / cap)
        difference = (logits[:, 0] - logits[:, 1]).cpu().numpy()
        effects.append(difference[:-1] - difference[-1])
    return np.concatenate(effects) if effects else np.zeros(0)
