"""Convert a transcoder set to another format, checked by reading it back before it is put into place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vlmscope.config import AppConfig
from vlmscope.config.wiring import chosen_set, limit_threads
from vlmscope.core.artifacts import atomic_folder, read_text, tensor_heads, write_text
from vlmscope.core.errors import CheckFailed, UserError
from vlmscope.core.records import generator
from vlmscope.tasks.settings import RunContext
from vlmscope.transcoders.formats import load_set, open_set, refusal, save_set
from vlmscope.transcoders.formats.common import eight_bits
from vlmscope.transcoders.hub import CARD, carried_over, facts_of_set, render
from vlmscope.transcoders.transcoder import TranscoderSet


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Convert the set that `transcoder=path transcoder.path=...` names, and write its card."""
    for key in ("to", "out"):
        if not getattr(cfg.task, key):
            raise UserError(f"task.{key} has no value; give it on the command line as task.{key}=...")
    limit_threads(cfg)
    folder, form, choice = chosen_set(cfg)
    files = [layer.path for layer in open_set(folder, form, choice).layers.values()]
    wide = any(head.dtype == "F64" for file in files for head in tensor_heads(file).values())
    # float64 only where the source has it: float32 holds all other weights exactly.
    dtype = torch.float64 if wide else torch.float32
    transcoders = load_set(folder, dtype=dtype, format=form, choice=choice).requires_grad_(False)
    why = refusal(transcoders, cfg.task.to)
    if why is not None:
        raise UserError(f"{folder} cannot be written as {cfg.task.to}: {why}; choose another task.to")
    stored = _smallest(transcoders) if cfg.task.dtype == "auto" else cfg.task.dtype
    source_card = read_text(folder / CARD) if (folder / CARD).is_file() else None
    facts = carried_over(facts_of_set(transcoders, cfg.task.to), source_card)
    if cfg.task.license is not None:
        facts = replace(facts, license=cfg.task.license)
    with atomic_folder(cfg.task.out) as temporary:
        save_set(transcoders, temporary, stored, cfg.task.to)
        _check(transcoders, temporary, cfg.task.to, stored)
        write_text(temporary / CARD, render(facts))
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    print(f"{len(transcoders)} layers as {cfg.task.to} in {stored}, read back and computing the same: {cfg.task.out}")
    return {"convert/layers": float(len(transcoders)), "convert/bytes": float(size)}


def _smallest(transcoders: TranscoderSet) -> str:
    """The smallest stored dtype that holds every number of the set exactly."""
    for name in ("bfloat16", "float32"):
        dtype = getattr(torch, name)
        tensors = (*transcoders.parameters(), *transcoders.buffers())
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors):
            return name
    return "float64"


def _check(expected: TranscoderSet, folder: Path, form: str, dtype: str) -> None:
    """Read the written set back and compare it on random inputs, with the weights as they were stored.

    Raises:
        CheckFailed: it computes something else or at other places, which is a fault of the writer.
    """
    wide = next(expected.parameters()).dtype
    again = load_set(folder, dtype=wide, format=form)
    if dtype == "int8":  # in place: there may be no room for a third copy
        for tensor in (tensor for tensor in expected.parameters() if tensor.ndim > 1):
            numbers, scale = eight_bits(tensor)
            tensor.data.copy_(numbers * scale[:, None])
    else:
        expected.to(getattr(torch, dtype)).to(wide)
    if again.layers != expected.layers:
        raise CheckFailed(f"{form} gives back layers {again.layers} instead of {expected.layers}; nothing is kept", {})
    inputs = {
        layer: torch.from_numpy(generator(0, "convert", layer).standard_normal((64, transcoder.config.d_model))).to(
            wide
        )
        for layer, transcoder in expected.transcoders.items()
    }
    with torch.no_grad():
        codes = expected.encode(inputs), again.encode(inputs)
        for layer, x in inputs.items():
            ours, theirs = (part.decode(layer, code, x) for part, code in zip((expected, again), codes, strict=True))
            configs = expected[layer].config, again[layer].config
            hooks = [f"{config.input_hook} to {config.output_hook}" for config in configs]
            if not torch.equal(ours, theirs) or configs[0].writes != configs[1].writes or hooks[0] != hooks[1]:
                raise CheckFailed(
                    f"layer {layer} read back from {form} differs by {float((ours - theirs).abs().max()):.3g} and maps "
                    f"{hooks[1]} instead of {hooks[0]}; nothing is kept",
                    {},
                )
