"""`config.yaml` + `layer_{i}.safetensors`: our own sets, those of the paper's code, and circuit-tracer's.

The three differ in what a missing key means. The paper's code reads k from `top_k` alone and takes 48 without it;
circuit-tracer reads `activation` and `k` and, without them, takes JumpReLU for a file that holds
`activation_function.threshold` and ReLU for any other. Its `to_safetensors` writes that tensor, or a scalar `k` of
TopK. Our writer says all of it, so that each reads the same function. Tables: docs/formats_transcoders.md.
"""

import os
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import TensorHead, open_tensors, read_yaml, tensor_heads, write_yaml
from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.formats.common import (
    UNKNOWN_L0,
    Choice,
    LayerSource,
    SetSource,
    Tensors,
    no_cross_layer,
    not_below_0,
    own_hook,
    own_tensors,
    positive,
    record_of,
    their_hook,
    uniform,
    write_tensors,
)
from vlmscope.transcoders.transcoder import TranscoderSet

CONFIG = "config.yaml"
_KIND = "transcoder_set"
_CROSS_LAYER = "cross_layer_transcoder_set"  # ours: other readers must not take it for a set of single layers
_THRESHOLD = "activation_function.threshold"  # circuit-tracer's name: its state dict's
_PAPER_K = 48  # the paper's reader takes this when `top_k` is absent
_HOOK_KEYS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}


def has_config(folder: Path) -> bool:
    """Whether a folder has this layout, whoever wrote it."""
    return (folder / CONFIG).is_file() and not (folder / "W_enc_0.safetensors").is_file()


def flavour(folder: Path) -> str:
    """Whose defaults hold in a folder of this layout: "vlmscope", "paper" or "circuit_tracer".

    Raises:
        UserError: it says too little, and the defaults of the two readers differ.
    """
    where = folder / CONFIG
    record = record_of(read_yaml(where), where)
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


def open_own(folder: Path, choice: Choice) -> SetSource:
    """A set of ours, which says everything."""
    return _open(folder, "vlmscope", choice)


def open_paper(folder: Path, choice: Choice) -> SetSource:
    """A set of the paper's code: TopK, k in `top_k`."""
    return _open(folder, "paper", choice)


def open_circuit_tracer(folder: Path, choice: Choice) -> SetSource:
    """A set of circuit-tracer: ReLU unless `activation` and `k` say otherwise."""
    return _open(folder, "circuit_tracer", choice)


def _open(folder: Path, name: str, choice: Choice) -> SetSource:
    del choice  # a folder of this layout holds one set
    where = folder / CONFIG
    if not where.is_file():
        raise UserError(
            f"no transcoder set in {folder}: config.yaml is missing{without_config(folder)}; check the path"
        )
    record = record_of(read_yaml(where), where)
    files = _layer_files(folder, record)
    activation, k = _activation(record, name, where)
    n_model_layers = positive(record.get("num_model_layers", max(files) + 1), "num_model_layers", where)
    model_name = str(record.get("model_name", ""))
    hooks = [own_hook(str(record.get(key, default)), model_name) for key, default in _HOOK_KEYS.items()]
    said = "activation" in record or name != "circuit_tracer"
    layers = {n: _layer(path, where, activation if said else None, k) for n, path in files.items()}
    activation = next(iter(layers.values())).activation or activation
    k = max(layer.k or k for layer in layers.values())
    return SetSource(TranscoderSetConfig(n_model_layers, k, activation, model_name, *hooks), layers)


def without_config(folder: Path) -> str:
    """Words for layers that nothing describes, as circuit-tracer's `to_safetensors` leaves them; "" without any."""
    first = next(iter(sorted(folder.glob("layer_*.safetensors"))), None)
    if first is None:
        return ""
    keys = "model_kind: transcoder_set, model_name, feature_input_hook and feature_output_hook"
    return f" ({first.name} is there; write {keys} of the set into {folder / CONFIG}, for no file says them)"


def _layer(path: Path, where: Path, activation: str | None, k: int) -> LayerSource:
    """One layer with what its own file says: thresholds under circuit-tracer's name, or k.

    Args:
        path: the layer's file.
        where: the set's configuration.
        activation: what that says; None where it says nothing, and each file decides as it does for circuit-tracer.
        k: of the set, where `activation` is TopK.

    Raises:
        UserError: the two contradict each other.
    """
    heads = tensor_heads(path)
    told = "jumprelu" if _THRESHOLD in heads else "topk" if "k" in heads else None
    if told is not None and activation not in (None, told):
        holds = "thresholds" if told == "jumprelu" else "k, of topk"
        raise UserError(f"{where}: activation is {activation!r}, but {path} holds {holds}; make them agree")
    own_k = _scalar(path, heads["k"]) if "k" in heads else None
    if own_k is not None and activation == "topk" and own_k != k:
        raise UserError(f"{where}: k is {k}, but {path.name} says {own_k}; make them agree")

    def translate(tensors: Tensors) -> Tensors:
        found = {name: tensor for name, tensor in tensors.items() if name not in ("k", _THRESHOLD)}
        if _THRESHOLD in tensors:
            if "threshold" in tensors:
                raise UserError(f"{path} holds its thresholds twice, as threshold too; leave one of them away")
            theirs = tensors[_THRESHOLD]
            one = theirs.numel() == 1 and "b_enc" in tensors  # the same for all features
            found["threshold"] = theirs.reshape(1).expand(tensors["b_enc"].shape) if one else theirs
            not_below_0(found, path)
        return found

    return LayerSource(path, where, translate, own_k, activation or told or "relu")


def _scalar(path: Path, head: TensorHead) -> int:
    if head.shape or not head.dtype.startswith(("I", "U")):
        raise UserError(f"{path}: k has shape {head.shape} and dtype {head.dtype} where one whole number is expected")
    with open_tensors(path) as file:
        return positive(int(file.get_tensor("k")), "k", path)


def _activation(record: dict[str, Any], name: str, where: Path) -> tuple[str, int]:
    """Activation and k as the format's own reader would take them."""
    top_k, k = record.get("top_k"), record.get("k")
    if top_k is not None and k is not None and top_k != k:
        raise UserError(f"{where}: top_k = {top_k} but k = {k}; make them agree")
    if name == "paper":
        activation = str(record.get("activation", "topk"))
        if activation != "topk":
            raise UserError(f"{where}: activation is {activation!r}, but the paper's sets are TopK; leave format away")
        return activation, positive(_PAPER_K if top_k is None else top_k, "k", where)
    if name == "circuit_tracer":
        activation = str(record.get("activation", "relu"))
        activation = "jumprelu" if activation == "jump_relu" else activation
        if activation == "topk" and k is None:
            raise UserError(f"{where}: activation is topk but k is missing; write it there")
        return activation, positive(UNKNOWN_L0 if k is None else k, "k", where)
    if top_k is None and k is None:
        raise UserError(f"{where}: neither top_k nor k is there; write how many features are active at a token")
    return str(record.get("activation", "topk")), positive(k if top_k is None else top_k, "k", where)


def _layer_files(folder: Path, record: dict[str, Any]) -> dict[int, Path]:
    """Layer -> file, from `layers` and `transcoders`, or from the file names when the config lists neither."""
    where = folder / CONFIG
    if record.get("model_kind", _KIND) not in (_KIND, _CROSS_LAYER):
        raise UserError(f"{where}: model_kind is {record['model_kind']!r}; only transcoder_set can be read")
    names, layers = record.get("transcoders"), record.get("layers")
    if names is None and layers is None:
        found = {int(path.stem[6:]): path for path in folder.glob("layer_*.safetensors") if path.stem[6:].isdecimal()}
        if not found:
            raise UserError(f"{folder} holds no layer_*.safetensors file; check the path")
        return dict(sorted(found.items()))
    if layers is None:
        layers = range(len(_strings(names, where)))
    elif not isinstance(layers, list) or not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise UserError(f"{where}: layers must be a list of layer numbers, not {layers!r}")
    names = [_file_name(layer) for layer in layers] if names is None else _strings(names, where)
    if len(names) != len(layers) or len(set(layers)) != len(layers):
        raise UserError(
            f"{where}: {len(names)} transcoders for {len(set(layers))} different layers; the lists must match"
        )
    files = {}
    for layer, name in zip(layers, names, strict=True):
        # Nothing outside the folder is ever opened: a set may come from a stranger.
        if "://" in name or not _lies_in(folder, name):
            raise UserError(f"{where}: {name!r} does not lie in the set's folder; copy the file there and name it so")
        files[layer] = folder / name
        if not os.path.isfile(files[layer]):  # Path.is_file raises for a name that is too long
            raise UserError(
                f"{files[layer]} is missing (layer {layer} of the set); copy it there or train the set again"
            )
    return dict(sorted(files.items()))


def _lies_in(folder: Path, name: str) -> bool:
    """By name, not by where a link leads: in the hub's cache every file is a link to another folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _strings(names: object, where: Path) -> list[str]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: transcoders must be a list of file names, not {names!r}")
    return names


def _file_name(layer: int) -> str:
    return f"layer_{layer}.safetensors"


def refuse_paper(transcoders: TranscoderSet) -> str | None:
    """The paper's code reads TopK between the raw MLP's input and output, of all layers from 0."""
    config, layers = _first(transcoders), transcoders.layers
    if transcoders.cross_layer:
        return no_cross_layer(transcoders)
    if config.activation != "topk":
        return f"the paper's code knows TopK alone and would read {config.activation} as TopK without its threshold"
    if (config.input_hook, config.output_hook) != ("mlp_in", "mlp_out"):
        return f"its target is the raw MLP output, and these map {config.input_hook} to {config.output_hook}"
    if layers != list(range(len(layers))):
        return f"it wants layers 0, 1, 2, ..., and these are {layers}"
    return uniform(transcoders)


def refuse_circuit_tracer(transcoders: TranscoderSet) -> str | None:
    """circuit-tracer reads TopK, ReLU and JumpReLU (and what is the same after training: BatchTopK)."""
    layers = transcoders.layers
    if transcoders.cross_layer:
        return f"{no_cross_layer(transcoders)} (its own format for them is clt)"
    if layers != list(range(len(layers))):
        return f"it counts the files as layers 0, 1, 2, ..., and these are {layers}"
    return uniform(transcoders)


def _first(transcoders: TranscoderSet) -> TranscoderConfig:
    return transcoders[transcoders.layers[0]].config


def write(transcoders: TranscoderSet, folder: Path, dtype: str) -> None:
    """Write the set with the keys of all three readers."""
    _write(transcoders, folder, dtype, {}, {})


def write_circuit_tracer(transcoders: TranscoderSet, folder: Path, dtype: str) -> None:
    """The same, with thresholds where circuit-tracer looks for them."""
    activation = _first(transcoders).activation
    said = {"activation": "jumprelu"} if activation == "batchtopk" else {}
    _write(transcoders, folder, dtype, {"threshold": _THRESHOLD}, said)


def _write(transcoders: TranscoderSet, folder: Path, dtype: str, names: dict[str, str], said: dict[str, Any]) -> None:
    for layer, transcoder in transcoders.transcoders.items():
        tensors = {names.get(name, name): tensor for name, tensor in own_tensors(transcoder).items()}
        write_tensors(folder / _file_name(layer), tensors, dtype)
    # Last, so that a folder with a config is a whole set.
    write_yaml(folder / CONFIG, _config_record(transcoders, dtype) | said)


def _config_record(transcoders: TranscoderSet, dtype: str) -> dict[str, Any]:
    config, one = transcoders.config, _first(transcoders)
    return {
        "model_kind": _CROSS_LAYER if transcoders.cross_layer else _KIND,
        "model_name": config.model_name,
        "feature_input_hook": their_hook(one.input_hook, config.model_name),
        "feature_output_hook": their_hook(one.output_hook, config.model_name),
        "activation": one.activation,
        # The paper's code reads `top_k`, circuit-tracer `activation` and `k`; without them each falls back in silence.
        "top_k": one.k,
        "k": one.k,
        "layers": transcoders.layers,
        "num_model_layers": config.n_model_layers,
        "transcoders": [_file_name(layer) for layer in transcoders.layers],
        "dtype": dtype,
    }
