"""Transcoder sets on disk, in the formats of the field: `load_set` and `save_set`.

Layouts, keys and traps: docs/formats_transcoders.md. Weights may be stored in bfloat16; they are computed in float32.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import FORMAT_NAMES
from vlmscope.transcoders.formats import clt, config_yaml, gemma_scope, sae_lens, sparsify
from vlmscope.transcoders.formats.common import STORED_DTYPES, Choice, Format, SetSource, build_layer, uniform
from vlmscope.transcoders.transcoder import TranscoderSet

__all__ = ["ANY", "FORMATS", "STORED_DTYPES", "Choice", "detect", "load_set", "open_set", "refusal", "save_set"]

ANY = Choice()
_CONFIG = "config.yaml with layer_{i}.safetensors"


def _own(
    name: str,
    open_it: Callable[[Path, Choice], SetSource],
    refusal: Callable[[TranscoderSet], str | None],
    write: Callable[[TranscoderSet, Path, str], None] = config_yaml.write,
) -> Format:
    """One of the three that share `config.yaml`."""

    def found(folder: Path) -> bool:
        return config_yaml.has_config(folder) and config_yaml.flavour(folder) == name

    return Format(name, _CONFIG, found, open_it, refusal, write)


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        _own("vlmscope", config_yaml.open_own, uniform),
        _own("paper", config_yaml.open_paper, config_yaml.refuse_paper),
        _own(
            "circuit_tracer",
            config_yaml.open_circuit_tracer,
            config_yaml.refuse_circuit_tracer,
            config_yaml.write_circuit_tracer,
        ),
        Format(
            "clt", "W_enc_{i}.safetensors with W_dec_{i}.safetensors", clt.found_in, clt.open_set, clt.refuse, clt.write
        ),
        Format(
            "gemma_scope",
            "transcoder_all/layer_*_width_*_l0_*/params.safetensors",
            gemma_scope.found_in,
            gemma_scope.open_set,
            gemma_scope.refuse,
            gemma_scope.write,
        ),
        Format(
            "sparsify",
            "layers.*.mlp/sae.safetensors with cfg.json",
            sparsify.found_in,
            sparsify.open_set,
            sparsify.refuse,
            sparsify.write,
        ),
        Format(
            "sae_lens",
            "sae_weights.safetensors with cfg.json",
            sae_lens.found_in,
            sae_lens.open_set,
            sae_lens.refuse,
            sae_lens.write,
        ),
    )
}

assert tuple(FORMATS) == FORMAT_NAMES


def format_named(name: str) -> Format:
    """The format of this name.

    Raises:
        UserError: there is none.
    """
    if name not in FORMATS:
        raise UserError(f"no transcoder format {name!r}; choose one of: {', '.join(FORMATS)}")
    return FORMATS[name]


def detect(folder: Path) -> Format:
    """The format of a folder, from what lies in it.

    Raises:
        UserError: it has none of the layouts; the message says what was looked for.
    """
    if not folder.is_dir():
        raise UserError(f"no transcoder set in {folder}: there is no such folder; check the path")
    for form in FORMATS.values():
        if form.found_in(folder):
            return form
    looked_for = "; ".join(dict.fromkeys(form.looks_for for form in FORMATS.values()))
    looked_for += config_yaml.without_config(folder)
    raise UserError(f"no transcoder set in {folder}: it has none of {looked_for}; check the path")


def open_set(folder: str | Path, format: str = "auto", choice: Choice = ANY) -> SetSource:
    """Read a set's configuration and find its files, without its weights.

    Args:
        folder: where it lies.
        format: one of `FORMATS`, or "auto": what lies in the folder decides.
        choice: which of several sets in a folder of Gemma Scope.

    Raises:
        UserError: one line that names the file.
    """
    folder = Path(folder)
    return (detect(folder) if format == "auto" else format_named(format)).open(folder, choice)


def load_set(
    folder: str | Path,
    n_layers: int | None = None,
    d_model: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    format: str = "auto",
    choice: Choice = ANY,
) -> TranscoderSet:
    """Read a set; weights are converted to `dtype`. `n_layers` and `d_model`, when given, are those of the model.

    Raises:
        UserError: one line that names the file, for a missing or corrupt file, a missing tensor, an unknown activation
            and for shapes that do not fit each other or the model (both shapes are named).
    """
    source = open_set(folder, format, choice)
    if n_layers is not None and sorted(source.layers) != list(range(n_layers)):
        raise UserError(
            f"{folder}: transcoders for layers {_spans(source.layers)} ({len(source.layers)}), but the model has "
            f"{n_layers} layers (0-{n_layers - 1}); choose the set trained on this model"
        )
    transcoders = {
        layer: build_layer(one, layer, source.config, d_model, dtype, device) for layer, one in source.layers.items()
    }
    widths = {layer: transcoder.config.d_model for layer, transcoder in transcoders.items()}
    if len(set(widths.values())) > 1:
        raise UserError(
            f"{folder}: layers disagree about the model width ({widths}); the files are of different models"
        )
    return TranscoderSet(transcoders, source.config)


def _spans(layers: Mapping[int, object]) -> str:
    ordered = sorted(layers)
    contiguous = ordered == list(range(ordered[0], ordered[-1] + 1))
    return f"{ordered[0]}-{ordered[-1]}" if contiguous else ", ".join(map(str, ordered))


def refusal(transcoders: TranscoderSet, format: str) -> str | None:
    """Why the set cannot be expressed in a format, in some words; None when it can."""
    return format_named(format).refusal(transcoders)


def save_set(transcoders: TranscoderSet, folder: str | Path, dtype: str = "float32", format: str = "vlmscope") -> None:
    """Write the set into `folder`; `dtype` is the stored one, "float32" (exact) or "bfloat16" (half the size).

    Raises:
        UserError: when the folder cannot be written, for another dtype, and for a set that the format cannot express.
    """
    if dtype not in STORED_DTYPES:
        raise UserError(f"cannot store transcoders as {dtype!r}; choose one of: {', '.join(STORED_DTYPES)}")
    reason = refusal(transcoders, format)
    if reason is not None:
        raise UserError(f"cannot write this set as {format}: {reason}; choose another format")
    format_named(format).write(transcoders, Path(folder), dtype)
