"""Causal trials as data: case sets x operations x settings x controls -> one tidy table.

A *case set* is one question asked of B recipients. An *operation* turns a case set and a strength into a plan of
edits. A *setting* says in which mode, at which positions and layers and how strongly to apply it, and next to how many
control draws. `run_trials` takes the product and returns one row per case, trial and draw (docs/formats.md,
`trials.parquet`); every rate, curve, matrix and p-value is a query on that table (`vlmscope.metrics.rates`).

Legend: B cases, T positions, n features of a layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import product, zip_longest
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from vlmscope.core.errors import UserError
from vlmscope.core.records import ROLES, control_draws
from vlmscope.interventions.controls import matched_plan, matched_pools
from vlmscope.interventions.edits import AnyPlan, LayerEdit, at_positions, codes, position_mask, scaled
from vlmscope.interventions.run import BaseRun, Norms, adding_random, editing, generate_batch, run_edited
from vlmscope.metrics.rates import log_softmax
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode

Features = Mapping[int, Tensor]  # layer -> [n] int64
ANSWER_TOKENS = 6  # longest answer in mode "generate"
WEAK = 0.5  # a control that moves less than this share of what its trial moves is none: it edits next to nothing
SLACK = 1.05  # further draws move a little less than the first
FUTILE = 5  # after so many draws of matched features that are all refused no more are run
COUNTED = 0.1  # of a trial's squared displacement: roles with less do not decide whether a control bites
# Fields of a case set with one entry per case.
PER_CASE = ("ids", "inputs", "pngs", "texts", "target_texts", "answer_ids", "target_ids")


@dataclass(frozen=True)
class Cases:
    """One question asked of B recipients."""

    name: str  # of the case set, for the table
    question: str
    batch: InputBatch
    base: BaseRun  # unedited, recorded for the modes that they will be edited in
    answer: Tensor  # [B], before any edit
    target: Tensor  # [B], what an intervention should bring about
    ids: tuple[str, ...]  # equal ids in several case sets are the same scene
    donors: InputBatch | None = None  # whose activations are carried over, row by row
    donor_logits: Tensor | None = None  # [B, V], needed for `recovered`
    inputs: tuple[ModelInputs, ...] = ()  # needed for mode "generate"
    prompt: str = ""  # for reports, as are small pictures
    pngs: tuple[bytes, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)  # columns of the table, such as recipient and donor
    texts: tuple[str, ...] = ()  # whole answers, unedited and aimed at, where whole answers are compared
    target_texts: tuple[str, ...] = ()
    # Answers of several tokens, right and aimed at, from the token on that tells them apart; for mode "generate".
    answer_ids: tuple[tuple[int, ...], ...] = ()
    target_ids: tuple[tuple[int, ...], ...] = ()
    donor_at: Tensor | None = None  # [T], the donors' position that stands for each; None where both have the same
    # Further columns of whole answers, from the cases' ids and the generated token ids.
    score: Callable[[Sequence[str], Sequence[Sequence[int]]], Mapping[str, Any]] | None = None
    # What is computed once, for all trials, settings and control draws.
    _codes: dict[str, Mapping[int, SparseCode]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _first: dict[int, Cases] = field(default_factory=dict, init=False, repr=False, compare=False)
    used: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)  # of the controls

    def codes(self, scope: Scope) -> Mapping[int, SparseCode]:
        """The unedited prompts' codes of every layer, from one forward."""
        if "own" not in self._codes:
            self._codes["own"] = codes(scope, self.batch)
        return self._codes["own"]

    @property
    def known(self) -> Mapping[int, SparseCode]:
        """`codes`, if they have been computed."""
        return self._codes.get("own", {})

    def donor_codes(self, scope: Scope) -> Mapping[int, SparseCode]:
        """The donors' codes of every layer, from one forward, at the recipients' positions."""
        if self.donors is None:
            raise UserError(
                f"settings: cases={self.name} has no donors to carry anything from; choose test, or do: shift"
            )
        if "donors" not in self._codes:
            found = codes(scope, self.donors)
            if self.donor_at is not None:
                at = self.donor_at.to(scope.adapter.device)
                found = {n: SparseCode(code.indices[:, at], code.values[:, at]) for n, code in found.items()}
            self._codes["donors"] = found
        return self._codes["donors"]

    def first(self, count: int | None) -> Cases:
        """The first `count` cases at most, all when None; always the same object."""
        if count is None or count >= self.batch.size:
            return self
        if count not in self._first:
            self._first[count] = self.select(range(count))
        return self._first[count]

    def select(self, rows: Sequence[int]) -> Cases:
        """Some of the cases."""
        index = torch.tensor(list(rows), device=self.answer.device)
        tuples = {
            key: tuple(entries[row] for row in rows)
            for key, entries in vars(self).items()
            if key in PER_CASE and entries
        }
        return replace(
            self,
            batch=self.batch.select(index),
            base=self.base.mapped(lambda values: values[index]),
            answer=self.answer[index],
            target=self.target[index],
            donors=None if self.donors is None else self.donors.select(index),
            donor_logits=None if self.donor_logits is None else self.donor_logits[index],
            **tuples,
        )

    def tagged(self, tags: Mapping[str, str]) -> Cases:
        """The same cases with more tags."""
        return replace(self, tags={**self.tags, **tags})

    def facing(self, donors: Cases, ids: tuple[str, ...]) -> Cases:
        """The same cases under other ids, with another case set as donors, whose answers are the targets.

        Where one of the two is a single prompt, it is repeated for each of the other's.
        """
        mine, theirs = (cases.select([0] * len(ids)) if cases.batch.size == 1 else cases for cases in (self, donors))
        return replace(mine, ids=ids, donors=theirs.batch, target=theirs.answer)


class Operation(Protocol):
    """What is done to a case set.

    `own_values` says that every feature has a value of its own, the donor's activation or 0, which a control's features
    then take; the features of other controls write the changes of those that they replace.
    """

    own_values: ClassVar[bool]

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """The edits; of other `features` than its own when given, which needs `own_values`."""
        ...


@dataclass(frozen=True)
class Setting:
    """Where, how and how strongly an operation is applied, and next to how many draws of which controls.

    The fields are those of `circuits.config.SettingConfig`, one value of each; `limit`, how many features the operation
    was made with, only goes into the table.
    """

    name: str = "main"
    mode: str = "free"
    positions: str = "all"
    layers: str = "all"
    strength: float = 1.0
    limit: int | None = None
    matched: int = 1
    random_direction: int = 0
    draws_on: int | None = None
    new_tokens: int = ANSWER_TOKENS

    def everywhere(self, layers: Sequence[int], roles: np.ndarray) -> list[Setting]:
        """The setting itself; where its layers or positions are "each", one for each layer or role in reading order."""
        # Text without "each" comes out the same for every layer, once.
        spans = dict.fromkeys(self.layers.replace("each", str(layer)) for layer in layers)
        places = dict.fromkeys(roles.tolist()) if self.positions == "each" else [self.positions]
        return [replace(self, layers=span, positions=place) for span in spans for place in places]

    def work(self, cases: Cases, layers: Sequence[int]) -> int:
        """How many runs of a case this is, with its controls."""
        controls = (self.matched + self.random_direction) * cases.first(self.draws_on).batch.size
        return len(self.everywhere(layers, cases.batch.roles)) * (cases.batch.size + controls)

    def restrict(self, plan: AnyPlan, roles: np.ndarray, n_layers: int) -> AnyPlan:
        """The part of a plan that lies in the setting's layers and positions."""
        low, high = layer_range(self.layers, n_layers)
        kept = {layer: edit for layer, edit in plan.items() if low <= layer <= high}
        if self.positions == "all":
            return kept
        kept = {layer: replace(edit, generated=None) for layer, edit in kept.items()}
        return at_positions(kept, position_mask(roles, "all" if self.positions == "prompt" else self.positions))


def layer_range(text: str, n_layers: int) -> tuple[int, int]:
    """First and last layer of "all", "no_last", "3", "0-5" or "3-"."""
    if text in ("all", "no_last"):
        return 0, n_layers - (1 if text == "all" else 2)
    first, dash, last = text.partition("-")
    return int(first), int(last) if last else n_layers - 1 if dash else int(first)


@dataclass(frozen=True)
class Trial:
    """An operation on some case sets in some settings."""

    operation: str
    do: Operation
    cases: Sequence[Cases]
    settings: Sequence[Setting]
    baseline: str = ""  # the variant of the operation that this is (`circuits.baselines`)

    def work(self, layers: Sequence[int]) -> int:
        """How many runs of a case this is, with its controls."""
        return sum(setting.work(cases, layers) for setting, cases in product(self.settings, self.cases))


def run_trials(scope: Scope, trials: Iterable[Trial], seed: int = 0, total: int = 0) -> pd.DataFrame:
    """Every operation on its case sets in its settings, with its controls.

    `total` is the work (`Trial.work`) that is known before, for the progress bar; it grows with what comes besides.

    Returns:
        One row per case, trial and draw: `operation`, the fields of the setting (its name as `setting`), `baseline`
        ("" for the trial itself and its controls, else the name of the variant), `cases`,
        `question`, the tags of the case set, `case`, `control` ("" for the trial itself, "matched",
        "random_direction"), `draw`, `features` (edited), `displacement_by_layer` [L], the norm over the prompt's
        positions of what the edit adds to each layer's transcoder target, `displacement_by_role`, the same at each of
        `ROLES` over the layers, `displacement`, over both, `moved`, a control's `share_moved`, `weak`, whether it is
        refused as `moved` is under `WEAK`, and the outcome (see `_outcome`). Prints what is refused.
    """
    tables: list[pd.DataFrame] = []
    shares: dict[str, list[float]] = {}  # trial, setting and control -> the share that each draw moves
    layers, planned, tags = scope.transcoders.layers, 0, set[str]()
    with tqdm(desc="trials", unit="case", total=total or None, disable=None) as bar:  # a case: one under one edit
        for trial in trials:
            for setting, cases in product(trial.settings, trial.cases):
                planned += setting.work(cases, layers)
                tags |= cases.tags.keys()
                bar.total = max(total, planned)
                bar.set_postfix_str(f"{trial.operation}/{setting.name}", refresh=False)
                whole = trial.do.plan(scope, cases, setting.strength)
                for local in setting.everywhere(scope.transcoders.layers, cases.batch.roles):
                    plan = local.restrict(whole, cases.batch.roles, scope.adapter.n_layers)
                    for table in _with_controls(scope, trial, cases, local, plan, seed):
                        if control := table.control.iloc[0]:
                            name = f"{trial.operation}/{setting.name} {control}"
                            shares.setdefault(name, []).append(float(table.moved.iloc[0]))
                        tables.append(table)
                        bar.update(len(table))
                bar.update(planned - bar.n)  # draws of controls that were left out
    refused = {name: [share for share in found if share < WEAK] for name, found in shares.items()}
    lines = [
        f"{name}: {len(weak)} of {len(shares[name])} draws move {np.median(weak):.2g} of it"
        for name, weak in refused.items()
        if weak
    ]
    if lines:
        print(f"controls refused, since one must move at least {WEAK:.0%} of what the edit moves: {'; '.join(lines)}")
    table = pd.concat(tables, ignore_index=True)
    return table.fillna(dict.fromkeys(sorted(tags & {*table}), ""))  # cases of several kinds have tags of their own


def _with_controls(
    scope: Scope, trial: Trial, cases: Cases, setting: Setting, plan: AnyPlan, seed: int
) -> Iterator[pd.DataFrame]:
    size = sum(len(edit.features) for edit in plan.values())
    labels = {"operation": trial.operation, "setting": setting.name, "baseline": trial.baseline}
    labels |= {key: getattr(setting, key) for key in ("mode", "positions", "layers", "strength", "limit")}
    labels |= {"cases": cases.name, "question": cases.question, "features": size, **cases.tags}
    norms: Norms = []
    done = _run(scope, cases, setting, norms, plan)
    yield done.assign(**labels, control="", draw=0, moved=1.0, weak=False)
    if not setting.matched + setting.random_direction:
        return
    few = cases.first(setting.draws_on)
    if few is not cases:
        rows, roles = slice(few.batch.size), few.batch.roles
        plan = setting.restrict(trial.do.plan(scope, few, setting.strength), roles, scope.adapter.n_layers)
        norms = [{layer: norm[rows] for layer, norm in by_layer.items()} for by_layer in norms]
    edits = {layer: edit for layer, edit in plan.items() if isinstance(edit, LayerEdit)}
    # Without features to edit the control edits none either: each case still has its pair.
    draws = control_draws(seed, setting.matched if edits or not plan else 0)
    subject = scope, trial.do, few, setting.strength, edits
    pools = matched_pools(*subject) if len(draws) else {}
    bites, scale = 0, 1.0
    for number, draw in enumerate(draws):
        if number == FUTILE and not bites:
            break
        table = _run(scope, few, setting, [], scaled(matched_plan(*subject, pools, draw), scale))
        moved = share_moved(table, done)
        if number == 0 and not trial.do.own_values and 0 < moved < WEAK:
            # What features of one concept write adds up, what others write cancels: their changes are enlarged until
            # the draws count.
            scale = SLACK * WEAK / moved
            table = _run(scope, few, setting, [], scaled(matched_plan(*subject, pools, draw), scale))
            moved = share_moved(table, done)
        bites += moved >= WEAK
        yield table.assign(**labels, control="matched", draw=draw, moved=moved, weak=moved < WEAK)
    for draw in control_draws(seed, setting.random_direction):
        table = _run(scope, few, setting, norms, direction=draw)
        moved = share_moved(table, done)
        yield table.assign(**labels, control="random_direction", draw=draw, moved=moved, weak=moved < WEAK)


def _run(
    scope: Scope,
    cases: Cases,
    setting: Setting,
    norms: Norms,
    plan: AnyPlan | None = None,
    direction: int | None = None,
) -> pd.DataFrame:
    """The outcome of each case under a plan, whose `norms` are filled; or under random directions of given norms."""
    adding = None if direction is None else adding_random(scope, norms, direction)
    if setting.mode == "generate":
        table = _generated(scope, cases, setting, adding or editing(scope, plan or {}, norms, cases.known))
    elif adding is None:
        logits = run_edited(scope, cases.batch, plan or {}, setting.mode, cases.base, norms, cases.known)
        table = _outcome(cases, logits)
    else:  # in free mode only, whatever the setting freezes
        with adding:
            table = _outcome(cases, scope.forward(cases.batch))
    by_layer, by_role = displacement(norms[0] if norms else {}, cases.batch, scope.adapter.n_layers)
    parts = {"displacement_by_layer": [*by_layer], "displacement_by_role": [*by_role]}
    return table.assign(displacement=np.linalg.norm(by_layer, axis=1), **parts)


def displacement(norms: Mapping[int, Tensor], batch: InputBatch, n_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """[B, L] and [B, roles] float64, norms of what an edit adds to each layer over positions, and at each of `ROLES`
    over layers.
    """
    squares = np.zeros((batch.size, n_layers, batch.length))
    for layer, by_position in norms.items():
        squares[:, layer] = by_position.double().square().numpy(force=True)
    by_role = [squares[..., batch.roles == role].sum((1, 2)) for role in ROLES]
    return np.sqrt(squares.sum(-1)), np.sqrt(np.stack(by_role, 1))


def share_moved(control: pd.DataFrame, trial: pd.DataFrame) -> float:
    """The share of what a trial displaces that a control draw on some of its cases displaces (medians): the least of
    the position roles that hold `COUNTED` of the trial's squared displacement at least; 1 where the trial adds nothing.
    """
    theirs, own = (np.median(np.stack(rows.displacement_by_role), 0) for rows in (control, trial[: len(control)]))
    counted = own**2 >= COUNTED * max((own**2).sum(), 1e-30)
    return float((theirs[counted] / own[counted]).min()) if counted.any() else 1.0


def _generated(scope: Scope, cases: Cases, setting: Setting, context: AbstractContextManager[None]) -> pd.DataFrame:
    """One row per case: `text`, the answer; `said`, its first token; `hit` and `changed`, of whole answers if given.

    With target texts also `right_words` and `kept_words`: the shares of the words that differ between the unedited and
    the target text, and of those that do not, that are the target's, each in its place.
    """
    longest = max((len(ids) for ids in (*cases.answer_ids, *cases.target_ids)), default=0)
    answers = generate_batch(scope.adapter, cases.inputs, max(setting.new_tokens, longest), context)
    texts = [scope.vlm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    first = [ids[0] if ids else -1 for ids in answers]
    answer, target = cases.answer.tolist(), cases.target.tolist()
    # An answer that names the target and then the old answer after all is no hit.
    hits = [ids[:1] == [t] and a not in ids for ids, a, t in zip(answers, answer, target, strict=True)]
    table = pd.DataFrame(
        {"case": cases.ids, "said": first, "text": texts, "hit": hits, "changed": np.not_equal(first, answer)}
    )
    if cases.answer_ids:
        table["changed"] = [not _begins(ids, own) for ids, own in zip(answers, cases.answer_ids, strict=True)]
    if cases.target_ids:
        table["hit"] = [_begins(ids, aim) for ids, aim in zip(answers, cases.target_ids, strict=True)]
    if cases.texts:
        table["changed"] = np.not_equal(texts, cases.texts)
    if cases.target_texts:
        table["hit"] = np.equal(texts, cases.target_texts)
        rows = zip(texts, cases.texts, cases.target_texts, strict=True)
        table[["right_words", "kept_words"]] = [word_shares(*row) for row in rows]
    return table if cases.score is None else table.assign(**cases.score(cases.ids, answers))


def _begins(ids: Sequence[int], answer: Sequence[int]) -> bool:
    return list(ids[: len(answer)]) == list(answer)


def word_shares(text: str, before: str, after: str) -> tuple[float, float]:
    """Shares of the words of `after` that `text` has in the same place: of those that differ from `before`, and of
    those that do not; nan where there are none. `before` and `after` have equally many words.
    """
    words, old, new = (np.array(line.split(), dtype=object) for line in (text, before, after))
    hits = np.array([a == b for a, b in zip_longest(words[: len(new)], new)])
    right, kept = (float(hits[mask].mean()) if mask.any() else np.nan for mask in (old != new, old == new))
    return right, kept


def _outcome(cases: Cases, logits: Tensor) -> pd.DataFrame:
    """One row per case.

    `said` is the most probable token, `hit` whether it is the target, `changed` whether it is no longer the unedited
    answer; `answer` and `target` are those tokens, `p_target` the target's probability and `gap` its logit minus the
    answer's, under the edit; `drop` by how many nats the log-probability of the answer fell, `kl` the divergence of the
    next token from the unedited run in nats. `recovered` is the share of the logit difference between target and answer
    that the edit brings about: 0 when nothing moved, 1 when the logits are as far apart as in the donor's own run
    (Zhang and Nanda, arXiv 2309.16042); missing without donor logits, where target and answer are the
    same or where the donor's logits are no further apart.
    """
    before, after = (x.double().numpy(force=True) for x in (cases.base.logits, logits))
    token, answer, target = (x.numpy(force=True) for x in (logits.argmax(-1), cases.answer, cases.target))
    rows = np.arange(len(token))
    table = pd.DataFrame({"case": cases.ids, "said": token, "hit": token == target, "changed": token != answer})
    log_before, log_after = log_softmax(before), log_softmax(after)
    table["answer"], table["target"] = answer, target
    table["p_target"] = np.exp(log_after[rows, target])
    table["gap"] = now = _gap(cases, logits)
    table["drop"] = log_before[rows, answer] - log_after[rows, answer]
    table["kl"] = (np.exp(log_before) * (log_before - log_after)).sum(-1)
    if cases.donor_logits is not None:
        start, full = _gap(cases, cases.base.logits), _gap(cases, cases.donor_logits)
        table["recovered"] = np.divide(
            now - start, full - start, out=np.full(len(rows), np.nan), where=(target != answer) & (full != start)
        )
    return table


def _gap(cases: Cases, logits: Tensor) -> np.ndarray:
    """[B], the target's logit minus the answer's; logits [B, V]."""
    rows = torch.arange(len(logits), device=logits.device)
    return (logits[rows, cases.target] - logits[rows, cases.answer]).double().numpy(force=True)
