"""Which features a graph keeps, by influence and by total effect: `python -m benchmarks.node_choice`.

Orrery's graphs of test pictures of every kind (and of text alone), one question each, with `attribution.max_nodes` far
below the number of active features. What a choice keeps is measured on the whole graph: the influence of the chosen
features there, over that of all features, beside the most that so many features can have. Prints a table in Markdown.
"""

import argparse
import platform
import statistics
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmscope.api import load
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.influence import influence, logit_weights, scores
from vlmscope.attribution.trace import attribute
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import KINDS
from vlmscope.models.base import ModelInputs
from vlmscope.replacement import build_replacement
from vlmscope.scope import Scope

CHOICES = ("influence", "total_effect")
Figures = dict[str, float]


def prompts(scope: Scope, count: int) -> list[ModelInputs]:
    """`count` test scenes of each kind, the first question of the first, the second of the second, and so on."""
    found = []
    for kind in KINDS:
        for number in range(count):
            scene = make_scene("test", kind, number)
            question = scene.questions[number % len(scene.questions)].question
            found.append(scope.inputs(question, [] if scene.image is None else [Image.fromarray(scene.image)]))
    return found


def chosen(graph: AttributionGraph) -> set[tuple[int, int, int]]:
    """The features with a node, as layer, position, index."""
    nodes = graph.nodes.of(NodeKind.FEATURE)
    table = graph.nodes
    return set(
        zip(table.layer[nodes].tolist(), table.position[nodes].tolist(), table.index[nodes].tolist(), strict=True)
    )


def of_prompt(scope: Scope, inputs: ModelInputs, limits: list[int], repeat: int) -> dict[int, Figures]:
    """Figures by limit, of those that are below the number of active features."""
    replacement = build_replacement(scope, inputs)

    def graph_of(**settings: Any) -> tuple[AttributionGraph, float]:
        graphs, seconds = [], []
        for _ in range(repeat):
            began = time.perf_counter()
            graphs[:] = [attribute(replacement, AttributionConfig(**settings), scope.vlm.tokenizer)]
            seconds.append(time.perf_counter() - began)
        return graphs[0], statistics.median(seconds)

    whole, seconds = graph_of(max_nodes=10**9)
    features = whole.nodes.of(NodeKind.FEATURE)
    flow = influence(whole, logit_weights(whole)).nodes[features]
    table = whole.nodes
    keys = list(
        zip(
            table.layer[features].tolist(),
            table.position[features].tolist(),
            table.index[features].tolist(),
            strict=True,
        )
    )
    found: dict[int, Figures] = {}
    for limit in limits:
        if limit >= len(features):
            continue
        record: Figures = {"active": len(features), "whole_s": seconds}
        sets = {}
        for choice in CHOICES:
            graph, record[f"{choice}_s"] = graph_of(max_nodes=limit, choice=choice)
            sets[choice] = chosen(graph)
            record[f"{choice}_mass"] = sum(flow[i] for i, key in enumerate(keys) if key in sets[choice]) / flow.sum()
            record[f"{choice}_left_out"] = scores(graph).left_out_share
        record["common"] = len(sets["influence"] & sets["total_effect"]) / limit
        record["best_mass"] = np.sort(flow)[-limit:].sum() / flow.sum()
        found[limit] = record
    return found


def cell(records: list[Figures], name: str) -> str:
    """Median (lowest to highest)."""
    values = [record[name] for record in records]
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=3, help="of each kind")
    parser.add_argument("--limits", type=int, nargs="*", default=[250, 500, 1000, 2000])
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    scope = load("orrery", check=False)
    inputs = prompts(scope, given.scenes)
    found = [of_prompt(scope, one, given.limits, given.repeat) for one in inputs]
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}", end="")
    print(f", {torch.get_num_threads()} threads; {len(inputs)} prompts, median (lowest to highest)\n")
    names = ["common", "best_mass", *(f"{c}_{what}" for what in ("mass", "left_out", "s") for c in CHOICES), "whole_s"]
    print("| max_nodes | prompts | active | " + " | ".join(names) + " |\n" + "| --- " * (len(names) + 3) + "|")
    for limit in given.limits:
        records = [figures[limit] for figures in found if limit in figures]
        if not records:
            continue
        active = [round(record["active"]) for record in records]
        print(f"| {limit} | {len(records)} | {min(active):,} to {max(active):,} | ", end="")
        print(" | ".join(cell(records, name) for name in names) + " |")


if __name__ == "__main__":
    main()
