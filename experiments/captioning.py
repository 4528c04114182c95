"""Captions, word by word: where each comes from, and pairs of right captions to steer from one to the other.

`declare`: features are chosen for each word that differs in training pairs; what is captioned are test pairs, and other
pictures. `analyse`: of the influence on a word, how much ends at the picture, at the prompt, and at earlier words? And
a caption begun about another scene follows a picture: whose word comes next?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from vlmscope.attribution.trace import word_sources
from vlmscope.circuits.cases import TextPair, bystanders, text_cases, text_pairs
from vlmscope.circuits.experiment import Declared, text_level
from vlmscope.core.errors import UserError
from vlmscope.data.images import png_bytes
from vlmscope.data.orrery.dataset import pictures, scene_pairs
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import Scene
from vlmscope.interventions.run import log_likelihoods, whole_answers
from vlmscope.metrics.rates import bootstrap_mean, rates, share_rate
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import continued
from vlmscope.report.style import label

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

SOURCES = ("from_picture", "from_prompt", "from_text_so_far")
SIDES = ("original", "counterfactual")


@dataclass
class Settings:
    """A swap is [change, original's word, counterfactual's]; word_features count for a word, others for a kind."""

    prompt: str
    kinds: list[str]
    swaps: dict[str, list[str]]
    pairs: dict[str, int]
    graphs: int
    conflicts: int
    others: int
    word_features: int
    steps: int
    new_tokens: int


class Caption(NamedTuple):
    """A scene, its prompt, the words of its generated caption, and the fact that each names ("" for none)."""

    scene: Scene
    inputs: ModelInputs
    ids: list[int]
    text: str
    facts: tuple[str, ...]


def check(cfg: Any) -> None:
    """Refuse kinds without pictures, and swaps that no pair has, before the model is loaded."""
    if "text" in cfg.analysis["kinds"]:
        raise UserError("analysis.kinds: text has no pictures; choose planets, digits, shapes, hands")
    for name, swap in cfg.analysis["swaps"].items():
        if len(swap) != 3:
            raise UserError(f"analysis.swaps.{name}={list(swap)}: write [change, original, counterfactual]")
        scene_pairs(swap[0], "train", 1, cfg.seed, *swap[1:])


def facts_named(scene: Scene, words: Sequence[str]) -> tuple[str, ...]:
    """The fact that each word of a scene's caption names, "" for none; each fact once, in the order of reading."""
    left = {q.group: q.answer for q in scene.questions if q.group not in ("caption", "sum")}
    named = []
    for word in words:
        # The plural of a shape's name begins with it.
        facts = (n for n, answer in left.items() if word == answer or (n == "shape" and word.startswith(answer)))
        named.append(next(facts, ""))
        left.pop(named[-1], None)
    return tuple(named)


def captions_of(bench: Bench, scenes: Sequence[Scene]) -> list[Caption]:
    """The scenes as the model captions them."""
    prompts = bench.inputs([Image.fromarray(picture) for picture in pictures(list(scenes))], bench.analysis.prompt)
    rows = zip(scenes, prompts, whole_answers(bench.scope, prompts, bench.analysis.new_tokens), strict=True)
    return [Caption(scene, prompt, ids, text, facts_named(scene, text.split())) for scene, prompt, (ids, text) in rows]


def pairs_of(bench: Bench, swap: str, split: str) -> list[TextPair]:
    """Pairs that are captioned rightly on both sides; base/<swap>/accuracy is the share of those asked for last."""
    (change, *words), count = bench.analysis.swaps[swap], bench.analysis.pairs[split]
    scenes = scene_pairs(change, split, count, bench.cfg.seed, *words)
    shown = [[Image.fromarray(array) for array in pictures([getattr(pair, side) for pair in scenes])] for side in SIDES]
    sides = [bench.inputs(bench.recorded(split, f"{swap} {split} {side}", images), bench.analysis.prompt)
             for side, images in zip(SIDES, shown, strict=True)]  # fmt: skip
    right = list(zip(*(pair.captions for pair in scenes), strict=True))
    pngs = [png_bytes(image) for image in shown[0]]
    pairs = text_pairs(bench.scope, sides, right, bench.analysis.new_tokens, pngs)
    if len(pairs) < 2:
        raise UserError(f"analysis.swaps.{swap}: {len(pairs)} of {count} pairs are captioned rightly on both sides")
    bench.metrics |= share_rate(np.arange(count) < len(pairs)).metrics(f"base/{swap}/accuracy")
    return pairs


def declare(bench: Bench) -> Declared:
    """Swaps as questions: validation and test pairs, and pictures whose caption does not have the original's word."""
    settings, scope = bench.analysis, bench.scope
    cases: dict[str, list] = {"validation": [], "test": [], "others": []}
    chosen = {}
    for swap, (_, word, _) in settings.swaps.items():
        level, _ = chosen[swap] = text_level(
            scope, pairs_of(bench, swap, "train"), settings.word_features, settings.steps
        )
        bench.metrics[f"base/{swap}/features"] = float(sum(map(len, level.features.values())))
        cases["validation"].append(text_cases(scope, "val", swap, pairs_of(bench, swap, "val")))
        pairs = pairs_of(bench, swap, "test")
        cases["test"].append(text_cases(scope, "test", swap, pairs, settings.prompt))
        for side, name in enumerate(SIDES):
            unedited = log_likelihoods(scope, [pair.sides[1] for pair in pairs], [pair.ids[side] for pair in pairs])
            bench.metrics |= bootstrap_mean(unedited).metrics(f"log_likelihood/{swap}/{name}")
        for kind in settings.kinds:
            scenes = [make_scene("test", kind, i, bench.cfg.seed) for i in range(4 * settings.others)]
            fit = [s for s in scenes if not any(w.startswith(word) for w in s.answer("caption").split())]
            if fit:
                others = captions_of(bench, fit[: settings.others])
                inputs, keys = [caption.inputs for caption in others], [caption.scene.key for caption in others]
                unrelated = bystanders(scope, kind, swap, inputs, keys)
                cases["others"].append(replace(unrelated, texts=tuple(caption.text for caption in others)))
    levels, means = ({swap: choice[part] for swap, choice in chosen.items()} for part in (0, 1))
    return Declared(cases, lambda t, c, _: replace(levels[c.question], gate=t.gate), lambda _, c: means[c.question])


def analyse(bench: Bench) -> dict[str, float]:
    """captions/<kind>/<fact>/from_<source>, follows_picture, follows_text; log_likelihood/<swap>/<condition>.

    word_sources.parquet and conflicts.parquet have a row for each caption, fact and source.
    """
    settings, metrics = bench.analysis, {}
    tables: dict[str, list] = {"word_sources": [], "conflicts": []}
    for kind in settings.kinds:
        count = max(settings.graphs, settings.conflicts)
        captions = captions_of(bench, [make_scene("test", kind, i, bench.cfg.seed) for i in range(count)])
        captions = [caption for caption in captions if caption.text == caption.scene.answer("caption")]
        metrics[f"captions/{kind}/right"] = len(captions) / count
        if not captions:
            raise UserError(f"analysis.kinds: none of the captions of {kind} is right, so its words say nothing")
        for caption in captions[: settings.graphs]:
            rows = word_sources(bench.scope, caption.inputs, caption.ids, bench.cfg.attribution)
            for fact in dict.fromkeys(caption.facts):
                *shares, errors = rows[[named == fact for named in caption.facts]].mean(0)
                tables["word_sources"] += [(kind, fact, *part, errors) for part in zip(SOURCES, shares, strict=True)]
        for fact in filter(None, dict.fromkeys(captions[0].facts)):
            hits = follows(bench, captions[: settings.conflicts], fact)
            tables["conflicts"] += [(kind, fact, *hit, np.nan) for hit in hits]
    for name, rows in tables.items():
        table = pd.DataFrame(rows, columns=["kind", "fact", "source", "share", "errors"])
        table["fact"] = table.fact.replace("", "other_words")
        table["word"] = table.kind + ": " + table.fact.map(label)
        means = table[table.source.str.endswith("picture")].groupby(["kind", "fact", "source"], sort=False).share.mean()
        metrics |= {"/".join(("captions", *key)): float(share) for key, share in means.items()}
        bench.write_table(name, table)
    steered = pd.read_parquet(bench.run_dir / "trials.parquet").query("setting == 'main'")
    for swap, row in rates(steered, ["question"], "log_likelihood").iterrows():
        names = {"steered": row.value, "matched": row.matched, "random_direction": row.random_direction}
        metrics |= {f"log_likelihood/{swap}/{name}": value for name, value in names.items()}
    return metrics


def follows(bench: Bench, captions: Sequence[Caption], fact: str) -> Iterator[tuple[str, bool]]:
    """Whether the next word is the picture's, and whether it is the text's, where the text so far is another caption's:
    that of the next caption with the same facts up to there and another word for this fact.
    """
    cases: dict[int, list[tuple[Caption, Caption]]] = {}
    for i, shown in enumerate(captions):
        for begun in [*captions[i + 1 :], *captions[:i]]:
            word = begun.facts.index(fact) if fact in begun.facts else 0
            if word and shown.facts[: word + 1] == begun.facts[: word + 1] and shown.ids[word] != begun.ids[word]:
                cases.setdefault(word, []).append((shown, begun))
                break
    for word, pairs in cases.items():
        inputs = [continued(bench.vlm.adapter, a.inputs, b.ids[:word], bench.vlm.tokenizer) for a, b in pairs]
        tokens = bench.scope.forward(bench.scope.batch(inputs)).argmax(-1).tolist()
        for token, (shown, begun) in zip(tokens, pairs, strict=True):
            yield from (("follows_picture", token == shown.ids[word]), ("follows_text", token == begun.ids[word]))
