"""General analyses of an experiment, named under `analyses:` in its YAML (docs/experiments.md).

Each is a dataclass of its settings. `check(cfg)` refuses a configuration before anything is loaded, `trials(bench,
declared)` adds trials to the declared ones, and `analyse(bench)` writes tables and figures and returns metrics. They
know no concept, question or data set by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from vlmscope.attribution.trace import word_sources
from vlmscope.circuits.cases import concept_cases, concept_questions
from vlmscope.circuits.circuit import save_circuit
from vlmscope.circuits.discovery.discover import discover_question, moving_questions, write_discoveries
from vlmscope.core.errors import UserError, check_choice
from vlmscope.core.records import ROLES
from vlmscope.core.results import Curve, Rate
from vlmscope.data.inputs import check_choosing
from vlmscope.data.orrery.dataset import pictures
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import PICTURED, Scene
from vlmscope.features.readouts import token_lens
from vlmscope.features.structure import modality_metrics, modality_parts, modality_table
from vlmscope.interventions.ablation import Averages, ablated, all_sites
from vlmscope.interventions.run import whole_answers
from vlmscope.metrics.rates import bootstrap_mean, rates, share_rate, without_baselines
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import continued
from vlmscope.report.figures import dose_response, layer_role_heatmap, modality_by_layer
from vlmscope.report.marks import write_rows

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench
    from vlmscope.circuits.experiment import Declared
    from vlmscope.config import AppConfig
    from vlmscope.interventions.trials import Trial


@dataclass
class Modality:
    """Which features of a study belong to pictures, to words or to both, layer by layer.

    Needs `task: {study: true}`. Writes modality.parquet (a row per feature), layers.parquet (a row per layer) and
    figures/modality_by_layer.png; metrics `layers/modality_<group>/layer_03`.
    """

    def analyse(self, bench: Bench) -> dict[str, float]:
        """Tables, figure and metrics."""
        info, table = bench.study.info, modality_table(bench.study)
        bench.write_table("modality", table, "zstd")
        layers, groups, index, shared = modality_parts(table)
        firing = {f"firing of both {place} (%)": np.multiply(100, share) for place, share in shared.items()}
        write_rows(
            bench.run_dir / "layers.parquet", pd.DataFrame({"layer": layers, **groups, **firing}).to_dict("records")
        )
        modality_by_layer(layers, groups, index, shared, bench.run_dir / "figures" / "modality_by_layer.png")
        positions = {f"study/positions_{kind}": float(count) for kind, count in info.positions.items()}
        return {"study/items": float(info.items)} | positions | modality_metrics(table)


@dataclass
class Discover:
    """The analysis `discovery` of an experiment: the circuit of every question of `pairs=` whose answer differs within
    pairs, or of `discovery.question`; what is done is in the group `discovery`.
    """

    def check(self, cfg: AppConfig) -> None:
        """Refuse pairs that cannot choose a circuit."""
        if cfg.pairs is not None:
            check_choosing(cfg.pairs)

    def analyse(self, bench: Bench) -> dict[str, float]:
        """Discover and write; metrics `discovery/<question>/...`."""
        cfg, scope, discoveries = bench.cfg, bench.scope, []
        train, test = bench.pairs("train"), bench.pairs("test")
        for question in moving_questions(train, test, cfg.discovery.question):
            settings = (cfg.discovery, cfg.attribution, cfg.interchange.least)
            discoveries.append(discover_question(scope, question, train, test, *settings))
            circuit = discoveries[-1].to_circuit(scope.vlm.name, scope.transcoders.widths)
            save_circuit(circuit, bench.run_dir / "circuits" / question)
        return write_discoveries(discoveries, bench.run_dir)


@dataclass
class MeanAblation:
    """How much each layer's MLP matters at each position role: the fall of accuracy when its output there is its mean.

    The mean is over training pictures of every planet, or of the concepts of `circuit` if these are none, so that it
    says nothing of one; accuracy is of the test pictures that are answered rightly, mean over questions. Writes
    mlp_ablation.parquet and figures/ablation.png; metrics `ablation/layer_00/<role>/accuracy_drop`.
    """

    pictures: int = 10

    def analyse(self, bench: Bench) -> dict[str, float]:
        """Table, figure and metrics."""
        adapter, config = bench.scope.adapter, bench.circuit_config
        images = [image for concept in bench.all_concepts for image in
                  bench.concept_pictures(concept, "train", self.pictures, purpose="means")]  # fmt: skip
        asked = concept_questions(bench.scope, config).values()
        batches = [bench.scope.batch([question.inputs(bench.scope, [image]) for image in images]) for question in asked]
        sites = all_sites(adapter, ["mlp"])
        means = Averages(adapter, batches, sites, by_role=True)
        count = bench.cfg.intervention.pictures
        questions = concept_cases(bench.scope, config, bench.concept_pictures, count, ["free"])
        drops = np.zeros((adapter.n_layers, len(ROLES)))
        for cases in questions:
            for layer, site in enumerate(sites):
                for column, role in enumerate(ROLES):
                    where = torch.from_numpy(cases.batch.roles == role)
                    logits = ablated(adapter, cases.batch, {site: means.of_role(site, role)}, where)
                    right = (logits.argmax(-1) == cases.answer).double().mean()
                    drops[layer, column] += (1.0 - float(right)) / len(questions)
        path = bench.run_dir / "figures" / "ablation.png"
        layers = list(range(adapter.n_layers))
        layer_role_heatmap(drops, layers, list(ROLES), path, "fall of accuracy under mean ablation")
        rows = [{"layer": n, "role": role, "accuracy_drop": float(drops[n, column])}
                for n in layers for column, role in enumerate(ROLES)]  # fmt: skip
        write_rows(bench.run_dir / "mlp_ablation.parquet", rows)
        return {f"ablation/layer_{row['layer']:02d}/{row['role']}/accuracy_drop": row["accuracy_drop"] for row in rows}


@dataclass
class Smallest:
    """The fewest features with which a setting of several limits hits `share` of the cases of a question.

    Metrics `circuit/smallest/<question>/features`, for questions where any number of features does.
    """

    setting: str
    share: float = 0.95

    def analyse(self, bench: Bench) -> dict[str, float]:
        """From trials.parquet."""
        table: Any = pd.read_parquet(bench.run_dir / "trials.parquet")
        shares = rates(table[table.setting == self.setting], ["question", "limit"])
        counts = shares[shares["value"] >= self.share].groupby(level="question").edited.min()
        return {f"circuit/smallest/{question}/features": float(count) for question, count in counts.items()}


@dataclass
class Transfer:
    """Do features of a question that are chosen on pairs of one value of another fact work on pairs of the others?

    Asked of every question of the pairs whose answer does not change. Figures over_<fact>.png; metrics
    `transfer/<question>/<fact>/<same or another>/recovered` and `/follow_rate`.
    """

    question: str

    def trials(self, bench: Bench, declared: Declared) -> Iterator[Trial]:
        """Features chosen on each value, carried on pairs of each."""
        assert declared.pairs is not None, "cases come from pairs"
        for cases in declared.cases["stays"]:
            yield from declared.pairs.transfer(self.question, cases.question, bench.cfg.interchange.transfer)

    def analyse(self, bench: Bench) -> dict[str, float]:
        """From trials.parquet."""
        table: Any = pd.read_parquet(bench.run_dir / "trials.parquet")
        metrics: dict[str, float] = {}
        moved = table[table.operation.str.startswith("over_")]
        for fact, part in moved.groupby(moved.operation.str.partition("/")[0]):
            for (setting, control), rows in part.groupby(["setting", "control"]):
                # A pair that several other values' features were carried to is one case.
                means = rows.groupby(["cases", "case"], sort=False)[["recovered", "hit"]].mean().mean()
                key, tail = f"transfer/{self.question}/{fact}/{setting}", "_control" * bool(control)
                metrics |= {f"{key}/recovered{tail}": means["recovered"], f"{key}/follow_rate{tail}": means["hit"]}
            cells = part[part.control == ""].pivot_table("recovered", "operation", "cases")
            path, words = bench.run_dir / "figures" / f"{fact}.png", ("tested on pairs of", "chosen on pairs of")
            layer_role_heatmap(cells.to_numpy(), list(cells.index), list(cells), path, "recovered share", *words)
        return metrics


@dataclass
class NumberShift:
    """By how much the number in the answer changes with the strength of a setting: a dose on a number line.

    `numbers` are the words for 0, 1, 2 ...; originals above `most` are left out, since what is added must have room.
    Metrics `dose/<question>/strength_2/shift` and `/plus_<n>`; figures/dose.png.
    """

    setting: str
    numbers: list[str]
    most: int

    def analyse(self, bench: Bench) -> dict[str, float]:
        """From trials.parquet."""
        table: Any = without_baselines(pd.read_parquet(bench.run_dir / "trials.parquet"))
        number = {bench.token(word): value for value, word in enumerate(self.numbers)}
        dose = table[(table.setting == self.setting) & (table.answer.map(number) <= self.most)]
        dose = dose.assign(shift=dose.said.map(number) - dose.answer.map(number))  # NaN where no number is said
        metrics: dict[str, float] = {}
        lines: dict[str, list[Rate]] = {}
        for (question, strength, control), part in dose.groupby(["question", "strength", "control"]):
            lines.setdefault(control or f"the {question}", []).append(bootstrap_mean(part["shift"].dropna().to_numpy()))
            key = f"dose/{question}/strength_{strength:g}"
            metrics[f"{key}/shift{'_control' * bool(control)}"] = float(part["shift"].mean())
            if not control:
                metrics |= {f"{key}/plus_{by}": float((part["shift"] == by).mean()) for by in range(self.most + 1)}
        curves = [Curve.of(name, sorted(dose.strength.unique()), points) for name, points in lines.items()]
        words = ("dose (1 = the counterfactual's activations)", "number said minus number before")
        dose_response(curves, bench.run_dir / "figures" / "dose.png", *words, percent=False)
        return metrics


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
