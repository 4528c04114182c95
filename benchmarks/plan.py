"""The plan's least time of one layer's training step against the step itself, on this machine.

`python benchmarks/plan.py [--repeat 7] [--threads 1]` measures the machine (a matrix product and a copy), then for
several sizes each part of a step of `vlmscope.training.layer_trainer`, and prints both beside the roofline of the
measured machine (`layer_work`, `vlmscope.tasks.plan.least_time`).
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from started import started
from torch import Tensor

from vlmscope.tasks.plan import BYTES, Machine, Work, least_time, transcoder_numbers
from vlmscope.training.config import TranscoderArchConfig
from vlmscope.training.layer_trainer import LayerTrainer

SIZES = [(2048, 128, 2048, 16), (2048, 256, 8192, 16), (1024, 512, 16384, 48), (512, 1024, 16384, 48)]  # n, d, F, k
GROUPS = {
    "encoder": "encoder",
    "choice": "choice",
    "rest of loss and gradient": "sparse",
    "clipping and AdamW": "optimiser",
}


_FLOAT = 4  # bytes; training's parameters, gradients, moments and standardised activations are float32


def layer_work(n: int, d: int, arch: TranscoderArchConfig, encoder_dtype: str = "float32") -> dict[str, Work]:
    """Work of one layer's transcoder in one step on n tokens; each tensor is read and written once.

    The encoder's product is dense; what follows the choice of features touches k rows a token: a bag and a gradient of
    the decoder, the gradient of the values, a gradient of the encoder, each gradient of [F, d] written whole.
    """
    f, k, skip, element = arch.expansion_factor * d, arch.k, arch.skip, BYTES[encoder_dtype]
    pre, rows, weight = n * f * element, n * d * _FLOAT, f * d * _FLOAT
    read, passes = weight + rows, 4
    if element != _FLOAT:  # copies of the operands; the chosen values are computed anew
        read, passes = read + 2 * element * (f * d + n * d), 5
    # The bags; to cast, to standardise, bias, residual, FVU, and their gradients; the skip path.
    loss = passes * n * k * d * _FLOAT + 2 * weight + 15 * rows + (4 * rows + 2 * d * d * _FLOAT) * skip
    return {
        "encoder": Work(2.0 * n * f * d, read + pre, encoder_dtype),
        "choice": Work(0.0, pre + n * k * (8 + _FLOAT)),
        "sparse": Work(passes * 2.0 * n * k * d + 4.0 * n * d * d * skip, loss),
        # Clipping reads and writes gradients; AdamW reads them, and reads and writes the weight and two moments.
        "optimiser": Work(0.0, 10 * _FLOAT * transcoder_numbers(d, f, skip, arch.activation)),
    }


def timed_once(work: Callable[[], object]) -> float:
    """Seconds of a call, with all that it leaves to GPUs."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Median time of a call after one that does not count."""
    work()
    return median(timed_once(work) for _ in range(repeat))


def product_rate(dtype: torch.dtype, size: int, repeat: int, device: str = "cpu") -> float:
    """10^12 operations a second of a product of square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2e-12 * size**3 / seconds(lambda: a @ b, repeat)


def copy_rate(repeat: int, device: str = "cpu", numbers: int = 1 << 26) -> float:
    """GB/s of a copy of float32 numbers (256 MiB), read and written."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    return 8e-9 * numbers / seconds(lambda: target.copy_(source), repeat)


def this_machine(repeat: int) -> Machine:
    """The rates of a product of 2048 x 2048 in float32 and of a copy."""
    rate, moved = product_rate(torch.float32, 2048, repeat), copy_rate(repeat)
    return Machine("this machine", rate, rate, rate, moved, None)


def step_of(trainer: LayerTrainer, x: Tensor, y: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """The two halves of a step on [N, d], [N, d]: loss and gradient, and clipping with AdamW."""
    optimiser = torch.optim.AdamW(trainer.parameters(), lr=1e-4, fused=True)

    def gradient() -> None:
        optimiser.zero_grad(set_to_none=True)
        trainer.loss(x, y)[0].backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimiser.step()

    return gradient, update


def measured(n: int, d: int, f: int, k: int, repeat: int) -> dict[str, float]:
    """Seconds of the groups of one layer's step."""
    x, y = torch.randn(n, d), torch.randn(n, d)
    trainer = started(d, f, k, x, y)
    standard = trainer.standard.apply(x, y)[0]
    with torch.no_grad():
        pre = trainer.transcoder.pre_activations(standard)
        encoder = seconds(lambda: trainer.transcoder.pre_activations(standard), repeat)
        choice = seconds(lambda: trainer.transcoder.activation.support(pre), repeat)
    gradient, update = step_of(trainer, x, y)
    whole = seconds(gradient, repeat)
    return dict(zip(GROUPS, (encoder, choice, whole - encoder - choice, seconds(update, repeat)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = this_machine(arguments.repeat)
    rates = f"{machine.float32 * 1e3:.1f} GFLOP/s, {machine.bandwidth:.2f} GB/s"
    print(f"{rates}, medians of {arguments.repeat}\n")
    print("| n | d | F | k | part | plan, ms | measured, ms | measured / plan |")
    print("|" + " --- |" * 8)
    for n, d, f, k in SIZES:
        work = layer_work(n, d, TranscoderArchConfig(f // d, k))
        planned = {group: least_time(work[part], machine)[0] for group, part in GROUPS.items()}
        found = measured(n, d, f, k, arguments.repeat)
        rows = {group: (planned[group], found[group]) for group in GROUPS}
        rows["all"] = (sum(planned.values()), sum(found.values()))
        for group, (plan, real) in rows.items():
            print(f"| {n} | {d} | {f} | {k} | {group} | {plan * 1e3:.3g} | {real * 1e3:.3g} | {real / plan:.2f} |")


if __name__ == "__main__":
    main()
