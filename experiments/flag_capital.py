"""Flags and written names: cases that carry between the two, features that both share, and the graph of two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from vlmscope.analyses.bench import Bench
from vlmscope.analyses.declared import from_pairs
from vlmscope.attribution.trace import trace
from vlmscope.circuits.cases import Question, ask, bystanders
from vlmscope.circuits.circuit import Circuit, direct_edges
from vlmscope.circuits.config import SupernodeConfig
from vlmscope.circuits.experiment import Declared
from vlmscope.circuits.page import described, draw_diagram
from vlmscope.circuits.selectors import by_contrast
from vlmscope.core.records import Positions, generator
from vlmscope.core.results import Supernode
from vlmscope.data.icons import on_ground, read_icons, read_relations
from vlmscope.features.readouts import role_means
from vlmscope.interventions.edits import codes
from vlmscope.interventions.trials import Cases
from vlmscope.models.base import ModelInputs

TO_PICTURE, TO_TEXT = "text_to_picture", "picture_to_text"


@dataclass
class Settings:
    """`countries` compared, the `top` features of a layer that prefer one, and the `members` of a box of the graph."""

    countries: int
    top: int
    permutations: int
    members: int


def standing_for(recipient: ModelInputs, donor: ModelInputs) -> torch.Tensor:
    """[T] the donor's position for each of the recipient's, where one shows what the other names.

    Words that both have stand for themselves; soft tokens and the name's tokens, repeated so that both end together,
    for each other.
    """
    mine, theirs = recipient.input_ids, donor.input_ids
    first = next(n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    last = next(n for n, (a, b) in enumerate(zip(mine[::-1], theirs[::-1], strict=False)) if a != b)
    size, others = len(mine) - first - last, len(theirs) - first - last
    middle = [first + (place - size) % others for place in range(size)]
    return torch.tensor([*range(first), *middle, *range(len(theirs) - last, len(theirs))])


def alike(inputs: Sequence[ModelInputs]) -> list[int]:
    """The rows whose prompts have the most usual length, which fit into one batch."""
    lengths = [len(each) for each in inputs]
    return [row for row, length in enumerate(lengths) if length == max(sorted(set(lengths)), key=lengths.count)]


def crossed(bench: Bench, cases: Cases) -> dict[str, Cases]:
    """The cases with the other country's written name as donor, and with the own name in the flag's place."""
    scope, relation = bench.scope, read_relations([cases.question])[cases.question]
    assert cases.donors is not None
    pairs, made = [case.split(" to ") for case in cases.ids], {}

    def written(number: int, side: int) -> ModelInputs:
        both = {country: relation.answers[country] for country in pairs[number]}
        begin = ask(scope, "", both).begin
        return Question(relation.asked(pairs[number][side]), begin, {}).inputs(scope, [])

    names = [[written(row, side) for row in range(len(pairs))] for side in (0, 1)]
    rows = alike(names[1])
    donors = [names[1][row] for row in rows]
    few = replace(cases.select(rows), name=TO_PICTURE, donors=scope.batch(donors), donor_logits=None)
    made[TO_PICTURE] = replace(few, donor_at=standing_for(cases.inputs[0], donors[0]))
    rows = alike(names[0])
    texts, ids = [names[0][row] for row in rows], [cases.ids[row] for row in rows]
    asked = bystanders(scope, TO_TEXT, cases.question, texts, ids)
    few, at = cases.select(rows), standing_for(texts[0], cases.inputs[0])
    known = torch.nonzero(asked.answer == few.answer).flatten().tolist()
    if known:
        made[TO_TEXT] = replace(asked, target=few.target, donors=few.donors, donor_at=at).select(known)
    return made


def declare(bench: Bench) -> Declared:
    """The pairs of flags, with cases that carry between flag and written name."""
    declared = from_pairs(bench)
    bench.records["pairs"], bench.records["test"] = declared.pairs, declared.cases["test"]
    found = [crossed(bench, cases) for cases in declared.cases["test"]]
    more = {name: [each[name] for each in found if name in each] for name in (TO_PICTURE, TO_TEXT)}
    return replace(declared, cases={**declared.cases, **more})


def analyse(bench: Bench) -> dict[str, float]:
    """holders.parquet, shared.parquet and figures/two_steps.png."""
    source = bench.records["pairs"]
    chosen = {"every relation": source.common()} | {name: source.particular(name) for name in source.questions}
    rows = [{"chosen for": name, "layer": m.feature.layer, "place": m.role} for name, ms in chosen.items() for m in ms]
    holders = pd.DataFrame(rows).groupby(["chosen for", "layer", "place"]).size().rename("features").reset_index()
    bench.write_table("holders", holders)
    metrics = {f"features/{name.replace(' ', '_')}": float(len(members)) for name, members in chosen.items()}
    draw_two_steps(bench, bench.records["test"][0])
    return metrics | shared_features(bench, source.questions[0])


@torch.no_grad()
def shared_features(bench: Bench, question: str) -> dict[str, float]:
    """Of the features that prefer a country's flag, how many prefer its name: next to other countries' names."""
    own, scope, relation = bench.analysis, bench.scope, read_relations([question])[question]
    table = read_icons("train", ["country"])
    drawn = {name: [on_ground(image) for image in part.image] for name, part in table.groupby("label")}
    texts = {name: scope.inputs(relation.asked(name), []) for name in drawn if name in relation.answers}
    names = [list(texts)[row] for row in alike(list(texts.values()))][: own.countries]
    written = codes(scope, scope.batch([texts[name] for name in names]))
    shown: dict[str, list[torch.Tensor]] = {}
    rows, metrics = [], {}
    for name in names:
        bench.recorded("train", f"{name} shared", drawn[name], "shared features")
        batch = scope.batch([scope.inputs(relation.asked(), [image]) for image in drawn[name]])
        soft = int(np.flatnonzero(batch.is_image)[-1])
        for layer, code in codes(scope, batch).items():
            dense = code.select(torch.arange(bench.transcoders.widths[layer]), bench.transcoders.widths[layer])
            for place, at in (("soft token and name", soft), ("last", -1)):
                shown.setdefault(f"{place}/{layer}", []).append(dense[:, at].mean(0))
    ends = {"soft token and name": int(np.flatnonzero(batch.is_image)[-1]) - len(batch.roles), "last": -1}
    orders = [generator(bench.cfg.seed, "shared", n).permutation(len(names)) for n in range(own.permutations)]
    for place, at in ends.items():
        total = np.zeros((len(names), len(names)))
        for layer, code in written.items():
            width = bench.transcoders.widths[layer]
            named = code.select(torch.arange(width), width)[:, at]
            prefer = []
            for acts in (torch.stack(shown[f"{place}/{layer}"]), named):
                best = (acts - acts.mean(0)).topk(min(own.top, width)).indices
                prefer.append(torch.zeros_like(acts).scatter_(1, best, 1.0))
            both = (prefer[0] @ prefer[1].T).double().numpy(force=True)
            total += both
            others = (both.sum() - np.trace(both)) / max(1, both.size - len(both))
            rows.append(
                {"place": place, "layer": layer, "own name": np.trace(both) / len(both), "another name": others}
            )
        null = [total[np.arange(len(total)), order].mean() for order in orders]
        real, key = float(np.trace(total) / len(total)), f"shared/{place.replace(' ', '_')}"
        beaten = 1 + sum(value >= real for value in null)
        metrics |= {key: real, f"{key}_shuffled": float(np.mean(null)), f"{key}_p": beaten / (1 + len(null))}
    bench.write_table("shared", pd.DataFrame(rows))
    return metrics


def draw_two_steps(bench: Bench, cases: Cases) -> None:
    """figures/two_steps.png: flag, its country, what is asked, and the answer, in the graph of the first test case."""
    scope, source, size = bench.scope, bench.records["pairs"], bench.analysis.members
    country, graph = cases.ids[0].split(" to ")[0], trace(scope, cases.inputs[0], bench.cfg.attribution).pruned
    test = {each.question: each.batch for each in bench.records["test"]}
    others = [batch for name, batch in test.items() if name != cases.question] or [cases.batch]
    asked, against = role_means(scope, [cases.batch]), role_means(scope, others)
    held, own = source.common()[:size], source.particular(cases.question)[:size]
    taken = {member.feature for member in [*held, *own]}
    known = by_contrast(scope.transcoders, asked, against, SupernodeConfig(count=4 * size), {})
    relation = [member for member in known if member.feature not in taken and member.role != "image"][:size]
    nodes = {
        f"{country}, seen": Supernode("", tuple(held), Positions(("image",))),
        f"{country}, at the end": Supernode("", tuple(held), Positions(("question", "last"))),
        f"asked: {cases.question}": Supernode("", tuple(relation), Positions(("question", "last"))),
        f"this {cases.question}": Supernode("", tuple(own), Positions(("last",))),
    }
    named = {name: replace(node, name=name) for name, node in nodes.items() if node.features}
    shown = described(scope, Circuit(named, {}, model=bench.vlm.name), lambda _: {})
    picture = np.asarray(bench.pairs("test")[cases.question][0].original.images[0])
    draw_diagram(bench.run_dir / "figures" / "two_steps.png", shown, direct_edges([graph.graph], shown), picture, 0.005)
