"""The smallest circuit of each question of the pairs, chosen on training pairs and judged on test pairs.

A run of a circuit is the original's run in which every embedding, feature and error outside the circuit has the value
of the counterfactual's run. Faithfulness is 0 for the counterfactual's run and 1 for the original's, a ratio of means
over pairs. The search itself is in `vlmscope.circuits.discovery`; its settings are the group `discovery`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmscope.circuits.circuit import save_circuit
from vlmscope.circuits.discovery.result import Discovery
from vlmscope.data.pairs import check_choosing
from vlmscope.report.marks import write_rows
from vlmscope.tasks.circuits.discovery import circuit_of, circuit_subject, discovered, questions, write_found
from vlmscope.tasks.circuits.discovery_page import draw_figures

if TYPE_CHECKING:
    from vlmscope.tasks.bench import Bench

SHOWN = 20  # members of each question in members.parquet; all are in discovery.json


def check(cfg: Any) -> None:
    """Refuse pairs that cannot choose a circuit."""
    if cfg.pairs is not None:
        check_choosing(cfg.pairs)


def analyse(bench: Bench) -> dict[str, float]:
    """Write circuits/, discovery.json, areas.parquet, members.parquet, figures/; metrics `discovery/<question>/...`."""
    train, test = (bench.pairs(split) for split in ("train", "test"))
    found: dict[str, Discovery] = {}
    for name in questions(bench, train, test):
        choose, judge = (circuit_subject(bench, name, pairs[name]) for pairs in (train, test))
        found[name] = discovered(bench, choose, judge)
        save_circuit(circuit_of(bench, found[name]), bench.run_dir / "circuits" / name)
        draw_figures(found[name], bench.run_dir / "figures")
    write_rows(bench.run_dir / "areas.parquet", [row for one in found.values() for row in areas(one)])
    write_rows(bench.run_dir / "members.parquet", [row for one in found.values() for row in members(one)])
    return write_found(bench, found)


def areas(found: Discovery) -> list[dict[str, Any]]:
    """CPR (area under the curve) and CMD (area between the curve and 1, 0 is best) by mode and ranking."""
    curves = found.curves | ({} if found.edges is None else {"edges": found.edges.curves})
    rows = []
    for mode, of in curves.items():
        for method, curve in of.items():
            row = {"question": found.question, "mode": mode, "ranked by": method}
            for name, rate in (("CPR", curve.cpr), ("CMD", curve.cmd)):
                row[name] = f"{rate.value:.3f} ({rate.ci_low:.3f} to {rate.ci_high:.3f})"
            rows.append(row)
    return rows


def members(found: Discovery) -> list[dict[str, Any]]:
    """The first members: scores (EAP-IG in logits), loss when dropped where measured, and how often chosen again."""
    return [
        {
            "question": found.question,
            "node": found.nodes.name(row),
            **{name: float(found.scores[name][row]) for name in ("eap_ig", "graph") if name in found.scores},
            "loss when dropped": found.circuit.losses.get(row),
            "chosen on resampled pairs": float(found.stability.frequency[row]),
        }
        for row in found.circuit.members[:SHOWN].tolist()
    ]
