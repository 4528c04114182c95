"""Figures of circuit discovery, and the sections of a page that show them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlmscope.circuits.discovery.discover import node_name
from vlmscope.circuits.discovery.result import Discovery, EdgesFound
from vlmscope.core.intervention import Curve, Rate
from vlmscope.metrics.prediction import FaithfulnessCurve
from vlmscope.report import figures
from vlmscope.report.page import Card, Cards, Figure, Percent, Section, Table, Text
from vlmscope.report.page import drawn as picture
from vlmscope.report.style import label

NAMES = {
    "graph": "attribution graphs",
    "eap_ig": "EAP-IG",
    "greedy": "elimination",
    "activation": "activation change",
    "random": "random features",
}
SHOWN = 20  # members and edges in tables


def summary(found: Discovery) -> str:
    """The result in a sentence."""
    circuit = found.circuit
    mode, rate = next(iter(circuit.test.items()))
    features = int(found.nodes.is_feature[circuit.members].sum())
    without = circuit.ablated[mode]
    return (
        f"{found.question}: {features} features (of {int(found.nodes.is_feature.sum()):,} that change) and "
        f"{len(circuit.members) - features} other nodes keep {rate.value:.0%} of the logit difference on test pairs "
        f"(matched features: {beside(rate)}); without these features {without.value:.0%} is left "
        f"(without matched ones: {beside(without)})."
    )


def beside(rate: Rate) -> str:
    """The control of a rate in words."""
    return "too few to draw" if rate.control is None else f"{rate.control:.0%}"


def draw_figures(found: Discovery, folder: Path) -> dict[str, Path]:
    """Draw faithfulness over size by mode, "groups" (where the circuit is) and, if they were searched, "edges"."""
    name = found.question
    drawn = {
        mode: draw(curves, folder / f"faithfulness_{name}_{mode}.png", "nodes kept (number)")
        for mode, curves in found.curves.items()
    }
    drawn["groups"] = figures.layer_role_heatmap(
        *group_matrix(found), folder / f"groups_{name}.png", "loss of faithfulness when dropped", "position role"
    )
    if found.edges is not None:
        drawn["edges"] = draw(found.edges.curves, folder / f"edges_{name}.png", "edges kept (number)")
    return drawn


def detail_sections(found: Discovery, folder: Path) -> list[Section]:
    """Curves, members, groups and edges of one question; draws figures."""
    circuit, name, drawn = found.circuit, found.question, draw_figures(found, folder)
    curves = tuple(picture(drawn[mode], f"Faithfulness over size: {name}, {label(mode)}") for mode in found.curves)
    intro = f"On {found.test_pairs} test pairs; ranked on {found.train_pairs} other pairs. Bands are 95 % intervals."
    alt = f"Loss of faithfulness when the circuit's nodes of a layer and role are dropped: {name}"
    note = f"Layer -1 is what enters the model. The circuit has {len(circuit.members)} nodes."
    sections: list[Section] = [
        Figure(f"Faithfulness over circuit size: {name}", curves, intro),
        areas(f"Areas under and beside the curves: {name}", found.curves),
        members(found),
        Figure(f"Where the circuit is: {name}", (picture(drawn["groups"], alt),), note),
    ]
    return sections if found.edges is None else sections + edge_sections(found, found.edges, drawn["edges"])


def headline(found: Discovery) -> Cards:
    """Numbers on top."""
    circuit, stability = found.circuit, found.stability
    cards = [
        Card("nodes of the circuit", len(circuit.members), f"of {len(found.nodes):,}; cut from: {NAMES[circuit.by]}")
    ]
    for mode, rate in circuit.test.items():
        detail = f"95 % interval {rate.ci_low:.0%} to {rate.ci_high:.0%}; matched features {beside(rate)}"
        cards.append(Card(f"faithfulness, {label(mode)}", Percent(rate.value), detail))
    mode, rate = next(iter(circuit.ablated.items()))
    cards.append(
        Card(
            "left without its features",
            Percent(rate.value),
            f"{label(mode)}; without matched ones {beside(rate)}",
        )
    )
    cards.append(
        Card(
            "same features on resampled pairs",
            Percent(stability.jaccard["eap_ig"]),
            f"Jaccard; by chance {stability.chance:.1%}",
        )
    )
    cards.append(
        Card("same features on other pairs", Percent(stability.other_pairs), "Jaccard, training against test pairs")
    )
    cards.append(Card("graphs and EAP-IG agree", found.correlation, "rank correlation over nodes with a score"))
    return Cards(f"The smallest circuit: {found.question}", tuple(cards))


def draw(curves: dict[str, FaithfulnessCurve], path: Path, xlabel: str) -> Path:
    """Faithfulness over the number of things kept."""
    lines = []
    for method, curve in curves.items():
        points = dict(zip(curve.counts, curve.rates, strict=True))  # small sets have equal sizes at several shares
        lines.append(Curve.of(NAMES[method], list(points), list(points.values())))
    return figures.feature_count_curve(lines, path, xlabel, "faithfulness (%)")


def areas(title: str, curves: dict[str, dict[str, FaithfulnessCurve]]) -> Table:
    """CPR and CMD by mode and ranking."""

    def interval(rate: Rate) -> str:
        return f"{rate.value:.3f} ({rate.ci_low:.3f} to {rate.ci_high:.3f})"

    rows = tuple(
        (label(mode), NAMES[method], interval(curve.cpr), interval(curve.cmd))
        for mode, found in curves.items()
        for method, curve in found.items()
    )
    columns = ("mode", "ranked by", "CPR, 95 % interval", "CMD, 95 % interval")
    note = "CPR: area under the curve, at most 0.999 without overshoot. CMD: area between the curve and 1, 0 is best."
    return Table(title, columns, rows, note=note)


def members(found: Discovery) -> Table:
    """The first members with their scores."""
    scores = [name for name in ("eap_ig", "graph", "activation") if name in found.scores]
    rows = tuple(
        (
            found.nodes.name(row),
            *(float(found.scores[name][row]) for name in scores),
            found.circuit.losses.get(row),
            Percent(float(found.stability.frequency[row])) if found.nodes.is_feature[row] else None,
        )
        for row in found.circuit.members[:SHOWN].tolist()
    )
    columns = ("node", *(NAMES[name] for name in scores), "loss when dropped", "chosen again")
    note = (
        f"The first {len(rows)} of {len(found.circuit.members)}; all are in discovery.json. EAP-IG is in logits; "
        "chosen again: share of bootstrap resamples of the pairs in which EAP-IG takes the feature. Losses were "
        "measured for the members of least estimated worth."
    )
    return Table(f"Members: {found.question}", columns, rows, note=note)


def group_matrix(found: Discovery) -> tuple[np.ndarray, list[int], list[str]]:
    """Losses [layers, roles], NaN where the circuit has nothing; layers and roles."""
    groups = found.circuit.groups
    layers, roles = (
        sorted({layer for layer, _ in groups}),
        [r for r in found.nodes.roles if any(r == g for _, g in groups)],
    )
    matrix = np.full((len(layers), len(roles)), np.nan)
    for (layer, role), loss in groups.items():
        matrix[layers.index(layer), roles.index(role)] = round(loss, 4) + 0.0
    return matrix, layers, roles


def edge_sections(found: Discovery, edges: EdgesFound, path: Path) -> list[Section]:
    """Circuits of edges in the frozen model, with their drawn curves."""
    order = np.argsort(-np.abs(edges.score), kind="stable")[:SHOWN]
    rows = tuple(
        (
            node_name(found.nodes, int(edges.source[i])),
            node_name(found.nodes, int(edges.target[i])),
            float(edges.score[i]),
            float(edges.influence[i]),
        )
        for i in order.tolist()
    )
    rate = edges.smallest_test
    intro = (
        f"In the frozen local replacement model, exactly. {edges.smallest:,} of {len(edges.source):,} edges keep "
        f"{rate.value:.0%} ({rate.ci_low:.0%} to {rate.ci_high:.0%}) on test pairs. Rank correlation of EAP-IG and "
        f"graphs: {edges.correlation:.2f}. The rest (changes of patterns, norms and supports) is {edges.rest:.0%} of "
        "the difference."
    )
    return [
        Figure(
            f"Circuits of edges: {found.question}",
            (picture(path, f"Faithfulness over edges: {found.question}"),),
            intro,
        ),
        Table(f"Strongest edges: {found.question}", ("from", "to", "EAP-IG (logits)", "influence in graphs"), rows),
    ]


def reading() -> Text:
    """What the numbers do not say."""
    return Text(
        "How to read this",
        (
            "A run of a circuit is the original's run in which every embedding, feature and error outside the circuit "
            "has the value of the counterfactual's run. Features inside are as this run makes them. Faithfulness is 0 "
            "for the counterfactual's run, 1 for the original's, a ratio of means over pairs.",
            "The random ranking shuffles features and leaves embeddings and errors in their places, so it starts with "
            "what the picture's embeddings carry without any feature.",
            "Rankings are by absolute score: a circuit also has what works against the answer, until members are "
            "pruned. Members are features at a position role; another counterfactual has another circuit.",
        ),
    )
