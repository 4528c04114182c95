"""Heads in graphs: `python -m benchmarks.heads` measures their time, `--planets 3` what brings planets to the answer.

Time: pairs of processor times of one process, one after the other, so that other processes slow both alike.
Planets: test pictures of each planet. Of what kept edges carry from positions on the picture to the last position, the
mean share of each head; and for the three heads with most on a picture, at the soft token that the last position looks
at most, the score as a sum over pairs of kinds of sources, mean over the pictures.
"""

import argparse
import statistics
import time
from collections import defaultdict

import numpy as np
import torch
from PIL import Image

from vlmscope.api import load
from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.edges import lay_out
from vlmscope.attribution.heads import Place, score_parts
from vlmscope.attribution.trace import Trace, trace, with_heads
from vlmscope.core.graph import NodeKind
from vlmscope.data.orrery.dataset import concept_scenes, pictures
from vlmscope.scope import Scope

PROMPT = "what planet is this ?"
PLANETS = ("mercury", "earth", "mars", "jupiter", "saturn", "neptune", "moon")
KINDS = (NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS)


def measure_time(scope: Scope, image: Image.Image, repeat: int) -> None:
    """Print a line per pair and the median."""
    config, inputs, ratios = AttributionConfig(), scope.inputs(PROMPT, [image]), []
    for number in range(repeat + 1):
        begin = time.process_time()
        plain = trace(scope, inputs, config)
        between = time.process_time()
        with_heads(scope, plain, config)
        end = time.process_time()
        if number:  # the first one warms caches
            ratios.append((end - begin) / (between - begin))
            print(f"{between - begin:.2f} s without, {end - begin:.2f} s with heads: {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), n = {repeat}")


def to_the_answer(traced: Trace) -> np.ndarray:
    """Shares of heads `[L, H]` in what kept edges carry from the picture to the last position; they sum to 1."""
    graph, heads = traced.graph, traced.pruned.heads
    assert heads is not None
    source, target = (graph.nodes.position[nodes] for nodes in
                      (graph.indices[heads.edges], graph.targets_of(heads.edges)))  # fmt: skip
    crossing = np.append(graph.is_image, False)[source] & (target == len(graph.tokens) - 1)
    flow = heads.parts()[1][crossing].sum(0)
    return flow / flow.sum()


def score_by_kind(scope: Scope, traced: Trace, layer: int, head: int) -> np.ndarray:
    """The score of the last position for its strongest soft token, by kinds of the query's and the key's sources."""
    replacement, last = traced.replacement, len(traced.graph.tokens) - 1
    row = replacement.state.patterns[layer].row(head, last) * torch.from_numpy(traced.graph.is_image)
    adjoint = Adjoint(replacement)
    parts = score_parts(scope.adapter, replacement, adjoint, Place(layer, head, last, int(row.argmax())))
    kept = np.ones(len(replacement.feature_activations), dtype=bool)
    nodes_of, nodes = lay_out(replacement, adjoint.columns, kept, parts.targets, "float32")
    kinds = nodes.kind[nodes_of[: parts.query.shape[1]]]
    query, key = (np.stack([side.double().numpy()[:, kinds == kind].sum(1) for kind in KINDS])
                  for side in (parts.query, parts.key))  # fmt: skip
    return parts.scale * query @ key.T


def measure_planets(scope: Scope, count: int) -> None:
    """Print a line per picture, then shares of heads and scores by kinds."""
    shares, blocks, right = [], defaultdict(list), 0
    for planet in PLANETS:
        for image in pictures(concept_scenes(planet, "test", count, seed=99)):
            inputs, config = scope.inputs(PROMPT, [Image.fromarray(image)]), AttributionConfig()
            traced = with_heads(scope, trace(scope, inputs, config), config)
            right += traced.graph.logit_tokens[0] == planet
            share = to_the_answer(traced)
            shares.append(share)
            best = [divmod(number, share.shape[1]) for number in np.argsort(-share, axis=None)[:3].tolist()]
            for head in best:
                blocks[head].append(score_by_kind(scope, traced, *head))
            print(planet, traced.graph.logit_tokens[0], best, flush=True)
    mean = np.mean(shares, 0)
    print(f"{len(shares)} pictures, {right} right; by layer", np.round(mean.sum(1), 3).tolist())
    for layer, head in sorted(blocks, key=lambda one: -mean[one]):
        found = np.array(blocks[layer, head])
        print(f"L{layer}H{head} share {mean[layer, head]:.3f}; score {found.sum((1, 2)).mean():+.2f}, n = {len(found)}")
        print("  query down, key across: " + ", ".join(kind.name.lower() for kind in KINDS))
        print(found.mean(0).round(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="orrery2", help="a name of task=list that a transcoder set has too")
    parser.add_argument("--image", default="assets/pictures/mars.png")
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--planets", type=int, default=0, help="pictures of each planet")
    given = parser.parse_args()
    scope = load(given.model, given.model)
    if given.planets:
        measure_planets(scope, given.planets)
    else:
        measure_time(scope, Image.open(given.image).convert("RGB"), given.repeat)


if __name__ == "__main__":
    main()
