"""What float64, float32, bfloat16 and float16 do to the identities and to graphs: `python benchmarks/numerics.py`.

Prints two tables in Markdown; with `--out FOLDER` also `numerics.json`. docs/numerics.md says what they mean.

1. The largest error of every identity (the column "in float32" of task=check) for each tiny random family, at one
   picture (text for a model without pictures), median over seeds, and for Orrery with its transcoders.
2. What Orrery's graphs in bfloat16 and float16 share with those in float32, on pictures of its test split.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from vlmscope.api import load
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import Trace, trace
from vlmscope.conformance import PROMPT, Limits, noise_picture, own_dtype_errors
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.data.orrery.dataset import concept_scenes
from vlmscope.data.orrery.scenes import PLANETS
from vlmscope.models.base import exact_float64
from vlmscope.models.tiny import FAMILIES, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

Errors = dict[str, float]
TOP = 100  # nodes by influence


@dataclass(frozen=True)
class Precision:
    """How a model and its graph are computed: the weights' dtype, the graph's, and whether casts stay in float64."""

    name: str
    model: torch.dtype
    graph: torch.dtype
    exact: bool = False


PRECISIONS = (
    Precision("float64, exact", torch.float64, torch.float64, exact=True),
    Precision("float64", torch.float64, torch.float64),
    Precision("float32", torch.float32, torch.float32),
    Precision("bfloat16", torch.bfloat16, torch.float32),
    Precision("float16", torch.float16, torch.float32),
)
HALVES = ("bfloat16", "float16")


def tiny_errors(family: str, seed: int, precision: Precision) -> Errors:
    """The identities' errors of a tiny model with random transcoders of the same numbers in every dtype."""
    vlm = tiny_vlm(family, seed, dtype=precision.model)
    adapter = vlm.adapter
    transcoders = random_set(adapter.n_layers, adapter.d_model, 96, 8, skip=True, seed=seed).to(precision.model)
    with exact_float64() if precision.exact else nullcontext():
        inputs = vlm.prepare(PROMPT, [noise_picture(seed)] if adapter.has_vision else [])
        return own_dtype_errors(Scope(vlm, transcoders), inputs, Limits(sources=8, seed=seed), precision.graph)


def orrery(dtype: str) -> Scope:
    """Orrery and its transcoders, whose files are bfloat16, in a dtype."""
    return load("orrery", dtype=dtype)


def questions(pictures_a_planet: int) -> Iterator[tuple[str, Image.Image]]:
    """A question on each of some test pictures of every planet; the questions take turns."""
    for planet in PLANETS:
        for number, scene in enumerate(concept_scenes(planet, "test", pictures_a_planet, seed=1)):
            assert scene.image is not None
            asked = scene.questions[number % len(scene.questions)]
            yield asked.question, Image.fromarray(scene.image)


def orrery_errors(precision: Precision, asked: Iterable[tuple[str, Image.Image]]) -> list[Errors]:
    """The identities' errors of Orrery at every question; total effects need all features and are skipped."""
    scope = orrery(str(precision.model).removeprefix("torch."))
    found = []
    with exact_float64() if precision.exact else nullcontext():
        for prompt, picture in asked:
            limits = Limits(targets=400, sources=8)
            inputs = scope.vlm.prepare(prompt, [picture])
            found.append(own_dtype_errors(scope, inputs, limits, precision.graph))
    return found


def node_keys(graph: AttributionGraph) -> np.ndarray:
    """One number a node, the same in every graph of one prompt: kind, layer, position and index."""
    nodes = graph.nodes
    columns = (nodes.kind, nodes.layer + 1, nodes.position + 1, nodes.index + 1)
    limits = (8, 1 << 10, 1 << 16, 1 << 30)
    key = np.zeros(len(nodes), dtype=np.int64)
    for column, limit in zip(columns, limits, strict=True):
        assert column.min() >= 0 and column.max() < limit
        key = key * limit + column
    return key


def top_nodes(traced: Trace) -> set[int]:
    """The keys of the most influential nodes."""
    best = np.argsort(-traced.pruned.influence, kind="stable")[:TOP]
    return set(node_keys(traced.graph)[best].tolist())


def edges_by_key(graph: AttributionGraph, common: np.ndarray) -> np.ndarray:
    """The edges into features and logits among common nodes (sorted keys `[C]`), dense `[C, C]`, rows targets."""
    keys = node_keys(graph)
    place = np.searchsorted(common, keys)
    known = np.isin(keys, common)
    targets = graph.edge_targets()
    kept = known[targets] & known[graph.indices]
    out = np.zeros((len(common), len(common)), dtype=np.float32)
    out[place[targets[kept]], place[graph.indices[kept]]] = graph.weights[kept]
    return out


def relative_change(before: np.ndarray, after: np.ndarray) -> float:
    """Sum of |changes| over the sum of |numbers before|."""
    return float(np.abs(after - before).sum(dtype=np.float64) / np.abs(before).sum(dtype=np.float64))


def influence_by_key(traced: Trace, keys: np.ndarray) -> np.ndarray:
    """The influence on the logits of the nodes with these sorted keys, 0 for one that the graph lacks."""
    out = np.zeros(len(keys))
    out[np.searchsorted(keys, node_keys(traced.graph))] = traced.pruned.influence
    return out


def shared(reference: Trace, other: Trace) -> dict[str, float]:
    """What a graph shares with the reference graph of the same prompt."""
    one, two = reference.graph, other.graph
    logits, others = (traced.replacement.state.logits[-1].double() for traced in (reference, other))
    features = [set(node_keys(g)[g.nodes.of(NodeKind.FEATURE)].tolist()) for g in (one, two)]
    common = np.intersect1d(node_keys(one), node_keys(two))
    before, after = edges_by_key(one, common), edges_by_key(two, common)
    is_logit = np.isin(common, node_keys(one)[one.nodes.of(NodeKind.LOGIT)])
    either = np.union1d(node_keys(one), node_keys(two))
    return {
        "same top-1 logit": float(logits.argmax() == others.argmax()),
        "largest change of a logit, of the largest logit": float((logits - others).abs().max() / logits.abs().max()),
        "active features in both, of those in either": len(features[0] & features[1]) / len(features[0] | features[1]),
        f"top {TOP} nodes by influence in both": len(top_nodes(reference) & top_nodes(other)) / TOP,
        "influence of all nodes: sum of changes, of its sum": relative_change(
            influence_by_key(reference, either), influence_by_key(other, either)
        ),
        "edges between common nodes: sum of changes, of their sum": relative_change(before, after),
        "... those into logits": relative_change(before[is_logit], after[is_logit]),
        "change of the replacement score": abs(reference.pruned.scores.replacement - other.pruned.scores.replacement),
        "largest residual that the graph states": float(two.residual.max()),
    }


def orrery_graphs(asked: list[tuple[str, Image.Image]]) -> dict[str, list[dict[str, float]]]:
    """For each half precision and question what the graph shares with the one in float32."""
    scopes = {name: orrery(name) for name in ("float32", *HALVES)}
    for name in HALVES:  # otherwise differences could come from the weights and not from computing with them
        weights = zip(scopes["float32"].vlm.model.parameters(), scopes[name].vlm.model.parameters(), strict=True)
        changed = max(float((a - b.float()).abs().max()) for a, b in weights)
        print(f"largest change of a weight of Orrery in {name}: {changed:.1e}")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in HALVES}
    config = AttributionConfig()
    for prompt, picture in asked:
        traces = {}
        for name, scope in scopes.items():
            inputs = scope.vlm.prepare(prompt, [picture])
            traces[name] = trace(scope, inputs, config)
            if name in found:
                found[name].append(shared(traces["float32"], traces[name]))
    return found


def median(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    """The median of a column, None where no row has it."""
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else None


def error_table(errors: Mapping[str, Mapping[str, list[Errors]]]) -> str:
    """Markdown: a line a model and precision, a column an identity."""
    first = next(iter(errors.values()))
    names = list(next(iter(first.values()))[0])
    lines = [f"| model | computed in | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
    for model, by_precision in errors.items():
        for precision, rows in by_precision.items():
            cells = [median(rows, name) for name in names]
            shown = " | ".join("-" if cell is None else f"{cell:.1e}" for cell in cells)
            lines.append(f"| {model} | {precision} | {shown} |")
    return "\n".join(lines)


def graph_table(graphs: Mapping[str, list[dict[str, float]]]) -> str:
    """Markdown: a line a figure, per precision its median, lowest and highest (of the top-1 logit: the mean)."""
    lines = [f"| | {' | '.join(graphs)} |", f"| --- |{' --- |' * len(graphs)}"]
    for name in next(iter(graphs.values()))[0]:
        cells = []
        for rows in graphs.values():
            values = [row[name] for row in rows]
            middle = statistics.mean(values) if name == "same top-1 logit" else statistics.median(values)
            cells.append(f"{middle:.2g} ({min(values):.2g} to {max(values):.2g})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """What it ran on."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="random models a family")
    parser.add_argument("--pictures", type=int, default=3, help="pictures a planet")
    parser.add_argument("--out", type=Path, help="folder for numerics.json")
    given = parser.parse_args()
    start = time.perf_counter()
    asked = list(questions(given.pictures))
    print(f"{machine()}; {given.seeds} seeds a family, {len(asked)} pictures\n")
    errors: dict[str, dict[str, list[Errors]]] = {}
    for family in ("gemma3", "gemma3_text", *FAMILIES):
        errors[f"tiny {family}"] = {
            p.name: [tiny_errors(family, seed, p) for seed in range(given.seeds)] for p in PRECISIONS
        }
    errors["Orrery"] = {p.name: orrery_errors(p, asked) for p in PRECISIONS}
    print(error_table(errors), "\n")
    graphs = orrery_graphs(asked)
    print("\n" + graph_table(graphs))
    print(f"\n{time.perf_counter() - start:.0f} s")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "errors": errors, "graphs": graphs}
        (given.out / "numerics.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
