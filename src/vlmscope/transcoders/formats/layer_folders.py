"""Formats with a folder for each layer, holding a file of tensors and a JSON: Gemma Scope 2, sparsify and SAELens.

gemma_scope  `transcoder_all/layer_{L}_width_{W}_l0_{S}[_affine]/{config.json,params.safetensors}`. JumpReLU. `w_enc`
             [d, F] is transposed, and so is `affine_skip_connection` [in, out], which is applied as `x @ W`. Input is
             the output of `pre_feedforward_layernorm`, our `mlp_in`; target is the output of the norm *after* the MLP,
             `post_feedforward_layernorm`, our `mlp_out_post`.
sparsify     `layers.{L}.mlp/{cfg.json,sae.safetensors}` (EleutherAI). TopK. Nothing is subtracted from a transcoder's
             input (`b_dec` is subtracted from an autoencoder's). The hook names a module whose input is read and whose
             output is imitated: `...mlp` is the raw MLP.
sae_lens     a folder with `{cfg.json,sae_weights.safetensors}` at any depth. `W_enc` [d, F] is transposed. An old set
             may have `apply_b_dec_to_input`: its encoder then sees `x - b_dec`, which is folded into `b_enc` exactly.
             From version 6 on SAELens has only ReLU and JumpReLU transcoders.

Tables of keys and traps: docs/formats_transcoders.md.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlmscope.core.artifacts import read_json, write_json
from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.formats import common
from vlmscope.transcoders.streaming import BLOCK
from vlmscope.transcoders.transcoder import TranscoderSet


class Layer(NamedTuple):
    """A layer as its folder's JSON describes it; `skip` and `shape` [F, d] are None where the JSON does not say.

    With `centred` the encoder sees `x - b_dec`.
    """

    number: int
    activation: str
    k: int | None
    model_name: str
    hooks: tuple[str, str] = ("mlp_in", "mlp_out")
    skip: bool | None = None
    shape: tuple[float | None, float | None] = (None, None)
    centred: bool = False


@dataclass(frozen=True)
class Layout:
    """Files of a format.

    `names` maps its tensors' names to ours; `turned` are those of ours that it stores transposed. `find` returns the
    folders of all layers, `choose` those of one set, `read` the layer that a folder's record describes, and `describe`
    the name and the record of a folder to write (None: the format is only read).
    """

    tensors: str
    record: str
    names: Mapping[str, str]
    turned: tuple[str, ...]
    find: Callable[[Path], list[Path]]
    read: Callable[[dict[str, Any], Path], Layer]
    describe: Callable[[TranscoderConfig, TranscoderSet, str], tuple[str, dict[str, Any]]] | None = None
    choose: Callable[[Path, list[Path], common.Choice], list[Path]] = lambda folder, paths, choice: paths

    def found_in(self, folder: Path) -> bool:
        """Whether a folder has this layout."""
        return bool(self.find(folder))

    def open_set(self, folder: Path, choice: common.Choice) -> common.SetSource:
        """The set in the folder, without its weights."""
        paths = self.choose(folder, self.find(folder), choice)
        if not paths:
            raise UserError(f"{folder} holds no {self.tensors} in this layout; check the path")
        layers: dict[int, tuple[Layer, common.LayerSource]] = {}
        for path in paths:
            where = path / self.record
            layer = self.read(common.record_of(read_json(where), where), where)
            if layer.number in layers:
                duplicate = layers[layer.number][1].path.parent
                raise UserError(f"{path} is for layer {layer.number}, and so is {duplicate}; keep one of them")
            for first, _ in layers.values():
                if (layer.model_name, layer.hooks) != (first.model_name, first.hooks):
                    raise UserError(
                        f"{where}: {layer.hooks} of {layer.model_name!r}, but {first.hooks} of {first.model_name!r} in "
                        "other layers; a set has one model and one pair of hooks"
                    )
            translate = partial(self._translate, layer=layer, where=where)
            source = common.LayerSource(path / self.tensors, where, translate, layer.k, layer.activation)
            layers[layer.number] = layer, source
        first = next(iter(layers.values()))[0]
        config = TranscoderSetConfig(
            n_model_layers=max(layers) + 1,
            k=max(layer.k or common.UNKNOWN_L0 for layer, _ in layers.values()),
            activation=first.activation,
            model_name=first.model_name,
            input_hook=first.hooks[0],
            output_hook=first.hooks[1],
        )
        return common.SetSource(config, {number: layers[number][1] for number in sorted(layers)})

    def _translate(self, tensors: common.Tensors, layer: Layer, where: Path) -> common.Tensors:
        path = where.parent / self.tensors
        optional = [theirs for theirs, ours in self.names.items() if ours in ("W_skip", "threshold")]
        ours = common.transposed(common.taken(tensors, self.names, optional, path), *self.turned)
        if layer.skip not in (None, "W_skip" in ours):
            raise UserError(
                f"{path}: W_skip is {'missing' if layer.skip else 'there'}, but {where.name} says otherwise"
            )
        shape = tuple(ours["W_enc"].shape)
        if len(shape) == 2 and any(n not in (None, size) for n, size in zip(layer.shape, shape, strict=True)):
            raise UserError(f"{where}: it makes {layer.shape} features and model width, but W_enc has {shape}")
        # Biases of the wrong length are left to the check of shapes, which has the better message.
        if layer.centred and ours["W_enc"].shape[-1:] == ours["b_dec"].shape:
            # W_enc (x - b_dec) + b_enc = W_enc x + (b_enc - W_enc b_dec)
            products = [rows.double() @ ours["b_dec"].double() for rows in ours["W_enc"].split(BLOCK)]
            ours["b_enc"] = ours["b_enc"].double() - torch.cat(products)
        return ours

    def write(self, transcoders: TranscoderSet, folder: Path, dtype: str) -> None:
        """Write a folder for each layer."""
        assert self.describe is not None, "a format that is only read"
        theirs = {ours: theirs for theirs, ours in self.names.items()}
        for transcoder in transcoders.transcoders.values():
            name, record = self.describe(transcoder.config, transcoders, dtype)
            tensors = common.transposed(common.own_tensors(transcoder), *self.turned)
            common.write_tensors(folder / name / self.tensors, {theirs[n]: t for n, t in tensors.items()}, dtype)
            write_json(folder / name / self.record, record)


def _demand(record: Mapping[str, Any], where: Path, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Refuse settings that change the function in a way that is not implemented here; None allows an absent key."""
    for key, values in allowed.items():
        if record.get(key) not in values:
            raise UserError(f"{where}: {key} is {record.get(key)!r}; only {values[0]!r} can be read")


def _find(folder: Path, pattern: str) -> list[Path]:
    """The folder itself if it holds such a file, else the folders in it that do."""
    if (folder / pattern.rpartition("/")[2]).is_file():
        return [folder.absolute()]
    return sorted(path.parent for path in folder.glob(pattern))


# Gemma Scope 2

_GEMMA = re.compile(r"layer_(\d+)_width_([0-9]+[km]?)_l0_([a-z0-9]+?)(_affine)?")
_GEMMA_HOOKS = {
    "hf_hook_point_in": "model.layers.{}.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.{}.post_feedforward_layernorm.output",
}


def _gemma_find(folder: Path) -> list[Path]:
    """Every layer's folder: `folder` itself, those in it, or those in its `transcoder_all`."""
    inside = sorted(
        path for parent in ("", "transcoder_all", "transcoder") for path in (folder / parent).glob("layer_*")
    )
    paths = [folder.absolute(), *inside]
    return [path for path in paths if _GEMMA.fullmatch(path.name) and (path / "params.safetensors").is_file()]


def _gemma_choose(folder: Path, paths: list[Path], choice: common.Choice) -> list[Path]:
    """The layers of the chosen width, sparsity and skip path; UserError unless exactly one set fits."""
    kinds: dict[common.Choice, list[Path]] = {}
    for path in paths:
        match = _GEMMA.fullmatch(path.name)
        assert match is not None
        kinds.setdefault(common.Choice(match[2], match[3], bool(match[4])), []).append(path)
    fitting = [k for k in kinds if all(chosen in (None, value) for chosen, value in zip(choice, k, strict=True))]
    shown = "; ".join(
        sorted(
            f"transcoder.width={kind.width} transcoder.l0={kind.l0} transcoder.affine={str(kind.affine).lower()}"
            for kind in fitting or kinds
        )
    )
    if not fitting:
        raise UserError(f"{folder} has no transcoders of that choice; choose one of: {shown}")
    if len(fitting) > 1:
        raise UserError(f"{folder} holds several sets; choose one of: {shown}")
    return kinds[fitting[0]]


def _gemma_read(record: dict[str, Any], where: Path) -> Layer:
    match = _GEMMA.fullmatch(where.parent.absolute().name)
    assert match is not None
    number = int(match[1])
    hooks = {key: (hook.format(number), None) for key, hook in _GEMMA_HOOKS.items()}
    _demand(record, where, {"architecture": ("jump_relu", None), **hooks})
    name = str(record.get("model_name", ""))
    return Layer(
        number, "jumprelu", common.l0_of(record.get("l0")), name, ("mlp_in", "mlp_out_post"), bool(match[4]) or None
    )


GEMMA_SCOPE = Layout(
    tensors="params.safetensors",
    record="config.json",
    names={
        "w_enc": "W_enc",
        "w_dec": "W_dec",
        "b_enc": "b_enc",
        "b_dec": "b_dec",
        "threshold": "threshold",
        "affine_skip_connection": "W_skip",
    },
    turned=("W_enc", "W_skip"),
    find=_gemma_find,
    read=_gemma_read,
    choose=_gemma_choose,
)


# sparsify

_MLP = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.mlp")
_SPARSIFY_K = 32  # sparsify's own default


def _sparsify_read(record: dict[str, Any], where: Path) -> Layer:
    hook = where.parent.name
    match = _MLP.fullmatch(hook)
    if match is None:
        raise UserError(f"{where.parent}: hook {hook!r} is not an MLP; only hooks such as layers.3.mlp can be read")
    # Autoencoders are not transcoders, and signed features can be negative.
    _demand(record, where, {"transcode": (True,), "activation": ("topk", None), "signed": (False, None)})
    settings = where.parent.parent / "config.json"  # of the training run
    name = str(common.record_of(read_json(settings), settings).get("model", "")) if settings.is_file() else ""
    k = common.positive(record.get("k", _SPARSIFY_K), "k", where)
    for key in ("num_latents", "expansion_factor", "d_in"):
        if type(record.get(key, 0)) not in (int, float):
            raise UserError(f"{where}: {key} must be a number, not {record[key]!r}")
    # As in sparsify, the width is `num_latents` unless that is 0, else `expansion_factor` times the model's.
    d, expansion = record.get("d_in"), record.get("expansion_factor")
    f = record.get("num_latents") or (None if d is None or expansion is None else d * expansion)
    return Layer(int(match[1]), "topk", k, name, skip=record.get("skip_connection"), shape=(f, d))


def _sparsify_describe(config: TranscoderConfig, transcoders: TranscoderSet, dtype: str) -> tuple[str, dict[str, Any]]:
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
    return f"layers.{config.layer}.mlp", record


class _Sparsify(Layout):
    def write(self, transcoders: TranscoderSet, folder: Path, dtype: str) -> None:
        super().write(transcoders, folder, dtype)
        if transcoders.config.model_name:
            write_json(folder / "config.json", {"model": transcoders.config.model_name})


SPARSIFY = _Sparsify(
    tensors="sae.safetensors",
    record="cfg.json",
    names={
        "encoder.weight": "W_enc",
        "encoder.bias": "b_enc",
        "W_dec": "W_dec",
        "b_dec": "b_dec",
        "W_skip": "W_skip",
    },
    turned=(),
    find=partial(_find, pattern="*/sae.safetensors"),
    read=_sparsify_read,
    describe=_sparsify_describe,
)


# SAELens

_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")


def _sae_lens_read(record: dict[str, Any], where: Path) -> Layer:
    record = {
        **common.record_of(record.get("metadata") or {}, where),
        **{k: v for k, v in record.items() if k != "metadata"},
    }
    hooks = [str(record.get(key) or "") for key in ("hook_name", "hook_name_out")]
    if hooks[1] in ("", hooks[0]):
        raise UserError(
            f"{where}: hook_name_out is not another than hook_name, so this is an autoencoder; give a transcoder"
        )
    matches = [match for hook in hooks if (match := _HOOK.fullmatch(hook))]
    if len(matches) < 2 or matches[0][1] != matches[1][1]:
        raise UserError(
            f"{where}: {hooks[0]} to {hooks[1]} is not within one layer; only such as blocks.3.mlp.hook_in can be read"
        )
    neutral = {"normalize_activations": ("none", None), "reshape_activations": ("none", None)}
    neutral |= dict.fromkeys(("rescale_acts_by_decoder_norm", "finetuning_scaling_factor"), (False, None))
    _demand(record, where, {**neutral, "hook_head_index": (None,)})
    activation, k = _sae_lens_activation(record, where)
    name = str(record.get("model_name") or "")
    ours = common.own_hook(matches[0][2], name), common.own_hook(matches[1][2], name)
    skip = "skip" in str(record.get("architecture")) or None
    centred = bool(record.get("apply_b_dec_to_input"))
    return Layer(int(matches[0][1]), activation, k, name, ours, skip, centred=centred)


def _sae_lens_activation(record: dict[str, Any], where: Path) -> tuple[str, int | None]:
    """The nonlinearity, and k or L0 if it is known."""
    architecture = str(record.get("architecture", "standard"))
    l0 = common.l0_of(record.get("l0"))
    if architecture in ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        return "jumprelu", l0
    if architecture not in ("standard", "transcoder", "skip_transcoder", "topk"):
        raise UserError(
            f"{where}: architecture is {architecture!r}; only transcoder, skip_transcoder and jumprelu_* can be read"
        )
    name = str(record.get("activation_fn") or record.get("activation_fn_str") or "relu")
    if architecture == "topk" or name == "topk":
        kwargs = common.record_of(record.get("activation_fn_kwargs") or {}, where)
        return "topk", common.positive(record.get("k", kwargs.get("k")), "k", where)
    if name != "relu":
        raise UserError(f"{where}: activation_fn is {name!r}; only relu, topk and jumprelu can be read")
    return "relu", l0


def _sae_lens_describe(config: TranscoderConfig, transcoders: TranscoderSet, dtype: str) -> tuple[str, dict[str, Any]]:
    name, layer = transcoders.config.model_name, config.layer
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
            "hook_name": f"blocks.{layer}.{common.their_hook(config.input_hook, name)}",
            "hook_name_out": f"blocks.{layer}.{common.their_hook(config.output_hook, name)}",
            "l0": config.k,
        },
    }
    return f"layer_{layer}", record


SAE_LENS = Layout(
    tensors="sae_weights.safetensors",
    record="cfg.json",
    names={name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip", "threshold")},
    turned=("W_enc",),
    find=partial(_find, pattern="**/sae_weights.safetensors"),
    read=_sae_lens_read,
    describe=_sae_lens_describe,
)
