"""SAELens: a folder a layer with `sae_weights.safetensors` and `cfg.json`.

`W_enc` [d, F] is transposed; `W_skip` [d, d] is applied as `x @ W_skip.T`. An old set may say `apply_b_dec_to_input`:
its encoder then sees `x - b_dec`, which is folded into `b_enc` exactly. From version 6 on SAELens knows ReLU and
JumpReLU transcoders alone, so a TopK set cannot be written for it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import read_json, write_json
from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderSetConfig
from vlmscope.transcoders.formats.common import (
    STORED_DTYPES,
    UNKNOWN_L0,
    Choice,
    LayerSource,
    SetSource,
    Tensors,
    l0_of,
    no_cross_layer,
    own_hook,
    own_tensors,
    positive,
    record_of,
    taken,
    their_hook,
    transposed,
    write_tensors,
)
from vlmscope.transcoders.transcoder import TranscoderSet

_FILE = "sae_weights.safetensors"
_NAMES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip", "threshold")}
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
# What changes the function, and the value with which it does not.
_NEUTRAL = {
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
    "finetuning_scaling_factor": False,
    "hook_head_index": None,
}


def _folders(folder: Path) -> list[Path]:
    own = [folder] if (folder / _FILE).is_file() else []
    return own or sorted(path.parent for path in folder.rglob(_FILE))


def found_in(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return folder.is_dir() and bool(_folders(folder))


def open_set(folder: Path, choice: Choice) -> SetSource:
    """The layers of the folder, at any depth.

    Raises:
        UserError: a `cfg.json` is that of an autoencoder, or says something that this project does not compute.
    """
    del choice  # a folder of this layout holds one set
    folders = _folders(folder)
    if not folders:
        raise UserError(f"{folder} holds no {_FILE}; check the path")
    layers: dict[int, LayerSource] = {}
    shared: dict[str, str] = {}
    for path in folders:
        layer, source, said = _layer(path)
        if layer in layers:
            raise UserError(f"{path} is for layer {layer}, and so is {layers[layer].path.parent}; keep one of them")
        for key, value in said.items():
            if shared.setdefault(key, value) != value:
                raise UserError(f"{path / 'cfg.json'}: {key} is {value}, but {shared[key]} in other layers")
        layers[layer] = source
    layers = dict(sorted(layers.items()))
    config = TranscoderSetConfig(
        n_model_layers=max(layers) + 1,
        k=max(source.k or UNKNOWN_L0 for source in layers.values()),
        activation=next(iter(layers.values())).activation or "relu",
        model_name=shared["model_name"],
        input_hook=shared["input hook"],
        output_hook=shared["output hook"],
    )
    return SetSource(config, layers)


def _layer(folder: Path) -> tuple[int, LayerSource, dict[str, str]]:
    """One layer: its number, source, and what all layers must share."""
    where = folder / "cfg.json"
    record = record_of(read_json(where), where)
    record = {**record_of(record.get("metadata") or {}, where), **{k: v for k, v in record.items() if k != "metadata"}}
    hooks = [str(record.get(key) or "") for key in ("hook_name", "hook_name_out")]
    if hooks[1] in ("", hooks[0]):
        raise UserError(
            f"{where}: hook_name_out is not another than hook_name, so this is an autoencoder; give a transcoder"
        )
    found = [_HOOK.fullmatch(hook) for hook in hooks]
    if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
        raise UserError(
            f"{where}: {hooks[0]} to {hooks[1]} is not within one layer; only such as blocks.3.mlp.hook_in can be read"
        )
    for key, neutral in _NEUTRAL.items():
        value = record.get(key)
        if value is not None and value != neutral:
            raise UserError(f"{where}: {key} is {value!r}, which this project does not compute; give a set without it")
    activation, k = _activation(record, where)
    model_name = str(record.get("model_name") or "")
    ins, outs = (own_hook(match[2], model_name) for match in found if match)
    source = LayerSource(folder / _FILE, where, _translator(record, folder / _FILE, activation), k, activation)
    return int(found[0][1]), source, {"model_name": model_name, "input hook": ins, "output hook": outs}


def _activation(record: dict[str, Any], where: Path) -> tuple[str, int | None]:
    """The nonlinearity, and k where there is one."""
    architecture = str(record.get("architecture", "standard"))
    told = l0_of(record.get("l0"))
    if architecture in ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        return "jumprelu", told
    if architecture not in ("standard", "transcoder", "skip_transcoder", "topk"):
        raise UserError(
            f"{where}: architecture is {architecture!r}; only transcoder, skip_transcoder and jumprelu_* can be read"
        )
    name = str(record.get("activation_fn") or record.get("activation_fn_str") or "relu")
    if architecture == "topk" or name == "topk":
        kwargs = record_of(record.get("activation_fn_kwargs") or {}, where)
        return "topk", positive(record.get("k", kwargs.get("k")), "k", where)
    if name != "relu":
        raise UserError(f"{where}: activation_fn is {name!r}; only relu, topk and jumprelu can be read")
    return "relu", told


def _translator(record: dict[str, Any], path: Path, activation: str) -> Callable[[Tensors], Tensors]:
    architecture = str(record.get("architecture", "standard"))

    def translate(tensors: Tensors) -> Tensors:
        wanted = {name for name in ("W_skip", "threshold") if name in tensors}
        if "skip" in architecture and "W_skip" not in tensors:
            raise UserError(f"{path} lacks W_skip, which architecture {architecture!r} needs; copy it anew")
        if wanted and activation != "jumprelu" and "threshold" in tensors:
            raise UserError(f"{path} holds threshold, which architecture {architecture!r} does not use")
        found = transposed(taken(tensors, _NAMES, ("W_skip", "threshold"), path), "W_enc")
        # Biases of one length with another: said by whoever checks shapes.
        if record.get("apply_b_dec_to_input") and found["W_enc"].shape[-1:] == found["b_dec"].shape:
            # W_enc (x - b_dec) + b_enc = W_enc x + (b_enc - W_enc b_dec)
            shift = found["W_enc"].double() @ found["b_dec"].double()
            found["b_enc"] = found["b_enc"].double() - shift
        return found

    return translate


def refuse(transcoders: TranscoderSet) -> str | None:
    """ReLU, JumpReLU (and BatchTopK, which is that after training), with or without a skip path, at any hooks."""
    activations = {transcoder.config.activation for transcoder in transcoders.transcoders.values()}
    if "topk" in activations:
        return "SAELens has no TopK transcoder and would read its weights with ReLU"
    return no_cross_layer(transcoders)


def write(transcoders: TranscoderSet, folder: Path, dtype: str) -> None:
    """Write a folder a layer, `layer_{i}`."""
    assert dtype in STORED_DTYPES
    name = transcoders.config.model_name
    for layer, transcoder in transcoders.transcoders.items():
        config, target = transcoder.config, folder / f"layer_{layer}"
        write_tensors(target / _FILE, transposed(own_tensors(transcoder), "W_enc"), dtype)
        jumps = "" if config.activation == "relu" else "jumprelu_"
        record = {
            "architecture": f"{jumps}{'skip_' if config.skip else ''}transcoder",
            "d_in": config.d_model,
            "d_out": config.d_model,
            "d_sae": config.n_features,
            "dtype": dtype,
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "model_name": name,
                "hook_name": f"blocks.{layer}.{their_hook(config.input_hook, name)}",
                "hook_name_out": f"blocks.{layer}.{their_hook(config.output_hook, name)}",
                "l0": config.k,
            },
        }
        write_json(target / "cfg.json", record)
