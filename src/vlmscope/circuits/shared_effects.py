"""Do pictures and words use the same features? Ablate them in both, and carry them from one into the other.

*Ablation*: the features that a concept's pictures and word share go to 0 at every position, once beside a picture of
the concept, once in the text that names it. *Patching across modalities*: at the last position the shared features of
recipient and donor get the activations that they have at the last position of the donor's prompt of the *other* kind:
a picture of Mars gets what the text about Earth has. Only there do the two kinds of prompt have a position in common.

Legend: B pictures, n features of a layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.records import FeatureId, control_draws
from vlmscope.interventions.edits import LayerEdit, Plan, scale_features, set_features, without_layers
from vlmscope.interventions.named import by_layer, matched_features
from vlmscope.interventions.run import activations, run_edited
from vlmscope.metrics.causal import log_softmax
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import TranscoderSet

KINDS = ("picture", "text")
Features = Iterable[FeatureId]


@dataclass(frozen=True)
class Asked:
    """A question about a concept, asked in one kind.

    Attributes:
        batch: B prompts that the model answers rightly, of pictures; one prompt of text.
        names: B, what tells them apart.
        logits: [B, V] at the last position, unedited.
        answer: the right token.
        last: layer -> [B, d], the transcoders' input at the last position.
    """

    batch: InputBatch
    names: tuple[str, ...]
    logits: Tensor
    answer: int
    last: dict[int, Tensor]


@torch.no_grad()
def ask(scope: Scope, batch: InputBatch, names: Sequence[str], answer: int) -> Asked | None:
    """Run prompts, a name each, and keep those that are answered rightly; None when there is none."""
    logits = run_edited(scope, batch, {}, "free")
    rows = torch.nonzero(logits.argmax(-1) == answer).flatten()
    if not len(rows):
        return None
    kept = batch.select(rows)
    last = {layer: x[:, -1] for layer, x in scope.capture(kept).items()}
    return Asked(kept, tuple(str(names[row]) for row in rows.tolist()), logits[rows], answer, last)


@dataclass
class Outcome:
    """Cases of one kind of prompt, collected over questions and concepts.

    Attributes:
        hits: for each case whether the answer changed (ablation) or became the donor's (patching).
        groups: for each case the picture (or text) that it hangs on.
        drops: by how many nats the right answer's log-probability fell.
        controls: the share of hits under each draw of matched features, a number for each set of cases.
        sizes: features that were edited, for each set of cases.
    """

    hits: list[bool] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    drops: list[float] = field(default_factory=list)
    controls: list[tuple[int, float]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(
        self,
        hits: np.ndarray,
        drops: np.ndarray,
        groups: Iterable[str],
        size: int,
        controls: Iterable[np.ndarray] = (),
    ) -> None:
        """Add the cases [B] of one set, with the hits [B] of each control."""
        self.hits += hits.tolist()
        self.groups += groups
        self.drops += drops.tolist()
        self.sizes.append(size)
        self.controls += [(len(hits), float(one.mean())) for one in controls]

    def join(self, other: Outcome) -> None:
        """Add all cases of another."""
        self.hits += other.hits
        self.groups += other.groups
        self.drops += other.drops
        self.controls += other.controls
        self.sizes += other.sizes

    @property
    def control(self) -> float | None:
        """The share of hits under the controls, weighted by cases; None without one."""
        if not self.controls:
            return None
        weights, shares = zip(*self.controls, strict=True)
        return float(np.average(shares, weights=weights))


def ablate(
    scope: Scope,
    asked: Asked,
    features: Features,
    means: Mapping[int, Tensor],
    draws: int,
    into: Outcome,
    seed: int = 0,
) -> None:
    """Set features to 0 at all positions of the prompts, in free mode, and beside it as many matched ones.

    Args:
        scope: the model and its transcoders.
        asked: the prompts.
        features: which; without one the answers stay as they are.
        means: layer -> [F], by which controls are matched.
        draws: of the controls.
        into: where the cases are added.
        seed: under which controls are drawn.
    """
    where = torch.ones(asked.batch.length, dtype=torch.bool)
    plan = {layer: scale_features(found, 0.0, where) for layer, found in by_layer(scope.transcoders, features).items()}

    def changed(edits: Plan) -> tuple[np.ndarray, np.ndarray]:
        logits = run_edited(scope, asked.batch, edits, "free")
        return (logits.argmax(-1) != asked.answer).numpy(force=True), fall(asked, logits)

    hits, drops = changed(plan)
    controls = [changed(matched_features(plan, means, draw))[0] for draw in control_draws(seed, draws)]
    into.add(hits, drops, asked.names, _size(plan), controls)


def fall(asked: Asked, logits: Tensor) -> np.ndarray:
    """[B], by how many nats the log-probability of the right answer fell."""
    before, after = (log_softmax(one.double().numpy(force=True))[:, asked.answer] for one in (asked.logits, logits))
    return before - after


def carried_plan(
    transcoders: TranscoderSet, recipient: Asked, donor: Asked, features: Mapping[int, Tensor]
) -> dict[int, LayerEdit]:
    """Give features at the recipients' last position the activations of the donor's.

    Args:
        transcoders: the set.
        recipient: R prompts.
        donor: as many, or one for all of them.
        features: layer -> [n].
    """
    where = torch.zeros(recipient.batch.length, dtype=torch.bool)
    where[-1] = True
    plan = {}
    for layer, chosen in features.items():
        here = chosen.to(donor.last[layer].device)
        plan[layer] = set_features(here, activations(transcoders[layer], donor.last[layer], here)[:, None], where)
    return plan


@torch.no_grad()
def patch_across(
    scope: Scope,
    recipient: Asked,
    donor: Asked,
    features: Features,
    every: Features,
    means: Mapping[int, Tensor],
    into: Mapping[str, Outcome],
    seed: int = 0,
) -> None:
    """Patch prompts with the activations of a donor of the other kind, and see whether they take its answer.

    Args:
        scope: the model and its transcoders.
        recipient: B pictures, or one text, which is then repeated for each donor.
        donor: one text, or B pictures.
        features: shared by pictures and words of the recipient's or of the donor's concept.
        every: those of them that are shared whatever is asked.
        means: layer -> [F], by which the control is matched.
        into: where cases are added: `shared`, with a control; `no_last_layer`, the same without the last layer;
            `every_question`, those of `every` alone; `everything`, all features instead of the shared ones, the most
            that such a patch can do, and `everything_no_last_layer`.
        seed: of the control.
    """
    # Pictures are many and a text is one, so a case hangs on its picture, whichever side that is.
    pictures = (recipient if recipient.batch.is_image.any() else donor).names
    if recipient.batch.size == 1 < donor.batch.size:
        recipient = _repeated(recipient, donor.batch.size)
    final = scope.adapter.n_layers - 1
    shared = carried_plan(scope.transcoders, recipient, donor, by_layer(scope.transcoders, features))
    widths = {layer: torch.arange(scope.transcoders[layer].config.n_features) for layer in scope.transcoders.layers}
    whole = carried_plan(scope.transcoders, recipient, donor, widths)

    def run(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
        logits = run_edited(scope, recipient.batch, plan, "free")
        return (logits.argmax(-1) == donor.answer).numpy(force=True), fall(recipient, logits)

    control = run(matched_features(shared, means, control_draws(seed, 1)[0]))[0]
    into["shared"].add(*run(shared), pictures, _size(shared), [control])
    for name, plan in (
        ("no_last_layer", without_layers(shared, [final])),
        ("every_question", carried_plan(scope.transcoders, recipient, donor, by_layer(scope.transcoders, every))),
        ("everything", whole),
        ("everything_no_last_layer", without_layers(whole, [final])),
    ):
        into[name].add(*run(plan), pictures, _size(plan))


def _repeated(asked: Asked, count: int) -> Asked:
    rows = [0] * count
    last = {layer: x[rows] for layer, x in asked.last.items()}
    return Asked(asked.batch.select(rows), asked.names * count, asked.logits[rows], asked.answer, last)


def _size(plan: Plan) -> int:
    return sum(len(edit.features) for edit in plan.values())
