"""Figures and report.html of circuit discovery."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.circuits.discovery.discover import node_name
from vlmscope.circuits.discovery.result import Discovery, EdgesFound
from vlmscope.core.intervention import Rate
from vlmscope.metrics.prediction import FaithfulnessCurve
from vlmscope.report import figures
from vlmscope.report.page import Card, Cards, Figure, Percent, ReportPage, Section, Table, Text
from vlmscope.report.style import label
from vlmscope.tasks.steps.intervene import make_curve
from vlmscope.tasks.steps.report_parts import configuration, picture, rerun

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

NAMES = {
    "graph": "attribution graphs",
    "eap_ig": "EAP-IG",
    "greedy": "elimination",
    "activation": "activation change",
    "random": "random features",
}
SHOWN = 20  # members and edges in tables


def run(bench: Bench) -> None:
    """Write figures/ and report.html."""
    found: dict[str, Discovery] = bench.record("discover")
    folder = bench.run_dir / "figures"
    sections: list[Section] = []
    for one in found.values():
        sections += question_sections(one, folder)
    sections += [reading(), rerun(bench), configuration(bench)]
    pairs = bench.cfg.pairs
    what = "own pairs" if pairs is None or pairs.change is None else label(pairs.change)
    page = ReportPage(
        title=f"Circuits: {what}",
        question="Which is the smallest part of the model that still prefers the original's answer to the "
        "counterfactual's, when everything else is as in the counterfactual's run?",
        summary=" ".join(summary(one) for one in found.values()),
        sections=tuple(sections),
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


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


def question_sections(found: Discovery, folder: Path) -> list[Section]:
    """Numbers, curves, members, groups and edges of one question."""
    return [headline(found), *detail_sections(found, folder)]


def detail_sections(found: Discovery, folder: Path) -> list[Section]:
    """Curves, members, groups and edges of one question; draws figures."""
    circuit, name = found.circuit, found.question
    drawn = []
    for mode, curves in found.curves.items():
        path = folder / f"faithfulness_{name}_{mode}.png"
        drawn.append(
            picture(draw(curves, path, "nodes kept (number)"), f"Faithfulness over size: {name}, {label(mode)}")
        )
    sections: list[Section] = [
        Figure(
            f"Faithfulness over circuit size: {name}",
            tuple(drawn),
            f"On {found.test_pairs} test pairs; ranked on {found.train_pairs} other pairs. Bands are 95 % intervals.",
        ),
        areas(f"Areas under and beside the curves: {name}", found.curves),
        members(found),
    ]
    path = figures.layer_role_heatmap(
        *group_matrix(found), folder / f"groups_{name}.png", "loss of faithfulness when dropped", "position role"
    )
    alt = f"Loss of faithfulness when the circuit's nodes of a layer and role are dropped: {name}"
    note = f"Layer -1 is what enters the model. The circuit has {len(circuit.members)} nodes."
    sections.append(Figure(f"Where the circuit is: {name}", (picture(path, alt),), note))
    if found.edges is not None:
        sections += edge_sections(found, found.edges, folder)
    return sections


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
        lines.append(make_curve(NAMES[method], [float(count) for count in points], list(points.values())))
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


def edge_sections(found: Discovery, edges: EdgesFound, folder: Path) -> list[Section]:
    """Circuits of edges in the frozen model."""
    path = draw(edges.curves, folder / f"edges_{found.question}.png", "edges kept (number)")
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
