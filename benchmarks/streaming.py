"""A wide set that stays on disk: seconds and memory of a pass over all encoders and of a graph, against one in memory.

The same random Gemma 3 and set for both, each in a process of its own; the graphs must be equal bit for bit. "Cold"
means that the kernel was asked to drop the files' pages first, so that they come from the disk.
"""

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from attribution_cases import Case, model_of, prompt_of
from measured import measured
from safetensors.torch import save_file

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import trace
from vlmscope.core.artifacts import write_yaml
from vlmscope.replacement import build_replacement
from vlmscope.scope import Scope
from vlmscope.transcoders.formats import load_set
from vlmscope.transcoders.streaming import BLOCK

WHAT = ("seconds", "cpu_seconds", "added_mb")


def write_set(case: Case, folder: Path) -> None:
    """A random set in bfloat16, a layer at a time."""
    random = torch.Generator().manual_seed(0)

    def rows() -> torch.Tensor:
        return torch.empty(case.n_features, case.d_model).normal_(0, case.d_model**-0.5, generator=random).bfloat16()

    for layer in range(case.n_layers):
        zeros = {"b_enc": torch.zeros(case.n_features), "b_dec": torch.zeros(case.d_model)}
        save_file({"W_enc": rows(), "W_dec": rows(), **zeros}, folder / f"layer_{layer}.safetensors")
    config = {"model_kind": "transcoder_set", "top_k": case.k, "activation": case.activation}
    write_yaml(folder / "config.yaml", config | {"num_model_layers": case.n_layers})


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(folder: Path) -> float:
    """Bytes per second of reading the files one after another, uncached."""
    drop_cache(folder)
    began, size = time.perf_counter(), 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while part := file.read(1 << 23):
                size += len(part)
    return size / (time.perf_counter() - began)


def one(
    case: Case, folder: Path, stream: bool, cold: bool, max_nodes: int, memory_gb: float | None
) -> dict[str, object]:
    """Load, a pass over all encoders and a graph; `mb` are peaks above what the process used before each."""
    torch.set_num_threads(1)
    config = AttributionConfig(max_nodes=max_nodes, memory_gb=memory_gb)
    trim = ctypes.CDLL(None).malloc_trim  # what was freed before goes back, else it would hide what is used next
    narrow = Case("warm", case.d_model, case.n_layers, case.n_tokens, 4 * case.k, case.activation, case.k)
    with tempfile.TemporaryDirectory() as small:  # so that code and libraries are in memory before it is measured
        write_set(narrow, Path(small))
        vlm = model_of(narrow)
        inputs = prompt_of(narrow, vlm)
        trace(Scope(vlm, load_set(small, stream=stream).requires_grad_(False)), inputs, config)
    found: dict[str, object] = {"model_mb": sum(p.nbytes for p in vlm.model.parameters()) / 1e6}
    if cold:
        drop_cache(folder)
    trim(0)
    with measured() as loading:
        scope = Scope(vlm, load_set(folder, stream=stream).requires_grad_(False))
        trim(0)
    found["set_mb"] = loading["kept_mb"]
    with measured() as passing:
        replacement = build_replacement(scope, inputs)
    used = [len(features.index.unique()) for features in replacement.features]
    found["rows_mb"] = 2 * sum(used) * case.d_model * 4 / 1e6
    del replacement
    if cold:
        drop_cache(folder)
    trim(0)
    with measured() as tracing:
        graph = trace(scope, inputs, config).graph
    digest = hashlib.sha256()
    for array in (graph.indptr, graph.indices, graph.weights, graph.nodes.index, graph.nodes.activation):
        digest.update(np.ascontiguousarray(array).tobytes())
    parts = {"load": loading, "pass": passing, "graph": tracing}
    return found | {"graph": digest.hexdigest(), "nodes": graph.n_nodes} | {
        f"{name}_{what}": record[what] for name, record in parts.items() for what in WHAT
    }  # fmt: skip


def main() -> None:
    """Print the table; exit code 1 if graphs differ or the streamed pass takes more than 1.5 times what it must."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=262144)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--memory-gb", type=float, help="attribution.memory_gb")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the set; a temporary one by default")
    parser.add_argument("--one", choices=("streamed-cold", "streamed", "resident"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    case = Case("wide", args.hidden, args.layers, args.tokens, args.width, "topk", args.k)
    if args.one:
        stream, cold = args.one != "resident", args.one == "streamed-cold"
        print(json.dumps(one(case, args.folder, stream, cold, args.nodes, args.memory_gb)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        write_set(case, folder)
        encoders = case.n_layers * case.n_features * case.d_model * 2
        rate = median(disk_rate(folder) for _ in range(args.repeat))
        print(
            f"encoders {encoders / 1e6:.0f} MB in bfloat16; disk {rate / 1e9:.2f} GB/s: {encoders / rate:.2f} s a pass"
        )
        env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        runs: dict[str, list[dict]] = {}
        for mode in ("streamed-cold", "streamed", "resident"):
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--one", mode]
            runs[mode] = [json.loads(subprocess.check_output(command, env=env)) for _ in range(args.repeat)]
        names = [f"{part}_{what}" for part in ("load", "pass", "graph") for what in WHAT]
        print("| set |", " | ".join(names), "|\n|", " --- |" * (len(names) + 1))
        for mode, records in runs.items():
            print(f"| {mode} |", " | ".join(f"{median(r[name] for r in records):.3g}" for name in names), "|")
        first = runs["streamed"][0]
        block = BLOCK * case.d_model * 4 / 1e6
        bound = first["model_mb"] + block + first["rows_mb"]
        print(
            f"model {first['model_mb']:.0f} MB + block {block:.0f} MB + active rows {first['rows_mb']:.0f} MB = "
            f"{bound:.0f} MB"
        )
        for part in ("graph", "pass"):
            peak = first["model_mb"] + median(r["set_mb"] + r[f"{part}_added_mb"] for r in runs["streamed"])
            parts = f"model, loaded set ({first['set_mb']:.0f} MB) and {part}"
            print(f"peak of {parts}: {peak:.0f} MB, {peak / bound:.2f} times that")
        same = len({record["graph"] for records in runs.values() for record in records}) == 1
        print(f"graphs of {first['nodes']} nodes equal bit for bit: {same}")
        if not same or peak > 1.5 * bound:
            sys.exit(1)


if __name__ == "__main__":
    main()
