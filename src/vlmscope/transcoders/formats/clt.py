"""circuit-tracer's cross-layer transcoders: `W_enc_{i}.safetensors` and `W_dec_{i}.safetensors` for each layer.

`W_enc_{i}` holds `W_enc_{i}` [F, d], `b_enc_{i}` [F], `b_dec_{i}` [d] and, with JumpReLU, `threshold_{i}` [F];
`W_dec_{i}` holds `W_dec_{i}` [F, L - i, d], whose second axis counts the layers written to from i upwards.
`config.yaml` (`model_kind: cross_layer_transcoder`) names the hooks; their defaults are circuit-tracer's. Its reader
knows ReLU and JumpReLU alone, the latter by the threshold.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmscope.core.artifacts import read_yaml, tensor_heads, write_yaml
from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderSetConfig
from vlmscope.transcoders.formats.common import (
    UNKNOWN_L0,
    Choice,
    LayerSource,
    SetSource,
    Tensors,
    not_below_0,
    own_hook,
    own_tensors,
    positive,
    read_tensors,
    record_of,
    taken,
    their_hook,
    uniform,
    write_tensors,
)
from vlmscope.transcoders.transcoder import TranscoderSet

KIND = "cross_layer_transcoder"
_CONFIG = "config.yaml"
_ENCODER = re.compile(r"W_enc_(\d+)\.safetensors")
_HOOK_KEYS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}


def found_in(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return (folder / "W_enc_0.safetensors").is_file()


def open_set(folder: Path, choice: Choice) -> SetSource:
    """The layers of the folder.

    Raises:
        UserError: a file is missing, or `config.yaml` says that it is something else.
    """
    del choice  # a folder of this layout holds one set
    layers = sorted(int(match[1]) for path in folder.glob("W_enc_*") if (match := _ENCODER.fullmatch(path.name)))
    if layers != list(range(len(layers))) or not layers:
        raise UserError(f"{folder} holds W_enc files of layers {layers}; a set has layers 0, 1, 2, ...; copy it anew")
    for layer in layers:
        if not (folder / f"W_dec_{layer}.safetensors").is_file():
            raise UserError(f"{folder}/W_dec_{layer}.safetensors is missing; copy it there")
    where = folder / _CONFIG
    record = record_of(read_yaml(where), where) if where.is_file() else {}
    if record.get("model_kind", KIND) != KIND:
        raise UserError(f"{where}: model_kind is {record['model_kind']!r}, and the files beside it are of a {KIND}")
    activation = str(
        record.get(
            "activation", "jumprelu" if "threshold_0" in tensor_heads(folder / "W_enc_0.safetensors") else "relu"
        )
    )
    if activation == "topk" and "k" not in record:
        raise UserError(f"{where}: activation is topk but k is missing; write it there")
    model_name = str(record.get("model_name", ""))
    hooks = [own_hook(str(record.get(key, default)), model_name) for key, default in _HOOK_KEYS.items()]
    k = positive(record.get("k", UNKNOWN_L0), "k", where)
    config = TranscoderSetConfig(len(layers), k, activation, model_name, *hooks)
    sources = {
        layer: LayerSource(folder / f"W_enc_{layer}.safetensors", where, _translator(folder, layer, len(layers)))
        for layer in layers
    }
    return SetSource(config, sources)


def _translator(folder: Path, layer: int, n_layers: int) -> Any:
    def translate(tensors: Tensors) -> Tensors:
        encoder = folder / f"W_enc_{layer}.safetensors"
        names = {f"{name}_{layer}": name for name in ("W_enc", "b_enc", "b_dec", "threshold")}
        ours = not_below_0(taken(tensors, names, (f"threshold_{layer}",), encoder), encoder)
        path = folder / f"W_dec_{layer}.safetensors"
        decoder = taken(read_tensors(path), {f"W_dec_{layer}": "W_dec"}, (), path)["W_dec"]
        return ours | _split(decoder, n_layers - layer, path)

    return translate


def _split(decoder: Tensor, writes: int, path: Path) -> Tensors:
    if decoder.ndim != 3 or decoder.shape[1] != writes:
        raise UserError(
            f"{path}: the decoder has shape {tuple(decoder.shape)} where (features, {writes}, model width) is "
            "expected, a decoder for its own layer and each later one; copy the set anew"
        )
    by_layer = decoder.movedim(1, 0).contiguous()
    return {"W_dec": by_layer[0]} | ({"W_later": by_layer[1:]} if writes > 1 else {})


def refuse(transcoders: TranscoderSet) -> str | None:
    """circuit-tracer wants all layers, each writing to every later one, ReLU or JumpReLU, no skip path."""
    ones, n = transcoders.transcoders, len(transcoders)
    if transcoders.layers != list(range(n)):
        return f"it wants layers 0, 1, 2, ..., and these are {transcoders.layers}"
    if any(one.config.writes != n - layer for layer, one in ones.items()):
        return "its features write to their own layer and to every later one, and these do not"
    if any(one.W_skip is not None for one in ones.values()):
        return "it has no place for a skip path"
    if any(one.config.activation not in ("relu", "jumprelu") for one in ones.values()):
        return f"circuit-tracer reads relu and jumprelu here, and would take {ones[0].config.activation} for relu"
    if len({one.config.n_features for one in ones.values()}) > 1:
        return "it has one width for all layers"
    return uniform(transcoders)


def write(transcoders: TranscoderSet, folder: Path, dtype: str) -> None:
    """Write the two files of each layer, then `config.yaml`."""
    for layer, one in transcoders.transcoders.items():
        tensors = own_tensors(one)
        decoders = [tensors.pop("W_dec"), *tensors.pop("W_later", [])]
        named = {f"{name}_{layer}": tensor for name, tensor in tensors.items()}
        write_tensors(folder / f"W_enc_{layer}.safetensors", named, dtype)
        stacked = torch.stack([decoder.detach() for decoder in decoders], dim=1)
        write_tensors(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": stacked}, dtype)
    config, one = transcoders.config, transcoders[0].config
    record = {
        "model_kind": KIND,
        "model_name": config.model_name,
        "feature_input_hook": their_hook(one.input_hook, config.model_name),
        "feature_output_hook": their_hook(one.output_hook, config.model_name),
        "activation": one.activation,
        "k": one.k,
        "dtype": dtype,
    }
    write_yaml(folder / _CONFIG, record)  # last, so that a folder with a config is a whole set
