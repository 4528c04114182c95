"""General analyses on Orrery's scenes, whose facts are known: the logit lens, and where words of captions come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from vlmscope.attribution.trace import word_sources
from vlmscope.core.errors import UserError, check_choice
from vlmscope.data.orrery.dataset import pictures
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import PICTURED, Scene
from vlmscope.features.readouts import token_lens
from vlmscope.interventions.run import whole_answers
from vlmscope.metrics.rates import share_rate
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import continued

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench
    from vlmscope.config import AppConfig

SOURCES = ("from_picture", "from_prompt", "from_text_so_far")


@dataclass
class Lens:
    """How early the right word can be read off the residual stream (logit lens), on Orrery's test scenes.

    `questions`: kind of scene -> what is asked; `scenes` of each kind. Writes lens.parquet, a row for each scene and
    state; metrics `lens/<kind>/state_<n>/any_soft`, the share of scenes in which the right word is the most probable
    one at some soft token of state n (0: before the first layer; control: another scene's word), and `/last`, at the
    last position.
    """

    questions: dict[str, str]
    scenes: int

    def check(self, cfg: AppConfig) -> None:
        """Refuse a second table of the same name."""
        if any("before_readable" in setting.baselines for setting in cfg.settings.values()):
            raise UserError(
                "analyses.lens: the baseline before_readable writes lens.parquet too; leave out one of them"
            )

    def analyse(self, bench: Bench) -> dict[str, float]:
        """The table and its metrics; a question without a right answer is left out."""
        metrics, tables, seed = {}, [], bench.cfg.seed
        for kind, question in self.questions.items():
            scenes = [make_scene("test", kind, index, seed) for index in range(self.scenes)]
            answers = [bench.token(word) for scene in scenes if (word := scene.answer_to(question))]
            if not answers:
                continue
            shown = bench.recorded("test", f"{kind} test", pictures(scenes), "lens")
            batch = bench.scope.batch(bench.inputs(shown, question))
            positions = np.append(np.flatnonzero(batch.is_image), batch.length - 1)
            # The word of the next scene that has another one, so that a word given to every picture does not count.
            others = [next((b for b in answers[i:] + answers[:i] if b != a), a) for i, a in enumerate(answers)]
            ranks = [token_lens(bench.vlm.adapter, batch, positions, words) for words in (answers, others)]
            soft, control = ((rank[..., :-1] == 0).any(2) for rank in ranks)
            for state, last in enumerate((ranks[0][..., -1] == 0).T):
                columns = {"any_soft": soft[:, state], "any_soft_control": control[:, state], "last": last}
                tables.append(pd.DataFrame({"kind": kind, "state": state, **columns}))
                rate = share_rate(soft[:, state], seed, float(control[:, state].mean()))
                metrics |= rate.metrics(f"lens/{kind}/state_{state:02d}/any_soft")
                metrics[f"lens/{kind}/state_{state:02d}/last"] = float(last.mean())
        if tables:
            bench.write_table("lens", pd.concat(tables))
        return metrics


class Caption(NamedTuple):
    """A scene, its prompt, the words of its generated caption, and the fact that each names ("" for none)."""

    scene: Scene
    inputs: ModelInputs
    ids: list[int]
    text: str
    facts: tuple[str, ...]


def captions_of(bench: Bench, prompt: str, scenes: Sequence[Scene], new_tokens: int) -> list[Caption]:
    """Test scenes as the model captions them."""
    shown = [image for scene in scenes for image in bench.recorded("test", scene.key, pictures([scene]), "captions")]
    inputs = bench.inputs(shown, prompt)
    rows = zip(scenes, inputs, whole_answers(bench.scope, inputs, new_tokens), strict=True)
    return [Caption(scene, one, ids, text, scene.facts_named(text.split())) for scene, one, (ids, text) in rows]


@dataclass
class WordSources:
    """Where the words of right captions of Orrery's test scenes come from, by the fact that a word names.

    Of the influence on a word, how much ends at the picture, at the prompt, and at earlier words (in `graphs` captions
    of each of `kinds`)? And a caption begun about another scene follows a picture: whose word comes next (of
    `conflicts` captions)? Writes word_sources.parquet and conflicts.parquet, a row for each caption, fact and source;
    metrics `captions/<kind>/right`, `captions/<kind>/<fact>/from_picture` and `/follows_picture`.
    """

    prompt: str
    kinds: list[str]
    graphs: int
    conflicts: int
    new_tokens: int = 16

    def check(self, cfg: AppConfig) -> None:
        """Refuse kinds of scenes without pictures."""
        for kind in self.kinds:
            check_choice("analyses.word_sources.kinds", kind, PICTURED)

    def analyse(self, bench: Bench) -> dict[str, float]:
        """Captions, graphs and conflicts of each kind."""
        metrics, sources, conflicts = {}, [], []
        for kind in self.kinds:
            count = max(self.graphs, self.conflicts)
            scenes = [make_scene("test", kind, i, bench.cfg.seed) for i in range(count)]
            captions = captions_of(bench, self.prompt, scenes, self.new_tokens)
            captions = [caption for caption in captions if caption.text == caption.scene.answer("caption")]
            metrics[f"captions/{kind}/right"] = len(captions) / count
            if not captions:
                raise UserError(f"none of the captions of {kind} is right, so its words say nothing; leave it out")
            for caption in captions[: self.graphs]:
                rows = word_sources(bench.scope, caption.inputs, caption.ids, bench.cfg.attribution)
                for fact in dict.fromkeys(caption.facts):
                    *shares, errors = rows[[named == fact for named in caption.facts]].mean(0)
                    sources += [(kind, fact, *part, errors) for part in zip(SOURCES, shares, strict=True)]
            for fact in filter(None, dict.fromkeys(captions[0].facts)):
                conflicts += [(kind, fact, *hit, np.nan) for hit in follows(bench, captions[: self.conflicts], fact)]
        for name, rows in (("word_sources", sources), ("conflicts", conflicts)):
            table = pd.DataFrame(rows, columns=["kind", "fact", "source", "share", "errors"])
            table["fact"] = table.fact.replace("", "other_words")
            table["word"] = table.kind + ": " + table.fact.str.replace("_", " ")
            bench.write_table(name, table)
            table = table[table.source.str.endswith("picture")]
            means = table.groupby(["kind", "fact", "source"], sort=False).share.mean()
            metrics |= {"/".join(("captions", *key)): float(share) for key, share in means.items()}
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
