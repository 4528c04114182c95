"""The smallest circuit of a question of the pairs, and how faithful, complete, minimal and stable it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.discovery.discover import discover, node_name
from vlmscope.circuits.discovery.result import Discovery
from vlmscope.circuits.discovery.sides import CircuitSubject
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.metrics.prediction import FaithfulnessCurve

if TYPE_CHECKING:
    from vlmscope.data.pairs import Pair
    from vlmscope.tasks.bench import Bench


def discovered(bench: Bench, choose: CircuitSubject, judge: CircuitSubject) -> Discovery:
    """The circuit of a question by the pairs that choose and the pairs that judge."""
    return discover(bench.scope, choose, judge, bench.cfg.discovery, bench.cfg.attribution)


def circuit_of(bench: Bench, found: Discovery) -> Circuit:
    """The circuit in the form in which circuits are saved."""
    return found.to_circuit(bench.vlm.name, bench.transcoders.widths)


def write_found(bench: Bench, found: dict[str, Discovery]) -> dict[str, float]:
    """Write discovery.json; metrics of all questions."""
    write_json(bench.run_dir / "discovery.json", {name: as_json(one) for name, one in found.items()})
    return {key: value for one in found.values() for key, value in discovery_metrics(one).items()}


def questions(bench: Bench, train: dict[str, list[Pair]], test: dict[str, list[Pair]]) -> list[str]:
    """The questions whose answer differs within pairs, or the one that is asked for.

    Raises:
        UserError: there is none, or not the one that is asked for.
    """
    moving = [name for name in train if name in test and train[name][0].moves]
    wanted = bench.cfg.discovery.question
    if wanted is not None and wanted not in moving:
        known = f"choose from {', '.join(moving)}" if moving else "no question of these pairs has two answers"
        raise UserError(f"discovery.question={wanted}: {known}")
    if not moving:
        raise UserError("no question's answer differs within a pair: there is no contrast to find a circuit by")
    return moving if wanted is None else [wanted]


def circuit_subject(bench: Bench, name: str, pairs: list[Pair]) -> CircuitSubject:
    """Pairs that are answered rightly on both sides, with the prompts of each."""
    subject = bench.pair_subject(name, pairs, bench.cfg.discovery.modes)
    rows = [pairs[i] for i in subject.rows.tolist()]
    sides = [[bench.vlm.prepare(s.prompt, list(s.images)) for s in some] for some in zip(
        *((pair.original, pair.counterfactual) for pair in rows), strict=True)]  # fmt: skip
    return CircuitSubject(subject, *sides)


def discovery_metrics(found: Discovery) -> dict[str, float]:
    """`discovery/<question>/...`: sizes, `<mode>/<method>/cpr` and `cmd`, faithfulness and its control, stability."""
    root = f"discovery/{found.question}"
    circuit, metrics = found.circuit, {}
    nodes = found.nodes
    metrics[f"{root}/candidates"] = float(len(nodes))
    metrics[f"{root}/members"] = float(len(circuit.members))
    metrics[f"{root}/features"] = float(nodes.is_feature[circuit.members].sum())
    metrics[f"{root}/members_before_pruning"] = float(circuit.cut)
    metrics |= circuit.train.metrics(f"{root}/train_faithfulness")
    for mode, rate in circuit.test.items():
        metrics |= rate.metrics(f"{root}/{mode}/faithfulness")
        metrics |= circuit.ablated[mode].metrics(f"{root}/{mode}/without_circuit")
    for mode, curves in found.curves.items():
        for method, curve in curves.items():
            metrics |= curve_metrics(f"{root}/{mode}/{method}", curve)
    stability = found.stability
    for method, value in stability.jaccard.items():
        metrics[f"{root}/stability/{method}"] = value
    metrics[f"{root}/stability/other_pairs"] = stability.other_pairs
    metrics[f"{root}/stability/chance"] = stability.chance
    metrics[f"{root}/rank_correlation_nodes"] = found.correlation
    if found.edges is not None:
        edges = found.edges
        metrics[f"{root}/edges/candidates"] = float(len(edges.source))
        metrics[f"{root}/edges/members"] = float(edges.smallest)
        metrics |= edges.smallest_test.metrics(f"{root}/edges/faithfulness")
        metrics[f"{root}/edges/rank_correlation"] = edges.correlation
        metrics[f"{root}/edges/rest"] = edges.rest
        for method, curve in edges.curves.items():
            metrics |= curve_metrics(f"{root}/edges/{method}", curve)
    return metrics


def curve_metrics(root: str, curve: FaithfulnessCurve) -> dict[str, float]:
    """CPR and CMD with their intervals."""
    return curve.cpr.metrics(f"{root}/cpr") | curve.cmd.metrics(f"{root}/cmd")


def as_json(found: Discovery) -> dict:
    """A discovery as plain data: curves, members with scores and losses, the strongest edges."""
    nodes, circuit = found.nodes, found.circuit

    def rate(one: Rate) -> dict:
        return vars(one)

    body = {
        "pairs": {"train": found.train_pairs, "test": found.test_pairs},
        "by": circuit.by,
        "curves": {
            mode: {method: [rate(one) for one in curve.rates] for method, curve in curves.items()}
            for mode, curves in found.curves.items()
        },
        "shares": list(next(iter(next(iter(found.curves.values())).values())).shares),
        "members": [
            {
                "node": nodes.name(row),
                "scores": {method: float(scores[row]) for method, scores in found.scores.items()},
                "loss": circuit.losses.get(row),
                "chosen_in": float(found.stability.frequency[row]),
            }
            for row in circuit.members.tolist()
        ],
        "groups": [{"layer": layer, "role": role, "loss": loss} for (layer, role), loss in circuit.groups.items()],
    }
    if found.edges is not None:
        edges = found.edges
        order = abs(edges.score).argsort()[::-1][: edges.smallest]
        body["edges"] = {
            "curves": {method: [rate(one) for one in curve.rates] for method, curve in edges.curves.items()},
            "members": [
                {
                    "source": node_name(nodes, int(edges.source[i])),
                    "target": node_name(nodes, int(edges.target[i])),
                    "score": float(edges.score[i]),
                    "influence": float(edges.influence[i]),
                }
                for i in order.tolist()
            ],
        }
    return body
