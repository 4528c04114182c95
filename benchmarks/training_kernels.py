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
from collections.abc import Callable
from typing import Any

import torch
from plan import step_of, timed_once
from started import started
from torch import Tensor
from training_data import Activations

from vlmscope.training.layer_trainer import LayerTrainer


def measure(job: dict[str, Any], data: Activations) -> dict[str, Any]:
    """Seconds: medians of `steps` rounds, in each of which all are measured in turn."""
    n, width, latents, k = job["batch"], job["width"], job["latents"], job["k"]
    # The peer's coder starts from our weights: which features are active matters for the speed.
    trainer = started(data.x.shape[1], latents, k, data.x[: 4 * n], data.y[: 4 * n])
    ours = step_of(trainer, data.x[:n], data.y[:n])[0]
    sys.path.insert(0, job["peer_site"])
    theirs = peer_step(trainer, data.x[:n], data.y[:n])
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


def peer_step(trainer: LayerTrainer, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Loss and gradients of a batch [N, d], [N, d] by the peer's coder with the trainer's weights; needs sparsify."""
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    folded = trainer.folded()
    config = folded.config
    settings = SparseCoderConfig(num_latents=config.n_features, k=config.k, transcode=True)
    coder = SparseCoder(config.d_model, settings).to(x.device)
    with torch.no_grad():
        coder.encoder.weight.copy_(folded.W_enc)
        coder.encoder.bias.copy_(folded.b_enc)
        assert coder.W_dec is not None
        coder.W_dec.copy_(folded.W_dec)
        coder.b_dec.copy_(folded.b_dec)

    def step() -> None:
        coder.zero_grad(set_to_none=True)
        coder(x, y).fvu.backward()

    return step
