"""What an experiment may claim, computed from its table of trials alone (docs/circuits.md, "What an experiment may
claim").

Each trial is judged once, in the first of its settings with baselines (else with controls) that is one place, one
strength and one mode. A trial that counts changed answers, such as an ablation, *removes*; the others *bring about*.
With r the rate, [low, high] its 95 % interval, and every question judged by itself:

| claim | shown when, on every question |
| --- | --- |
| sufficient | low >= 1/2; not asked of a removal |
| necessary | of a removal: low >= 1/2, above its controls; else: `complement` has high < 1/2; both where both ran |
| specific | the rank among >= 19 draws that bite has p <= 0.05; answers to unrelated cases change with high <= 0.1 |
| more than copying | `without_writers` has low >= r / 2, and is above the trial's controls |
| more than a mean difference | above `difference_of_means`; not asked of a removal |
| found by the graph | above `unconfirmed` |

"Above" is the one-sided exact paired test on the same cases (`rates.paired_p`; above controls: above each draw that
bites, so its largest p), corrected over all claims of the experiment (Holm) at 0.05. A claim holds on every question
or not at all, so that its p is the largest of any question and needs no correction within. A rank's p cannot be
corrected so: of n draws it is at least 1 / (n + 1). A control or baseline that moves the residual stream by less than
half of what the edit does decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.core.results import Rate, text_table
from vlmscope.metrics.rates import CASE, LEAST_DRAWS, Draws, displacement_ratio, draws_of, holm, paired_p, share_rate

HALF = 0.5  # of the cases: a circuit that does it in fewer does not do it
ALPHA = 0.05
UNRELATED = 0.1  # the most that answers to unrelated cases may change
LEAST_DISPLACEMENT = 0.5  # of what the edit moves; the share below which a control or a baseline is too weak to decide
ONLY_BROUGHT_ABOUT = ("sufficient", "more_than_a_mean_difference")
PLACES = ["mode", "positions", "layers", "strength", "limit"]
Rows = Any  # a frame: pandas' own types of what a selection may be are too wide
CLAIMS = (
    "sufficient", "necessary", "specific", "more_than_copying", "more_than_a_mean_difference", "found_by_the_graph",
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A claim on one question.

    `value` is the number that is judged, `other` that of the control, baseline or limit `decided_by`, which it must
    exceed, or stay under where `below`; `p` that of the paired test or rank between them (NaN without one), and
    `reason` why the claim does not hold, or "".
    """

    question: str
    value: Rate
    decided_by: str
    other: float
    p: float = np.nan
    reason: str = ""
    below: bool = False

    def strength(self) -> tuple[bool, float, float]:
        """What the worst question has least of: no failure, a small p, distance to what decides."""
        distance = self.value.value - self.other
        return not self.reason, -self.p if self.p == self.p else 0.0, -distance if self.below else distance


NOTHING = {"question": "", "value": np.nan, "ci_low": np.nan, "ci_high": np.nan, "cases": 0, "decided_by": "",
           "other": np.nan, "p": np.nan}  # fmt: skip


def claims(table: pd.DataFrame, measures: Mapping[str, str]) -> pd.DataFrame:
    """The claims of every trial, from rows of `run_trials` and the measure that each "operation/setting" counts.

    Returns:
        One row per trial and claim (`operation`, `setting`, `claim`), none of trials without controls and baselines:
        whether it is `shown`, the fields of the worst question's `Verdict`, with p corrected over the experiment.
    """
    subjects = list(_subjects(table, measures))
    rows = [
        {"operation": subject.operation, "setting": subject.setting, "claim": claim, "shown": False}
        | _worst(subject.verdicts(claim, subjects))
        for subject in subjects
        for claim in subject.claims
    ]
    tested = [row for row in rows if row["p"] == row["p"] and row["claim"] != "specific"]
    for row, p in zip(tested, holm(np.array([row["p"] for row in tested])), strict=True):
        row["p"] = float(p)
        if not row["reason"] and not p <= ALPHA:
            reason = f"not above {row['decided_by']}: {percent(row['value'])} against {percent(row['other'])}"
            row["reason"] = f"{reason} (p {p:.2g})"
    rows = [row | {"shown": row["reason"] == ""} for row in rows]
    columns = ["operation", "setting", "claim", "shown", *NOTHING, "reason"]
    return pd.DataFrame(rows, columns=columns)


def _worst(found: Sequence[Verdict] | str) -> dict[str, Any]:
    """The worst question's verdict as fields of a row; a text is why nothing could be judged."""
    if isinstance(found, str):
        return {**NOTHING, "reason": found}
    worst = min(found, key=Verdict.strength)
    rate = vars(worst.value)
    return {key: rate[key] if key in rate else getattr(worst, key) for key in (*NOTHING, "reason")}


def claim_metrics(found: Rows) -> dict[str, float]:
    """`claims/<trial>/<claim>`, 1 where it is shown."""
    return {f"claims/{row.operation}/{row.claim}": float(row.shown) for row in found.itertuples()}


def claims_text(found: Rows) -> str:
    """The table of claims for a console."""
    head = ("trial", "may it be called", "shown", "rate", "95 % interval", "decided by", "there", "question", "why not")
    rows = [
        (
            f"{row.operation}/{row.setting}",
            str(row.claim).replace("_", " "),
            "yes" if row.shown else "no",
            *(
                ("-", "-")
                if np.isnan(row.value)
                else (f"{percent(row.value)}", f"{percent(row.ci_low)} to {percent(row.ci_high)}")
            ),
            row.decided_by or "-",
            "-" if np.isnan(row.other) else f"{percent(row.other)}",
            row.question or "-",
            row.reason,
        )
        for row in found.itertuples()
    ]
    return text_table([head, *rows])


def percent(share: float) -> str:
    """A share in per cent with one decimal."""
    return f"{100 * share:.1f} %"


def _subjects(table: Rows, measures: Mapping[str, str]) -> Iterator[Subject]:
    """Trials that may claim something, each in one setting; not those of another question's features (`way/name`)."""
    if "answer" in table:  # nothing can follow on questions whose answer is to stay
        moves = table.answer.isna() | (table.answer != table.target)
        table = table[moves.groupby([table.cases, table.question]).transform("any")]
    table = table.assign(baseline=table.baseline if "baseline" in table else "")
    for operation, rows in table.groupby("operation", sort=False):
        if "/" in str(operation):
            continue
        found: dict[bool, Subject] = {}
        for setting, part in rows.groupby("setting", sort=False):
            modes = part["mode"].unique()
            part = part[part["mode"] == ("free" if "free" in modes else modes[0])]
            measure = measures.get(f"{operation}/{setting}", "hit")
            if measure not in ("hit", "changed") or (part.cases == "unrelated").any():
                continue
            if (part.groupby("question")[PLACES].nunique(dropna=False) > 1).to_numpy().any():
                continue
            compared = bool((part.baseline != "").any())
            if compared or (part.control != "").any():
                found.setdefault(compared, Subject(str(operation), str(setting), part, rows, measure))
        if found:
            yield found[max(found)]  # the first setting with baselines, else the first with controls


@dataclass(frozen=True)
class Subject:
    """A trial in one setting: `rows` of the table, and all rows of the operation."""

    operation: str
    setting: str
    rows: Rows
    all_rows: Rows
    measure: str

    @property
    def removes(self) -> bool:
        """Whether answers go rather than come."""
        return self.measure == "changed"

    @property
    def claims(self) -> Sequence[str]:
        """Those that make sense of it.

        A removal does not show what suffices: answers that stay when all else is removed may be owed to errors,
        embeddings and attention alone. Nor is a difference of means removed.
        """
        return [claim for claim in CLAIMS if not (self.removes and claim in ONLY_BROUGHT_ABOUT)]

    @cached_property
    def questions(self) -> dict[str, Rows]:
        """Rows of each question; of several sets of concepts "set/question"."""
        by = [column for column in ("set", "question") if column in self.rows]
        return {"/".join(filter(None, map(str, key))): part for key, part in self.rows.groupby(by, sort=False)}

    def verdicts(self, claim: str, subjects: Sequence[Subject]) -> Sequence[Verdict] | str:
        """The claim on every question, or why it cannot be judged."""
        if claim == "sufficient":
            return self._each(self._sufficient)
        if claim == "necessary":
            return self._each(self._removal) if self.removes else self._needed(subjects)
        if claim == "specific":
            return [*self._each(self._ranked), *self._unrelated()]
        if claim == "more_than_copying":
            return self._baseline("without_writers", self._not_copied)
        return self._baseline(
            {"found_by_the_graph": "unconfirmed"}.get(claim, "difference_of_means"), self._above_baseline
        )

    def _each(self, judge: Any) -> list[Verdict]:
        return [judge(question, rows) for question, rows in self.questions.items()]

    def _baseline(self, name: str, judge: Any) -> list[Verdict] | str:
        """A judgement of each question by a baseline, which must have been run."""
        if not (self.rows.baseline == name).any():
            return f"not run: baselines: [{name}]"
        return self._each(lambda question, rows: judge(name, question, rows))

    def _sufficient(self, question: str, rows: Rows) -> Verdict:
        value = self._rate(_own(rows))
        return Verdict(question, value, "half of the cases", HALF, reason=_at_least(value, HALF))

    def _removal(self, question: str, rows: Rows) -> Verdict:
        value = self._rate(_own(rows))
        if reason := _at_least(value, HALF):
            return Verdict(question, value, "half of the cases", HALF, reason=reason)
        return self._above_draws(question, value, _own(rows), rows)

    def _needed(self, subjects: Sequence[Subject]) -> list[Verdict] | str:
        """By the complement, by a removal on the same cases, or by both."""
        found = self._baseline("complement", self._complement)
        for other in subjects:
            if other.removes and set(other.rows.cases) == set(self.rows.cases):
                removed = [
                    replace(verdict, decided_by=f"{verdict.decided_by} ({other.operation})")
                    for verdict in other._each(other._removal)
                ]
                return removed if isinstance(found, str) else [*found, *removed]
        return f"{found}, or a trial that removes, on the same cases" if isinstance(found, str) else found

    def _complement(self, name: str, question: str, rows: Rows) -> Verdict:
        other = rows[rows.baseline == name]
        value = self._rate(other)
        reason = (
            "" if value.ci_high < HALF else f"all other features do it too: up to {percent(value.ci_high)} of the cases"
        )
        return Verdict(question, value, name, HALF, np.nan, reason or _weak(name, other, rows), below=True)

    def _ranked(self, question: str, rows: Rows) -> Verdict:
        value, draws = self._rate(_own(rows)), self._draws(rows)
        count, p, reason = len(draws.means), draws.p, draws.reason
        if not reason and count < LEAST_DRAWS:
            reason = f"{count} control draws count; a rank needs {LEAST_DRAWS}"
        elif not reason and not p <= ALPHA:
            reason = f"rank {draws.rank} of {count + 1}: features drawn at random do as much"
        highest = float(draws.means.max()) if count else np.nan
        decides = f"rank {draws.rank} of {count + 1}" if count else "controls"
        return Verdict(question, value, decides, highest, p, reason)

    def _unrelated(self) -> Iterator[Verdict]:
        rows = _own(self.all_rows[self.all_rows.cases == "unrelated"])
        rows = rows[rows["mode"] == self.rows["mode"].iloc[0]]
        if len(rows):
            value = share_rate(rows.changed.to_numpy(bool), groups=_units(rows))
            reason = (
                "" if value.ci_high <= UNRELATED else f"up to {percent(value.ci_high)} of unrelated answers change too"
            )
            yield Verdict("unrelated cases", value, "most that may change", UNRELATED, np.nan, reason, below=True)

    def _not_copied(self, name: str, question: str, rows: Rows) -> Verdict:
        other = rows[rows.baseline == name]
        value, own = self._rate(other), self._rate(_own(rows)).value
        verdict = self._above_draws(question, value, other, rows)
        if value.ci_low < HALF * own:
            reason = f"without the features that write an answer {percent(value.value)} are left of {percent(own)}"
            return Verdict(question, value, "half of the trial's rate", HALF * own, reason=reason)
        return verdict

    def _above_baseline(self, name: str, question: str, rows: Rows) -> Verdict:
        own, other = _own(rows), rows[rows.baseline == name]
        value, there = self._rate(own), float(other[self.measure].mean())
        # A weak baseline that does as much all the same decides against the claim.
        weak = _weak(name, other, rows) if value.value > there else ""
        return Verdict(question, value, name, there, self._paired(own, other), weak)

    def _above_draws(self, question: str, value: Rate, done: Rows, rows: Rows) -> Verdict:
        """Whether `done` hits more than each control draw that bites: the largest p decides."""
        draws = self._draws(rows)
        if draws.reason:
            return Verdict(question, value, "controls", np.nan, reason=draws.reason)
        controls: Any = rows[(rows.control == draws.control) & rows.draw.isin(draws.numbers)]
        p = max(self._paired(done, draw) for _, draw in controls.groupby("draw"))
        names = f"each of {len(draws.means)} control draws" if len(draws.means) > 1 else "the only control draw"
        return Verdict(question, value, names, float(draws.means.max()), p)

    def _draws(self, rows: Rows) -> Draws:
        return draws_of(rows[rows.baseline == ""], self.measure)

    def _rate(self, rows: Rows) -> Rate:
        return share_rate(rows[self.measure].to_numpy(bool), groups=_units(rows))

    def _paired(self, done: Rows, other: Rows) -> float:
        """`paired_p` on the cases of both; where cases are clustered (`_units`), by which of the two has more hits in
        each cluster.
        """
        keys = [column for column in CASE if column in done]
        both: Any = done.merge(other, on=keys, suffixes=("", "_other"))
        gain = both[self.measure].astype(int) - both[f"{self.measure}_other"].astype(int)
        by_unit = gain.groupby(np.asarray(_units(both))).sum()
        return paired_p(by_unit.to_numpy() > 0, by_unit.to_numpy() < 0)


def _own(rows: Rows) -> Rows:
    """Rows of the trial itself."""
    return rows[(rows.control == "") & (rows.baseline == "")]


def _units(rows: Rows) -> list[str]:
    """What is independent: cases, or unordered pairs of recipient and donor, which share a circuit."""
    if "donor" in rows:
        return ["-".join(sorted(pair)) for pair in rows[["recipient", "donor"]].astype(str).to_numpy()]
    return rows["case"].astype(str).tolist()


def _at_least(value: Rate, least: float) -> str:
    """Why an interval does not lie above a share, or ""."""
    return "" if value.ci_low >= least else f"its interval starts at {percent(value.ci_low)}, under half of the cases"


def _weak(name: str, other: Rows, rows: Rows) -> str:
    """Why a baseline moves too little to decide anything, or ""; one that was not measured is taken to be fair."""
    ratio = displacement_ratio(other, _own(rows))
    return f"{name} too weak: it moves {ratio:.2g} of what the edit does" if ratio < LEAST_DISPLACEMENT else ""
