"""Gemma Scope 2: `transcoder_all/layer_{L}_width_{W}_l0_{S}[_affine]/{config.json,params.safetensors}`.

JumpReLU. `w_enc` [d, F] is transposed, and so is `affine_skip_connection` [in, out], which is applied as `x @ W`. The
input is the output of `pre_feedforward_layernorm`, our `mlp_in`; the target is the output of the norm *after* the MLP,
`post_feedforward_layernorm`, our `mlp_out_post`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlmscope.core.artifacts import read_json, write_json
from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderSetConfig
from vlmscope.transcoders.formats.common import (
    UNKNOWN_L0,
    Choice,
    LayerSource,
    SetSource,
    Tensors,
    l0_of,
    no_cross_layer,
    own_tensors,
    record_of,
    taken,
    transposed,
    uniform,
    write_tensors,
)
from vlmscope.transcoders.transcoder import TranscoderSet

_FOLDER = re.compile(r"layer_(\d+)_width_([0-9]+[km]?)_l0_([a-z0-9]+?)(_affine)?")
_PARENTS = ("transcoder_all", "transcoder")
_NAMES = {
    "w_enc": "W_enc",
    "w_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
    "affine_skip_connection": "W_skip",
}
_IN = "model.layers.{}.pre_feedforward_layernorm.output"
_OUT = "model.layers.{}.post_feedforward_layernorm.output"


class _Variant(NamedTuple):
    layer: int
    width: str
    l0: str
    affine: bool
    folder: Path

    def fits(self, choice: Choice) -> bool:
        """Whether nothing that was chosen speaks against it."""
        return (
            choice.width in (None, self.width) and choice.l0 in (None, self.l0) and choice.affine in (None, self.affine)
        )

    @property
    def kind(self) -> str:
        return f"transcoder.width={self.width} transcoder.l0={self.l0} transcoder.affine={str(self.affine).lower()}"


def _variants(folder: Path) -> list[_Variant]:
    """Every layer's folder: the given one itself, those in it, or those in its `transcoder_all`."""
    inside = [path for parent in (folder, *(folder / name for name in _PARENTS)) for path in parent.glob("layer_*")]
    found = []
    for path in [folder.absolute(), *sorted(inside)]:
        match = _FOLDER.fullmatch(path.name)
        if match and (path / "params.safetensors").is_file():
            found.append(_Variant(int(match[1]), match[2], match[3], bool(match[4]), path))
    return found


def found_in(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return bool(_variants(folder))


def open_set(folder: Path, choice: Choice) -> SetSource:
    """The layers of the chosen width, sparsity and skip path.

    Raises:
        UserError: none or several fit the choice, or a `config.json` says that it is something else.
    """
    variants = _variants(folder)
    if not variants:
        raise UserError(f"{folder} holds no layer_*_width_*_l0_*/params.safetensors; check the path")
    fitting = [variant for variant in variants if variant.fits(choice)]
    kinds = sorted({variant.kind for variant in (fitting or variants)})
    if not fitting:
        raise UserError(f"{folder} has no transcoders of that choice; choose one of: {'; '.join(kinds)}")
    if len(kinds) > 1 or len({variant.layer for variant in fitting}) < len(fitting):
        raise UserError(f"{folder} holds several sets; choose one of: {'; '.join(kinds)}")
    records = {variant.layer: _record(variant) for variant in fitting}
    l0s = [found for record in records.values() if (found := l0_of(record.get("l0"))) is not None]
    config = TranscoderSetConfig(
        n_model_layers=max(records) + 1,
        k=round(sum(l0s) / len(l0s)) if l0s else UNKNOWN_L0,
        activation="jumprelu",
        model_name=str(next(iter(records.values())).get("model_name", "")),
        output_hook="mlp_out_post",
    )
    layers = {
        v.layer: LayerSource(
            v.folder / "params.safetensors", v.folder / "config.json", _translator(v), l0_of(records[v.layer].get("l0"))
        )
        for v in sorted(fitting)
    }
    return SetSource(config, layers)


def _record(variant: _Variant) -> dict[str, Any]:
    where = variant.folder / "config.json"
    record = record_of(read_json(where), where)
    for key, expected in (("hf_hook_point_in", _IN), ("hf_hook_point_out", _OUT)):
        wanted = expected.format(variant.layer)
        if record.get(key, wanted) != wanted:
            raise UserError(
                f"{where}: {key} is {record[key]!r}, where a transcoder of layer {variant.layer} has {wanted}"
            )
    if record.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(f"{where}: architecture is {record['architecture']!r}; only jump_relu can be read")
    return record


def _translator(variant: _Variant) -> Callable[[Tensors], Tensors]:
    path = variant.folder / "params.safetensors"

    def translate(tensors: Tensors) -> Tensors:
        optional = () if variant.affine else ("affine_skip_connection",)
        return transposed(taken(tensors, _NAMES, optional, path), "W_enc", "W_skip")

    return translate


def refuse(transcoders: TranscoderSet) -> str | None:
    """JumpReLU (and what is the same: ReLU, and BatchTopK after training) into the stream after the post norm."""
    config = transcoders[transcoders.layers[0]].config
    if transcoders.cross_layer:
        return no_cross_layer(transcoders)
    if config.activation == "topk":
        return "it is JumpReLU, and no threshold chooses as TopK does"
    if (config.input_hook, config.output_hook) != ("mlp_in", "mlp_out_post"):
        hooks = f"{config.input_hook} to {config.output_hook}"
        return f"its target lies after the norm that follows the MLP, and these map {hooks}"
    if len({t.W_skip is None for t in transcoders.transcoders.values()}) > 1:
        return "it has a skip path in every layer or in none"
    return uniform(transcoders)


def write(transcoders: TranscoderSet, folder: Path, dtype: str) -> None:
    """Write `transcoder_all/...`; the sparsity's name is small up to an L0 of 20 and big above, as in Gemma Scope 2."""
    widths = {transcoder.config.n_features for transcoder in transcoders.transcoders.values()}
    ours = {ours: theirs for theirs, ours in _NAMES.items()}
    for layer, transcoder in transcoders.transcoders.items():
        config = transcoder.config
        tensors = transposed(own_tensors(transcoder), "W_enc", "W_skip")
        tensors.setdefault("threshold", torch.zeros_like(transcoder.b_enc))  # ReLU
        skip, l0 = config.skip, "small" if transcoders.config.k <= 20 else "big"
        width = _width_name(max(widths))
        target = folder / "transcoder_all" / f"layer_{layer}_width_{width}_l0_{l0}{'_affine' if skip else ''}"
        write_tensors(target / "params.safetensors", {ours[name]: t for name, t in tensors.items()}, dtype)
        record = {
            "hf_hook_point_in": _IN.format(layer),
            "hf_hook_point_out": _OUT.format(layer),
            "width": config.n_features,
            "model_name": transcoders.config.model_name,
            "architecture": "jump_relu",
            "l0": config.k,
            "affine_connection": skip,
            "type": "transcoder",
        }
        write_json(target / "config.json", record)


def _width_name(features: int) -> str:
    for unit, name in ((2**20, "m"), (2**10, "k")):
        if features >= unit:
            return f"{features // unit}{name}"
    return str(features)
