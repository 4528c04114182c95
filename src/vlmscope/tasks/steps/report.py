"""Figures and report.html from what the other steps left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.circuits.circuit import Circuit, commonest_label
from vlmscope.circuits.flow import circuit_edges
from vlmscope.core.intervention import AnswerExample, Supernode
from vlmscope.data.images import png_bytes
from vlmscope.interventions.run import generate_edited
from vlmscope.report import figures
from vlmscope.report.circuit_figure import circuit_diagram
from vlmscope.report.graph_figure import attribution_graph
from vlmscope.report.page import (
    Card,
    Cards,
    Examples,
    Features,
    Figure,
    Percent,
    ReportPage,
    Section,
    Table,
    flip_table,
    graph_cards,
)
from vlmscope.tasks.steps.describe_features import SHOWN, describe_features
from vlmscope.tasks.steps.report_parts import configuration, figure, limits, picture, rerun

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench
    from vlmscope.tasks.steps.intervene import Case

LISTED = 24  # features of a supernode in its table
CAPTION_PROMPT = "describe this image in detail ."


def run(bench: Bench) -> None:
    """Write figures/ and report.html."""
    folder = bench.run_dir / "figures"
    found, effects = bench.record("find_circuit"), bench.record("intervene")
    supernodes = describe_features(bench, found["circuit"])
    sections: list[Section] = [headline(bench)]
    sections += answers(bench, effects["cases"])
    sections += circuit_sections(bench, found, supernodes, folder)
    sections += effect_sections(bench, effects, folder)
    if "curves" in bench.records:
        sections += curve_sections(bench, folder)
    sections += [limits(bench.intervention.gate is not None), rerun(bench), configuration(bench)]
    recipient, donor = bench.circuit_config.concepts
    page = ReportPage(
        title=f"From {recipient} to {donor}",
        question=(
            f"Do the features that tell {recipient} from {donor} cause the answer? Suppress those of {recipient}, "
            f"raise those of {donor}, and see what the model says of pictures of {recipient} that were not used to "
            "find them."
        ),
        summary=summary(bench),
        sections=tuple(sections),
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


def summary(bench: Bench) -> str:
    """The result in one paragraph, from the metrics."""
    m = bench.metrics
    recipient, donor = bench.circuit_config.concepts
    parts = []
    for method in ("steer", "patch"):
        key = f"{method}/free/flip_rate"
        parts.append(
            f"{'Steering' if method == 'steer' else 'Patching'} {m[f'{method}/features']:.0f} features in all layers "
            f"and positions turns {recipient} into {donor} on {m[key]:.0%} of the pictures for the worst of the "
            f"questions (matched random features: {m[key + '_control']:.0%})"
        )
    return (
        ". ".join(parts) + ". Acting on everything may only copy the answer: read the rows without the last layer and "
        "without the last position, and the third planet, beside it."
    )


def headline(bench: Bench) -> Cards:
    """Numbers on top."""
    m = bench.metrics
    cards = []
    for method in ("steer", "patch"):
        key = f"{method}/free/flip_rate"
        cards.append(
            Card(
                f"{method}: worst question flips",
                Percent(m[key]),
                f"95 % interval {m[key + '_ci_low']:.0%} to {m[key + '_ci_high']:.0%}; "
                f"control {m[key + '_control']:.0%}",
            )
        )
        late = f"{method}/free/no_last_layer/name/flip_rate"
        if late in m:
            cards.append(Card(f"{method}: name, without the last layer", Percent(m[late]), "free mode"))
    if "specificity/changed_rate" in m:
        cards.append(
            Card(
                "other answers changed",
                Percent(m["specificity/changed_rate"]),
                f"mean KL {m['specificity/kl']:.3f} nats",
            )
        )
    return Cards("Result", tuple(cards))


def answers(bench: Bench, cases: dict[str, Case]) -> list[Section]:
    """Pictures before and after, and a caption generated token by token under steering."""
    count = bench.intervention.examples
    shown: list[AnswerExample] = []
    for name, case in cases.items():
        prompt = bench.circuit_config.questions[name].prompt
        for method, logits in case.after.items():
            for i in range(max(count // len(cases) // max(len(case.after), 1), 1)):
                row = i % len(case.images)
                before = bench.words(case.subject.base.logits[row])
                after = bench.words(logits[row])
                png = png_bytes(case.images[row], 128)
                shown.append(AnswerExample(png, prompt, method, before[0][0], after[0][0], before, after))
    figures.answer_shift(shown, bench.run_dir / "figures" / "answer_shift.png")
    sections: list[Section] = [Examples("Answers before and after", tuple(shown))]
    spoken = captions(bench, cases)
    if spoken:
        sections.append(Table("Captions, generated token by token under steering", ("before", "after"), tuple(spoken)))
    return sections


def captions(bench: Bench, cases: dict[str, Case]) -> list[tuple[str, str]]:
    """Free generation with a KV cache, before and under the steering plan, for three pictures."""
    circuit: Circuit = bench.record("find_circuit")["circuit"]
    rows = []
    for image in next(iter(cases.values())).images[:3]:
        inputs = bench.vlm.prepare(CAPTION_PROMPT, [image])
        plan = bench.steer(circuit, inputs.roles)
        before = generate_edited(bench.scope, inputs)
        rows.append((before, generate_edited(bench.scope, inputs, plan)))
    return rows


def circuit_sections(bench: Bench, found: dict, supernodes: Sequence[Supernode], folder: Path) -> list[Section]:
    """The circuit drawn, its features, and the attribution graph it was confirmed in."""
    pruned = found["trace"].pruned
    image = np.asarray(found["trace_image"])
    groups = {m.feature: node.name for node in supernodes for m in node.features}
    edges = circuit_edges(pruned, {node.name: {m.feature for m in node.features} for node in supernodes})
    words = {node.name: said for node in supernodes if (said := commonest_label(node))}
    drawn = circuit_diagram(supernodes, edges, folder / "circuit.png", {"soft tokens": image}, words=words)
    graph = attribution_graph(pruned, folder / "graph.png", [image], groups, labels=bench.labels)
    recipient = bench.circuit_config.concepts[0]
    sections: list[Section] = [
        figure(
            "The circuit",
            drawn,
            "Supernodes, and the influence on the answer that flows between them",
            f"Found by contrast of means on training pictures, each feature confirmed by influence on the answer in an "
            f"attribution graph; drawn from the graph of one training picture of {recipient}.",
        )
    ]
    for node in supernodes:
        intro = f"The {LISTED} most influential of {len(node.features)}; all are in circuits/ of the run folder."
        listed = Supernode(node.name, node.features[:LISTED])
        sections.append(Features(f"Features of {node.name}", listed, intro, shown=SHOWN))
    sections += [
        graph_cards("Attribution graph", pruned),
        figure("Attribution graph, drawn", graph, "Pruned attribution graph, its strongest edges", wide=True),
    ]
    return sections


def effect_sections(bench: Bench, effects: dict, folder: Path) -> list[Section]:
    """Tables and figures of what steering and patching did."""
    rows = effects["rows"]
    # Ablation raises nothing, so that its flips say little; what it changes is in the table.
    exchanged = [row for row in rows if row.method != "ablate"]
    pictures = [
        (figures.flip_rates(exchanged, folder / "flip_rates.png"), "Flip rate by question, with matched controls"),
        (figures.modes(exchanged, folder / "modes.png"), "Flip rate of the worst question by mode"),
        (figures.scopes(exchanged, folder / "scopes.png"), "Flip rate of the worst question by where it acted"),
    ]
    sections: list[Section] = [
        Figure("What changed", tuple(picture(path, alt) for path, alt in pictures)),
        flip_table(
            "All flip rates",
            rows,
            note="A control edits as many random features of the same layers, matched "
            "by mean activation, to the same values. Ablation sets the recipient's features to 0 and raises nothing. "
            "Generated: an answer that begins with the donor's word and does not name the recipient's after it. q: "
            "exact paired p-value against the first control (of flips; of changed answers for ablation), corrected "
            "over all rows (false discovery rate, Benjamini and Hochberg).",
        ),
    ]
    curve = figures.dose_response(
        effects["curves"], folder / "dose_response.png", "steering strength (1 = own mean activation)", "flip rate (%)"
    )
    sections.append(figure("Dose and response", curve, "Flip rate against steering strength, by question"))
    return [*sections, checks(bench)]


def checks(bench: Bench) -> Table:
    """What should not happen: random directions, a third concept, prompts about something else."""
    m, third = bench.metrics, bench.circuit_config.third
    found = [
        (f"random direction of the same norm, {name}", Percent(m[f"steer/free/{name}/flip_rate_random_direction"]))
        for name in bench.circuit_config.questions
    ]
    for form, said in (("", "steered as above"), ("ungated/", "steered without the gate")):
        found += [
            (
                f"{third} answered as {bench.circuit_config.concepts[1]}, {name}, {said}",
                Percent(m[f"third/{form}{third}/{name}/donor_rate"]),
            )
            for name in bench.circuit_config.questions
            if f"third/{form}{third}/{name}/donor_rate" in m
        ]
        if f"specificity/{form}changed_rate" in m:
            found.append((f"other scenes: answers changed, {said}", Percent(m[f"specificity/{form}changed_rate"])))
    return Table("Further checks", ("check", "share"), tuple(found))


def curve_sections(bench: Bench, folder: Path) -> list[Section]:
    """What the step `curves` measured."""
    made = bench.record("curves")
    kinds = made["curves"]
    drawn = [
        figures.dose_response(kinds["strength"], folder / "patch_strength.png", "patching strength", "flip rate (%)"),
        figures.feature_count_curve(kinds["features"], folder / "feature_count.png"),
        figures.dose_response(kinds["layers"], folder / "layers.png", "layer x", "flip rate (%)"),
        figures.layer_role_heatmap(
            made["ablation"],
            list(range(len(made["ablation"]))),
            ["special", "image", "question", "last"],
            folder / "ablation.png",
            "fall of accuracy under mean ablation",
        ),
    ]
    alts = (
        "Flip rate against patching strength",
        "Flip rate against number of features steered",
        "Flip rate when only some layers are steered",
        "How much accuracy falls when a layer's MLP output is replaced by its mean, by position role",
    )
    return [
        Figure("Long curves", tuple(picture(path, alt) for path, alt in zip(drawn, alts, strict=True))),
        flip_table("By position role", made["rows"]),
    ]
