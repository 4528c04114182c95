"""Where features of every relation and of one alone are, which a flag and a name share, and the graph of two steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from vlmscope.analyses.bench import Bench
from vlmscope.analyses.declared import from_pairs
from vlmscope.attribution.trace import trace
from vlmscope.circuits.cases import of_one_length
from vlmscope.circuits.circuit import passed_on
from vlmscope.circuits.config import SOFT, TEXT, SupernodeConfig
from vlmscope.circuits.experiment import Declared
from vlmscope.circuits.selectors import by_contrast
from vlmscope.core.records import ROLES, Positions, generator
from vlmscope.core.results import Supernode
from vlmscope.data.icons import PICTURE, on_ground, read_icons, read_relations
from vlmscope.features.readouts import role_means
from vlmscope.interventions.edits import codes
from vlmscope.interventions.trials import Cases
from vlmscope.report.circuit_figure import circuit_diagram, drawable

LEAST = 10.0  # per cent of what reaches a box; weaker arrows are not drawn


@dataclass
class Settings:
    """`countries` compared, the `top` features of a layer that prefer one, `permutations` of names."""

    countries: int
    top: int
    permutations: int


def declare(bench: Bench) -> Declared:
    """The pairs of flags."""
    declared = from_pairs(bench)
    bench.records["pairs"], bench.records["test"] = declared.pairs, declared.cases["test"]
    return declared


def analyse(bench: Bench) -> dict[str, float]:
    """by_layer, by_place and shared (Parquet), and figures/two_steps.png."""
    source = bench.records["pairs"]
    chosen = {"every relation": source.common()} | {name: source.particular(name) for name in source.questions}
    kinds = {"layer": bench.transcoders.layers, "place": ROLES}
    for kind, values in kinds.items():
        rows = [
            {"chosen for": name, kind: value, "share": value == (m.feature.layer if kind == "layer" else m.role)}
            for name, members in chosen.items()
            for m in members
            for value in values
        ]
        bench.write_table(f"by_{kind}", pd.DataFrame(rows).sort_values(kind, kind="stable"))
    metrics = {f"features/{name.replace(' ', '_')}": float(len(members)) for name, members in chosen.items()}
    draw_two_steps(bench, bench.records["test"][0])
    return metrics | shared_features(bench, source.questions[0])


@torch.no_grad()
def shared_features(bench: Bench, question: str) -> dict[str, float]:
    """Of the features that prefer a country's flag, how many prefer its name: next to other countries' names."""
    own, scope, relation = bench.analysis, bench.scope, read_relations([question])[question]
    table = read_icons("train", ["country"])
    drawn = {str(name): [on_ground(image) for image in part.image] for name, part in table.groupby("label")}
    texts = {name: scope.inputs(relation.asked(name), []) for name in drawn if name in relation.known}
    names = [list(texts)[row] for row in of_one_length(list(texts.values()))][: own.countries]
    prompts = {name: [scope.inputs(relation.asked(), [image]) for image in drawn[name]] for name in names}
    for name in names:
        bench.recorded("train", f"{name} shared", drawn[name], "shared features")
    shown = [codes(scope, scope.batch(prompts[name])) for name in names]
    written = codes(scope, scope.batch([texts[name] for name in names]))
    seen = prompts[names[0]][0]
    places = {"soft token and name": int(np.flatnonzero(seen.is_image)[-1]) - len(seen), "last": -1}
    orders = [generator(bench.cfg.seed, "shared", n).permutation(len(names)) for n in range(own.permutations)]
    rows, metrics = [], {}
    for place, at in places.items():
        total = np.zeros((len(names), len(names)))  # features of one's flag and another's name
        for layer, width in bench.transcoders.widths.items():
            every = torch.arange(width, device=scope.adapter.device)
            flags = torch.stack([code[layer].select(every, width)[:, at].mean(0) for code in shown])
            sides = []
            for acts in (flags, written[layer].select(every, width)[:, at]):
                best = (acts - acts.mean(0)).topk(min(own.top, width)).indices
                sides.append(torch.zeros_like(acts).scatter_(1, best, 1.0))
            both = (sides[0] @ sides[1].T).double().numpy(force=True)
            total += both
            same, rest = np.trace(both) / len(both), both[~np.eye(len(both), dtype=bool)].mean()
            rows.append({"place": place, "layer": layer, "own name": same, "another name": rest})
        null = np.array([total[np.arange(len(total)), order].mean() for order in orders])
        real, key = float(np.trace(total) / len(total)), f"shared/{place.replace(' ', '_')}"
        beaten = float(1 + (null >= real).sum()) / (1 + len(null))
        metrics |= {key: real, f"{key}_shuffled": float(null.mean()), f"{key}_p": beaten}
    bench.write_table("shared", pd.DataFrame(rows))
    return metrics


def draw_two_steps(bench: Bench, cases: Cases) -> None:
    """figures/two_steps.png and two_steps_dark.png, of the first test case: why its answer, not the other flag's."""
    scope, source, asked = bench.scope, bench.records["pairs"], cases.question
    test = {each.question: each.batch for each in bench.records["test"]}
    others = [batch for name, batch in test.items() if name != asked] or [cases.batch]
    held, own = source.common(), source.particular(asked)
    taken = {member.feature for member in [*held, *own]}
    of, against = (role_means(scope, batches) for batches in ([cases.batch], others))
    known = by_contrast(scope.transcoders, of, against, SupernodeConfig(count=bench.cfg.interchange.features), {})
    relation = [member for member in known if member.feature not in taken and member.role != "image"]
    parts = {
        "features that name the country": (held, ("image",)),
        (own_words := f"features of what is asked: {asked}"): (relation, ("question", "last")),
        f"features that recall the {asked}": (own, ("last",)),
    }
    nodes = [Supernode(name, tuple(members), Positions(roles)) for name, (members, roles) in parts.items() if members]
    ends = [f"id:{int(tokens[0])}" for tokens in (cases.answer, cases.target)]
    graph = trace(scope, cases.inputs[0], replace(bench.cfg.attribution, difference=ends)).pruned.graph
    side = next(pair.original for pair in bench.pairs("test")[asked] if pair.id == cases.ids[0])
    flag, question, answer = "the flag", "the question", side.answer.strip()
    titles = {SOFT: flag, TEXT: question} | {node.name: node.name for node in nodes}
    flows = passed_on(graph, nodes, own_words)
    shares = [(titles[s], titles.get(t, answer), share) for s, t, share in flows if s in titles]
    chance = float(cases.base.logits[0].softmax(-1)[cases.answer[0]])
    words = {question: side.prompt.replace(PICTURE, "▢"), answer: f"the model's answer ({100 * chance:.0f} %)"}
    for name, dark in (("two_steps", False), ("two_steps_dark", True)):
        drawn = bench.run_dir / "figures" / f"{name}.png", {flag: [np.asarray(side.images[0])]}
        circuit_diagram(
            nodes,
            drawable(shares, LEAST),
            *drawn,
            words,
            dark,
            "share of what reaches a box beside the question's words",
        )
