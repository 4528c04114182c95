"""A coder's step without the optimiser against the roofline of its products, and against the peer's coder.

The roofline of N tokens, width d, F features, k active is the encoder product [N, d] x [d, F], as fast as this machine
multiplies these very matrices, and four sparse passes (decode, gradients of activations, decoder and encoder), each of
which must read a row of d numbers for each of N k entries, and the last two write [F, d]: as fast as this machine reads
an array of the size of [F, d] again and again (the best of ten times). Multiplications of the sparse passes hide behind
their reading. Selecting the k largest, standardising and the loss are no part of the roofline.
"""

import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from started import started
from training_data import Activations


def measure(job: dict[str, Any], data: Activations) -> dict[str, Any]:
    """Seconds: medians of `steps` rounds, in each of which all are measured in turn."""
    n, width, latents, k = job["batch"], job["width"], job["latents"], job["k"]
    ours, theirs = our_step(data, n, latents, k), peer_step(job, data, n, latents, k)
    x, weights = data.x[:n].contiguous(), torch.randn(latents, width)
    out = torch.empty(n, latents)
    timed = {
        "ours_s": ours,
        "peer_s": theirs,
        "product_s": lambda: torch.mm(x, weights.T, out=out),
    }
    found: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(job["steps"] + 3):
        for name, run in timed.items():
            seconds = timed_once(run)
            if number >= 3:
                found[name].append(seconds)
    best = min(timed_once(weights.sum) for _ in range(10))
    medians = {name: statistics.median(values) for name, values in found.items()}
    moved = 4 * n * k * width + 2 * latents * width  # numbers
    sparse = best * moved / (latents * width)
    return {**medians, "sparse_s": sparse, "roofline_s": medians["product_s"] + sparse}


def timed_once(run: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def our_step(data: Activations, n: int, latents: int, k: int) -> Callable[[], None]:
    """Loss and gradients of a batch, as `TranscoderModule` takes them."""
    trainer = started(data.x.shape[1], latents, k, data.x[: 4 * n], data.y[: 4 * n])

    def step() -> None:
        trainer.zero_grad(set_to_none=True)
        trainer.loss(data.x[:n], data.y[:n])[0].backward()

    return step


def peer_step(job: dict[str, Any], data: Activations, n: int, latents: int, k: int) -> Callable[[], None]:
    """The same of the peer's coder, started from our weights: which features are active matters for the speed."""
    sys.path.insert(0, job["peer_site"])
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    trainer = started(data.x.shape[1], latents, k, data.x[: 4 * n], data.y[: 4 * n])
    folded = trainer.folded()
    coder = SparseCoder(data.x.shape[1], SparseCoderConfig(num_latents=latents, k=k, transcode=True))
    with torch.no_grad():
        coder.encoder.weight.copy_(folded.W_enc)
        coder.encoder.bias.copy_(folded.b_enc)
        assert coder.W_dec is not None
        coder.W_dec.copy_(folded.W_dec)
        coder.b_dec.copy_(folded.b_dec)

    def step() -> None:
        coder.zero_grad(set_to_none=True)
        coder(data.x[:n], data.y[:n]).fvu.backward()

    return step
