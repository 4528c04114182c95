"""Figures and report.html of what is read at which layer and which layers an answer needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.core.intervention import Curve, Rate
from vlmscope.data.orrery.scenes import APPEARANCE
from vlmscope.report import figures
from vlmscope.report.page import Card, Cards, Figure, Percent, ReportPage, Section, Table, Text
from vlmscope.tasks.steps.interchange import roles_of
from vlmscope.tasks.steps.intervene import make_curve
from vlmscope.tasks.steps.layer_ranges import Alike, ByWay
from vlmscope.tasks.steps.layer_reading import KINDS, PICTURE, LayerReading
from vlmscope.tasks.steps.report_parts import configuration, figure, picture, rerun

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

PLACE = {PICTURE: "soft tokens (mean)"}


def run(bench: Bench) -> None:
    """Write figures/ and report.html."""
    folder = bench.run_dir / "figures"
    ranges = bench.record("layer_ranges")
    sections: list[Section] = [depth_cards(ranges["depths"])]
    if "layer_reading" in bench.records:
        sections += reading_sections(bench, bench.record("layer_reading"), folder)
    sections += range_sections(bench, ranges, folder)
    sections += way_sections(bench, ranges, folder)
    sections += [reading(), rerun(bench), configuration(bench)]
    page = ReportPage(
        title="From appearance to planet to facts",
        question="At which layer is each level read off the features, which layers does each answer follow, and is one "
        "fact read out by way of another?",
        summary=summary(ranges),
        sections=tuple(sections),
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


def layers_text(rate: Rate, signed: bool = False) -> str:
    """A number of layers with its interval."""
    sign = "+" if signed else ""
    return f"{rate.value:{sign}.2f} ({rate.ci_low:{sign}.2f} to {rate.ci_high:{sign}.2f})"


def summary(ranges: dict) -> str:
    """The result in one paragraph."""
    depths = "; ".join(f"{name} {layers_text(rate)}" for name, rate in ranges["depths"].items())
    gaps = "; ".join(f"{a} less {b} {layers_text(rate, True)}" for (a, b), rate in ranges["gaps"].items())
    ways: list[ByWay] = [way for way in ranges["ways"] if way.features_of != way.question]
    moved = "; ".join(
        f"the {way.features_of}'s features carry the {way.question} on {way.carried.value:.0%} (matched "
        f"{way.carried.control or 0:.0%}) and, silenced, change it on {way.silenced.value:.0%} (matched "
        f"{way.silenced.control or 0:.0%})"
        for way in ways
    )
    ways_text = f"{moved[:1].upper()}{moved[1:]}"
    return f"Mean layer at which an answer is carried: {depths}. On the same scenes: {gaps}. {ways_text}."


def depth_cards(depths: dict[str, Rate]) -> Cards:
    """Numbers on top."""
    cards = tuple(
        Card(f"mean layer: {name}", round(rate.value, 2), f"95 % interval {rate.ci_low:.2f} to {rate.ci_high:.2f}; "
             f"{rate.cases} pairs") for name, rate in depths.items()
    )  # fmt: skip
    return Cards("How deep each answer is carried", cards)


def reading_sections(bench: Bench, found: dict[str, LayerReading], folder: Path) -> list[Section]:
    """What can be read where, and features by kind."""
    layers = bench.transcoders.layers
    x = [float(layer) for layer in layers]
    curves = [make_curve(PLACE.get(place, place.replace("_", ": ")), x, one.planet) for place, one in found.items()]
    nulls = np.mean([[rate.control or 0.0 for rate in one.planet] for one in found.values()], axis=0)
    flat = tuple(nulls.tolist())
    curves.append(Curve("planets shuffled (mean)", tuple(x), flat, flat, flat))
    planet = figures.dose_response(curves, folder / "planet_by_layer.png", "layer", "planet read rightly (%)")
    drawn = [picture(planet, "Planet read off the features by layer and place, on new pictures")]
    for place, one in found.items():
        path = figures.layer_role_heatmap(
            np.round(np.maximum(one.looks, 0.0), 2), layers, APPEARANCE, folder / f"looks_{place}.png",
            "R² on new pictures, within planets", "what the disc looks like",
        )  # fmt: skip
        drawn.append(picture(path, f"Appearance within planets read off the features at {place.replace('_', ' ')}"))
    kinds = [
        picture(
            figures.layer_role_heatmap(one.kinds, layers, KINDS, folder / f"kinds_{place}.png", "features", "kind"),
            f"Features by kind at {place.replace('_', ' ')}",
        )
        for place, one in found.items()
    ]
    chance = "; ".join(f"{place.replace('_', ' ')} {one.chance}" for place, one in found.items())
    null = max(float(one.looks_null.max()) for one in found.values())
    said = (
        "Ridge regression on all features of a layer, tested on new pictures. Appearance is what differs between "
        f"pictures of one planet; with pictures shuffled, R² is at most {null:.2f}. R² below 0 is drawn as 0."
    )
    more = (
        "Each feature is of the simplest kind that predicts it on new pictures nearly as well as the best. With "
        f"pictures shuffled in training, features of any kind: {chance}."
    )
    return [Figure("What can be read, by layer", tuple(drawn), said), Figure("Kinds of features", tuple(kinds), more)]


def range_sections(bench: Bench, ranges: dict, folder: Path) -> list[Section]:
    """Which layers each answer follows."""
    layers = bench.transcoders.layers
    x = [float(layer) for layer in layers]
    drawn = []
    words = {"first": "features carried in layers 0 to", "last": "features carried from this layer to the last"}
    for kind, xlabel in words.items():
        curves = [make_curve(name, x, [one.follows for one in of[kind].outcomes])
                  for name, of in ranges["curves"].items()]  # fmt: skip
        control = np.mean([of[kind].directions for of in ranges["curves"].values()], axis=0)
        flat = tuple(control.tolist())
        curves.append(Curve("random directions", tuple(x), flat, flat, flat))
        path = figures.dose_response(curves, folder / f"range_{kind}.png", xlabel, "answers that follow (%)")
        drawn.append(picture(path, f"Answers that follow, {xlabel}"))
    for name, grid in ranges["grids"].items():
        path = figures.layer_role_heatmap(
            np.round(grid[..., 0], 3) + 0.0, layers, roles_of(ranges["cases"][name].subject),
            folder / f"grid_{name}.png", f"recovered share, question: {name}",
        )  # fmt: skip
        drawn.append(picture(path, f"Recovered share when one layer and position role is carried: {name}"))
    rows = [(name, layers_text(rate), rate.cases) for name, rate in ranges["depths"].items()]
    rows += [(f"{a} less {b}", layers_text(rate, True), rate.cases) for (a, b), rate in ranges["gaps"].items()]
    return [
        Figure("Which layers an answer follows", tuple(drawn), "All features of the layers, free mode."),
        Table("Mean layer at which an answer is carried", ("question", "layers, 95 % interval", "pairs"), tuple(rows),
              note="Differences are taken on scenes that both questions have."),
    ]  # fmt: skip


def way_sections(bench: Bench, ranges: dict, folder: Path) -> list[Section]:
    """Whether one question's features serve another."""
    ways: list[ByWay] = ranges["ways"]
    rows = tuple(
        (way.features_of, way.question, way.size, way.carried, Percent(way.carried.control or 0.0),
         Percent(way.recovered.value), way.silenced, Percent(way.silenced.control or 0.0))
        for way in ways
    )  # fmt: skip
    columns = ("features of", "question", "features", "carried: answer follows", "matched", "recovered",
               "set to 0: answer changed", "matched")  # fmt: skip
    curves = alike_curves(ranges["alike"], bench.transcoders.layers)
    drawn = figures.dose_response(curves, folder / "alike.png", "layer", "cosine of effects on two questions", False)
    return [
        Table("One question's features on another's answer", columns, rows,
              note="As many matched features are the controls."),
        figure("Where the ways of two questions part", drawn, "Likeness of effects on two questions by layer and place",
               "Cosine of the features' absolute effects (attribution patching on training pairs): mean over pairs of "
               "questions, and their range. No mark: no feature there has an effect.", wide=True),
    ]  # fmt: skip


def alike_curves(alike: Alike, layers: list[int]) -> list[Curve]:
    """A curve a role: mean and range over pairs of questions, nan where some have no effect; and chance."""
    x = tuple(float(layer) for layer in layers)
    words = {"image": "at soft tokens", "question": "at the question's words", "last": "at the last position"}
    curves = []
    for role, name in words.items():
        tables = [real for (_, _, of), (real, _) in alike.items() if of == role]
        if tables:
            found = np.stack(tables)
            ends = (found.mean(0), found.min(0), found.max(0))
            curves.append(Curve(name, x, *(tuple(values.tolist()) for values in ends)))
    chance = np.stack([null for (_, _, of), (_, null) in alike.items() if of in words])
    flat = tuple(np.nanmean(chance, axis=0).tolist())
    return [*curves, Curve("features shuffled (mean)", x, flat, flat, flat)]


def reading() -> Text:
    """What the numbers do not say."""
    return Text(
        "How to read this",
        (
            "Every planet has one cover and one colour, so reading the planet is reading its facts: only interventions "
            "tell them apart, and only Earth and Neptune share a colour.",
            "Carrying layers 0 to k leaves later layers to compute on. An answer that follows early can still be "
            "worked out late; a mean layer says where the difference between two planets is put in, not where it is "
            "read.",
            "Features set to 0 are away from where the model ever was: that answers stay says more than that they "
            "change.",
        ),
    )
