"""Figures and report.html of captions: where their words come from, and what steering makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmscope.core.intervention import Rate
from vlmscope.report import figures
from vlmscope.report.experiment_figures import CaptionedPicture, captioned, word_bars
from vlmscope.report.page import Card, Cards, Figure, Percent, ReportPage, Section, Table, Text
from vlmscope.report.style import label
from vlmscope.tasks.steps.caption_words import SOURCES, WordSources
from vlmscope.tasks.steps.report_parts import configuration, figure, picture, rerun

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench
    from vlmscope.tasks.steps.caption_steering import SwapResult

WORDS = {
    "steered": "steered",
    "no_last_layer": "steered, without last layer",
    "prompt_only": "steered in the prompt only",
    "role_image": "steered at the picture only",
    "without_gate": "steered, without the gate",
    "counterfactual's own": "unedited, counterfactual's caption",
    "original's": "unedited, original's caption",
}
SHOWN = ("steered", "prompt_only", "matched features", "random direction")
MEASURES = ("all_right", "right_words", "kept_words")
EXAMPLES = 2  # pictures a swap


def run(bench: Bench) -> None:
    """Write figures/ and report.html from what the other steps left."""
    folder = bench.run_dir / "figures"
    sections: list[Section] = [headline(bench)]
    said = []
    if "caption_words" in bench.records:
        rows: list[WordSources] = bench.record("caption_words")["rows"]
        sections += word_sections(bench, rows, folder)
        said.append(word_summary(rows))
    if "caption_steering" in bench.records:
        results: list[SwapResult] = bench.record("caption_steering")
        sections += steering_sections(results, folder)
        said.append(steering_summary(results))
    sections += [reading(), rerun(bench), configuration(bench)]
    page = ReportPage(
        title="Captions, word by word",
        question="Which words of a generated caption are read from the picture, and which from the text so far? Can a "
        "caption be steered as a whole, so that every word that should change does and no other?",
        summary=" ".join(said),
        sections=tuple(sections),
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


def name_of(row: WordSources) -> str:
    """A word's group in words."""
    return f"{row.kind}: {label(row.slot)}"


def word_summary(rows: list[WordSources]) -> str:
    """The words that look at the picture most and least."""
    ranked = sorted(rows, key=lambda row: -row.shares[0].value)
    most, least = ranked[0], ranked[-1]
    return (
        f"Of the influence that ends at tokens, the picture has {most.shares[0].value:.0%} for {name_of(most)} and "
        f"{least.shares[0].value:.0%} for {name_of(least)}."
    )


def steering_summary(results: list[SwapResult]) -> str:
    """Each swap in half a sentence."""
    parts = []
    for result in results:
        rate, control = (result.measures[name]["all_right"].value for name in ("steered", "matched features"))
        parts.append(f"{label(result.swap.name)} {rate:.0%} (matched features {control:.0%})")
    return f"Steered captions with every word right: {', '.join(parts)}."


def headline(bench: Bench) -> Cards:
    """Numbers on top."""
    cards = []
    for result in bench.records.get("caption_steering", []):
        rate = result.measures["steered"]["all_right"]
        span = f"95 % interval {rate.ci_low:.0%} to {rate.ci_high:.0%}; {result.n_features} features"
        cards.append(Card(f"{label(result.swap.name)}: every word right", Percent(rate.value), span))
    for kind in bench.cfg.captions.kinds if "caption_words" in bench.records else ():
        share = bench.metrics[f"captions/{kind}/right"]
        cards.append(Card(f"captions of {kind} right", Percent(share), "unedited, test scenes"))
    return Cards("Result", tuple(cards))


def word_sections(bench: Bench, rows: list[WordSources], folder: Path) -> list[Section]:
    """Shares of influence by word, and whose word comes when text and picture disagree."""
    words = [name_of(row) for row in rows]
    shares = {name: [row.shares[i] for row in rows] for i, name in enumerate(SOURCES)}
    drawn = word_bars(words, shares, folder / "word_sources.png", "influence that ends at tokens (%)")
    pictures = [picture(drawn, "Where the influence on each word ends: at the picture, the prompt, or earlier words")]
    torn = [row for row in rows if row.follows_picture is not None]
    if torn:
        series = {
            "the picture's word": [row.follows_picture for row in torn],
            "the text's word": [row.follows_text for row in torn],
        }
        path = folder / "conflicts.png"
        drawn = word_bars([name_of(row) for row in torn], series, path, "captions begun about another scene (%)")
        pictures.append(picture(drawn, "The word that comes when the text so far is about another scene"))
    columns = (
        "word", *(f"from the {name}, 95 % interval" for name in SOURCES), "errors, of all influence",
        "picture's word wins, 95 % interval", "text's word wins, 95 % interval",
    )  # fmt: skip
    cells = tuple(
        (name_of(row), *row.shares, Percent(row.error.value), row.follows_picture, row.follows_text) for row in rows
    )
    config = bench.cfg.captions
    intro = (
        f"Attribution graphs of {config.graphs} whole captions of each kind of scene, every word a target. Right: the "
        f"same word when the caption was begun about another scene whose word differs, up to {config.conflicts} "
        "captions of each kind; a first word has no text to be read from."
    )
    return [
        Figure("Where a word comes from", tuple(pictures), intro),
        Table("Sources of words", columns, cells, note="Only captions that the model gives rightly count."),
    ]


def steering_sections(results: list[SwapResult], folder: Path) -> list[Section]:
    """Examples, rates beside controls, strength, and what happens to other pictures."""
    shown = []
    for result in results:
        for i in range(min(EXAMPLES, len(result.swap.pairs))):
            before, after = (" ".join(words) for words in result.swap.words[i])
            texts = {"before": before}
            texts |= {WORDS.get(name, name): result.texts[name][i] or "(nothing)" for name in SHOWN}
            shown.append(CaptionedPicture(result.swap.pictures[i], texts | {"right of the counterfactual": after}))
    drawn = captioned(shown, folder / "captions.png")
    rows = [
        (label(result.swap.name), WORDS.get(name, name), *(one.get(key) for key in MEASURES),
         interval_of(one.get("log_likelihood")))
        for result in results for name, one in result.measures.items()
    ]  # fmt: skip
    columns = (
        "swap", "condition", "every word right, 95 % interval", "words that should change, right",
        "words that should stay, kept", "log-likelihood a word (nats), 95 % interval",
    )  # fmt: skip
    note = (
        "The log-likelihood is that of the text under the unedited model, given the counterfactual's picture: high "
        "where the text is both fluent and true of it. Controls steer as many other features, matched by layer and "
        "mean activation, to their own level on counterfactuals, or add a random direction of the same norm at each "
        "layer and word."
    )
    curve = figures.dose_response(
        [line for result in results for line in result.curve], folder / "strength.png",
        "strength (1 = the counterfactual's mean level)", "every word right (% of captions)",
    )  # fmt: skip
    other = tuple(
        (label(result.swap.name), kind, rate, result.others_ungated.get(kind))
        for result in results for kind, rate in result.others.items()
    )  # fmt: skip
    strengths = ", ".join(f"{label(result.swap.name)} {result.strength:g}" for result in results)
    return [
        figure("Captions before and after", drawn, "Test pictures with their captions", wide=True),
        Table("Steered captions", columns, tuple(rows), note=note),
        figure("Strength", curve, "Share of captions with every word right, by strength",
               f"Settled on validation pairs: {strengths}."),
        Table("Captions of other pictures that change", ("swap", "pictures of", "changed", "changed without the gate"),
              other, note="Pictures whose caption does not have the swap's word."),
    ]  # fmt: skip


def interval_of(rate: Rate | None) -> str | None:
    """A mean in nats with its interval."""
    return None if rate is None else f"{rate.value:.2f} ({rate.ci_low:.2f} to {rate.ci_high:.2f})"


def reading() -> Text:
    """What the numbers do not say."""
    return Text(
        "How to read this",
        (
            "Influence adds up sizes of edges whatever their sign, and attention fixes what is looked at without being "
            "explained: a share says where a word's inputs come from, not that it would change with them. The captions "
            "begun about another scene test that.",
            "Features are chosen and levels taken on other pictures than those that are captioned here. Steering sets "
            "the level of each word's features at that word's place in the caption, so words of captions of another "
            "length would not be met.",
        ),
    )
