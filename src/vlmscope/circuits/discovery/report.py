"""Outputs of discovery in a run folder: discovery.json, tables, figures, metrics and sections of a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.circuits.config import MarkConfig
from vlmscope.circuits.discovery.discover import Discovery
from vlmscope.core.artifacts import write_json
from vlmscope.core.results import Curve, Rate
from vlmscope.report.figures import dose_response, layer_role_heatmap
from vlmscope.report.marks import Folder, sections_of, write_rows
from vlmscope.report.page import Card, Cards, Percent, Section, Text
from vlmscope.report.style import label

NAMES = {
    "graph": "attribution graphs",
    "eap_ig": "EAP-IG",
    "greedy": "elimination",
    "activation": "activation change",
    "random": "random features",
}
SHOWN = 20  # members in members.parquet; all are in discovery.json
READING = (
    "A run of a circuit is the original's run in which every embedding, feature and error outside the circuit has the "
    "value of the counterfactual's run. Features inside are as this run makes them. Faithfulness is 0 for the "
    "counterfactual's run, 1 for the original's, a ratio of means over pairs.",
    "The random ranking shuffles features and leaves embeddings and errors in their places, so it starts with what the "
    "picture's embeddings carry without any feature.",
    "Rankings are by absolute score: a circuit also has what works against the answer, until members are pruned. "
    "Members are features at a position role; another counterfactual has another circuit.",
)


def write_discoveries(discoveries: Sequence[Discovery], folder: Path, figures: bool = True) -> dict[str, float]:
    """Write discovery.json, areas.parquet, members.parquet and figures/ into a run folder; metrics of all questions."""
    write_json(folder / "discovery.json", {discovery.question: _body(discovery) for discovery in discoveries})
    for name, rows in (("areas", _area_rows), ("members", _member_rows)):
        write_rows(folder / f"{name}.parquet", [row for discovery in discoveries for row in rows(discovery)])
    for discovery in discoveries if figures else ():
        _draw(discovery, folder / "figures")
    return {key: value for discovery in discoveries for key, value in _metrics(discovery).items()}


def _metrics(discovery: Discovery) -> dict[str, float]:
    """`discovery/<question>/...`: sizes, `<mode>/<method>/cpr` and `cmd`, faithfulness and its control, stability."""
    circuit, stability, edges = discovery.circuit, discovery.stability, discovery.edges
    metrics = {
        "candidates": float(len(discovery.nodes)),
        "members": float(len(circuit.members)),
        "features": float(discovery.n_features),
        "members_before_pruning": float(circuit.cut),
        "stability/other_pairs": stability.other_pairs,
        "stability/chance": stability.chance,
        "rank_correlation_nodes": discovery.correlation,
    }
    metrics |= {f"stability/{method}": value for method, value in stability.jaccard.items()}
    rates = {"train_faithfulness": circuit.train}
    for mode, rate in circuit.test.items():
        rates |= {f"{mode}/faithfulness": rate, f"{mode}/without_circuit": circuit.ablated[mode]}
    for mode, curves in discovery.all_curves.items():
        for method, curve in curves.items():
            rates |= {f"{mode}/{method}/cpr": curve.cpr, f"{mode}/{method}/cmd": curve.cmd}
    if edges is not None:
        rates["edges/faithfulness"] = edges.smallest_test
        metrics |= {"edges/candidates": float(len(edges.source)), "edges/members": float(edges.smallest)}
        metrics |= {"edges/rank_correlation": edges.correlation, "edges/rest": edges.rest}
    for name, rate in rates.items():
        metrics |= rate.metrics(name)
    return {f"discovery/{discovery.question}/{name}": value for name, value in metrics.items()}


def _body(discovery: Discovery) -> dict[str, Any]:
    """A discovery as plain data: curves, members with scores and losses, the edges of the smallest circuit of edges."""
    nodes, circuit, edges = discovery.nodes, discovery.circuit, discovery.edges
    curves = {
        mode: {method: [vars(rate) for rate in curve.rates] for method, curve in by_method.items()}
        for mode, by_method in discovery.all_curves.items()
    }
    of_edges = curves.pop("edges", None)
    body: dict[str, Any] = {
        "pairs": {"train": len(discovery.train_rows), "test": discovery.test_pairs},
        "by": circuit.by,
        "curves": curves,
        "shares": list(next(iter(next(iter(discovery.curves.values())).values())).shares),
        "members": [
            {
                "node": nodes.name(row),
                "scores": {method: float(scores[row]) for method, scores in discovery.scores.items()},
                "loss": circuit.losses.get(row),
                "chosen_in": float(discovery.stability.frequency[row]),
            }
            for row in circuit.members.tolist()
        ],
        "groups": [{"layer": layer, "role": role, "loss": loss} for (layer, role), loss in circuit.groups.items()],
    }
    if edges is not None:
        order = np.abs(edges.score).argsort()[::-1][: edges.smallest]
        members = [
            {"source": nodes.name(source), "target": nodes.name(target), "score": score, "influence": flow}
            for source, target, score, flow in zip(
                *(column[order].tolist() for column in (edges.source, edges.target, edges.score, edges.influence)),
                strict=True,
            )
        ]
        body["edges"] = {"curves": of_edges, "members": members}
    return body


def _area_rows(discovery: Discovery) -> list[dict[str, Any]]:
    """CPR (area under the curve) and CMD (area between the curve and 1, 0 is best) by mode and ranking."""

    def interval(rate: Rate) -> str:
        return f"{rate.value:.3f} ({rate.ci_low:.3f} to {rate.ci_high:.3f})"

    return [
        {"question": discovery.question, "mode": label(mode), "ranked by": NAMES[method]}
        | {"CPR": interval(curve.cpr), "CMD": interval(curve.cmd)}
        for mode, curves in discovery.all_curves.items()
        for method, curve in curves.items()
    ]


def _member_rows(discovery: Discovery) -> list[dict[str, Any]]:
    """The first members: scores (EAP-IG in logits), loss when dropped where measured, and how often chosen again."""
    return [
        {
            "question": discovery.question,
            "node": discovery.nodes.name(row),
            **{name: float(discovery.scores[name][row]) for name in ("eap_ig", "graph") if name in discovery.scores},
            "loss when dropped": discovery.circuit.losses.get(row),
            "chosen on resampled pairs": float(discovery.stability.frequency[row]),
        }
        for row in discovery.circuit.members[:SHOWN].tolist()
    ]


def _draw(discovery: Discovery, folder: Path) -> None:
    """Faithfulness over size by mode and of edges, and the loss by layer and role: where the circuit is."""
    for mode, curves in discovery.all_curves.items():
        what, name = ("edges", f"edges_{discovery.question}")
        if mode != "edges":
            what, name = "nodes", f"faithfulness_{discovery.question}_{mode}"
        lines = []
        for method, curve in curves.items():
            points = dict(zip(curve.counts, curve.rates, strict=True))  # small sets have equal sizes at several shares
            lines.append(Curve.of(NAMES[method], list(points), list(points.values())))
        xlabel, ylabel = f"{what} kept (number)", "faithfulness (%)"
        dose_response(lines, folder / f"{name}.png", xlabel, ylabel, log_x=True)
    groups = discovery.circuit.groups
    layers = sorted({layer for layer, _ in groups})
    present = {role for _, role in groups}
    roles = [role for role in discovery.nodes.roles if role in present]
    matrix = np.full((len(layers), len(roles)), np.nan)
    for (layer, role), loss in groups.items():
        matrix[layers.index(layer), roles.index(role)] = round(loss, 4) + 0.0
    path = folder / f"groups_{discovery.question}.png"
    layer_role_heatmap(matrix, layers, roles, path, "loss of faithfulness when dropped")


def summary(discovery: Discovery) -> str:
    """The result in a sentence."""
    circuit, features = discovery.circuit, discovery.n_features
    mode, rate = next(iter(circuit.test.items()))
    without = circuit.ablated[mode]
    return (
        f"{discovery.question}: {features} features (of {int(discovery.nodes.is_feature.sum()):,} that change) and "
        f"{len(circuit.members) - features} other nodes keep {rate.value:.0%} of the logit difference on test pairs "
        f"(matched features: {_control(rate)}); without these features {without.value:.0%} is left "
        f"(without matched ones: {_control(without)})."
    )


def _control(rate: Rate) -> str:
    return "too few to draw" if rate.control is None else f"{rate.control:.0%}"


def sections(discovery: Discovery, folder: Path) -> tuple[list[Section], list[Section]]:
    """Numbers on top of a page; and curves, areas, members, groups and edges from the run folder, with how to read
    them.
    """
    circuit, stability, edges = discovery.circuit, discovery.stability, discovery.edges
    origin = f"of {len(discovery.nodes):,}; cut from: {NAMES[circuit.by]}"
    cards = [Card("nodes of the circuit", len(circuit.members), origin)]
    for mode, rate in circuit.test.items():
        detail = f"95 % interval {rate.ci_low:.0%} to {rate.ci_high:.0%}; matched features {_control(rate)}"
        cards.append(Card(f"faithfulness, {label(mode)}", Percent(rate.value), detail))
    mode, left = next(iter(circuit.ablated.items()))
    left_detail, chance = f"{label(mode)}; without matched ones {_control(left)}", f"by chance {stability.chance:.1%}"
    cards += [
        Card("left without its features", Percent(left.value), left_detail),
        Card("same features on resampled pairs", Percent(stability.jaccard["eap_ig"]), f"Jaccard; {chance}"),
        Card("same features on test pairs", Percent(stability.other_pairs), "Jaccard"),
        Card("graphs and EAP-IG agree", discovery.correlation, "rank correlation over nodes with a score"),
    ]
    marks = [
        ("picture", "Faithfulness over circuit size", "faithfulness_*", "On test pairs, with 95 % intervals."),
        ("table", "Areas under and beside the curves", "areas.parquet", "CMD: area between curve and 1, 0 is best."),
        ("table", "First members", "members.parquet", "EAP-IG is in logits. All members are in discovery.json."),
        ("picture", "Where the circuit is", "groups_*", "Layer -1 is what enters the model."),
    ]
    if edges is not None:
        rate = edges.smallest_test
        says = (
            f"In the frozen local replacement model, exactly. {edges.smallest:,} of {len(edges.source):,} edges keep "
            f"{rate.value:.0%} ({rate.ci_low:.0%} to {rate.ci_high:.0%}) on test pairs. Rank correlation of EAP-IG and "
            f"graphs: {edges.correlation:.2f}. The rest (changes of patterns, norms and supports) is {edges.rest:.0%} "
            "of the difference."
        )
        marks.append(("picture", "Circuits of edges", "edges_*", says))
    shown = {file: MarkConfig(mark, title, file=file, says=says) for mark, title, file, says in marks}
    details = [*sections_of(Folder(folder), shown), Text("How to read this", READING)]
    return [Cards(f"The smallest circuit: {discovery.question}", tuple(cards))], details
