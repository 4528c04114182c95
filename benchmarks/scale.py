"""Long prompts: CPU seconds and memory of a graph as its positions grow, of text, several pictures and tiled ones.

Each size runs in a process of its own, on a random model: Gemma 3 with five layers of a sliding window to one that sees
everything, or for tiled pictures a tiny Idefics 3. An exponent is the slope of log(seconds) or log(megabytes) over
log(positions), by least squares.
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

import numpy as np
import torch
from attribution_cases import Case, prompt_of
from measured import measured
from PIL import Image

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import trace
from vlmscope.models.base import ModelInputs
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_gemma3, tiny_vlm
from vlmscope.replacement import build_replacement
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PICTURE = 64  # positions for each picture
COLUMNS = ("positions", "pictures", "active", "nodes", "edges", "pass_cpu_s", "pass_mb", "graph_cpu_s", "graph_mb")


def made(kind: str, positions: int, hidden: int, layers: int, window: int) -> tuple[VLM, ModelInputs]:
    """A model and a prompt of about this many positions."""
    if kind == "tiles":
        vlm, side = tiny_vlm("idefics3"), 48
    else:
        types = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(layers)]
        sizes: dict[str, Any] = {"d_model": hidden, "n_heads": 4, "n_kv_heads": 2, "head_dim": hidden // 4}
        vlm, side = tiny_gemma3(text_only=kind == "text", layer_types=types, window=window, **sizes), 16
    if kind == "text":
        return vlm, prompt_of(Case("text", hidden, layers, positions, 0, "topk", 0), vlm)
    random = np.random.default_rng(0)
    count = max(positions // PICTURE, 1)
    pictures = [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
    bare = len(vlm.prepare("what", pictures))
    return vlm, vlm.prepare(" ".join(["what"] * max(positions - bare + 1, 1)), pictures)


def one(args: argparse.Namespace, positions: int) -> dict[str, float]:
    """The forward that is frozen, then a whole graph; megabytes are peaks above what there was before."""
    torch.set_num_threads(1)
    config = AttributionConfig(max_nodes=args.nodes, choice=args.choice, memory_gb=args.memory_gb)
    for length in (PICTURE, positions):  # the first brings code and libraries into memory
        vlm, inputs = made(args.kind, length, args.hidden, args.layers, args.window)
        adapter = vlm.adapter
        drawn = random_set(adapter.n_layers, adapter.d_model, 8 * adapter.d_model, args.k).requires_grad_(False)
        scope = Scope(vlm, drawn)
        with measured() as passing:
            replacement = build_replacement(scope, inputs)
        active = len(replacement.feature_activations)
        del replacement
        with measured() as tracing:
            graph = trace(scope, inputs, config).graph
    numbers = len(inputs), len(inputs.sizes), active, graph.n_nodes, graph.n_edges
    times = passing["cpu_seconds"], passing["added_mb"], tracing["cpu_seconds"], tracing["added_mb"]
    return dict(zip(COLUMNS, (*numbers, *times), strict=True))


def main() -> None:
    """Print a row per size, medians of `--repeat`, and the exponents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--kind", choices=("text", "pictures", "tiles"), default="text")
    parser.add_argument("--nodes", type=int, default=200, help="features that get a row of edges")
    parser.add_argument("--choice", default="influence", help="attribution.choice")
    parser.add_argument("--memory-gb", type=float, help="attribution.memory_gb")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args, args.one)))
        return
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    rows: list[list[float]] = []
    print("|", " | ".join(COLUMNS), "|\n|", " --- |" * len(COLUMNS))
    for positions in args.positions:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(positions)]
        runs = [json.loads(subprocess.check_output(command, env=env)) for _ in range(args.repeat)]
        rows.append([median(run[name] for run in runs) for name in COLUMNS])
        print(
            "|", " | ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in rows[-1]), "|", flush=True
        )
    if len(rows) > 1:
        table = np.log(np.array(rows))
        slopes = {name: np.polyfit(table[:, 0], table[:, column], 1)[0] for column, name in enumerate(COLUMNS[5:], 5)}
        print("exponents:", ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items()))


if __name__ == "__main__":
    main()
