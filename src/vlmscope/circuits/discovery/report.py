"""What discovery leaves in a run folder: discovery.json, circuits, tables, figures, metrics and sections of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.circuits.config import MarkConfig
from vlmscope.circuits.discovery.discover import Discovery
from vlmscope.core.artifacts import write_json
from vlmscope.core.intervention import Curve, Rate
from vlmscope.metrics.prediction import FaithfulnessCurve
from vlmscope.report.figures import dose_response, layer_role_heatmap
from vlmscope.report.marks import Folder, sections_of, write_rows
from vlmscope.report.page import Card, Cards, Percent, Section, Table, Text
from vlmscope.report.style import label

NAMES = {
    "graph": "attribution graphs",
    "eap_ig": "EAP-IG",
    "greedy": "elimination",
    "activation": "activation change",
    "random": "random features",
}
SHOWN = 20  # members and edges in tables


def write_discoveries(found: Sequence[Discovery], folder: Path, figures: bool = True) -> dict[str, float]:
    """Write discovery.json, areas.parquet, members.parquet and figures/ into a run folder; metrics of all questions."""
    write_json(folder / "discovery.json", {discovery.question: as_json(discovery) for discovery in found})
    for name, rows in (("areas", area_rows), ("members", member_rows)):
        write_rows(folder / f"{name}.parquet", [row for discovery in found for row in rows(discovery)])
    for discovery in found if figures else ():
        draw_figures(discovery, folder / "figures")
    return {key: value for discovery in found for key, value in metrics_of(discovery).items()}


def metrics_of(found: Discovery) -> dict[str, float]:
    """`discovery/<question>/...`: sizes, `<mode>/<method>/cpr` and `cmd`, faithfulness and its control, stability."""
    circuit, stability, edges = found.circuit, found.stability, found.edges
    rates = {"train_faithfulness": circuit.train}
    for mode, rate in circuit.test.items():
        rates |= {f"{mode}/faithfulness": rate, f"{mode}/without_circuit": circuit.ablated[mode]}
    metrics = {
        "candidates": float(len(found.nodes)),
        "members": float(len(circuit.members)),
        "features": float(found.n_features),
        "members_before_pruning": float(circuit.cut),
        **{f"stability/{method}": value for method, value in stability.jaccard.items()},
        "stability/other_pairs": stability.other_pairs,
        "stability/chance": stability.chance,
        "rank_correlation_nodes": found.correlation,
    }
    if edges is not None:
        rates["edges/faithfulness"] = edges.smallest_test
        metrics |= {"edges/candidates": float(len(edges.source)), "edges/members": float(edges.smallest)}
        metrics |= {"edges/rank_correlation": edges.correlation, "edges/rest": edges.rest}
    for mode, curves in _all_curves(found).items():
        for method, curve in curves.items():
            rates |= {f"{mode}/{method}/cpr": curve.cpr, f"{mode}/{method}/cmd": curve.cmd}
    for name, rate in rates.items():
        metrics |= rate.metrics(name)
    return {f"discovery/{found.question}/{name}": value for name, value in metrics.items()}


def _all_curves(found: Discovery) -> Mapping[str, Mapping[str, FaithfulnessCurve]]:
    """Curves by mode and ranking, with those of circuits of edges as the mode "edges"."""
    return found.curves if found.edges is None else {**found.curves, "edges": found.edges.curves}


def as_json(found: Discovery) -> dict[str, Any]:
    """A discovery as plain data: curves, members with scores and losses, the edges of the smallest circuit of edges."""
    nodes, circuit, edges = found.nodes, found.circuit, found.edges
    curves = {
        mode: {method: [vars(rate) for rate in curve.rates] for method, curve in of_mode.items()}
        for mode, of_mode in _all_curves(found).items()
    }
    of_edges = curves.pop("edges", None)
    body: dict[str, Any] = {
        "pairs": {"train": found.train_pairs, "test": found.test_pairs},
        "by": circuit.by,
        "curves": curves,
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
    if edges is not None:
        body["edges"] = {"curves": of_edges, "members": edge_rows(found, edges.smallest)}
    return body


def edge_rows(found: Discovery, count: int) -> list[dict[str, Any]]:
    """The `count` edges of largest score."""
    edges = found.edges
    assert edges is not None, "edges were left out"
    return [
        {
            "source": found.nodes.name(int(edges.source[i])),
            "target": found.nodes.name(int(edges.target[i])),
            "score": float(edges.score[i]),
            "influence": float(edges.influence[i]),
        }
        for i in np.argsort(-np.abs(edges.score), kind="stable")[:count].tolist()
    ]


def area_rows(found: Discovery) -> list[dict[str, Any]]:
    """CPR (area under the curve) and CMD (area between the curve and 1, 0 is best) by mode and ranking."""

    def interval(rate: Rate) -> str:
        return f"{rate.value:.3f} ({rate.ci_low:.3f} to {rate.ci_high:.3f})"

    return [
        {"question": found.question, "mode": label(mode), "ranked by": NAMES[method]}
        | {"CPR": interval(curve.cpr), "CMD": interval(curve.cmd)}
        for mode, curves in _all_curves(found).items()
        for method, curve in curves.items()
    ]


def member_rows(found: Discovery) -> list[dict[str, Any]]:
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


def draw_figures(found: Discovery, folder: Path) -> dict[str, Path]:
    """Faithfulness over size by mode, "groups" (where the circuit is) and, if they were searched, "edges"."""
    drawn: dict[str, Path] = {}
    for mode, curves in _all_curves(found).items():
        stem, what = ("edges", "edges") if mode == "edges" else ("faithfulness", "nodes")
        name = f"{stem}_{found.question}" + ("" if mode == "edges" else f"_{mode}")
        lines = []
        for method, curve in curves.items():
            points = dict(zip(curve.counts, curve.rates, strict=True))  # small sets have equal sizes at several shares
            lines.append(Curve.of(NAMES[method], list(points), list(points.values())))
        drawn[mode] = dose_response(
            lines, folder / f"{name}.png", f"{what} kept (number)", "faithfulness (%)", log_x=True
        )
    groups = found.circuit.groups
    layers = sorted({layer for layer, _ in groups})
    roles = [role for role in found.nodes.roles if any(role == there for _, there in groups)]
    matrix = np.full((len(layers), len(roles)), np.nan)
    for (layer, role), loss in groups.items():
        matrix[layers.index(layer), roles.index(role)] = round(loss, 4) + 0.0
    path = folder / f"groups_{found.question}.png"
    drawn["groups"] = layer_role_heatmap(matrix, layers, roles, path, "loss of faithfulness when dropped")
    return drawn


def summary(found: Discovery) -> str:
    """The result in a sentence."""
    circuit, features = found.circuit, found.n_features
    mode, rate = next(iter(circuit.test.items()))
    without = circuit.ablated[mode]
    return (
        f"{found.question}: {features} features (of {int(found.nodes.is_feature.sum()):,} that change) and "
        f"{len(circuit.members) - features} other nodes keep {rate.value:.0%} of the logit difference on test pairs "
        f"(matched features: {_control(rate)}); without these features {without.value:.0%} is left "
        f"(without matched ones: {_control(without)})."
    )


def _control(rate: Rate) -> str:
    return "too few to draw" if rate.control is None else f"{rate.control:.0%}"


def headline(found: Discovery) -> Cards:
    """Numbers on top of a page."""
    circuit, stability = found.circuit, found.stability
    size = f"of {len(found.nodes):,}; cut from: {NAMES[circuit.by]}"
    cards = [Card("nodes of the circuit", len(circuit.members), size)]
    for mode, rate in circuit.test.items():
        detail = f"95 % interval {rate.ci_low:.0%} to {rate.ci_high:.0%}; matched features {_control(rate)}"
        cards.append(Card(f"faithfulness, {label(mode)}", Percent(rate.value), detail))
    mode, rate = next(iter(circuit.ablated.items()))
    again, chance = Percent(stability.jaccard["eap_ig"]), f"Jaccard; by chance {stability.chance:.1%}"
    other = Percent(stability.other_pairs)
    cards += [
        Card("left without its features", Percent(rate.value), f"{label(mode)}; without matched ones {_control(rate)}"),
        Card("same features on resampled pairs", again, chance),
        Card("same features on other pairs", other, "Jaccard, training against test pairs"),
        Card("graphs and EAP-IG agree", found.correlation, "rank correlation over nodes with a score"),
    ]
    return Cards(f"The smallest circuit: {found.question}", tuple(cards))


def detail_sections(found: Discovery, folder: Path) -> list[Section]:
    """Curves, areas, members, groups and edges of a run folder, and how to read them."""
    marks = {
        "curves": MarkConfig(
            "picture",
            "Faithfulness over circuit size",
            file="faithfulness_*",
            says=f"On {found.test_pairs} test pairs; ranked on {found.train_pairs} others. Bands are 95 % intervals.",
        ),
        "areas": MarkConfig(
            "table",
            "Areas under and beside the curves",
            file="areas.parquet",
            says="CPR: area under the curve, at most 0.999 without overshoot. CMD: area between it and 1, 0 is best.",
        ),
        "members": MarkConfig(
            "table",
            "First members",
            file="members.parquet",
            says="All are in discovery.json. EAP-IG is in logits; chosen on resampled pairs: share of bootstrap "
            "resamples in which EAP-IG takes the feature. Losses are those of members of least estimated worth.",
        ),
        "groups": MarkConfig(
            "picture", "Where the circuit is", file="groups_*", says="Layer -1 is what enters the model."
        ),
    }
    sections = sections_of(Folder(folder), marks)
    if (edges := found.edges) is not None:
        rate = edges.smallest_test
        intro = (
            f"In the frozen local replacement model, exactly. {edges.smallest:,} of {len(edges.source):,} edges keep "
            f"{rate.value:.0%} ({rate.ci_low:.0%} to {rate.ci_high:.0%}) on test pairs. Rank correlation of EAP-IG and "
            f"graphs: {edges.correlation:.2f}. The rest (changes of patterns, norms and supports) is {edges.rest:.0%} "
            "of the difference."
        )
        mark = MarkConfig("picture", "Circuits of edges", file="edges_*", says=intro)
        rows = tuple(tuple(row.values()) for row in edge_rows(found, SHOWN))
        columns = ("from", "to", "EAP-IG (logits)", "influence in graphs")
        sections += [*sections_of(Folder(folder), {"edges": mark}), Table("Strongest edges", columns, rows)]
    reading = (
        "A run of a circuit is the original's run in which every embedding, feature and error outside the circuit "
        "has the value of the counterfactual's run. Features inside are as this run makes them. Faithfulness is 0 "
        "for the counterfactual's run, 1 for the original's, a ratio of means over pairs.",
        "The random ranking shuffles features and leaves embeddings and errors in their places, so it starts with "
        "what the picture's embeddings carry without any feature.",
        "Rankings are by absolute score: a circuit also has what works against the answer, until members are "
        "pruned. Members are features at a position role; another counterfactual has another circuit.",
    )
    return [*sections, Text("How to read this", reading)]
