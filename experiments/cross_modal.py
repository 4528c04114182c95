"""Features that a concept's pictures and its word share (vlmscope.features.cross_modal), and trials on them.

For every set of `association`: counts.parquet and shared.parquet, and case sets "picture" and "text" (right answers to
unseen prompts), "picture_other" and "text_other" (once for each other concept whose features are ablated), and
"picture_to_text" and "text_to_picture" (another concept's prompts of the other kind as donors).
"""

from typing import cast

import numpy as np
import pandas as pd
from PIL import Image

from vlmscope.circuits.cases import answer_token, bystanders
from vlmscope.circuits.experiment import Declared
from vlmscope.circuits.operations import Ablate, Carry
from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Curve
from vlmscope.data.orrery.dataset import colour_scenes, digit_scenes, pictures
from vlmscope.features import cross_modal as search
from vlmscope.interventions.named import by_layer, mean_activations
from vlmscope.metrics.decoding import Rule
from vlmscope.metrics.table import measured
from vlmscope.report.figures import dose_response, share_matrices

KINDS = ("picture", "text")
CASE_SETS = ("picture", "text", "picture_other", "text_other", "picture_to_text", "text_to_picture")
SUMMARY = ("shared", "by_rule", "by_rule_null", "by_rule_p", "matching_expected", "matching_p")  # of each question


def declare(bench):
    """Find what is shared in every set, and the cases and features of the trials."""
    if not bench.cfg.association:
        raise UserError("this experiment needs sets of concepts: /cross_modal@association.planets: planets")
    counted, listed, cases, means, features = [], [], {name: [] for name in CASE_SETS}, {}, {}
    for name, config in bench.cfg.association.items():
        found = {question: find(bench, config, question) for question in config.questions}
        table = search.counts(found, config.concepts, bench.transcoders.layers, config.seed)
        counted.append(table.assign(set=name))
        listed.append(search.shared_features(found, config.concepts).assign(set=name))
        draw(found, config.concepts, bench.transcoders.layers, bench.run_dir / "figures", name)
        every = search.in_every_question(found)
        for question, shared in found.items():
            total = table[(table.question == question) & (table.of == "all")].iloc[0]
            bench.metrics |= {f"{name}/{question}/{key}": float(total[key]) for key in SUMMARY}
            for c, concept in enumerate(config.concepts):
                features[name, question, concept] = {"shared": shared.features(c), "every_question": every[c]}
            add_cases(bench, name, config, question, cases, means)
    if not any(cases.values()):
        raise UserError("no question of any set is answered rightly: there is nothing to ablate or to carry")
    for file, tables in (("counts", counted), ("shared", listed)):
        with atomic_path(bench.run_dir / f"{file}.parquet") as temporary:
            pd.concat(tables).to_parquet(temporary, index=False)

    def operation(trial, of, limit):
        own, other = (features.get((of.tags["set"], of.question, of.tags[key]), {}) for key in ("concept", "other"))
        if trial.features == "all":
            return Carry(None, last=trial.last)
        if trial.features not in ("shared", "every_question", "other"):
            raise UserError(f"trials: features={trial.features}: choose shared, every_question, other or all")
        chosen = own.get(trial.features, set()) | other.get(trial.features, set())
        if trial.features == "other":  # what the two concepts have in common is both's
            chosen = other["shared"] - own["shared"]
        chosen = by_layer(bench.transcoders, sorted(chosen))
        return Ablate(chosen) if trial.do == "ablate" else Carry(chosen, last=trial.last)

    return Declared(cases, operation, lambda _, of: means[means_key(of)], metrics=metrics)


def means_key(cases):
    """Controls are matched on the recipients' own prompts."""
    return tuple(cases.tags[key] for key in ("set", "concept", "kind")) + (cases.question,)


def find(bench, config, question):
    """What is shared under one question, from training pictures."""
    asked = config.questions[question]
    texts = [bench.scope.inputs(asked.asked_in_text(concept)) for concept in config.concepts]
    candidates = search.text_candidates(bench.scope, texts, config.ratio)
    images = [images_of(bench, config, question, one, "train", config.pictures) for one in config.concepts]
    batches = [bench.scope.batch(bench.inputs(of, asked.picture)) for of in images]
    peaks = np.concatenate([search.picture_peaks(bench.scope, batch, candidates.by_layer()) for batch in batches])
    labels = np.repeat(np.arange(len(images)), [len(of) for of in images])
    rule, numbers = Rule(config.ratio, config.fires), (config.q, config.permutations, config.seed)
    return search.find_shared(candidates, peaks, labels, bench.transcoders.layers, rule, *numbers)


def images_of(bench, config, question, concept, split, count):
    """Pictures of a concept under a question; on the test split the user's own take their place."""
    if config.source == "planets" or (split == "test" and bench.cfg.images.get(concept)):
        return bench.concept_pictures(concept, split, count, config.seed)
    if config.source == "digits":
        scenes = digit_scenes(concept, split, count, config.seed, config.questions[question].second)
    else:
        scenes = colour_scenes(concept, split, count, config.seed)
    return [Image.fromarray(picture) for picture in pictures(scenes)]


def add_cases(bench, name, config, question, cases, means):
    """Add the case sets of one question, the means that match their controls, and accuracies."""
    asked, right = config.questions[question], {}
    total = dict[str, int](picture=0, text=0)
    for concept in config.concepts:
        images = images_of(bench, config, question, concept, "test", config.test_pictures)
        texts = [bench.scope.inputs(asked.asked_in_text(concept))]
        for kind, prompts in (("picture", bench.inputs(images, asked.picture)), ("text", texts)):
            ids = [f"{concept} {kind} {number}" for number in range(len(prompts))]
            tags = {"set": name, "concept": concept, "kind": kind, "other": ""}
            every = bystanders(bench.scope, kind, question, prompts, ids).tagged(tags)
            token = answer_token(bench.scope, asked.answers[concept])
            rows = (every.answer == token).nonzero().flatten().tolist()
            total[kind] += len(prompts)
            if rows:
                right[concept, kind] = one = every.select(rows)
                means[means_key(one)] = mean_activations(bench.scope, [one.batch], bench.transcoders.layers)
    for kind in KINDS:
        sizes = [one.batch.size for (_, of), one in right.items() if of == kind]
        bench.metrics[f"{name}/{question}/{kind}_accuracy"] = sum(sizes) / total[kind]
    others = search.drawn_others(config, question, bench.cfg.seed)
    for (concept, kind), one in right.items():
        cases[kind].append(one)
        for other in others[concept]:
            paired = one.tagged({"other": other})
            cases[f"{kind}_other"].append(paired)
            donor = right.get((other, KINDS[1 - KINDS.index(kind)]))
            if donor is not None and asked.answers[other] != asked.answers[concept]:
                # Pictures are many and a text is one, which stands next to each: a case is its picture's.
                ids = (paired if kind == "picture" else donor).ids
                cases[f"{donor.tags['kind']}_to_{kind}"].append(paired.facing(donor, ids))


def draw(found, concepts, layers, folder, name):
    """figures/<set>_coincidences.png and figures/<set>_layers.png (all questions, next to shuffled pictures)."""
    maps = {question: shared.coincidences for question, shared in found.items()}
    labels = {"axes_of": ("prefers pictures of", "prefers the word"), "percent": False}
    share_matrices(concepts, maps, folder / f"{name}_coincidences.png", **labels)
    lines, null, x = [], np.sum([shared.null_layers for shared in found.values()], 0), tuple(map(float, layers))
    for at, place in enumerate(search.PLACES):
        of = [one.candidates.features[m].layer for one in found.values() for _, m in np.argwhere(one.shared[:, at])]
        lines.append(Curve(place, x, *3 * [tuple(float(of.count(layer)) for layer in layers)]))
    band = (null.mean(0), *np.quantile(null, (0.025, 0.975), axis=0))
    lines.append(Curve("any place, shuffled", x, *(tuple(map(float, one)) for one in band)))
    dose_response(lines, folder / f"{name}_layers.png", "layer", "shared features", percent=False)


def metrics(table, trials, settings):
    """`<trial>/<setting>/<set>` over all questions, with an interval over pictures and the control's rate."""
    found, reported = measured(table, ["operation", "setting", "set"], {k: t.measure for k, t in trials.items()}), {}
    for key, row in found.iterrows():
        name = "/".join(cast(tuple[str, ...], key))
        reported |= {name: row.value, f"{name}_ci_low": row.ci_low, f"{name}_ci_high": row.ci_high}
        reported |= {} if np.isnan(row.matched) else {f"{name}_control": row.matched}
    return reported
