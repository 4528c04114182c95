"""Formats with `config.yaml` and a file for each layer: our own, that of the paper's code, and circuit-tracer's two.

`config.yaml` + `layer_{i}.safetensors`: vlmscope, paper and circuit_tracer differ in what a missing key means. The
paper's code reads k from `top_k` alone, by default 48; circuit-tracer reads `activation` and `k` and, without them,
takes JumpReLU for a file with `activation_function.threshold` and ReLU for any other. Its `to_safetensors` writes that
tensor, or a scalar `k` of TopK. Our writer writes all of these, so that each tool reads the same function.

clt, cross-layer: `W_enc_{i}.safetensors` with `W_enc_{i}` [F, d], `b_enc_{i}` [F], `b_dec_{i}` [d] and, with JumpReLU,
`threshold_{i}` [F]; `W_dec_{i}.safetensors` with `W_dec_{i}` [F, L - i, d], whose second axis counts the layers written
to from i upwards. circuit-tracer reads only ReLU and JumpReLU, the latter when there is a threshold.

Tables of keys and traps: docs/formats_transcoders.md.
"""

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vlmscope.core.artifacts import open_tensors, read_yaml, tensor_heads, write_yaml
from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderSetConfig
from vlmscope.transcoders.formats import common
from vlmscope.transcoders.transcoder import TranscoderSet

CONFIG = "config.yaml"
_KIND, _CLT_KIND = "transcoder_set", "cross_layer_transcoder"
_CROSS_LAYER = "cross_layer_transcoder_set"  # ours: other readers must not take it for a set of single layers
_THRESHOLD = "activation_function.threshold"  # circuit-tracer's name, from its state dict
_PAPER_K = 48  # the paper's reader takes this when `top_k` is absent
_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
_CLT_HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}


def found_in(folder: Path, name: str) -> bool:
    """Whether a folder has `config.yaml` + `layer_{i}.safetensors`, with the defaults of the format `name`."""
    return (folder / CONFIG).is_file() and not clt_found_in(folder) and _flavour(folder) == name


def _flavour(folder: Path) -> str:
    """The format whose defaults apply: "vlmscope", "paper" or "circuit_tracer"."""
    where = folder / CONFIG
    record = common.record_of(read_yaml(where), where)
    if "top_k" in record and "activation" in record:
        return "vlmscope"
    if "activation" in record or "k" in record or "scan" in record:
        return "circuit_tracer"
    if any({_THRESHOLD, "k"} & tensor_heads(file).keys() for file in _layer_files(folder, record).values()):
        return "circuit_tracer"  # no other tool writes these
    if {"top_k", "layers", "num_model_layers"} & record.keys():
        return "paper"
    raise UserError(
        f"{where} says neither top_k nor activation: the paper's code would take TopK with k = {_PAPER_K}, "
        "circuit-tracer ReLU; say whose set it is with transcoder.format=paper or transcoder.format=circuit_tracer"
    )


def open_set(folder: Path, choice: common.Choice, name: str) -> common.SetSource:
    """The set of single layers in a folder, with the defaults of the format `name`."""
    where = folder / CONFIG
    if not where.is_file():
        raise UserError(
            f"no transcoder set in {folder}: config.yaml is missing{without_config(folder)}; check the path"
        )
    record = common.record_of(read_yaml(where), where)
    files = _layer_files(folder, record)
    activation, k = _activation(record, name, where)
    n_model_layers = common.positive(record.get("num_model_layers", max(files) + 1), "num_model_layers", where)
    model_name, hooks = _named(record, _HOOKS)
    recorded = "activation" in record or name != "circuit_tracer"
    layers = {n: _layer(path, where, activation if recorded else None, k) for n, path in files.items()}
    activation = next(iter(layers.values())).activation or activation
    k = max(layer.k or k for layer in layers.values())
    return common.SetSource(TranscoderSetConfig(n_model_layers, k, activation, model_name, *hooks), layers)


def without_config(folder: Path) -> str:
    """Advice for layers without a config, as circuit-tracer's `to_safetensors` writes them; "" if there are none."""
    first = next(iter(sorted(folder.glob("layer_*.safetensors"))), None)
    if first is None:
        return ""
    keys = "model_kind: transcoder_set, model_name, feature_input_hook and feature_output_hook"
    return f" ({first.name} is there; write {keys} of the set into {folder / CONFIG}, for no file says them)"


def _named(record: dict[str, Any], defaults: dict[str, str]) -> tuple[str, list[str]]:
    """The model's name, and the hooks by our names."""
    name = str(record.get("model_name", ""))
    return name, [common.own_hook(str(record.get(key, default)), name) for key, default in defaults.items()]


def _layer(path: Path, where: Path, activation: str | None, k: int) -> common.LayerSource:
    """One layer, with the settings in its own file: thresholds under circuit-tracer's name, or k of TopK.

    The file must agree with `activation` and `k` of the configuration `where`; if `activation` is None each file
    decides, as it does for circuit-tracer.
    """
    heads = tensor_heads(path)
    stored = "jumprelu" if _THRESHOLD in heads else "topk" if "k" in heads else None
    if stored is not None and activation not in (None, stored):
        holds = "thresholds" if stored == "jumprelu" else "k, of topk"
        raise UserError(f"{where}: activation is {activation!r}, but {path} holds {holds}; make them agree")
    stored_k = None
    if "k" in heads:
        shape, dtype = heads["k"].shape, heads["k"].dtype
        if shape or not dtype.startswith(("I", "U")):
            raise UserError(f"{path}: k has shape {shape} and dtype {dtype} where one whole number is expected")
        with open_tensors(path) as file:
            stored_k = common.positive(int(file.get_tensor("k")), "k", path)
        if activation == "topk" and stored_k != k:
            raise UserError(f"{where}: k is {k}, but {path.name} says {stored_k}; make them agree")
    return common.LayerSource(path, where, partial(_translate, path=path), stored_k, activation or stored or "relu")


def _translate(tensors: common.Tensors, path: Path) -> common.Tensors:
    ours = {name: tensor for name, tensor in tensors.items() if name not in ("k", _THRESHOLD)}
    if _THRESHOLD not in tensors:
        return ours
    if "threshold" in tensors:
        raise UserError(f"{path} holds its thresholds twice, as threshold too; leave one of them away")
    threshold = tensors[_THRESHOLD]
    shared = threshold.numel() == 1 and "b_enc" in tensors  # one number for all features
    ours["threshold"] = threshold.reshape(1).expand(tensors["b_enc"].shape) if shared else threshold
    return common.not_below_0(ours, path)


def _activation(record: dict[str, Any], name: str, where: Path) -> tuple[str, int]:
    """Activation and k as the format's own reader would understand them."""
    top_k, k = record.get("top_k"), record.get("k")
    if top_k is not None and k is not None and top_k != k:
        raise UserError(f"{where}: top_k = {top_k} but k = {k}; make them agree")
    activation = str(record.get("activation", "relu" if name == "circuit_tracer" else "topk"))
    if name == "circuit_tracer":
        activation = "jumprelu" if activation == "jump_relu" else activation
        if activation == "topk" and k is None:
            raise UserError(f"{where}: activation is topk but k is missing; write it there")
        return activation, common.positive(common.UNKNOWN_L0 if k is None else k, "k", where)
    if name == "paper":
        if activation != "topk":
            raise UserError(f"{where}: activation is {activation!r}, but the paper's sets are TopK; leave format away")
        return activation, common.positive(_PAPER_K if top_k is None else top_k, "k", where)
    if top_k is None and k is None:
        raise UserError(f"{where}: neither top_k nor k is there; write how many features are active at a token")
    return activation, common.positive(k if top_k is None else top_k, "k", where)


def _layer_files(folder: Path, record: dict[str, Any]) -> dict[int, Path]:
    """Layer -> file, from `layers` and `transcoders`, or from the file names when the config lists neither."""
    where = folder / CONFIG
    if record.get("model_kind", _KIND) not in (_KIND, _CROSS_LAYER):
        raise UserError(f"{where}: model_kind is {record['model_kind']!r}; only transcoder_set can be read")
    names, layers = record.get("transcoders"), record.get("layers")
    if names is None and layers is None:
        stems = {path.stem.removeprefix("layer_"): path for path in folder.glob("layer_*.safetensors")}
        files = {int(stem): path for stem, path in stems.items() if stem.isdecimal()}
        if not files:
            raise UserError(f"{folder} holds no layer_*.safetensors file; check the path")
        return dict(sorted(files.items()))
    if names is not None and not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise UserError(f"{where}: transcoders must be a list of file names, not {names!r}")
    layers = list(range(len(names or ()))) if layers is None else layers
    if not isinstance(layers, list) or not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise UserError(f"{where}: layers must be a list of layer numbers, not {layers!r}")
    names = [_file_name(layer) for layer in layers] if names is None else names
    if len(names) != len(layers) or len(set(layers)) != len(layers):
        raise UserError(
            f"{where}: {len(names)} transcoders for {len(set(layers))} different layers; the lists must match"
        )
    files = {}
    for layer, name in sorted(zip(layers, names, strict=True)):
        # Sets may come from strangers, so nothing outside the folder is opened. Judged by name, not by resolved link:
        # in the hub's cache every file is a link to another folder.
        if "://" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{where}: {name!r} does not lie in the set's folder; copy the file there and name it so")
        files[layer] = folder / name
        if not os.path.isfile(files[layer]):  # Path.is_file raises for a name that is too long
            raise UserError(
                f"{files[layer]} is missing (layer {layer} of the set); copy it there or train the set again"
            )
    return files


def _file_name(layer: int) -> str:
    return f"layer_{layer}.safetensors"


def write(transcoders: TranscoderSet, folder: Path, dtype: str, name: str) -> None:
    """Write the set with the keys of all three readers; for circuit-tracer, with thresholds under its name."""
    theirs = {"threshold": _THRESHOLD} if name == "circuit_tracer" else {}
    for layer, transcoder in tqdm(transcoders.transcoders.items(), desc="saving", unit="layer", delay=5.0):
        tensors = {theirs.get(ours, ours): tensor for ours, tensor in common.own_tensors(transcoder).items()}
        common.write_tensors(folder / _file_name(layer), tensors, dtype)
    record = _head(transcoders, _CROSS_LAYER if transcoders.cross_layer else _KIND)
    if name == "circuit_tracer" and record["activation"] == "batchtopk":
        record["activation"] = "jumprelu"  # what it is after training
    k = transcoders[transcoders.layers[0]].config.k
    record |= {
        # The paper's code reads `top_k`, circuit-tracer `activation` and `k`; both use defaults silently without them.
        "top_k": k,
        "k": k,
        "layers": transcoders.layers,
        "num_model_layers": transcoders.config.n_model_layers,
        "transcoders": [_file_name(layer) for layer in transcoders.layers],
        "dtype": dtype,
    }
    write_yaml(folder / CONFIG, record)  # last, so that a folder with a config is a whole set


def _head(transcoders: TranscoderSet, kind: str) -> dict[str, Any]:
    first, name = transcoders[transcoders.layers[0]].config, transcoders.config.model_name
    return {
        "model_kind": kind,
        "model_name": name,
        "feature_input_hook": common.their_hook(first.input_hook, name),
        "feature_output_hook": common.their_hook(first.output_hook, name),
        "activation": first.activation,
    }


# Cross-layer


def clt_found_in(folder: Path) -> bool:
    """Whether a folder has the layout of circuit-tracer's cross-layer transcoders."""
    return (folder / "W_enc_0.safetensors").is_file()


def clt_open_set(folder: Path, choice: common.Choice) -> common.SetSource:
    """The set of cross-layer transcoders in a folder."""
    matches = [re.fullmatch(r"W_enc_(\d+)\.safetensors", path.name) for path in folder.glob("W_enc_*")]
    layers = sorted(int(match[1]) for match in matches if match)
    if layers != list(range(len(layers))) or not layers:
        raise UserError(f"{folder} holds W_enc files of layers {layers}; a set has layers 0, 1, 2, ...; copy it again")
    for layer in layers:
        if not (folder / f"W_dec_{layer}.safetensors").is_file():
            raise UserError(f"{folder}/W_dec_{layer}.safetensors is missing; copy it there")
    where = folder / CONFIG
    record = common.record_of(read_yaml(where), where) if where.is_file() else {}
    if record.get("model_kind", _CLT_KIND) != _CLT_KIND:
        raise UserError(
            f"{where}: model_kind is {record['model_kind']!r}, and the files beside it are of a {_CLT_KIND}"
        )
    default = "jumprelu" if "threshold_0" in tensor_heads(folder / "W_enc_0.safetensors") else "relu"
    activation = str(record.get("activation", default))
    if activation == "topk" and "k" not in record:
        raise UserError(f"{where}: activation is topk but k is missing; write it there")
    model_name, hooks = _named(record, _CLT_HOOKS)
    k = common.positive(record.get("k", common.UNKNOWN_L0), "k", where)
    sources = {}
    for layer in layers:
        path = folder / f"W_enc_{layer}.safetensors"
        translate = partial(_clt_translate, path=path, layer=layer, writes=len(layers) - layer)
        sources[layer] = common.LayerSource(
            path, where, translate, decoders=path.with_name(f"W_dec_{layer}.safetensors")
        )
    return common.SetSource(TranscoderSetConfig(len(layers), k, activation, model_name, *hooks), sources)


def _clt_translate(tensors: common.Tensors, path: Path, layer: int, writes: int) -> common.Tensors:
    names = {f"{name}_{layer}": name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    ours = common.not_below_0(common.taken(tensors, names, (f"threshold_{layer}",), path), path)
    decoder, path = ours["W_dec"], path.with_name(f"W_dec_{layer}.safetensors")
    if decoder.ndim != 3 or decoder.shape[1] != writes:
        raise UserError(
            f"{path}: the decoder has shape {tuple(decoder.shape)} where (features, {writes}, model width) is "
            "expected, a decoder for its own layer and each later one; copy the set again"
        )
    by_layer = decoder.movedim(1, 0)
    return ours | {"W_dec": by_layer[0]} | ({"W_later": by_layer[1:]} if writes > 1 else {})


def clt_write(transcoders: TranscoderSet, folder: Path, dtype: str) -> None:
    """Write the two files of each layer, then `config.yaml`."""
    for layer, transcoder in transcoders.transcoders.items():
        tensors = common.own_tensors(transcoder)
        decoders = [tensors.pop("W_dec"), *tensors.pop("W_later", [])]
        named = {f"{name}_{layer}": tensor for name, tensor in tensors.items()}
        common.write_tensors(folder / f"W_enc_{layer}.safetensors", named, dtype)
        stacked = torch.stack([decoder.detach() for decoder in decoders], dim=1)
        common.write_tensors(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": stacked}, dtype)
    record = {**_head(transcoders, _CLT_KIND), "k": transcoders[0].config.k, "dtype": dtype}
    write_yaml(folder / CONFIG, record)  # last, as above
