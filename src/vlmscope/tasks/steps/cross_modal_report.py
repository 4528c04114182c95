"""report.html of features that pictures and words share, for one set of concepts or several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmscope.core.intervention import Rate
from vlmscope.features.cross_modal_config import PLACEHOLDER
from vlmscope.report.page import Card, Cards, Figure, Percent, ReportPage, Section, Table, Text, Value
from vlmscope.tasks.steps.cross_modal import Association
from vlmscope.tasks.steps.cross_modal_effects import rates
from vlmscope.tasks.steps.report_parts import configuration, picture, rerun

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

DONE = {
    ("ablation", "own"): "set to 0 everywhere: the concept's own shared features",
    ("ablation", "every_question"): "set to 0 everywhere: those shared under every question",
    ("ablation", "other_concept"): "set to 0 everywhere: another concept's",
    ("patching", "shared"): "last position patched: shared features",
    ("patching", "no_last_layer"): "last position patched: shared, without the last layer",
    ("patching", "every_question"): "last position patched: those of every question",
    ("patching", "everything"): "last position patched: all features",
    ("patching", "everything_no_last_layer"): "last position patched: all, without the last layer",
}
KINDS = {"picture": "beside a picture", "text": "in text alone"}
ALTS = {
    "coincidences": "Features that prefer a concept's pictures and a concept's word, by concept",
    "shared_by_layer": "Shared features by layer and place, beside shuffled pictures",
    "effects": "Effects of ablating and patching shared features",
}


def run(bench: Bench) -> None:
    """Write report.html from what cross_modal or cross_modal_association left."""
    found: dict[str, Association] = bench.record("cross_modal")
    sections: list[Section] = [headline(found), counts(found)]
    for name, one in found.items():
        sections += set_sections(name, one)
    sections += [reading(), rerun(bench), configuration(bench)]
    page = ReportPage(
        title="What pictures and words share",
        question="Given a picture or given words, is the associated fact recalled by the same features?",
        summary=" ".join(summary(name, one) for name, one in found.items()),
        sections=tuple(sections),
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


def titled(name: str, what: str) -> str:
    """A section's title, with the set where there are several."""
    return f"{name}: {what}" if name else what[:1].upper() + what[1:]


def patched(one: Association, kind: str) -> Rate | None:
    """How often prompts of a kind take the answer of the other kind under the shared features."""
    return rates(one.effects)["patching"][kind].get("shared")


def summary(name: str, one: Association) -> str:
    """A set in a sentence."""
    m, parts = one.metrics, []
    for question in one.found:
        key = f"cross_modal/{question}"
        parts.append(
            f"{m[f'{key}/shared']:.0f} features under {question} (pictures shuffled: {m[f'{key}/by_rule_null']:.1f}, "
            f"p = {m[f'{key}/by_rule_p']:.3f})"
        )
    carried = []
    for kind, words in KINDS.items():
        rate = patched(one, kind)
        if rate is not None:
            carried.append(
                f"{rate.value:.0%} of the answers {words} follow the other kind (matched {rate.control or 0:.0%})"
            )
    start = f"{name[:1].upper()}{name[1:]}: shared are" if name else "Shared are"
    effects = f"; carried over at the last position, {' and '.join(carried)}" if carried else ""
    return f"{start} {', '.join(parts)}{effects}."


def headline(found: dict[str, Association]) -> Cards:
    """Numbers on top: the carried answers."""
    cards = []
    for name, one in found.items():
        for kind, words in KINDS.items():
            rate = patched(one, kind)
            if rate is not None:
                cards.append(Card(titled(name, f"answers {words} that follow the other kind"), rate))
    return Cards("Shared features carried over", tuple(cards))


def counts(found: dict[str, Association]) -> Table:
    """A row a set and question."""
    rows: list[tuple[Value, ...]] = []
    for name, one in found.items():
        for question, shared in one.found.items():
            m, key, asked = one.metrics, f"cross_modal/{question}", one.config.questions[question]
            example = one.config.concepts[0]
            rows.append(
                (
                    name or "the set",
                    f"{asked.picture} / {asked.asked_in_text(example) if PLACEHOLDER in asked.text else asked.text}",
                    len(one.config.concepts),
                    int(m[f"{key}/shared"]),
                    round(m[f"{key}/by_rule_null"], 2),
                    m[f"{key}/by_rule_p"],
                    int(shared.coincidences.trace()),
                    round(m[f"{key}/matching/expected"], 1),
                    m[f"{key}/matching/p"],
                    Percent(m[f"base/{question}/picture/accuracy"]),
                    Percent(m[f"base/{question}/text/accuracy"]),
                )
            )
    columns = (
        "set", "beside a picture / in text", "concepts", "shared features", "pictures shuffled: mean", "p",
        "by the rule, any q", "names exchanged: mean", "p", "right beside pictures", "right in text",
    )  # fmt: skip
    note = (
        "Two nulls: the pictures' concepts shuffled, and (harder) concepts' names exchanged between pictures and "
        "words, of which there are few orders where concepts are few."
    )
    return Table("Sets of concepts", columns, tuple(rows), note=note)


def set_sections(name: str, one: Association) -> list[Section]:
    """Figures and effects of a set."""
    drawn = tuple(picture(path, titled(name, ALTS[what]), wide=True) for what, path in one.figures.items())
    rows: list[tuple[Value, ...]] = []
    for panel, kinds in rates(one.effects).items():
        for kind, of in kinds.items():
            for what, rate in of.items():
                control = None if rate.control is None else Percent(rate.control)
                rows.append((DONE[panel, what], KINDS[kind], rate, control, rate.cases))
    columns = ("what was done", "prompts", "answers changed, or taken over", "matched features", "cases")
    note = "Set to 0: the answer is another. Patched: it is that of the other kind of prompt about another concept."
    return [
        Figure(titled(name, "what is shared, and what it does"), drawn),
        Table(titled(name, "effects"), columns, tuple(rows), note=note),
    ]


def reading() -> Text:
    """What the numbers do not say."""
    return Text(
        "How to read this",
        (
            "Shared: the feature prefers the concept's word in a text without a picture, prefers its pictures under a "
            "question that does not name it, and holds against shuffled pictures. Ablation and patching are on "
            "pictures that were not used for that; intervals draw whole pictures.",
            "A feature shared under one question may stand for the answer rather than the concept. Those of every "
            "question are counted apart; where a set has one question they are the same.",
            "Patching acts at the last position alone, the one place that both kinds of prompt have in common.",
        ),
    )
