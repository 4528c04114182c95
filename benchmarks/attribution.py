"""The attribution engine and the pruning against circuit-tracer: `python -m benchmarks.attribution [--quick]`.

Makes the peer an environment of its own (PyPI), gives both sides the same model, transcoders and prompt, asserts that
they find the same edges, and then measures them in turns. Each part keeps its result in WORK/results, so parts can be
measured one by one; the tables are printed from what is there. Figures: `benchmarks/results/attribution.md`.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.attribution_cases import LARGE, SMALL, Case, write_case
from benchmarks.attribution_plots import draw_growth, exponent

ROOT = Path(__file__).resolve().parent.parent
PEER = ("circuit-tracer==0.5.0", "nnsight==0.6.1", "torch==2.13.0", "transformers>=4.57,<4.58")
PRUNED = {"n_layers": 26, "n_positions": 16, "n_features": 290, "n_logits": 10}  # 8,006 nodes
BATCHES = (64, 256, 512)  # of the peer: its fastest is measured; 512 is its default
TOLERANCE = 1e-5
GROWTH = Case("growth", 128, 8, 32, 1024, "topk", 16)
AXES: dict[str, list[dict[str, Any]]] = {
    "nodes": [{"k": 64, "max_nodes": count} for count in (1000, 2000, 4000, 8000)],
    "tokens": [{"n_tokens": count} for count in (16, 32, 64, 128)],
    "layers": [{"n_layers": count} for count in (4, 8, 16, 32)],
    "features": [{"k": count} for count in (8, 16, 32, 64)],
    "largest": [{"n_layers": 16, "n_tokens": 64, "k": 40}],
}


class Worker:
    """A process that answers requests in JSON lines."""

    def __init__(self, command: list[str], folder: Path, threads: int) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "src")] if command[0] == sys.executable else [str(ROOT)])
        quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        environment = os.environ | quiet | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        self.command = " ".join(command)
        self.process = subprocess.Popen(
            [*command, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "--verbose" not in sys.argv else None,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.command} ended; run with --verbose to see why")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()


@contextmanager
def workers(commands: Sequence[list[str]], folder: Path, threads: int) -> Iterator[list[Worker]]:
    """Start workers and end them."""
    started: list[Worker] = []
    try:
        for command in commands:
            started.append(Worker(command, folder, threads))
        yield started
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.wait()


OWN = [sys.executable, "-m", "benchmarks.attribution_own"]


def peer_command(work: Path) -> list[str]:
    """The peer's side, in an environment that is made when it is missing."""
    folder = work / "peer"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"making {folder} with {', '.join(PEER)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER], check=True)
        (folder / "complete").touch()
    return [str(python), str(ROOT / "benchmarks" / "attribution_peer.py")]


def agreement(own: Path, peer: Path) -> dict[str, float]:
    """Largest difference of a row, of its largest edge; the peer's token columns corrected by sqrt(width).

    Raises:
        AssertionError: other nodes, or features and errors differ by more than the tolerance.
    """
    with np.load(own) as ours, np.load(peer) as theirs:
        assert (ours["features"] == theirs["features"]).all(), "the two sides have other features"
        assert (ours["logits"] == theirs["logits"]).all(), "the two sides have other logits"
        found, other = ours["matrix"], theirs["matrix"]
        split, scale = int(ours["widths"][:2].sum()), float(ours["d_model"]) ** 0.5
    row = np.abs(found).max(1)

    def off(columns: slice, factor: float) -> float:
        return float((np.abs(found[:, columns] - factor * other[:, columns]).max(1) / row).max())

    result = {
        "features_and_errors": off(slice(split), 1.0),
        "tokens_corrected": off(slice(split, None), scale),
        "tokens_as_they_are": off(slice(split, None), 1.0),
    }
    assert result["features_and_errors"] <= TOLERANCE, result
    assert result["tokens_corrected"] <= TOLERANCE, result
    return result


def in_turns(own: Worker, peer: Worker, repeats: int, **peer_request: Any) -> dict[str, Any]:
    """Medians of both sides, measured alternately."""
    times: dict[str, list[float]] = {"own": [], "peer": []}
    for _ in range(repeats):
        times["own"].append(own.ask()["seconds"])
        times["peer"].append(peer.ask(**peer_request)["seconds"])
    medians = {f"{side}_seconds": statistics.median(found) for side, found in times.items()}
    return medians | {"ratio": medians["peer_seconds"] / medians["own_seconds"], "repeats": repeats, "times": times}


def attribution_part(case: Case, work: Path, threads: int, repeats: int) -> dict[str, Any]:
    """One case of the table."""
    folder = work / case.name
    if not (folder / "case.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_case(case, folder)
    with workers([OWN, peer_command(work)], folder, threads) as (own, peer):
        first_own = own.ask()
        first_peer = peer.ask(batch_size=BATCHES[0])
        own.ask(save=str(folder / "own.npz"))
        peer.ask(batch_size=BATCHES[0], save=str(folder / "peer.npz"))
        agree = agreement(folder / "own.npz", folder / "peer.npz")
        tried = {size: peer.ask(batch_size=size)["seconds"] for size in BATCHES}
        batch = min(tried, key=lambda size: tried[size])
        result = in_turns(own, peer, repeats, batch_size=batch)
        work_done = own.ask(count=True)
    rate = work_done["flops"] / result["own_seconds"]
    best = gemm_rate(threads)
    return result | {
        "nodes": first_own["nodes"],
        "peer_nodes": first_peer["nodes"],
        "own_added_mb": first_own["added_mb"],
        "peer_added_mb": first_peer["added_mb"],
        "peer_batch": batch,
        "peer_tried": tried,
        "agreement": agree,
        "flops": work_done["flops"],
        "intensity": work_done["flops"] / work_done["bytes"],
        "gemm_share": rate / best,
        "gemm_gflops": best / 1e9,
    }


def pruning_part(work: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Pruning a random causal graph, the same on both sides."""
    folder = work / "pruning"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.json").write_text(json.dumps(PRUNED))
    with workers([OWN], folder, threads) as (own,):
        first_own = own.ask(save=str(folder / "graph.npz"))
        with workers([peer_command(work)], folder, threads) as (peer,):
            first_peer = peer.ask()
            result = in_turns(own, peer, repeats)
    off = abs(first_own["kept_nodes"] - first_peer["kept_nodes"]) / first_peer["kept_nodes"]
    # The peer sums 64 million scores in float32, so its thresholds are not exact.
    assert off < 0.01, (first_own, first_peer)
    kept = {name: [first_own[name], first_peer[name]] for name in ("kept_nodes", "kept_edges")}
    return (
        result
        | kept
        | {
            "nodes": first_own["nodes"],
            "edges": first_own["edges"],
            "own_added_mb": first_own["added_mb"],
            "peer_added_mb": first_peer["added_mb"],
        }
    )


def large_pruning_part(work: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Pruning 20,000 nodes, ours alone: the peer's dense copies would take 11 GB."""
    folder = work / "pruning_20000"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"n_layers": 26, "n_positions": 32, "n_features": 736, "n_logits": 10}
    (folder / "graph.json").write_text(json.dumps(sizes))
    with workers([OWN], folder, threads) as (own,):
        first = own.ask()
        times = [own.ask()["seconds"] for _ in range(repeats)]
    return {
        "own_seconds": statistics.median(times),
        "own_added_mb": first["added_mb"],
        "graph_mb": first["edges"] * 8 / 1e6,
        "nodes": first["nodes"],
        "edges": first["edges"],
        "repeats": repeats,
    }


def growth_part(axis: str, work: Path, threads: int, repeats: int) -> dict[str, Any]:
    """Time, memory and sizes along one axis, each point in a process of its own."""
    points = []
    for change in AXES[axis]:
        sizes = {name: value for name, value in change.items() if name != "max_nodes"}
        name = "-".join(["growth", *(f"{key}={value}" for key, value in sizes.items())])
        case = dataclasses.replace(GROWTH, **sizes, name=name)
        folder = work / case.name
        if not (folder / "case.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_case(case, folder)
        request = {"max_nodes": change.get("max_nodes", 10**6)}
        with workers([OWN], folder, threads) as (own,):
            once = own.ask(**request, prune_too=True)
            # A long run needs no warming up.
            times = [own.ask(**request)["seconds"] for _ in range(repeats)] if once["seconds"] < 20 else []
        points.append(once | {"seconds": statistics.median(times or [once["seconds"]]), "change": change})
    return {"points": points, "repeats": repeats}


def gemm_rate(threads: int, size: int = 1024) -> float:
    """Float32 operations a second of this machine's matrix product, the median of 9."""
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times)


def tables(results: dict[str, dict[str, Any]]) -> str:
    """All results in Markdown."""
    lines = [
        "| case | threads | circuit-tracer 0.5.0 | vlmscope | ratio | added memory, MB: peer, own |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        if "ratio" in found:
            lines.append(
                f"| {name.rsplit('-', 1)[0]}, {found['nodes']:,} nodes | {name.rsplit('-', 1)[1]} "
                f"| {found['peer_seconds']:.2f} s | {found['own_seconds']:.3f} s | {found['ratio']:.1f} "
                f"| {found['peer_added_mb']:.0f}, {found['own_added_mb']:.0f} |"
            )
    for name, found in results.items():
        if "agreement" in found:
            agree = found["agreement"]
            lines.append(
                f"\n{name}: features and errors agree to {agree['features_and_errors']:.1e}, tokens after correction "
                f"to {agree['tokens_corrected']:.1e}; {found['flops'] / 1e9:.2f} GFLOP at intensity "
                f"{found['intensity']:.1f} FLOP/byte, {100 * found['gemm_share']:.0f} % of the measured GEMM rate of "
                f"{found['gemm_gflops']:.0f} GFLOP/s; peer's batch {found['peer_batch']}"
            )
        if "graph_mb" in found:
            lines.append(
                f"\n{name}: {found['nodes']:,} nodes, {found['edges']:,} edges ({found['graph_mb']:.0f} MB): "
                f"{found['own_seconds']:.2f} s, {found['own_added_mb']:.0f} MB added"
            )
    lines += ["", "| axis | value | nodes | edges | seconds | added MB | prune s |", "|" + " --- |" * 7]
    for name, found in results.items():
        for point in found.get("points", []):
            change = ", ".join(f"{key} {value}" for key, value in point["change"].items())
            lines.append(
                f"| {name.removeprefix('growth-')} | {change} | {point['nodes']:,} | {point['edges']:,} "
                f"| {point['seconds']:.2f} | {point['added_mb']:.0f} | {point['prune_seconds']:.2f} |"
            )
    for name, found in results.items():
        if len(found.get("points", [])) > 1:
            lines.append(f"\n{name}: time grows with exponent {exponent(name, found['points']):.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for and print everything that is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one thread, 3 repeats, no growth")
    parser.add_argument("--parts", nargs="*", help="of small, large, pruning, pruning_20000, growth-AXIS; none: report")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmarks" / "attribution")
    parser.add_argument("--plot", type=Path, help="draw the growth there")
    parser.add_argument("--verbose", action="store_true", help="show what the processes say")
    given = parser.parse_args()
    threads, repeats = ([1], 3) if given.quick else (given.threads, given.repeats)
    every = [
        "small",
        "large",
        "pruning",
        "pruning_20000",
        *([] if given.quick else [f"growth-{axis}" for axis in AXES]),
    ]
    store = given.work / "results"
    store.mkdir(parents=True, exist_ok=True)
    for part in every if given.parts is None else given.parts:
        for count in threads if not part.startswith(("growth", "pruning_20000")) else threads[:1]:
            print(f"measuring {part} on {count} threads", flush=True)
            if part in ("small", "large"):
                found = attribution_part({"small": SMALL, "large": LARGE}[part], given.work, count, repeats)
            elif part == "pruning":
                found = pruning_part(given.work, count, repeats)
            elif part == "pruning_20000":
                found = large_pruning_part(given.work, count, repeats)
            else:
                found = growth_part(part.removeprefix("growth-"), given.work, count, repeats)
            name = part if "ratio" not in found else f"{part}-{count}"
            (store / f"{name}.json").write_text(json.dumps(found, indent=1))
    results = {path.stem: json.loads(path.read_text()) for path in sorted(store.glob("*.json"))}
    machine = platform.processor() or platform.machine()
    print(f"\n{machine}, Python {platform.python_version()}, torch {torch.__version__}\n")
    print(tables(results))
    if given.plot:
        draw_growth({name: found["points"] for name, found in results.items() if "points" in found}, given.plot)
    print(
        "\nratios: " + ", ".join(f"{name} {found['ratio']:.1f}" for name, found in results.items() if "ratio" in found)
    )


if __name__ == "__main__":
    main()
