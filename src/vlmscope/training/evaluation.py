"""Quality of a transcoder set for a model: FVU, L0, dead features, and the loss when it replaces every MLP.

Definitions: `vlmscope.metrics.dictionary`. `val/<name>` is the mean of `layers/<name>/layer_<i>` over the layers.
FVU is about the mean of the tokens that are counted, `fvu_token` about each token's own mean; both are of all tokens
and of those of a kind:

| kind | tokens |
| --- | --- |
| `_text` | all but soft tokens |
| `_image` | soft tokens; all are one token, so `fvu_image` is about its own mean already |
| `_special` | of text, those that the tokenizer marks as special (the template's) |
| `_last` | of text, those that predict the first word of an answer |

A figure without tokens, such as `fvu_image` without pictures, is left out. Each transcoder is compared, and spliced in,
at its own `output_hook`: the raw MLP's output, or that of the norm after it.

A set for another model or another hook point still loads, but its FVU is mostly above 1, worse than the target's mean
(`warn_if_unfit`). Orrery's set moved by one layer has 0.91 to 2.08, above 1 in 6 of 8 layers. A wrong nonlinearity
shows less: the same set read with ReLU instead of TopK has 0.08 to 0.45 instead of 0.01 to 0.07, so there is no
warning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from vlmscope.activations import capture_mlp, norm_weight_after, target_at, target_module
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.data.orrery.scenes import KINDS, vocabulary
from vlmscope.metrics.dictionary import (
    FvuAccumulator,
    TokenFvuAccumulator,
    cross_entropy,
    dead_fraction,
    duplicated_fraction,
    firing_counts,
    fvu,
)
from vlmscope.models.batching import InputBatch
from vlmscope.models.loading import VLM
from vlmscope.scope import Scope
from vlmscope.training.batches import (
    LOSS_MASK,
    Batch,
    Forward,
    chat_batch,
    forward_arguments,
    forwards,
    on_device,
    seen,
    shown,
    valid_tokens,
)
from vlmscope.transcoders.config import HOOKS, ROLES, UsualError
from vlmscope.transcoders.transcoder import SparseCode, Transcoder

_LOG = logging.getLogger(__name__)
_NOT_BY_LAYER = ("fvu_token", "fvu_token_special", "fvu_token_last")  # metrics are few
_KINDS = ("_text", "_image", "_special", "_last")  # of tokens
_SCENES = 4  # of each kind, about 440 tokens in total
_PICTURE = 256  # pixels a side
_PLAIN = (
    "The river rises in the hills to the north and runs for some two hundred miles before it meets the sea. For most "
    "of that way it is slow and wide, and the towns along its banks have lived by it since the middle ages: first by "
    "fishing, then by the mills, and in the last century by the trade in coal and timber that the railways brought. "
    "In 1894 a flood carried three of the old bridges away. Two of them were built again in iron; the third, at the "
    "lower ford, was never replaced, and people still cross there by a small ferry that holds two cars and about a "
    "dozen passengers. What would you show a visitor who has only one afternoon, and why?"
)


@dataclass
class _LayerFigures:
    """Running sums of one layer's figures."""

    n_features: int
    fvu: dict[str, FvuAccumulator] = field(default_factory=lambda: {kind: FvuAccumulator() for kind in ("", *_KINDS)})
    by_token: TokenFvuAccumulator = field(default_factory=TokenFvuAccumulator)
    by_last_token: TokenFvuAccumulator = field(default_factory=TokenFvuAccumulator)
    tokens: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def update(
        self, code: SparseCode, reconstruction: Tensor, y: Tensor, ids: Tensor, kinds: dict[str, Tensor]
    ) -> None:
        """Add N tokens: their `ids [N]`, and a mask [N] for each of `_KINDS`."""
        self.fvu[""].update(y, reconstruction)
        for kind, part in kinds.items():
            self.fvu[kind].update(y[part], reconstruction[part])
        self.by_token.update(ids, y, reconstruction)
        last = kinds["_last"]
        self.by_last_token.update(ids[last], y[last], reconstruction[last])
        counts = firing_counts(code.indices, code.values, self.n_features)
        self.counts = counts if self.tokens == 0 else self.counts + counts
        self.tokens += y.shape[0]

    def compute(self, soft: int | None, special: Collection[int]) -> dict[str, float]:
        """The figures that have tokens; `soft` is the soft token, `special` are the special ones."""
        figures = {f"fvu{kind}": accumulator.compute() for kind, accumulator in self.fvu.items()}
        figures["fvu_token"] = self.by_token.compute()
        figures["fvu_token_text"] = self.by_token.compute(lambda token: token != soft)
        figures["fvu_token_special"] = self.by_token.compute(special.__contains__)
        figures["fvu_token_last"] = self.by_last_token.compute()
        figures["l0"] = float(self.counts.sum()) / self.tokens
        figures["dead_frac"] = dead_fraction(self.counts)
        return {name: value for name, value in figures.items() if math.isfinite(value)}


class ErrorMeter:
    """Collects the reconstruction errors of validation inputs, by role and layer, for the set's `UsualError`."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.errors: dict[str, list[np.ndarray]] = {role: [] for role in ROLES}

    def add(self, forward: Forward, soft: int | None, errors: Mapping[int, Tensor]) -> None:
        """Add the rows of a forward; `errors`: layer -> squared distances [N] at its valid tokens."""
        self.layers = list(errors)
        valid = valid_tokens(forward)
        image, text = _prompt_roles(forward, soft)
        for row in range(len(valid)):
            own = torch.zeros_like(valid)
            own[row] = valid[row]
            for role, mask in zip(ROLES, (image, text), strict=True):
                if (mask & own).any():
                    self.errors[role].append(_log_errors(errors, (mask & own)[valid]))

    def usual(self) -> UsualError:
        """The usual errors of all inputs so far."""
        return UsualError.of(self.layers, {role: np.array(values) for role, values in self.errors.items()})


def _log_errors(errors: Mapping[int, Tensor], at: Tensor) -> np.ndarray:
    """`[L]`: the log of the mean squared distance, over the tokens `at` [N] bool."""
    means = torch.stack([distances[at].double().mean() for distances in errors.values()])
    return means.clamp_min(1e-12).log().numpy(force=True)


def _prompt_roles(forward: Forward, soft: int | None) -> tuple[Tensor, Tensor]:
    """Masks [B, T] of soft tokens, and of other tokens up to the first answer; of a plain text, all tokens."""
    valid, ids = valid_tokens(forward), forward["input_ids"]
    image = torch.zeros_like(valid) if soft is None else (ids == soft) & valid
    text = valid & ~image
    if LOSS_MASK in forward:
        before = text & (forward[LOSS_MASK].bool().cumsum(1) == 0)
        text = torch.where(before.sum(1, keepdim=True) > 1, before, text)  # one token: a text, not a question
    return image, text


@torch.no_grad()
def evaluate_transcoders(scope: Scope, batches: Iterable[Batch], meter: ErrorMeter | None = None) -> dict[str, float]:
    """Figures of the set on `batches` (`vlmscope.training.batches`).

    `val/fvu` and `val/fvu_token` with their kinds (above), `val/l0`, `val/dead_frac` (never fired on these batches),
    `val/duplicated_frac`, with `layers/<name>/layer_07` for each but some of `fvu_token`; `val/ce` (the model's own
    loss on answer tokens, in nats) and `val/ce_delta` (how much it rises with all layers replaced) when the batches
    have a `loss_mask`. A `meter` gets the errors of every row.
    """
    transcoders = scope.transcoders
    check_hooks(scope)
    stack = scope.stack
    wrong = [layer for layer in transcoders.layers if layer >= stack.n_layers]
    widths = {transcoder.config.d_model for transcoder in transcoders.transcoders.values()}
    if wrong or widths != {stack.d_model}:
        raise UserError(
            f"transcoders of layers {transcoders.layers} and width {sorted(widths)} do not fit a {stack.site} of "
            f"{stack.n_layers} layers and width {stack.d_model}; choose the set trained on this model"
        )
    layers = {layer: _LayerFigures(transcoders[layer].config.n_features) for layer in transcoders.layers}
    soft, special = stack.soft_token_id(), _special(scope.vlm)
    losses: dict[str, float] = {"tokens": 0.0, "original": 0.0, "spliced": 0.0}
    bar = tqdm(batches, desc="validation", unit="batch", delay=5.0)
    placed = (on_device(stack, forward) for batch in bar for forward in forwards(batch) if shown(stack, forward))
    for forward in placed:
        tokens, activations = seen(stack, forward)
        ids, kinds = _kinds(tokens, soft, special)
        codes: dict[int, SparseCode] = {}
        errors: dict[int, Tensor] = {}
        for layer, figures in layers.items():
            x, y = activations.by_layer[layer]
            target = target_at(stack, layer, transcoders[layer].config.output_hook, y)
            with _brought_to(stack.device, transcoders[layer]):
                codes[layer] = transcoders[layer].encode(x)
                reconstruction = transcoders.decode(layer, codes, x)
                figures.update(codes[layer], reconstruction, target, ids, kinds)
                errors[layer] = (target - reconstruction).square().sum(-1)
        if meter is not None:
            meter.add(tokens, soft, errors)
        if LOSS_MASK in forward:
            _add_losses(scope, forward, losses)
    if any(figures.tokens == 0 for figures in layers.values()):
        raise UserError("no tokens to evaluate the transcoders on; give at least one batch")
    by_layer = {layer: figures.compute(soft, special) for layer, figures in layers.items()}
    directions = {}
    for layer in layers:
        config = transcoders[layer].config
        targets, b_dec = range(layer, layer + config.writes), transcoders[layer].b_dec
        weights = [norm_weight_after(stack, target, config.output_hook, b_dec) for target in targets]
        directions[layer] = transcoders[layer].directions(weights)
    alive = {layer: figures.counts > 0 for layer, figures in layers.items()}
    for layer, fraction in duplicated_fraction(directions, alive, device=stack.device).items():
        by_layer[layer]["duplicated_frac"] = fraction
    summary: dict[str, float] = {}
    for name in dict.fromkeys(name for figures in by_layer.values() for name in figures):
        values = {layer: figures[name] for layer, figures in by_layer.items() if name in figures}
        summary[f"val/{name}"] = sum(values.values()) / len(values)
        if name not in _NOT_BY_LAYER:
            summary |= {f"layers/{name}/layer_{layer:02d}": value for layer, value in values.items()}
    if losses["tokens"]:
        summary["val/ce"] = losses["original"] / losses["tokens"]
        summary["val/ce_delta"] = (losses["spliced"] - losses["original"]) / losses["tokens"]
    return summary


def _special(vlm: VLM) -> set[int]:
    """The tokens that the tokenizer marks as special, without the soft token."""
    marked = {token for token, added in vlm.tokenizer.added_tokens_decoder.items() if added.special}
    return marked - {vlm.adapter.soft_token_id()}


def _kinds(forward: Forward, soft: int | None, special: Collection[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The N valid tokens of a forward, `[N]`, and the mask `[N]` of each of `_KINDS`."""
    ids, valid = forward["input_ids"], valid_tokens(forward)
    is_image = torch.zeros_like(valid) if soft is None else ids == soft
    last = torch.zeros_like(valid)
    if LOSS_MASK in forward:
        answers = forward[LOSS_MASK].bool()
        # A plain text counts as an answer from its second token on; its first one comes after no prompt.
        last[:, 1:-1] = answers[:, 2:] & ~answers[:, 1:-1] & valid[:, :-2]
    masks = (~is_image, is_image, torch.isin(ids, torch.tensor(sorted(special), device=ids.device)), last)
    return ids[valid], {kind: mask[valid] for kind, mask in zip(_KINDS, masks, strict=True)}


@contextmanager
def _brought_to(device: torch.device, transcoder: Transcoder) -> Iterator[None]:
    """Move a layer's transcoder to the device for a while, since all layers together may not fit there."""
    home = transcoder.b_dec.device
    transcoder.to(device)
    try:
        yield
    finally:
        transcoder.to(home)


def _add_losses(scope: Scope, batch: Mapping[str, Tensor], losses: dict[str, float]) -> None:
    """Add the cross-entropy summed over answer tokens, of the model itself and with every layer replaced."""
    answers = batch[LOSS_MASK].bool()[:, 1:]
    if not answers.any():
        return
    # Logits take much memory, so only positions that predict an answer in some row get them.
    positions = answers.any(0).nonzero().flatten()
    chosen = answers[:, positions]
    labels = batch["input_ids"][:, 1:][:, positions][chosen]

    def loss(check: Callable[[Tensor], Tensor]) -> float:
        out = scope.adapter.forward(forward_arguments(batch), use_cache=False, logits_to_keep=positions)
        return float(cross_entropy(check(out.logits[chosen]), labels)) * len(labels)

    losses["tokens"] += len(labels)
    losses["original"] += loss(scope.adapter.finite)
    with spliced(scope):
        losses["spliced"] += loss(lambda logits: logits)  # unchecked: nan is a valid result for a poor set


@contextmanager
def spliced(scope: Scope) -> Iterator[None]:
    """Context in which each transcoder's target is replaced by its reconstruction from the MLP's current input."""
    inputs: dict[int, Tensor] = {}
    codes: dict[int, SparseCode] = {}  # layers run in order, so codes of lower layers are from the same forward

    def keep(layer: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[layer] = args[0]

    def replace(layer: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs.pop(layer)
        with _brought_to(x.device, scope.transcoders[layer]):
            codes[layer] = scope.transcoders[layer].encode(x)
            return scope.transcoders.decode(layer, codes, x).to(output.dtype)

    with ExitStack() as stack:
        for layer, transcoder in scope.transcoders.transcoders.items():
            target = target_module(scope.stack, layer, transcoder.config.output_hook)
            stack.callback(scope.stack.mlp(layer).register_forward_pre_hook(partial(keep, layer)).remove)
            stack.callback(target.register_forward_hook(partial(replace, layer)).remove)
        yield


def check_hooks(scope: Scope) -> None:
    """UserError for transcoders at hook points that this model does not have or that are not supported."""
    for layer, transcoder in scope.transcoders.transcoders.items():
        source, target = transcoder.config.input_hook, transcoder.config.output_hook
        if (source, target) not in (*HOOKS.values(), ("mlp_in", "mlp_out_post")):
            raise UserError(
                f"the transcoder of layer {layer} maps {source} to {target}; only mlp_in to mlp_out or "
                "mlp_out_post, and tower_mlp_in to tower_mlp_out, can be used (docs/formats_transcoders.md)"
            )
        if target == "mlp_out_post" and scope.adapter.norms(layer).mlp_out_post is None:
            raise UserError(
                f"the transcoder of layer {layer} imitates mlp_out_post, the norm after the MLP, and this model has "
                "none; choose the set trained on this model"
            )


@dataclass(frozen=True)
class _Reconstructed:
    """MLP outputs [N, d] at each transcoder's own hook points, next to their reconstructions."""

    by_layer: dict[int, tuple[Tensor, Tensor]]
    is_image: Tensor  # [N] bool
    row: Tensor  # [N] int64, number of the prompt

    def fvus(self) -> dict[int, float]:
        """FVU per layer."""
        return {layer: float(fvu(y.double(), imitated.double())) for layer, (y, imitated) in self.by_layer.items()}

    def errors(self) -> list[dict[str, np.ndarray]]:
        """The errors [L] by role of each prompt, which has no answer, as `ErrorMeter` collects them."""
        distances = {layer: (y - imitated).square().sum(-1) for layer, (y, imitated) in self.by_layer.items()}
        found = []
        for number in self.row.unique().tolist():
            own = self.row == number
            masks = zip(ROLES, (self.is_image & own, ~self.is_image & own), strict=True)
            found.append({role: _log_errors(distances, at) for role, at in masks if at.any()})
        return found


@torch.no_grad()
def _reconstructed(scope: Scope, prompts: Mapping[str, Tensor] | InputBatch) -> _Reconstructed:
    """From one forward of prompts, given as arguments of the Hugging Face model or as a batch of embeddings.

    Of a vision tower's set all pictures count as one prompt's.
    """
    stack, transcoders = scope.stack, scope.transcoders
    if isinstance(prompts, InputBatch):
        tensors, ids = prompts.tensors, prompts.input_ids
        valid = torch.ones_like(ids, dtype=torch.bool)
    else:
        tensors = forward_arguments(on_device(stack, prompts))
        ids, valid = tensors["input_ids"], valid_tokens(tensors)
    captured = capture_mlp(stack, tensors)
    if stack.site == "tower":
        tokens = stack.tokens(tensors, captured[0][0].shape[:-1])
        ids, valid = tokens["input_ids"], valid_tokens(tokens)
    ids, valid = ids.to(stack.device), valid.to(stack.device)
    dtype = next(transcoders.parameters()).dtype
    inputs = {layer: captured[layer][0][valid].to(dtype) for layer in transcoders.layers}
    codes, outputs = transcoders.encode(inputs), {}
    for layer, transcoder in transcoders.transcoders.items():
        y = target_at(stack, layer, transcoder.config.output_hook, captured[layer][1][valid])
        outputs[layer] = y, transcoders.decode(layer, codes, inputs[layer])
    soft = stack.soft_token_id()
    is_image = torch.zeros_like(valid) if soft is None else ids == soft
    return _Reconstructed(outputs, is_image[valid], valid.nonzero()[:, 0] * (stack.site == "decoder"))


def warn_if_strange(scope: Scope, prompts: Sequence[Mapping[str, Tensor] | InputBatch], name: str = "this") -> int:
    """Warn in one line of prompts whose reconstruction errors lie far beyond those of the set's validation data.

    `name` is what the line calls a single one. Returns how many are strange: none where the set does not know its usual
    error.
    """
    if scope.transcoders.usual_error is None:
        return 0
    if scope.transcoders.site == "tower":  # it sees pictures alone, and no embeddings
        prompts = [each for each in prompts if not isinstance(each, InputBatch) and shown(scope.stack, each)]
    return _say_strange(scope, [row for each in prompts for row in _reconstructed(scope, each).errors()], name)


def _say_strange(scope: Scope, errors: Sequence[Mapping[str, np.ndarray]], name: str = "this") -> int:
    usual = scope.transcoders.usual_error
    if usual is None:
        return 0
    found = [beyond for each in errors if (beyond := usual.beyond(each))]
    if not found:
        return 0
    role = max(ROLES, key=lambda role: sum(role in beyond for beyond in found))
    score, limit = max(beyond[role] for beyond in found if role in beyond)
    what = {"image": "picture", "text": "prompt"}[role]
    which = f"{name} {what} is" if len(errors) == 1 else f"{len(found)} of {len(errors)} {what}s are"
    _LOG.warning(
        "%s unlike what the transcoders were trained on: they err %.1f standard deviations more than usual (the limit "
        "is %.1f); trust neither the answer nor its explanation (docs/strangers.md)",
        which,
        score,
        limit,
    )
    return len(found)


def warn_if_unfit(scope: Scope, prompt: str | None, pictures: Sequence[Image.Image] = ()) -> dict[int, float]:
    """Log a warning for layers with an FVU above 1 on the run's own prompt, or on Orrery's scenes if it has none.

    Returns FVU per layer, empty without an input.
    """
    check_hooks(scope)
    forward = _input(scope.vlm, prompt, pictures)
    if forward is None or not shown(scope.stack, forward):
        return {}
    found = _reconstructed(scope, forward)
    fvus, tokens = found.fvus(), len(found.is_image)
    if prompt is not None:
        _say_strange(scope, found.errors())
    named = ", ".join(f"{layer} ({value:.3g})" for layer, value in fvus.items() if not value <= 1)  # nan too
    if named:
        _LOG.warning(
            "the transcoders do not fit %s: FVU above 1 on %d tokens in layer %s; are they for this model, revision, "
            "hook point and format?",
            scope.vlm.name,
            tokens,
            named,
        )
    return fvus


def warn_on_load(scope: Scope) -> dict[int, float]:
    """`warn_if_unfit` without a run's prompt: on Orrery's scenes, or else on a text and a picture of colours.

    Also warns if the model's vocabulary lacks words of the text.
    """
    if speaks_orrery(scope.vlm):
        return warn_if_unfit(scope, None)
    # Red increases from left to right and green from top to bottom.
    ramp = Image.linear_gradient("L").resize((_PICTURE, _PICTURE))
    colours = Image.merge("RGB", (ramp.rotate(90), ramp, Image.new("L", ramp.size, 128)))
    fvus = warn_if_unfit(scope, _PLAIN, [colours] if scope.adapter.has_vision else [])
    if not fvus:
        _LOG.warning(
            "the transcoders were not tried on %s: its vocabulary lacks words of the check's text", scope.vlm.name
        )
    return fvus


def speaks_orrery(vlm: VLM, kinds: Sequence[str] = KINDS) -> bool:
    """Whether the model's vocabulary has the words of Orrery's scenes of these kinds."""
    return {"<image_soft_token>", *vocabulary(kinds)} <= vlm.tokenizer.get_vocab().keys()


def _input(vlm: VLM, prompt: str | None, pictures: Sequence[Image.Image]) -> dict[str, Tensor] | None:
    if prompt is not None:
        try:
            return vlm.prepare(prompt, pictures).tensors
        except UserError:
            return None  # the task itself reports it, in its own words
    if not speaks_orrery(vlm):
        return None
    from vlmscope.data.orrery.rendering import make_scene

    # Without digits, whose library takes longer to load than all other work here.
    scenes = [make_scene("val", kind, i) for kind in ("planets", "shapes", "hands", "text") for i in range(_SCENES)]
    return chat_batch(scenes, vlm.tokenizer, int(vlm.processor.image_seq_length), generator(0, "load check"))
