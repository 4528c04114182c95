"""Figures: what they choose to draw, that marks are to scale, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmscope.attribution.trace_files import strongest_edges
from vlmscope.core.graph import NodeKind
from vlmscope.core.intervention import Curve, Rate, Supernode
from vlmscope.core.records import FeatureId
from vlmscope.core.runs import SweepJob
from vlmscope.report import figures
from vlmscope.report.circuit_figure import circuit_diagram, describe, drawable
from vlmscope.report.graph_figure import attribution_graph, key_entries
from vlmscope.report.style import COLOURS, line_style


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), float)


def share_of(shown: np.ndarray, colour: str) -> float:
    """Share of the pixels that have exactly this colour."""
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return float((np.abs(shown - rgb).max(axis=-1) <= 1).mean())


def test_taller_bars_for_higher_rates(tmp_path: Path) -> None:
    inked = []
    for value in (0.2, 0.8):
        rates = {"steer": [Rate(value, value, value, 10)]}
        path = figures.rate_bars(["name"], rates, tmp_path / "deep" / f"{value}.png", "T", "flip rate (%)")
        inked.append(share_of(pixels(path), COLOURS[0]))
    # The legend's swatch is a constant part of both.
    assert 3 < inked[1] / inked[0] < 4.2


def test_same_records_same_bytes(curves: list[Curve], tmp_path: Path) -> None:
    paths = [figures.dose_response(curves, tmp_path / f"{name}.png", "strength", "flip rate (%)") for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_nothing_to_draw_and_lengths_that_differ_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    refused = [
        (lambda: figures.dose_response([], path, "x", "y"), "no curves"),
        (lambda: figures.rate_bars([], {}, path, "T", "y"), "nothing to draw"),
        (lambda: figures.layer_role_heatmap(np.zeros((5, 3)), range(4), ["a", "b", "c"], path, "v"), "4 layers"),
        (lambda: figures.fvu_by_layer({"text": [0.1] * 3}, [0.0, 0.02], path), "2 layers"),
        (lambda: figures.sweep_overview([], path), "no job"),
    ]
    for draw, words in refused:
        with pytest.raises(ValueError, match=words):
            draw()
    assert not list(tmp_path.iterdir())


def test_circuit_diagram(supernode: Supernode, tmp_path: Path) -> None:
    edges = [("soft tokens", "mars", 2.0), ("mars", "answer: mars", 4.0), ("soft tokens", "answer: mars", -0.5)]
    colours = ["#0ac81e", "#c81e0a", "#1e0ac8", "#0909c8"]
    given = [np.full((64, 64, 3), tuple(bytes.fromhex(colour[1:])), np.uint8) for colour in colours]
    one = pixels(circuit_diagram([supernode], edges, tmp_path / "one.png", {"mars": given[0]}))
    several = circuit_diagram([supernode], edges, tmp_path / "c.png", {"mars": given}, words={"mars": "writes mars"})
    shares = [share_of(pixels(several), colour) for colour in colours]
    assert min(shares[:3]) > 0.005 and shares[3] == 0  # three pictures at most
    assert share_of(one, colours[0]) > shares[0]  # one alone is larger
    assert describe(supernode) == "5 features, layers 1 to 5"
    with pytest.raises(ValueError, match="cycle"):
        circuit_diagram([supernode], [("a", "b", 1.0), ("b", "a", 1.0)], tmp_path / "cycle.png")


def test_cycles_lose_their_weakest_edge() -> None:
    edges = [("a", "b", 3.0), ("b", "c", -2.0), ("c", "a", 1.0), ("b", "a", -0.5), ("a", "a", 9.0), ("c", "d", 0.1)]
    drawn, left_out = drawable(edges, 0.2)
    assert drawn == [("a", "b", 3.0), ("b", "c", -2.0)]
    assert left_out == 2  # the two that close a cycle; what is too weak, or goes to itself, is not counted
    assert drawable(edges)[0] == [*drawn, ("c", "d", 0.1)]


def test_strongest_edges_are_kept_and_ranked(pruned) -> None:
    graph = pruned.graph
    chosen = strongest_edges(pruned, 40)
    assert len(chosen) == 40
    assert pruned.edge_mask[chosen].all()
    importance = pruned.influence.copy()
    importance[-3:] += graph.logit_probabilities
    strength = []
    for edge in np.flatnonzero(pruned.edge_mask):
        target = int(np.searchsorted(graph.indptr, edge, side="right")) - 1
        _, weights = graph.incoming(target)
        strength.append(abs(graph.weights[edge]) / np.abs(weights).sum() * importance[target])
    best = np.flatnonzero(pruned.edge_mask)[np.argsort(strength)[::-1][:40]]
    assert set(chosen) == set(best)


def test_a_graph_shows_patches_and_groups_and_a_key_of_labels(pruned, tmp_path: Path) -> None:
    picture = np.full((64, 64, 3), (10, 200, 30), np.uint8)
    features = [pruned.graph.nodes.feature_id(int(node)) for node in pruned.graph.nodes.of(NodeKind.FEATURE)]
    plain = pixels(attribution_graph(pruned, tmp_path / "plain.png"))
    patches = pixels(attribution_graph(pruned, tmp_path / "patches.png", [picture]))
    assert share_of(patches, "#0ac81e") > 0.005 > share_of(plain, "#0ac81e")
    marked = pixels(attribution_graph(pruned, tmp_path / "groups.png", groups=dict.fromkeys(features, "mars")))
    assert share_of(marked, COLOURS[1]) > share_of(plain, COLOURS[1]) + 0.001
    labels = dict.fromkeys(features, "planet = mars (0.97)")
    key = pixels(attribution_graph(pruned, tmp_path / "key.png", labels=labels))
    assert key.shape[0] > plain.shape[0] and key.shape[1] == plain.shape[1] == 2100
    entries = key_entries([FeatureId(5, 7), FeatureId(5, 7), FeatureId(5, 8)], {FeatureId(5, 7): "x" * 200})
    assert entries == [f"L5/7  {'x' * 79}..."]


def test_twelve_lines_look_different() -> None:
    assert len({(line_style(number)["color"], line_style(number)["marker"]) for number in range(12)}) == 12


def test_markers_of_a_sweep_are_whole(tmp_path: Path) -> None:
    """Each of three settings with the same L0 and nearly the same FVU shows its marker uncut."""
    jobs = []
    for number, fvu in enumerate((0.69, 0.65, 0.61)):
        metrics = {"layers/fvu/layer_00": 0.1, "layers/fvu/layer_01": 0.1, "val/l0": 4.0, "val/fvu": fvu}
        jobs.append(SweepJob((f"k={number}",), metrics))
    shown = pixels(figures.sweep_overview(jobs, tmp_path / "sweep.png"))
    assert shown.shape[:2] == (1080, 1650)
    panel = shown[500:1040, 550:1100]  # FVU against L0, without the legend
    areas = [share_of(panel, colour) for colour in COLOURS[:3]]
    assert min(areas) > 0
    circle, square, triangle = (area / areas[1] for area in areas)
    assert circle == pytest.approx(np.pi / 4, abs=0.1)
    assert triangle == pytest.approx(0.5, abs=0.15)
    assert square == 1
