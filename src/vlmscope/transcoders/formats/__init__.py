"""Transcoder sets on disk, in the formats of the field: `load_set` and `save_set`.

Layouts, keys and traps: docs/formats_transcoders.md. Weights may be stored in bfloat16 or int8; computation
is in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import ACTIVATIONS, FORMAT_NAMES, read_usual_error
from vlmscope.transcoders.formats import circuit_tracer
from vlmscope.transcoders.formats.common import STORED_DTYPES, Choice, SetSource, build_layer
from vlmscope.transcoders.formats.layer_folders import GEMMA_SCOPE, SAE_LENS, SPARSIFY, Layout
from vlmscope.transcoders.transcoder import TranscoderSet

__all__ = ["ANY", "FORMATS", "STORED_DTYPES", "Choice", "detect", "load_set", "open_set", "refusal", "save_set"]

ANY = Choice()
_RAW = ("mlp_in", "mlp_out")
_THRESHOLDS = ("jumprelu", "relu", "batchtopk")  # ReLU has thresholds of 0, BatchTopK one for all features


@dataclass(frozen=True)
class Format:
    """One format: how to recognise, read and write it, and which sets it can express.

    `looks_for` names the files by which `found_in` recognises it; `open` reads the configuration and finds the files,
    without the weights; `write` is None for a format that is only read. `per_set` are the settings that it stores once
    for all layers, `counted` whether layers must be 0, 1, 2, .., `cross_layer` whether its features write to later
    layers (None: either), `skips` whether they may have skip paths.
    """

    looks_for: str
    found_in: Callable[[Path], bool]
    open: Callable[[Path, Choice], SetSource]
    write: Callable[[TranscoderSet, Path, str], None] | None
    activations: tuple[str, ...] = ACTIVATIONS
    hooks: tuple[str, str] | None = None
    per_set: tuple[str, ...] = ("activation", "input_hook", "output_hook", "k")
    counted: bool = False
    cross_layer: bool | None = False
    skips: bool = True


def _yaml(name: str, **expresses: Any) -> Format:
    """One of the three formats that share `config.yaml`."""
    return Format(
        "config.yaml with layer_{i}.safetensors",
        partial(circuit_tracer.found_in, name=name),
        partial(circuit_tracer.open_set, name=name),
        partial(circuit_tracer.write, name=name),
        **expresses,
    )


def _folders(layout: Layout, looks_for: str, **expresses: Any) -> Format:
    """A format with a folder for each layer."""
    write = None if layout.describe is None else layout.write
    return Format(looks_for, layout.found_in, layout.open_set, write, **expresses)


FORMATS: dict[str, Format] = {
    "vlmscope": _yaml("vlmscope", cross_layer=None),
    "paper": _yaml("paper", activations=("topk",), hooks=_RAW, counted=True),
    "circuit_tracer": _yaml("circuit_tracer", counted=True),
    "clt": Format(
        "W_enc_{i}.safetensors with W_dec_{i}.safetensors",
        circuit_tracer.clt_found_in,
        circuit_tracer.clt_open_set,
        circuit_tracer.clt_write,
        activations=("relu", "jumprelu"),
        per_set=("activation", "input_hook", "output_hook", "k", "n_features"),
        counted=True,
        cross_layer=True,
        skips=False,
    ),
    "gemma_scope": _folders(GEMMA_SCOPE, "transcoder_all/layer_*_width_*_l0_*/params.safetensors"),
    "sparsify": _folders(
        SPARSIFY, "layers.*.mlp/sae.safetensors with cfg.json", activations=("topk",), hooks=_RAW, per_set=()
    ),
    "sae_lens": _folders(SAE_LENS, "sae_weights.safetensors with cfg.json", activations=_THRESHOLDS, per_set=()),
}

assert tuple(FORMATS) == FORMAT_NAMES


def format_named(name: str) -> Format:
    """The format of this name; UserError if there is none."""
    if name not in FORMATS:
        raise UserError(f"no transcoder format {name!r}; choose one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def detect(folder: Path) -> str:
    """The name of a folder's format, from the files in it."""
    if not folder.is_dir():
        raise UserError(f"no transcoder set in {folder}: there is no such folder; check the path")
    for name, form in FORMATS.items():
        if form.found_in(folder):
            return name
    looked_for = "; ".join(dict.fromkeys(form.looks_for for form in FORMATS.values()))
    looked_for += circuit_tracer.without_config(folder)
    raise UserError(f"no transcoder set in {folder}: it has none of {looked_for}; check the path")


def open_set(folder: str | Path, format: str = "auto", choice: Choice = ANY) -> SetSource:
    """Read a set's configuration and find its files, without its weights.

    `format` is one of `FORMATS`, or "auto" to detect it; `choice` selects one of several sets in a Gemma Scope folder.
    """
    folder = Path(folder)
    return format_named(detect(folder) if format == "auto" else format).open(folder, choice)


def load_set(
    folder: str | Path,
    n_layers: int | None = None,
    d_model: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    format: str = "auto",
    choice: Choice = ANY,
    stream: bool = False,
) -> TranscoderSet:
    """Read a set and convert its weights to `dtype`; `n_layers` and `d_model`, if given, are those of the model.

    With `stream` encoders and decoders stay on disk (`vlmscope.transcoders.streaming`): the same functions, slower.

    Raises:
        UserError: a file is missing or corrupt, a tensor is missing, the activation is unknown, or shapes do not fit
            each other or the model. The message names the file and both shapes.
    """
    folder = Path(folder)
    source = open_set(folder, format, choice)
    if n_layers is not None and sorted(source.layers) != list(range(n_layers)):
        ordered = sorted(source.layers)
        contiguous = ordered == list(range(ordered[0], ordered[-1] + 1))
        shown = f"{ordered[0]}-{ordered[-1]}" if contiguous else ", ".join(map(str, ordered))
        raise UserError(
            f"{folder}: transcoders for layers {shown} ({len(ordered)}), but the model has {n_layers} layers "
            f"(0-{n_layers - 1}); choose the set trained on this model"
        )
    transcoders = {
        number: build_layer(layer, number, source.config, d_model, dtype, device, stream)
        for number, layer in source.layers.items()
    }
    widths = {layer: transcoder.config.d_model for layer, transcoder in transcoders.items()}
    if len(set(widths.values())) > 1:
        raise UserError(
            f"{folder}: layers disagree about the model width ({widths}); the files are of different models"
        )
    loaded, usual = TranscoderSet(transcoders, source.config), read_usual_error(folder)
    if usual is not None and list(usual.layers) == loaded.layers:
        loaded.usual_error = usual
    return loaded


def refusal(transcoders: TranscoderSet, format: str) -> str | None:
    """The reason why a format cannot express the set, in words; None if it can."""
    form, layers = format_named(format), transcoders.layers
    if form.write is None:
        return "it is only read"
    configs = [transcoder.config for transcoder in transcoders.transcoders.values()]
    if form.cross_layer is False and transcoders.cross_layer:
        return "it has no place for decoders to later layers (those of circuit-tracer, clt, has)"
    if form.cross_layer and any(config.writes != len(configs) - config.layer for config in configs):
        return "its features write to their own layer and to every later one, and these do not"
    for config in configs:
        if config.activation not in form.activations:
            return f"it has no place for {config.activation}, only for {' and '.join(form.activations)}"
        hooks = config.input_hook, config.output_hook
        if form.hooks not in (None, hooks):
            return f"it maps {' to '.join(form.hooks)}, and these map {' to '.join(hooks)}"
    if form.counted and layers != list(range(len(layers))):
        return f"it counts layers 0, 1, 2, ..., and these are {layers}"
    if not form.skips and any(config.skip for config in configs):
        return "it has no place for skip paths"
    for name in form.per_set:
        values = sorted({str(getattr(config, name)) for config in configs})
        # k matters for TopK alone: elsewhere it is the target of training and not part of the function.
        if len(values) > 1 and (name != "k" or configs[0].activation == "topk"):
            return f"it says {name} once for all layers, but they have {', '.join(values)}"
    return None


def save_set(transcoders: TranscoderSet, folder: str | Path, dtype: str = "float32", format: str = "vlmscope") -> None:
    """Write the set into `folder`.

    `dtype` is the stored one: "float32", "float64", "bfloat16" (half the size of float32), or "int8" with a scale for
    each row of a matrix (a quarter), which only our own format has.
    """
    if dtype not in STORED_DTYPES:
        raise UserError(f"cannot store transcoders as {dtype!r}; choose one of: {', '.join(STORED_DTYPES)}")
    reason = refusal(transcoders, format)
    if reason is None and dtype == "int8" and format != "vlmscope":
        reason = "it has no place for int8's scales"
    if reason is not None:
        raise UserError(f"cannot write this set as {format}: {reason}; choose another format")
    write = FORMATS[format].write
    assert write is not None, "as `refusal` would have said"
    write(transcoders, Path(folder), dtype)
    if transcoders.usual_error is not None:
        transcoders.usual_error.write(Path(folder))
