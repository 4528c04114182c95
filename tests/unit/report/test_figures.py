"""Figures: what they choose to draw, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest

from vlmscope.attribution.influence import edge_strengths
from vlmscope.core.records import FeatureId
from vlmscope.core.results import Curve, Rate, Supernode, SweepJob
from vlmscope.report import figures
from vlmscope.report.circuit_figure import circuit_diagram, describe, drawable
from vlmscope.report.graph_figure import attribution_graph, key_entries


def test_equal_records_give_equal_bytes(curves: list[Curve], tmp_path: Path) -> None:
    for name in "ab":
        figures.dose_response(curves, tmp_path / name / "dose.png", "strength", "flip rate (%)", log_x=True)
        rates = {"steer": [Rate(0.9, 0.8, 1.0, 10, 0.1), None], "patch": [Rate(0.2, 0.1, 0.3, 10)] * 2}
        figures.rate_bars(["name", "colour"], rates, tmp_path / name / "bars.png", "T", "%", notes=["a", "b"])
        figures.layer_role_heatmap(np.eye(2), [0, 1], ["image", "last"], tmp_path / name / "heat.png", "fall (nats)")
        metrics = {"layers/fvu/layer_00": 0.1, "layers/fvu/layer_01": 0.1, "val/l0": 4.0, "val/fvu": 0.6}
        jobs = [SweepJob((f"transcoder.k={k}", f"seed={seed}"), metrics) for k in (1, 2) for seed in (0, 1)]
        figures.sweep_overview([*jobs, SweepJob(("transcoder.k=3",), None)], tmp_path / name / "sweep.png")
    written = sorted((tmp_path / "a").iterdir())
    assert len(written) == 4
    assert all(path.read_bytes() == (tmp_path / "b" / path.name).read_bytes() for path in written)


def test_nothing_to_draw_and_lengths_that_differ_are_refused(pruned, supernode: Supernode, tmp_path: Path) -> None:
    path, cycle = tmp_path / "x.png", [("a", "b", 1.0), ("b", "a", 1.0)]
    refused = [
        (lambda: figures.dose_response([], path, "x", "y"), "no curves"),
        (lambda: figures.rate_bars([], {}, path, "T", "y"), "nothing to draw"),
        (lambda: figures.layer_role_heatmap(np.zeros((5, 3)), range(4), ["a", "b", "c"], path, "v"), "4 layers"),
        (lambda: figures.fvu_by_layer({"layers/dead_frac/layer_00": 0.0}, path), "one FVU for each layer"),
        (lambda: figures.sweep_overview([], path), "no job"),
        (lambda: circuit_diagram([supernode], cycle, path, {}, {}), "cycle"),
        (lambda: attribution_graph(pruned, path, max_edges=0), "no edges"),
    ]
    for draw, words in refused:
        with pytest.raises(ValueError, match=words):
            draw()
    assert not list(tmp_path.iterdir())


def test_cycles_lose_their_weakest_edge(supernode: Supernode) -> None:
    edges = [("a", "b", 3.0), ("b", "c", -2.0), ("c", "a", 1.0), ("b", "a", -0.5), ("a", "a", 9.0), ("c", "d", 0.1)]
    assert drawable(edges, 0.2) == [("a", "b", 3.0), ("b", "c", -2.0)]
    assert drawable(edges) == [("a", "b", 3.0), ("b", "c", -2.0), ("c", "d", 0.1)]
    assert describe(supernode) == "5 features, layers 1 to 5"


def test_strongest_edges_are_kept_and_ranked(pruned) -> None:
    graph = pruned.graph
    chosen = edge_strengths(pruned)[0][:40]
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


def test_a_key_names_each_feature_once_and_shortens_long_labels() -> None:
    entries = key_entries([FeatureId(5, 7), FeatureId(5, 7), FeatureId(5, 8)], {FeatureId(5, 7): "x" * 200})
    assert entries == [f"L5/7  {'x' * 79}..."]
