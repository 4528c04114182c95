"""sparsify (EleutherAI): a folder a hook, `layers.3.mlp/{sae.safetensors,cfg.json}`.

TopK. `encoder.weight` [F, d], `encoder.bias` [F], `W_dec` [F, d], `b_dec` [d], `W_skip` [d, d] applied as
`x @ W_skip.T`. Nothing is subtracted from a transcoder's input (`b_dec` is from an autoencoder's). The hook names a
module whose input is read and whose output is imitated: `...mlp` is the raw MLP.
"""

import re
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import read_json, write_json
from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderSetConfig
from vlmscope.transcoders.formats.common import (
    Choice,
    LayerSource,
    SetSource,
    Tensors,
    no_cross_layer,
    own_tensors,
    positive,
    record_of,
    taken,
    write_tensors,
)
from vlmscope.transcoders.transcoder import TranscoderSet

_HOOK = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.mlp")
_K = 32  # sparsify's own default
_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}
_FILE = "sae.safetensors"


def _hooks(folder: Path) -> list[Path]:
    own = [folder.absolute()] if (folder / _FILE).is_file() else []
    return own or sorted(path.parent for path in folder.glob(f"*/{_FILE}"))


def found_in(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return bool(_hooks(folder))


def open_set(folder: Path, choice: Choice) -> SetSource:
    """The layers of the folder.

    Raises:
        UserError: a hook is no MLP, or a `cfg.json` is that of an autoencoder or of something that is not TopK.
    """
    del choice  # a folder of this layout holds one set
    hooks = _hooks(folder)
    if not hooks:
        raise UserError(f"{folder} holds no */{_FILE}; check the path")
    layers: dict[int, LayerSource] = {}
    for path in hooks:
        match = _HOOK.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path}: hook {path.name!r} is no MLP; only those such as layers.3.mlp can be read")
        layer = int(match[1])
        if layer in layers:
            raise UserError(f"{path} is for layer {layer}, and so is {layers[layer].path.parent}; keep one of them")
        layers[layer] = _layer(path)
    layers = dict(sorted(layers.items()))
    ks = [source.k or _K for source in layers.values()]
    config = TranscoderSetConfig(max(layers) + 1, max(ks), "topk", _model_name(folder))
    return SetSource(config, layers)


def _model_name(folder: Path) -> str:
    where = folder / "config.json"  # sparsify's settings of the training run
    return str(record_of(read_json(where), where).get("model", "")) if where.is_file() else ""


def _layer(folder: Path) -> LayerSource:
    where = folder / "cfg.json"
    record = record_of(read_json(where), where)
    if not record.get("transcode", False):
        raise UserError(f"{where}: transcode is not true, so this is an autoencoder; only transcoders can be read")
    if record.get("activation", "topk") != "topk":
        raise UserError(f"{where}: activation is {record['activation']!r}; only topk can be read")
    if record.get("signed", False):
        raise UserError(f"{where}: signed is true, so features can be negative; only those that cannot can be read")
    path = folder / _FILE

    def translate(tensors: Tensors) -> Tensors:
        skip = record.get("skip_connection", "W_skip" in tensors)
        if skip != ("W_skip" in tensors):
            raise UserError(f"{path}: skip_connection is {skip}, but W_skip is {'missing' if skip else 'there'}")
        found = taken(tensors, _NAMES, ("W_skip",), path)
        _check_width(found, record, where)
        return found

    return LayerSource(path, where, translate, positive(record.get("k", _K), "k", where))


def _check_width(tensors: Tensors, record: dict[str, Any], where: Path) -> None:
    """`num_latents` when it is not 0, else `expansion_factor` times the width, as sparsify counts."""
    if tensors["W_enc"].ndim != 2:
        return  # said by whoever checks shapes
    f, d = tensors["W_enc"].shape
    if record.get("d_in", d) != d:
        raise UserError(f"{where}: d_in is {record['d_in']}, but encoder.weight has shape {(f, d)}")
    for key in ("num_latents", "expansion_factor"):
        if type(record.get(key, 0)) not in (int, float):
            raise UserError(f"{where}: {key} must be a number, not {record[key]!r}")
    said = record.get("num_latents") or d * record.get("expansion_factor", f / d)
    if said != f:
        raise UserError(f"{where}: num_latents and expansion_factor make {said} features, encoder.weight has {(f, d)}")


def refuse(transcoders: TranscoderSet) -> str | None:
    """TopK over the raw MLP; k and width may differ by layer."""
    for transcoder in transcoders.transcoders.values():
        config = transcoder.config
        if config.activation != "topk":
            return f"sparsify chooses features by TopK, and has no place for {config.activation}"
        if (config.input_hook, config.output_hook) != ("mlp_in", "mlp_out"):
            hooks = f"{config.input_hook} to {config.output_hook}"
            return f"it maps a module's input to its output, and no module maps {hooks}"
    return no_cross_layer(transcoders)


def write(transcoders: TranscoderSet, folder: Path, dtype: str) -> None:
    """Write a folder a layer, `layers.{i}.mlp`, and the model's name into `config.json`."""
    ours = {ours: theirs for theirs, ours in _NAMES.items()}
    for layer, transcoder in transcoders.transcoders.items():
        config, target = transcoder.config, folder / f"layers.{layer}.mlp"
        write_tensors(target / _FILE, {ours[name]: t for name, t in own_tensors(transcoder).items()}, dtype)
        whole = config.n_features % config.d_model == 0
        record = {
            "activation": "topk",
            "expansion_factor": config.n_features // config.d_model if whole else 1,
            "normalize_decoder": False,
            "num_latents": 0 if whole else config.n_features,
            "k": config.k,
            "multi_topk": False,
            "skip_connection": config.skip,
            "transcode": True,
            "d_in": config.d_model,
        }
        write_json(target / "cfg.json", record)
    if transcoders.config.model_name:
        write_json(folder / "config.json", {"model": transcoders.config.model_name})
