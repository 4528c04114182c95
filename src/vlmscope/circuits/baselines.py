"""Baselines of trials: the same trial without what copies the answer, without features, without the graph.

A circuit that moves an answer may only *write* it. A feature of a layer is an answer writer of a question if

    decoder    of all words, its decoder row through the norms and the unembedding raises an answer of the question most
    measured   it is one of the fewest features of the model that hold `SHARE` of all positive direct effect on a right
               answer's logit, e[f, w] = sum over positions t of a[f, t] W_dec[f] . d(l_w - mean l)/d(write[t]) in mode
               direct, mean over training prompts with this answer

The second finds what the first cannot see: features whose write reaches the answer by attention's value path, or whose
row raises some other word a little more. Nearly every active feature has some direct effect above 0, so that a share of
the sum decides, the one by which graphs are pruned (Ameisen et al. 2025).

Legend: B cases, T positions, F features of a layer, W answer words, V vocabulary, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vlmscope.circuits.config import TrialConfig
from vlmscope.circuits.operations import Ablate, Carry, Toward
from vlmscope.circuits.pairs import code_slopes
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.features.readouts import decoder_logits, token_lens
from vlmscope.interventions.edits import AnyPlan, LayerEdit, OutputEdit, WholeEdit, codes, some_features
from vlmscope.interventions.run import base_run, direct_gradients, hook_targets
from vlmscope.interventions.trials import Cases, Features, Operation
from vlmscope.models.base import token_strings
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode

if TYPE_CHECKING:
    from vlmscope.circuits.experiment import ConceptMaterial, PairSource

PROMPTS = 24  # training prompts of each side on which direct effects are measured
SHARE = 0.8  # of the positive direct effect on an answer, which measured writers hold together
ROUNDING = 1e-5  # of the largest logit that a row of the layer writes: what is less is none
TRIED = 8192  # tokens of a large vocabulary that are read first: most rows raise one of them more than an answer
READ = 50  # cases of a case set that the lens reads
MOST = 0.5  # of the cases: the lens reads the answer in a state where it is first in more of them
RoleVectors = Mapping[str, Mapping[int, Tensor]]  # role -> layer -> [B or 1, d]


@dataclass(frozen=True)
class Writers:
    """Which features of the model write an answer of one question."""

    words: tuple[str, ...]  # W
    logit: Mapping[int, Tensor]  # layer -> [F, W], what decoder rows write to the words' logits
    effect: Mapping[int, Tensor]  # layer -> [F, W], the measured direct effect in logits
    by_decoder: Mapping[int, Tensor]  # layer -> [F] int64, the number of the word, -1 for none
    measured: Mapping[int, Tensor]

    def of(self, layer: int) -> Tensor:
        """[F] int64, the number of the word that a feature writes by either criterion, -1 for none."""
        first = self.by_decoder[layer]
        return torch.where(first >= 0, first, self.measured[layer])

    def rows(self, **more: str) -> Iterable[dict[str, Any]]:
        """Every writer as a row of a table."""
        for layer in self.logit:
            words = self.of(layer)
            for index in torch.nonzero(words >= 0).flatten().tolist():
                word = int(words[index])
                yield more | {
                    "feature": str(FeatureId(layer, index)),
                    "word": self.words[word],
                    "by_decoder": bool(self.by_decoder[layer][index] >= 0),
                    "measured": bool(self.measured[layer][index] >= 0),
                    "logit": float(self.logit[layer][index, word]),
                    "effect": float(self.effect[layer][index, word]),
                }


def answer_writers(scope: Scope, tokens: Sequence[int], prompts: Sequence[tuple[InputBatch, Tensor]]) -> Writers:
    """The features that write one of the answers `tokens`, by decoder or by direct effect on the right answers [B] of
    prompts.
    """
    tokens = sorted(set(tokens))
    words = _words(scope, tokens)
    logit, by_decoder = {}, {}
    alike, some = _tried(scope, words)
    for layer in scope.transcoders.layers:
        chosen, least = None, 0.0
        if alike is not None and some is not None:  # only what raises an answer most of these can raise it most of all
            tried = torch.cat([torch.tensor(tokens), alike, some])
            found = torch.cat(list(decoder_logits(scope, layer, None, tried)))
            logit[layer], own, other = found.split([len(tokens), len(alike), len(some)], -1)
            chosen, least = torch.nonzero(own.amax(-1) >= other.amax(-1)).flatten().cpu(), float(found.max())
            by_decoder[layer] = torch.full((len(found),), -1, device=found.device)
            if not len(chosen):
                continue
        parts = [(logits[:, tokens], *logits.max(-1)) for logits in decoder_logits(scope, layer, chosen)]
        here, most, top = (torch.cat(column) for column in zip(*parts, strict=True))
        raised, place = top.unique(return_inverse=True)
        # "mars" and " mars" are one word, whichever of its tokens a row raises most.
        number = {word: i for i, word in enumerate(words)}
        known = [number.get(word, -1) for word in _words(scope, raised.tolist())]
        written = torch.tensor(known, device=top.device)[place]
        # A row that no word reads raises one of them by rounding.
        written = torch.where(most > ROUNDING * max(least, float(most.max())), written, -1)
        if chosen is None:
            logit[layer], by_decoder[layer] = here, written
        else:
            by_decoder[layer][chosen] = written
    effect = direct_effects(scope, tokens, prompts)
    measured = {layer: torch.full_like(found, -1) for layer, found in by_decoder.items()}
    for word in range(len(tokens)):
        positive = torch.cat([table[:, word].clamp_min(0) for table in effect.values()]).sort(descending=True).values
        sums = positive.cumsum(0)
        least = float(positive[int((sums < SHARE * sums[-1]).sum())])
        for layer, table in effect.items():
            strong = (table[:, word] >= least) & (table[:, word] > 0) & (table[:, word] >= table.max(-1).values)
            measured[layer][strong] = word
    return Writers(tuple(words), logit, effect, by_decoder, measured)


def _tried(scope: Scope, words: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
    """Of a large vocabulary, the tokens that read as one of the words, and `TRIED` of all; else nothing."""
    size = len(scope.adapter.lm_head().weight)
    if size <= 2 * TRIED:
        return None, None
    known = set(words)
    alike = [token for token, word in enumerate(_words(scope, range(size))) if word in known]
    return torch.tensor(alike), torch.arange(0, size, size // TRIED)


def _words(scope: Scope, tokens: Sequence[int]) -> list[str]:
    return [text.strip().casefold() for text in token_strings(scope.vlm.tokenizer, tokens)]


def direct_effects(
    scope: Scope, tokens: Sequence[int], prompts: Sequence[tuple[InputBatch, Tensor]]
) -> dict[int, Tensor]:
    """Layer -> [F, W], the mean direct effect of each feature on the logit of the right answer minus the mean logit,
    over the prompts (with their right answers [B]) whose right answer is each of the tokens; 0 without any.
    """
    effects = {
        n: torch.zeros(len(tokens), width, dtype=torch.float64, device=scope.adapter.device)
        for n, width in scope.transcoders.widths.items()
    }
    number = {token: i for i, token in enumerate(tokens)}
    counts = torch.zeros(len(tokens), 1, device=scope.adapter.device)
    for batch, right in prompts:
        base = base_run(scope, batch, ["direct"])
        word = torch.tensor([number[token] for token in right.tolist()], device=counts.device)
        counts[:, 0] += torch.bincount(word, minlength=len(tokens))
        gradients = direct_gradients(scope, batch, base, right)
        with torch.no_grad():
            for layer, table in effects.items():
                transcoder = scope.transcoders[layer]
                code = transcoder.encode(base.mlp_in[layer])
                each = code.values.double() * code_slopes(transcoder, code, gradients, layer)
                place = word[:, None, None] * table.shape[1] + code.indices
                table.view(-1).index_add_(0, place.flatten(), each.flatten())
    return {layer: (table / counts.clamp_min(1)).T for layer, table in effects.items()}


def mean_outputs(scope: Scope, batches: Sequence[InputBatch], classes: Sequence[Tensor]) -> Mapping[int, RoleVectors]:
    """Mean of what each layer's MLP writes at each role: class -> role -> layer -> [d], in float64.

    `classes` has the class of each prompt [B] of each batch.
    """
    sums: dict[tuple[int, str, int], Tensor] = {}
    counts: dict[tuple[int, str], int] = {}
    for batch, labels in zip(batches, classes, strict=True):
        outputs: dict[int, Tensor] = {}
        with ExitStack() as stack:
            hook_targets(stack, scope, scope.transcoders.layers, outputs.__setitem__)
            scope.forward(batch)
        for role in dict.fromkeys(batch.roles.tolist()):
            at = torch.from_numpy(batch.roles == role)
            for label in labels.unique().tolist():
                counts[label, role] = counts.get((label, role), 0) + int((labels == label).sum()) * int(at.sum())
                for layer, out in outputs.items():
                    total = out[labels == label][:, at].double().sum((0, 1))
                    sums[label, role, layer] = sums.get((label, role, layer), torch.zeros_like(total)) + total
    means: dict[int, dict[str, dict[int, Tensor]]] = {}
    for (label, role, layer), total in sums.items():
        means.setdefault(label, {}).setdefault(role, {})[layer] = total / counts[label, role]
    return means


@dataclass(frozen=True)
class Variant:
    """An operation whose plan is changed."""

    do: Operation
    change: Callable[[Cases, AnyPlan], AnyPlan]
    own_values: ClassVar[bool] = False

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """As `Operation.plan`; it has no controls."""
        assert features is None, "baselines have no matched features"
        return self.change(cases, self.do.plan(scope, cases, strength))


@dataclass(frozen=True)
class Complement:
    """The edit of every feature but those that an operation edits, at every position.

    Activations are carried at the donor's own level, whatever the strength: all features of a model threefold are no
    run of it.
    """

    do: Carry | Toward | Ablate
    own_values: ClassVar[bool] = False

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """As `Operation.plan`."""
        chosen = self.do.plan(scope, cases, strength)
        if isinstance(self.do, Ablate):
            whole = self._silent(scope, cases)
        else:
            whole = Carry(None, last=isinstance(self.do, Carry) and self.do.last).plan(scope, cases, 1.0)
        plan: dict[int, WholeEdit] = {}
        for layer, edit in whole.items():
            assert isinstance(edit, WholeEdit)
            if isinstance(self.do, Toward):
                edit = self._moved(scope, cases, layer, edit, strength)
            kept = torch.ones(edit.width, dtype=torch.bool)
            if layer in chosen:
                kept[chosen[layer].features.cpu()] = False
            plan[layer] = replace(edit, kept=kept)
        return plan

    def _silent(self, scope: Scope, cases: Cases) -> dict[int, WholeEdit]:
        shape = (1, cases.batch.length, 1)
        none = SparseCode(torch.zeros(shape, dtype=torch.long), torch.zeros(shape))
        where, last = torch.ones(shape[1], dtype=torch.bool), SparseCode(none.indices[:, 0], none.values[:, 0])
        return {n: WholeEdit(none, width, where, last) for n, width in scope.transcoders.widths.items()}

    def _moved(self, scope: Scope, cases: Cases, layer: int, edit: WholeEdit, strength: float) -> WholeEdit:
        if strength > 1:
            raise UserError(f"settings.baselines: complement of do: toward needs strengths up to 1, not {strength:g}")
        own, donors = codes(scope, cases.batch, [layer])[layer], edit.code
        values = torch.cat([own.values * (1 - strength), donors.values * strength], -1)
        return replace(edit, code=SparseCode(torch.cat([own.indices, donors.indices], -1), values))


@dataclass
class Baselines:
    """Variants of an experiment's operations; what they have in common is computed once."""

    scope: Scope
    material: ConceptMaterial | PairSource  # the source of the cases
    lens: list[dict[str, Any]] = field(default_factory=list)  # rows of lens.parquet
    _writers: dict[tuple[object, ...], Writers] = field(default_factory=dict)
    _readable: dict[tuple[object, ...], int] = field(default_factory=dict)
    _differences: dict[tuple[object, ...], RoleVectors] = field(default_factory=dict)

    def operation(self, name: str, trial: TrialConfig, do: Operation, cases: Cases, limit: int | None) -> Operation:
        """The variant `name` of the operation of a trial on a case set; `circuits.config.baselines_of` says of which
        trials it is defined.
        """
        if name == "unconfirmed":
            return self.material.unconfirmed(trial, cases, limit)
        if name == "complement":
            assert isinstance(do, Carry | Toward | Ablate), do
            return Complement(do)
        changes = {
            "without_writers": partial(self._writing, writing=False),
            "only_writers": partial(self._writing, writing=True),
            "other_writers": self._other_writers,
            "difference_of_means": self._difference_of_means,
            "before_readable": self._before_readable,
        }
        return Variant(do, changes[name])

    def tables(self) -> dict[str, pd.DataFrame]:
        """What the baselines stand on, by file name: the lens, and every answer writer of each question."""
        rows = [
            row
            for (question, *tags), found in self._writers.items()
            for row in found.rows(question=str(question), **{str(k): str(v) for k, v in tags})  # pyright: ignore
        ]
        tables = {"lens": pd.DataFrame(self.lens), "writers": pd.DataFrame(rows)}
        return {name: table for name, table in tables.items() if len(table)}

    def writers(self, cases: Cases) -> Writers:
        """The answer writers of the cases' question."""
        key = _key(cases)
        if key not in self._writers:
            few = [
                (batch.select(range(min(PROMPTS, batch.size))), right[:PROMPTS])
                for batch, right in self.material.prompts(cases)
            ]
            self._writers[key] = answer_writers(self.scope, self.material.answers(cases), few)
        return self._writers[key]

    def _writing(self, cases: Cases, plan: AnyPlan, writing: bool) -> AnyPlan:
        """The plan of the features that write an answer, or of those that do not."""
        found, kept = self.writers(cases), dict(plan)
        for layer, edit in plan.items():
            keep = (found.of(layer) >= 0) == writing
            if isinstance(edit, WholeEdit):
                kept[layer] = replace(edit, kept=keep)
            elif isinstance(edit, LayerEdit):
                kept[layer] = some_features(edit, keep[edit.features.to(keep.device)])
        return kept

    def _other_writers(self, cases: Cases, plan: AnyPlan) -> AnyPlan:
        """Of each layer, for each answer writer one from outside the circuit that writes the same word, those that
        raise it most first, with the same values, places and gate; fewer where a layer has no more.
        """
        found, others = self.writers(cases), dict(plan)
        for layer, edit in plan.items():
            assert isinstance(edit, LayerEdit), "of all features there are no others"
            words = found.of(layer)
            outside = words.clone()
            outside[edit.features.to(words.device)] = -1
            mine, chosen = words[edit.features.to(words.device)], edit.features.clone()
            keep = torch.zeros(len(mine), dtype=torch.bool)
            for word in range(len(found.words)):
                places = torch.nonzero(mine == word).flatten().cpu()
                free = torch.nonzero(outside == word).flatten()
                best = free[found.logit[layer][free, word].argsort(descending=True)][: len(places)]
                chosen[places[: len(best)]] = best.to(chosen)
                keep[places[: len(best)]] = True
            others[layer] = some_features(replace(edit, features=chosen), keep)
        return others

    def _difference_of_means(self, cases: Cases, plan: AnyPlan) -> AnyPlan:
        """The difference of mean outputs by role, where the plan acts; without its gate and at strength 1."""
        key, roles, size = (*_key(cases), cases.name, cases.ids), cases.batch.roles.tolist(), self.scope.adapter.d_model
        if key not in self._differences:
            self._differences[key] = self.material.difference(cases)
        vectors = self._differences[key]
        added: dict[int, OutputEdit] = {}
        for layer, edit in plan.items():
            none = torch.zeros(1, size, dtype=torch.float64, device=self.scope.adapter.device)
            by_role = {role: vectors.get(role, {}).get(layer, none) for role in {*roles, "last"}}
            rows = max(len(vector) for vector in by_role.values())
            value = torch.stack([by_role[role].expand(rows, -1) for role in roles], 1)
            where = edit.where
            if isinstance(edit, LayerEdit) and edit.at is not None:
                where = where & edit.at.any(-1).cpu()
            added[layer] = OutputEdit(value, where, None if edit.generated is None else by_role["last"])
        return added

    def _before_readable(self, cases: Cases, plan: AnyPlan) -> AnyPlan:
        """The plan at the layers before the one after which the lens reads the answer."""
        first = self.first_readable(cases)
        return {layer: edit for layer, edit in plan.items() if layer < first}

    def first_readable(self, cases: Cases) -> int:
        """The first layer after which the logit lens at the last position reads the answer in most of the cases, or in
        most of their donors the target; the number of layers when it never does. Rows of `lens` say what was read.
        """
        key = (*_key(cases), cases.name, cases.ids)
        if key in self._readable:
            return self._readable[key]
        runs = {"recipient": (cases.batch, cases.answer)}
        if cases.donors is not None:
            runs["donor"] = (cases.donors, cases.target)
        shares = {}
        for run, (batch, words) in runs.items():
            batch, words = batch.select(range(min(READ, batch.size))), words[:READ]
            ranks = token_lens(self.scope.adapter, batch, np.array([batch.length - 1]), words.tolist())
            shares[run] = (ranks[:, :, 0] == 0).mean(0)  # [L + 1], state n is read before layer n
        read = np.flatnonzero(np.max(list(shares.values()), axis=0) > MOST)
        first = max(int(read[0]) - 1, 0) if len(read) else self.scope.adapter.n_layers
        for run, share in shares.items():
            common = {"cases": cases.name, "question": cases.question, **cases.tags, "run": run}
            # State 0 is what enters the first layer.
            self.lens += [
                {**common, "after_layer": state - 1, "read": float(value), "edited": 0 <= state - 1 < first}
                for state, value in enumerate(share)
            ]
        self._readable[key] = first
        return first


def _key(cases: Cases) -> tuple[object, ...]:
    """What tells the questions of an experiment apart: its name and the tags of its cases."""
    return (cases.question, *sorted(cases.tags.items()))
