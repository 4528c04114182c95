"""Figures: written where asked, of the expected size, not blank, and refusing what they cannot draw."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmscope.core.graph import NodeKind
from vlmscope.core.intervention import Curve, FlipRow, Rate, Supernode
from vlmscope.core.records import FeatureId
from vlmscope.core.runs import SweepJob
from vlmscope.report import figures, training_figures
from vlmscope.report.circuit_figure import circuit_diagram, describe, drawable
from vlmscope.report.graph_figure import attribution_graph, key_entries, strongest_edges
from vlmscope.report.style import COLOURS
from vlmscope.report.training_figures import sweep_overview

DPI = 150


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), float)


def check(path: Path, width: float, height: float | None = None) -> np.ndarray:
    """The picture has the size in inches that it should have and shows something."""
    shown = pixels(path)
    assert shown.shape[1] == pytest.approx(width * DPI, abs=1)
    if height is not None:
        assert shown.shape[0] == pytest.approx(height * DPI, abs=1)
    assert shown.std() > 10
    return shown


def share_of(shown: np.ndarray, colour: str) -> float:
    """Share of the pixels that have exactly this colour."""
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return float((np.abs(shown - rgb).max(axis=-1) <= 1).mean())


def test_flip_figures(rows: list[FlipRow], tmp_path: Path) -> None:
    assert figures.flip_rates(rows, tmp_path / "deep" / "flips.png") == tmp_path / "deep" / "flips.png"
    check(tmp_path / "deep" / "flips.png", 6.6, 4.3)


def test_taller_bars_for_higher_rates(tmp_path: Path) -> None:
    inked = []
    for value in (0.2, 0.8):
        row = FlipRow("steer", "free", "name", "all", Rate(value, value, value, 10), 3)
        inked.append(share_of(pixels(figures.flip_rates([row], tmp_path / f"{value}.png")), COLOURS[0]))
    # The legend's swatch is a constant part of both.
    assert 3 < inked[1] / inked[0] < 4.2


def test_flip_figures_refuse_nothing_and_contradictions(rows: list[FlipRow], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        figures.flip_rates([row for row in rows if row.mode != "free"], tmp_path / "a.png")
    twin = next(row for row in rows if (row.method, row.mode, row.scope) == ("patch", "free", "all"))
    with pytest.raises(ValueError, match="two rows for patch"):
        figures.flip_rates([*rows, twin], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_curves(curves: list[Curve], tmp_path: Path) -> None:
    check(figures.dose_response(curves, tmp_path / "dose.png", "strength (x)", "flip rate (% of cases)"), 6.6, 4.2)
    check(figures.feature_count_curve(curves, tmp_path / "count.png"), 6.6, 4.2)
    with pytest.raises(ValueError, match="no curves"):
        figures.dose_response([], tmp_path / "none.png", "x", "y")


def test_answer_shift(answers, tmp_path: Path) -> None:
    check(figures.answer_shift(answers, tmp_path / "four.png"), 10.8, 5.5)
    check(figures.answer_shift(answers[:1], tmp_path / "one.png"), 5.4, 3.0)


def test_layer_role_heatmap(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(5, 3))
    roles = ["image", "question", "last"]
    check(figures.layer_role_heatmap(matrix, range(5), roles, tmp_path / "h.png", "fall (nats)"), 2.6 + 3.45, 3.5)
    with pytest.raises(ValueError, match="4 layers"):
        figures.layer_role_heatmap(matrix, range(4), roles, tmp_path / "h.png", "fall (nats)")


def test_training_figures(tmp_path: Path) -> None:
    fvu = {"text": [0.02, 0.03, 0.05], "image": [0.04, 0.05, 0.09]}
    check(training_figures.fvu_by_layer(fvu, [0.0, 0.02, 0.05], tmp_path / "fvu.png", 0.05), 6.6, 5.0)
    with pytest.raises(ValueError, match="2 layers"):
        training_figures.fvu_by_layer(fvu, [0.0, 0.02], tmp_path / "fvu.png")
    accuracies = {"name": Rate(0.9, 0.88, 0.93, 300), "sum": 0.8}
    check(training_figures.accuracy_bars(accuracies, {"name": 0.2}, tmp_path / "acc.png"), 6.6, 4.0)
    steps = np.arange(1, 100)
    panels = {"loss (nats)": {"train": (steps, 3 * np.exp(-steps / 20))}, "FVU": {"mean": (steps, 1 / steps)}}
    check(training_figures.training_curves(panels, tmp_path / "train.png"), 10.4, 3.3)


def test_same_records_same_bytes(rows: list[FlipRow], tmp_path: Path) -> None:
    first, second = (figures.flip_rates(rows, tmp_path / f"{name}.png").read_bytes() for name in "ab")
    assert first == second


def test_circuit_diagram(supernode: Supernode, tmp_path: Path) -> None:
    edges = [("soft tokens", "mars", 2.0), ("mars", "answer: mars", 4.0), ("soft tokens", "answer: mars", -0.5)]
    picture = np.full((64, 64, 3), (10, 200, 30), np.uint8)
    path = circuit_diagram([supernode], edges, tmp_path / "c.png", {"soft tokens": picture})
    shown = check(path, 0.95 * (2 * 3.6 + 2.1 + 0.3))
    assert share_of(shown, "#0ac81e") > 0.005
    assert describe(supernode) == "5 features, layers 1 to 5"
    with pytest.raises(ValueError, match="cycle"):
        circuit_diagram([supernode], [("a", "b", 1.0), ("b", "a", 1.0)], tmp_path / "cycle.png")


def test_supernodes_hold_several_pictures_and_a_line_of_words(supernode: Supernode, tmp_path: Path) -> None:
    colours = [(10, 200, 30), (200, 30, 10), (30, 10, 200), (9, 9, 200)]
    pictures = [np.full((64, 64, 3), colour, np.uint8) for colour in colours]
    edges = [("mars", "answer: mars", 4.0)]
    one = check(circuit_diagram([supernode], edges, tmp_path / "one.png", {"mars": pictures[:1]}), 0.95 * (3.6 + 2.4))
    more = circuit_diagram([supernode], edges, tmp_path / "c.png", {"mars": pictures}, words={"mars": "writes mars"})
    shown = check(more, 0.95 * (3.6 + 2.1 + 0.3))
    for code in ("#0ac81e", "#c81e0a", "#1e0ac8"):
        assert share_of(shown, code) > 0.01
    assert share_of(shown, "#0909c8") == 0  # three pictures at most
    assert share_of(one, "#0ac81e") > share_of(shown, "#0ac81e")  # one alone is larger


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


def test_attribution_graph(pruned, tmp_path: Path) -> None:
    picture = np.full((64, 64, 3), (10, 200, 30), np.uint8)
    shown = check(attribution_graph(pruned, tmp_path / "g.png", [picture]), 14.0, 2.1 + 0.72 * 8)
    plain = pixels(attribution_graph(pruned, tmp_path / "boxes.png"))
    assert share_of(shown, "#0ac81e") > 0.005 > share_of(plain, "#0ac81e")
    grouped = {pruned.graph.nodes.feature_id(int(node)): "mars" for node in pruned.graph.nodes.of(1)}
    marked = pixels(attribution_graph(pruned, tmp_path / "groups.png", groups=grouped))
    assert share_of(marked, COLOURS[1]) > share_of(plain, COLOURS[1]) + 0.001


def test_a_graph_with_labels_has_a_key_below(pruned, tmp_path: Path) -> None:
    graph = pruned.graph
    features = np.flatnonzero((graph.nodes.kind == NodeKind.FEATURE) & pruned.node_mask)
    labels = {graph.nodes.feature_id(int(node)): "planet = mars (0.97)" for node in features}
    plain = attribution_graph(pruned, tmp_path / "plain.png")
    assert attribution_graph(pruned, tmp_path / "none.png", labels={}).read_bytes() == plain.read_bytes()
    before, after = pixels(plain), pixels(attribution_graph(pruned, tmp_path / "key.png", labels=labels))
    assert after.shape[0] > before.shape[0] and after.shape[1] == before.shape[1]
    assert key_entries([FeatureId(5, 7), FeatureId(5, 7), FeatureId(5, 8)], {FeatureId(5, 7): "x" * 200}) == [
        f"L5/7  {'x' * 79}..."
    ]


def test_twelve_settings_of_a_sweep_look_different_and_are_named_briefly() -> None:
    from vlmscope.report.style import COLOURS, pick
    from vlmscope.report.training_figures import _marker, _short

    assert len({(pick(COLOURS, number), _marker(number)) for number in range(12)}) == 12
    assert _short("transcoder.activation=topk, transcoder.k=8") == "activation=topk, k=8"
    assert _short("modality=image") == "modality=image"
    assert _short("task.batch={a:1, b:2}") == "batch={a:1, b:2}"


def test_markers_of_a_sweep_are_whole(tmp_path: Path) -> None:
    """Each of three settings with the same L0 and nearly the same FVU shows its marker uncut."""
    jobs = []
    for number, fvu in enumerate((0.69, 0.65, 0.61)):
        metrics = {"layers/fvu/layer_00": 0.1, "layers/fvu/layer_01": 0.1, "val/l0": 4.0, "val/fvu": fvu}
        jobs.append(SweepJob((f"k={number}",), metrics))
    shown = pixels(sweep_overview(jobs, tmp_path / "sweep.png"))
    assert shown.shape[:2] == (1080, 1650)
    panel = shown[500:1040, 550:1100]  # FVU against L0, without the legend
    areas = [share_of(panel, colour) for colour in COLOURS[:3]]
    assert min(areas) > 0
    circle, square, triangle = (area / areas[1] for area in areas)
    assert circle == pytest.approx(np.pi / 4, abs=0.1)
    assert triangle == pytest.approx(0.5, abs=0.15)
    assert square == 1
