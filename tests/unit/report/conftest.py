"""Made-up records for the report tests: every kind of section, with values that are easy to find again."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from vlmscope.core.graph import AttributionGraph, GraphScores, NodeKind, NodeTable, PrunedGraph
from vlmscope.core.intervention import (
    AnswerExample,
    CircuitFeature,
    Curve,
    FeatureExample,
    FlipRow,
    Rate,
    Supernode,
)
from vlmscope.core.records import FeatureId, PatchBox
from vlmscope.report import page as s
from vlmscope.report.marks import flip_table
from vlmscope.report.page import ReportPage

HOSTILE = "<start_of_image> & \"quotes\" <script>alert('x')</script>"
SIDE, GRID, LAYERS = 64, 4, 6
BOXES = tuple(PatchBox(x / GRID, y / GRID, (x + 1) / GRID, (y + 1) / GRID) for y in range(GRID) for x in range(GRID))
WORDS = [
    "<bos>",
    "<start_of_turn>",
    "user",
    "<start_of_image>",
    "<end_of_image>",
    "what",
    "planet",
    "is",
    "this",
    "?",
    "<end_of_turn>",
    "model",
]


def ball(red: int, green: int, blue: int, seed: int = 0) -> np.ndarray:
    """A shaded, speckled disc on black, uint8 [64, 64, 3]."""
    y, x = (np.mgrid[:SIDE, :SIDE] - SIDE / 2) / (SIDE * 0.38)
    inside = x**2 + y**2 < 1
    light = np.clip(0.3 + 0.7 * (np.sqrt(np.maximum(1 - x**2 - y**2, 0)) + 0.3 * x), 0, 1) * inside
    speckle = np.random.default_rng(seed).normal(0, 12, (SIDE, SIDE, 1)) * inside[..., None]
    return np.clip(light[..., None] * np.array([red, green, blue]) + speckle, 0, 255).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


MARS, EARTH = ball(205, 95, 50), ball(60, 110, 200)


def make_rows() -> list[FlipRow]:
    rng = np.random.default_rng(3)
    scales = {"all": 1.0, "no_last_layer": 0.92, "no_last_position": 0.8, "role_image": 0.55, "role_last": 0.3}
    rows = []
    for method, top in (("steer", 0.9), ("patch", 0.985)):
        for mode, strength in (("direct", 0.7), ("frozen_attention", 0.9), ("free", 1.0)):
            for question, ease in (("name", 1.0), ("colour", 0.97), ("cover", 0.9), ("worst", 0.9)):
                for scope, scale in scales.items():
                    value = float(top * strength * ease * scale)
                    rate = Rate(value, max(value - 0.05, 0), min(value + 0.04, 1), 200, float(rng.uniform(0, 0.06)))
                    rows.append(FlipRow(method, mode, question, scope, rate, 38 if scope == "all" else 31))
    return rows


def make_curves() -> list[Curve]:
    x = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    curves = []
    for name, speed in (("mars to earth", 3.0), ("earth to mars", 2.0), ("matched control", 0.05)):
        y = tuple(1 - float(np.exp(-speed * value)) for value in x)
        low, high = tuple(max(v - 0.05, 0) for v in y), tuple(min(v + 0.05, 1) for v in y)
        curves.append(Curve(name, x, y, low, high))
    return curves


def make_answers(count: int = 4) -> list[AnswerExample]:
    questions = ("what planet is this ?", "what colour is it ?", "what covers it ?", "describe <start_of_image> & say")
    return [
        AnswerExample(
            png(MARS),
            questions[at % 4],
            "patch: mars circuit replaced by earth's, 38 features",
            "mars",
            "earth" if at else "mars",
            (("mars", 0.9731), ("jupiter", 0.0123), ("mercury", 0.0081), ("earth", 0.0004)),
            (("earth", 0.8842), ("mars", 0.0611), ("neptune", 0.0301)),
        )
        for at in range(count)
    ]


def make_supernode(name: str = "mars", size: int = 5, picture: np.ndarray = MARS, examples: int = 6) -> Supernode:
    rng = np.random.default_rng(len(name))
    members = []
    for at in range(size):
        shown = []
        for number in range(examples):
            grid = np.maximum(rng.normal(0, 1, GRID * GRID), 0)
            tokens = ("the", "red", "planet", "<start_of_image>", "is", name) if number % 3 == 2 else ()
            fires = tuple(float(v) for v in np.maximum(rng.normal(0, 1, len(tokens)), 0))
            source = png(picture) if number % 3 != 2 else None
            boxes, values = (BOXES, tuple(float(v) for v in grid)) if source else ((), ())
            shown.append(FeatureExample(9.5 - number, f"{name} {number}", source, boxes, values, tokens, fires))
        raises = ((name, 2.31), ("red", 1.12), ("desert", 0.98))
        lowers = (("earth", -1.77), ("blue", -0.9))
        feature = FeatureId(1 + at % LAYERS, 100 * at + 7)
        members.append(CircuitFeature(feature, "image", 1.25 - 0.1 * at, 0.031, tuple(shown), raises, lowers))
    return Supernode(name, tuple(members))


def make_pruned(features_a_cell: int = 2, dense: float = 0.25, seed: int = 1) -> PrunedGraph:
    """A random graph with every kind of node, biases and left-out features included."""
    rng = np.random.default_rng(seed)
    tokens = WORDS[:4] + ["<image_soft_token>"] * GRID**2 + WORDS[4:]
    positions = len(tokens)
    table = [(NodeKind.TOKEN, -1, at, at) for at in range(positions)]
    for layer in range(LAYERS):
        table.append((NodeKind.BIAS, layer, -1, -1))
        for at in range(positions):
            for _ in range(int(rng.poisson(features_a_cell))):
                table.append((NodeKind.FEATURE, layer, at, int(rng.integers(2048))))
        table += [(NodeKind.ERROR, layer, at, -1) for at in range(positions)]
        table.append((NodeKind.LEFT_OUT, layer, -1, -1))
    table += [(NodeKind.LOGIT, LAYERS, positions - 1, token) for token in (5, 6, 7)]
    kind, layer, position, index = (np.array(column) for column in zip(*table, strict=True))
    sources, weights, counts = [], [], []
    for node in range(len(table)):
        below = (
            np.flatnonzero(layer < layer[node]) if kind[node] in (NodeKind.FEATURE, NodeKind.LOGIT) else np.array([])
        )
        chosen = below[rng.random(len(below)) < dense].astype(int)
        sources.append(chosen)
        weights.append(rng.standard_t(2, len(chosen)))
        counts.append(len(chosen))
    zeros = np.zeros(len(table))
    soft = np.array([token == "<image_soft_token>" for token in tokens])
    boxes = iter(BOXES)
    graph = AttributionGraph(
        nodes=NodeTable(kind, layer, position, index, zeros, zeros),
        indptr=np.concatenate([[0], np.cumsum(counts)]),
        indices=np.concatenate(sources).astype(np.int32),
        weights=np.concatenate(weights).astype(np.float32),
        residual=zeros,
        left_out_mass=np.zeros((len(table), 0)),
        logit_probabilities=np.array([0.93, 0.04, 0.01]),
        logit_tokens=["mars", "jupiter", "earth"],
        tokens=tokens,
        is_image=soft,
        image_index=np.where(soft, 0, -1),
        patch_boxes=[next(boxes) if flag else None for flag in soft],
        roles=np.where(soft, "image", "question"),
        prompt="what planet is this ?",
        meta={"n_layers": LAYERS},
    )
    influence = 0.02 * rng.pareto(1.2, len(table)) * np.where(kind == NodeKind.FEATURE, 1.0, 0.5)
    influence[kind == NodeKind.LOGIT] = 0
    scores = GraphScores(0.7312, 0.8645, 0.61, 0.21, 0.15, 0.03)
    keep_edge = rng.random(len(graph.weights)) < 0.4
    return PrunedGraph(graph, np.ones(len(table), bool), keep_edge, influence, influence, scores, 0.8, 0.98)


def make_page(word: str = "", width: int = SIDE) -> ReportPage:
    """A page with every kind of section; `word` stands at the end of every text, `width` is the figures' in pixels."""
    word = f" {word}" if word else ""
    answers = [
        replace(one, question=one.question + word, before=one.before + word, after=one.after + word)
        for one in make_answers()
    ]
    supernode = make_supernode()
    members = [replace(one, top_logits=((f"mars{word}", 2.31), *one.top_logits[1:])) for one in supernode.features]
    supernode = replace(supernode, features=tuple(members))
    flips = [row for row in make_rows() if row.mode == "free"]
    figure = s.Picture(
        png(np.full((300, width, 3), 200, np.uint8)), "the circuit, drawn", f"a caption{word}", wide=True
    )
    rate = Rate(0.9754, 0.9512, 0.9871, 240, 0.0312)
    cards = (
        s.Card(f"patching flips{word}", rate, f"worst of three{word}"),
        s.Card("KL", 0.00183),
        s.Card("features", 12345),
    )
    return ReportPage(
        f"Mars & Earth{word}",
        f"Does {HOSTILE} carry Mars?{word}",
        f"It does.{word}",
        (
            s.Cards("Headline", cards, f"In short:{word}"),
            s.Examples("Answers", tuple(answers)),
            s.Figure(f"The circuit{word}", (figure, replace(figure, wide=False))),
            s.Features("Mars", supernode, shown=2),
            s.Features("Mars", supernode, shown=3),
            flip_table("Flip rates", flips, f"Of all.{word}"),
            s.Table(
                "Specificity", ("prompts", f"changed{word}"), (("digits", s.Percent(0.0042)), (f"none{word}", None))
            ),
            s.Text(
                "Method", (HOSTILE + word,), (f"one seed{word}",), f"python run.py experiment=mars_earth_patch{word}"
            ),
            s.Details("Configuration", "config.yaml", "prompt: " + HOSTILE + word),
            s.mapping_table("Environment", {"numpy": f"2.1{word}"}),
        ),
        f"run 17{word}",
    )


@pytest.fixture
def page() -> ReportPage:
    return make_page()


@pytest.fixture
def rows() -> list[FlipRow]:
    return make_rows()


@pytest.fixture
def curves() -> list[Curve]:
    return make_curves()


@pytest.fixture
def answers() -> list[AnswerExample]:
    return make_answers()


@pytest.fixture
def supernode() -> Supernode:
    return make_supernode()


@pytest.fixture
def pruned() -> PrunedGraph:
    return make_pruned()
