"""What an experiment may claim, by hand-made tables of trials: each rule, each refusal, and the worst question."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from vlmscope.metrics.claims import CLAIMS, claims

CASES = 40
WHERE = {"mode": "free", "positions": "all", "layers": "all", "strength": 1.0, "limit": None, "cases": "test"}
# A circuit of which every claim is true: hits of 40 cases under the trial, its baselines, and each of 30 draws.
GOOD = {"": 38, "without_writers": 30, "complement": 5, "difference_of_means": 10, "unconfirmed": 12}


def run(hits: int, question: str = "name", **more: Any) -> pd.DataFrame:
    """The first cases are hit, and the last changed; so many that both are `hits`."""
    same = WHERE | {"operation": "steer", "setting": "main", "control": "", "draw": 0, "baseline": "", "features": 3}
    count = more.pop("cases_of", CASES)
    rows = pd.DataFrame({"case": range(count), "hit": np.arange(count) < hits, "changed": np.arange(count) < hits})
    return rows.assign(**(same | {"question": question, "displacement": 1.0, "weak": False} | more))


def draws(hits: int, count: int = 30, first: int = 0, **more: Any) -> list[pd.DataFrame]:
    return [run(hits, control="matched", draw=first + draw, **more) for draw in range(count)]


def trial(hits: dict[str, int], control: int = 2, count: int = 30, **more: Any) -> list[pd.DataFrame]:
    return [run(n, baseline=name, **more) for name, n in hits.items()] + draws(control, count, **more)


def judged(*tables: pd.DataFrame, operation: str = "steer", **measures: str) -> dict[str, Any]:
    """Claim -> row, of one trial."""
    found = claims(pd.concat(tables, ignore_index=True), {f"{k}/main": v for k, v in measures.items()})
    return {row.claim: row for row in found[found.operation == operation].itertuples()}


def shown(rows: dict[str, Any]) -> set[str]:
    return {claim for claim, row in rows.items() if row.shown}


def test_a_good_circuit_may_claim_everything() -> None:
    found = judged(*trial(GOOD))
    assert shown(found) == set(CLAIMS) and {row.reason for row in found.values()} == {""}
    assert (found["specific"].decided_by, found["specific"].p) == ("rank 1 of 31", 1 / 31)
    row = found["found_by_the_graph"]
    assert (row.decided_by, row.value, row.other) == ("unconfirmed", 38 / 40, 12 / 40)
    assert row.p == 2.0**-26  # 26 cases gained, none lost: the largest p of three


@pytest.mark.parametrize(
    ("changes", "claim", "reason"),
    [
        ({"": 24}, "sufficient", "its interval starts at 43.3 %"),
        ({"complement": 20}, "necessary", "all other features do it too"),
        ({"without_writers": 2}, "more_than_copying", "without the features that write an answer 5.0 % are left of 95"),
        (
            {"difference_of_means": 38},
            "more_than_a_mean_difference",
            "not above difference_of_means: 95.0 % against 95",
        ),
        ({"unconfirmed": 36}, "found_by_the_graph", r"not above unconfirmed: 95.0 % against 90.0 % \(p 0.25\)"),
    ],
)
def test_a_claim_falls_by_its_own_number(changes: dict[str, int], claim: str, reason: str) -> None:
    found = judged(*trial(GOOD | changes))
    assert shown(found) == set(CLAIMS) - {claim}
    assert pd.Series([found[claim].reason]).str.contains(reason).all(), found[claim].reason


def test_the_worst_question_decides() -> None:
    found = judged(*trial(GOOD), *trial(GOOD | {"": 22, "unconfirmed": 12}, question="colour"))
    assert not found["sufficient"].shown and found["sufficient"].question == "colour"
    assert found["specific"].shown
    other = judged(*trial(GOOD), *trial(GOOD, control=39, question="colour"))
    assert not other["specific"].shown and other["specific"].question == "colour"
    assert other["specific"].reason == "rank 31 of 31: features drawn at random do as much"
    assert "more_than_copying" not in shown(other)  # not above the controls of colour


def test_what_was_not_run_is_not_shown() -> None:
    found = judged(*trial({"": 38}))
    assert shown(found) == {"sufficient", "specific"}
    assert found["more_than_copying"].reason == "not run: baselines: [without_writers]"
    assert found["necessary"].reason == "not run: baselines: [complement], or a trial that removes, on the same cases"
    few = judged(*trial(GOOD, count=5))
    assert few["specific"].reason == "5 control draws count; a rank needs 19" and few["more_than_copying"].shown
    none = judged(*trial(GOOD, count=0))
    assert none["specific"].reason == "no control was run" and not none["more_than_copying"].shown
    assert claims(run(38), {}).empty  # neither controls nor baselines


def test_controls_and_baselines_that_move_little_decide_nothing() -> None:
    own = [run(n, baseline=name) for name, n in GOOD.items()]
    found = judged(*own, *draws(0, weak=True, displacement=0.07))
    for claim in ("specific", "more_than_copying"):
        assert found[claim].reason == "control too weak: it moves 0.07 of what the edit does"
    some = judged(*own, *draws(0, 20, weak=True, displacement=0.07), *draws(0, 12, 20))
    assert some["specific"].reason == "12 control draws count; a rank needs 19"
    weak = pd.concat([run(0, baseline="unconfirmed", displacement=0.2), *trial({"": 38})])
    assert judged(weak)["found_by_the_graph"].reason == "unconfirmed too weak: it moves 0.2 of what the edit does"
    able = pd.concat([run(38, baseline="unconfirmed", displacement=0.2), *trial({"": 38})])
    assert judged(able)["found_by_the_graph"].reason.startswith("not above unconfirmed")


def test_a_removal_shows_what_is_necessary() -> None:
    ablate = {"operation": "ablate"}
    removed = trial({"": 36, "without_writers": 30, "complement": 4, "unconfirmed": 9}, **ablate)
    found = judged(*removed, operation="ablate", ablate="changed")
    assert shown(found) == set(CLAIMS) - {"more_than_a_mean_difference", "sufficient"} == set(found)
    carried = judged(*trial({"": 38}), *removed, ablate="changed")
    assert carried["necessary"].shown and carried["necessary"].decided_by == "each of 30 control draws (ablate)"
    # Redundant: with the circuit removed the answers stay, and so do they with all others carried.
    spared = judged(*trial(GOOD), *trial({"": 3}, **ablate), ablate="changed")
    assert spared["necessary"].reason == "its interval starts at 1.6 %, under half of the cases"


def test_unrelated_answers_must_stay() -> None:
    calm, loud = ([run(n, setting="unrelated", cases="unrelated", cases_of=100)] for n in (1, 9))
    assert judged(*trial(GOOD), *calm)["specific"].shown
    row = judged(*trial(GOOD), *loud)["specific"]
    assert (row.shown, row.question) == (False, "unrelated cases") and "16.4 % of unrelated answers" in row.reason


def test_claims_are_corrected_together() -> None:
    """p of 5 cases gained is 1 / 32: alone it passes, beside four others it does not."""
    close = GOOD | {"": 38, "unconfirmed": 33}
    alone = judged(*trial({"": 38, "unconfirmed": 33}))["found_by_the_graph"]
    beside = judged(*trial(close | {"difference_of_means": 33}))["found_by_the_graph"]
    assert alone.shown and alone.p == 1 / 32
    assert not beside.shown and beside.p == 2 / 32 and beside.reason.endswith("(p 0.062)")


def test_cells_of_one_pair_of_concepts_are_one_unit() -> None:
    """Forty pictures of one pair say what one pair says."""
    cell = {"recipient": "mars", "donor": "earth"}
    found = judged(*(table.assign(**cell) for table in trial(GOOD)))
    assert not found["sufficient"].shown and found["found_by_the_graph"].p > 0.05
