"""Made-up records for the report tests: every kind of section, with values that are easy to find again."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tests.random_graphs import random_graph

from vlmscope.attribution.influence import prune
from vlmscope.core.graph import PrunedGraph
from vlmscope.core.records import FeatureId, PatchBox
from vlmscope.core.results import AnswerExample, CircuitFeature, Curve, FeatureExample, FlipRow, Rate, Supernode
from vlmscope.report import page as s
from vlmscope.report.marks import flip_table
from vlmscope.report.page import ReportPage

HOSTILE = "<start_of_image> & \"quotes\" <script>alert('x')</script>"
SIDE, GRID = 64, 4
BOXES = tuple(PatchBox(x / GRID, y / GRID, (x + 1) / GRID, (y + 1) / GRID) for y in range(GRID) for x in range(GRID))


def ball(red: int, green: int, blue: int) -> np.ndarray:
    """A shaded, speckled disc on black, uint8 [64, 64, 3]."""
    y, x = (np.mgrid[:SIDE, :SIDE] - SIDE / 2) / (SIDE * 0.38)
    inside = x**2 + y**2 < 1
    light = np.clip(0.3 + 0.7 * (np.sqrt(np.maximum(1 - x**2 - y**2, 0)) + 0.3 * x), 0, 1) * inside
    speckle = np.random.default_rng(0).normal(0, 12, (SIDE, SIDE, 1)) * inside[..., None]
    return np.clip(light[..., None] * np.array([red, green, blue]) + speckle, 0, 255).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


MARS = ball(205, 95, 50)


def make_rows() -> list[FlipRow]:
    scales = {"all": 1.0, "no_last_layer": 0.92, "role_image": 0.55}
    ease = {"name": 1.0, "cover": 0.9, "worst": 0.87}
    rows = []
    for method, top in (("steer", 0.9), ("patch", 0.985)):
        for number, (question, scope) in enumerate((q, scope) for q in ease for scope in scales):
            value = top * ease[question] * scales[scope]
            rate = Rate(value, max(value - 0.05, 0), min(value + 0.04, 1), 200, (number + top) / 100)
            rows.append(FlipRow(method, "free", question, scope, rate, 38 if scope == "all" else 31))
    return rows


def make_answers(word: str = "") -> tuple[AnswerExample, ...]:
    before = (("mars", 0.9731), ("jupiter", 0.0123), ("mercury", 0.0081), ("earth", 0.0004))
    after = (("earth", 0.8842), ("mars", 0.0611), ("neptune", 0.0301))
    said = "patch: mars circuit replaced by earth's, 38 features"
    questions = ("what planet is this ?", "what colour is it ?", "describe <start_of_image> & say")
    answers = ("mars", "earth", "earth")
    return tuple(
        AnswerExample(png(MARS), question + word, said, f"mars{word}", answer + word, before, after)
        for question, answer in zip(questions, answers, strict=True)
    )


def make_supernode(word: str = "", size: int = 5) -> Supernode:
    """The examples of a feature are pictures, but each third one is words."""
    rng = np.random.default_rng(4)
    members = []
    for at in range(size):
        shown = []
        for number in range(6):
            grid, fires = (tuple(np.maximum(rng.normal(0, 1, n), 0).tolist()) for n in (GRID * GRID, 6))
            said, where = ("the", "red", "planet", "<start_of_image>", "is", "mars"), (png(MARS), BOXES, grid)
            content = (None, (), (), said, fires) if number % 3 == 2 else where
            shown.append(FeatureExample(9.5 - number, f"mars {number}", *content))
        raises = ((f"mars{word}", 2.31), ("red", 1.12), ("desert", 0.98))
        lowers = (("earth", -1.77), ("blue", -0.9))
        feature = FeatureId(1 + at % 6, 100 * at + 7)
        members.append(CircuitFeature(feature, "image", 1.25 - 0.1 * at, 0.031, tuple(shown), raises, lowers))
    return Supernode("mars", tuple(members))


def make_pruned() -> PrunedGraph:
    """A random graph with every kind of node, whose soft tokens are in the middle."""
    tokens = ["<bos>", "user", *["<soft>"] * GRID**2, "what", "planet", "?"]
    graph = random_graph(4, len(tokens), 60, density=0.3, left_out=True, seed=1)
    soft = np.array([token == "<soft>" for token in tokens])
    boxes = [None, None, *BOXES, None, None, None]
    return prune(replace(graph, tokens=tokens, is_image=soft, image_index=np.where(soft, 0, -1), patch_boxes=boxes))


def make_page(word: str = "", width: int = SIDE) -> ReportPage:
    """A page with every kind of section; `word` stands at the end of every text, `width` is the figures' in pixels."""
    word = f" {word}" if word else ""
    supernode = make_supernode(word)
    pixels = png(np.full((300, width, 3), 200, np.uint8))
    figure = s.Picture(pixels, "the circuit, drawn", f"a caption{word}", wide=True)
    cards = (
        s.Card(f"patching flips{word}", Rate(0.9754, 0.9512, 0.9871, 240, 0.0312), f"worst of three{word}"),
        s.Card("KL", 0.00183),
        s.Card("features", 12345),
    )
    shares = (("digits", s.Percent(0.0042)), (f"none{word}", None))
    command = f"python run.py experiment=mars_earth_patch{word}"
    sections = (
        s.Cards("Headline", cards, f"In short:{word}"),
        s.Examples("Answers", make_answers(word)),
        s.Figure(f"The circuit{word}", (figure, replace(figure, wide=False))),
        s.Features("Mars", supernode, shown=2),
        s.Features("Mars", supernode, shown=3),
        flip_table("Flip rates", make_rows(), f"Of all.{word}"),
        s.Table("Specificity", ("prompts", f"changed{word}"), shares),
        s.Text("Method", (HOSTILE + word, f"one seed{word}"), command),
        s.Details("Configuration", "config.yaml", "prompt: " + HOSTILE + word),
        s.mapping_table("Environment", {"numpy": f"2.1{word}"}),
    )
    question = f"Does {HOSTILE} carry Mars?{word}"
    return ReportPage(f"Mars & Earth{word}", question, f"It does.{word}", sections, f"run 17{word}")


@pytest.fixture
def page() -> ReportPage:
    return make_page()


@pytest.fixture
def curves() -> list[Curve]:
    x = (0.0, 0.5, 1.0, 2.0)
    return [Curve(name, x, (0.0, at, 2 * at, 0.9), (0.0,) * 4, (1.0,) * 4) for name, at in (("mars", 0.4), ("x", 0.1))]


@pytest.fixture
def supernode() -> Supernode:
    return make_supernode()


@pytest.fixture(scope="session")
def pruned() -> PrunedGraph:
    return make_pruned()
