"""Checks of the model and of what acts on it: that pictures matter, that weights are there, that edits and cached
generation in Hugging Face's own modules do what the replacement model says.
"""

import numpy as np
import torch
from torch import Tensor

from vlmscope.conformance.record import Skipped, check
from vlmscope.conformance.subject import FeatureKey, Subject
from vlmscope.core.seeds import generator
from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.frozen import base_run
from vlmscope.interventions.run import editing, run_edited


@check("soft_tokens", "another picture moves the logits", 1e-6, at_least=True)
def soft_tokens(subject: Subject) -> float:
    """The change of the last logits, relative to the largest: an identity would hold idly if pictures did nothing."""
    if subject.other is None:
        raise Skipped("no picture in the prompt")
    with torch.no_grad():
        other = subject.scope.vlm.model(**subject.other.tensors).logits[0, -1]
    own = subject.own_logits[-1]
    return float((other - own).abs().max() / own.abs().max())


@check("weights", "every weight is finite, no matrix is all zero", 0.0)
def weights(subject: Subject) -> float:
    """How many parameters of model and transcoders break this. A vector may be zero: an unused bias, a centred norm."""
    named = [*subject.scope.vlm.model.named_parameters(), *subject.scope.transcoders.named_parameters()]
    bad = [
        name
        for name, parameter in named
        if not bool(torch.isfinite(parameter).all()) or (parameter.ndim > 1 and not bool(parameter.any()))
    ]
    return float(len(bad))


@check("direct_mode", "direct edits in Hugging Face's modules = the replacement model")
def direct_mode(subject: Subject) -> float:
    """Random changes of all features of sampled positions, each position a run; relative to the largest change."""
    scope = subject.scope
    batch = scope.batch([subject.inputs])
    base = base_run(scope, batch, ["direct"])
    replacement = subject.replacement
    unedited = replacement.replay().logits[-1].double()
    rng, last = generator(subject.limits.seed, "direct mode"), subject.replacement.n_positions - 1
    others = rng.permutation(last)[: subject.limits.positions - 1]
    gaps, effects = [], []
    for position in [last, *others.tolist()]:
        plan, delta = _random_change(subject, position, rng)
        moved = (run_edited(scope, batch, plan, "direct", base) - base.logits)[0].double()
        change = replacement.direct(delta).logits[-1].double()
        expected = replacement.capped(unedited + change) - replacement.capped(unedited)
        gaps.append(float((moved - expected).abs().max()))
        effects.append(float(expected.abs().max()))
    if max(effects) == 0:
        raise Skipped("no feature of the sampled positions has a direct effect on the logits")
    return float(np.max(gaps) / np.max(effects))


def _random_change(
    subject: Subject, position: int, rng: np.random.Generator
) -> tuple[dict[int, LayerEdit], dict[FeatureKey, float]]:
    """Every active feature at a position times a factor of its own between 0 and 2, for either implementation."""
    plan: dict[int, LayerEdit] = {}
    delta: dict[FeatureKey, float] = {}
    where = torch.zeros(subject.replacement.n_positions, dtype=torch.bool)
    where[position] = True
    for layer, features in enumerate(subject.replacement.features):
        span = slice(features.offsets[position], features.offsets[position + 1])
        index, activation = features.index[span], features.activation[span]
        if not len(index):
            continue
        share = torch.from_numpy(rng.uniform(-1, 1, len(index))).to(activation)
        scale = (1 + share).to(subject.scope.transcoders[layer].W_dec.dtype)
        plan[layer] = LayerEdit(index, torch.zeros_like(scale), scale, where)
        for feature, amount in zip(index.tolist(), (share * activation).tolist(), strict=True):
            delta[layer, position, feature] = amount
    return plan, delta


@check("generation", "cached under an edit of nothing = plain without a cache")
def generation(subject: Subject) -> float:
    """Logits of every generated token, relative to the largest: equal tokens alone would say little, since a model may
    repeat one word whatever is done to it.
    """
    adapter, transcoders = subject.scope.adapter, subject.scope.transcoders
    where = torch.ones(len(subject.inputs), dtype=torch.bool)
    plan = {}
    for layer in transcoders.layers:
        features = torch.arange(transcoders[layer].config.n_features, device=adapter.device)
        nothing = torch.zeros(len(features), dtype=adapter.dtype, device=adapter.device)
        plan[layer] = LayerEdit(features, nothing, torch.ones_like(nothing), where, nothing)
    with editing(subject.scope, plan):
        cached = _answer_logits(subject, use_cache=True)
    plain = _answer_logits(subject, use_cache=False)
    return float((cached - plain).abs().max() / plain.abs().max())


@torch.no_grad()
def _answer_logits(subject: Subject, *, use_cache: bool) -> Tensor:
    """`[new_tokens, V]`, what each token of the greedy answer was chosen by; an end token does not end it."""
    count = subject.limits.new_tokens
    soft = subject.scope.adapter.soft_token_id()
    answer = subject.scope.vlm.model.generate(
        **subject.inputs.tensors,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        # A random model may answer with a soft token, which the next step would take for a picture that was not given.
        suppress_tokens=None if soft is None else [soft],
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(answer.logits)
