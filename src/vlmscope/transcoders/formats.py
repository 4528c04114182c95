"""Transcoder sets on disk: `config.yaml` + `layer_{i}.safetensors`, as the paper's code and circuit-tracer read them.

Layout and keys: docs/formats_transcoders.md. Weights may be stored in bfloat16; they are computed in float32.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmscope.core.artifacts import atomic_path, read_yaml, write_yaml
from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.init import set_weight
from vlmscope.transcoders.nonlinearities import activation_has_threshold
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet

STORED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The names that the field's tools give to the raw MLP input and output, and ours.
_HOOK_KEYS = ("feature_input_hook", "feature_output_hook")
_HOOKS = {"mlp.hook_in": "mlp_in", "mlp.hook_out": "mlp_out"}
_PAPER_K = 48  # the paper's reader takes this when `top_k` is absent
_REQUIRED = ("W_enc", "W_dec", "b_enc", "b_dec")


def save_set(transcoders: TranscoderSet, folder: str | Path, dtype: str = "float32") -> None:
    """Write the set into `folder`; `dtype` is the stored one, "float32" (exact) or "bfloat16" (half the size).

    Raises:
        UserError: when the folder cannot be written, or for another dtype.
    """
    folder = Path(folder)
    if dtype not in STORED_DTYPES:
        raise UserError(f"cannot store transcoders as {dtype!r}; choose one of: {', '.join(STORED_DTYPES)}")
    for layer, transcoder in transcoders.transcoders.items():
        tensors = {
            name: tensor.detach().to("cpu", STORED_DTYPES[dtype]).contiguous()
            for name, tensor in _tensors(transcoder).items()
        }
        with atomic_path(folder / _file_name(layer)) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    # Last, so that a folder with a config is a whole set.
    write_yaml(folder / "config.yaml", _config_record(transcoders, dtype))


def _tensors(transcoder: Transcoder) -> dict[str, Tensor]:
    """What a layer's file holds: `threshold` [F] too where the nonlinearity has one."""
    found = {name: getattr(transcoder, name) for name in (*_REQUIRED, "W_skip")}
    found["threshold"] = transcoder.activation.thresholds
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _file_name(layer: int) -> str:
    return f"layer_{layer}.safetensors"


def _config_record(transcoders: TranscoderSet, dtype: str) -> dict[str, Any]:
    config = transcoders.config
    to_theirs = {ours: theirs for theirs, ours in _HOOKS.items()}
    return {
        "model_kind": "transcoder_set",
        "model_name": config.model_name,
        "feature_input_hook": to_theirs.get(config.input_hook, config.input_hook),
        "feature_output_hook": to_theirs.get(config.output_hook, config.output_hook),
        "activation": config.activation,
        # The paper's code reads `top_k`, circuit-tracer `activation` and `k`; without them each falls back in silence.
        "top_k": config.k,
        "k": config.k,
        "layers": transcoders.layers,
        "num_model_layers": config.n_model_layers,
        "transcoders": [_file_name(layer) for layer in transcoders.layers],
        "dtype": dtype,
    }


def load_set(
    folder: str | Path,
    n_layers: int | None = None,
    d_model: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TranscoderSet:
    """Read a set; weights are converted to `dtype`. `n_layers` and `d_model`, when given, are those of the model.

    Raises:
        UserError: one line that names the file, for a missing or corrupt file, a missing tensor, an unknown activation
            and for shapes that do not fit each other or the model (both shapes are named).
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"no transcoder set in {folder}: config.yaml is missing; check the path")
    record = read_yaml(folder / "config.yaml")
    files = _layer_files(folder, record)
    config = _set_config(folder, record, files)
    if n_layers is not None and sorted(files) != list(range(n_layers)):
        raise UserError(
            f"{folder}: transcoders for layers {_spans(files)} ({len(files)}), but the model has {n_layers} layers "
            f"(0-{n_layers - 1}); choose the set trained on this model"
        )
    transcoders = {layer: _load_layer(path, layer, config, d_model, dtype, device) for layer, path in files.items()}
    widths = {layer: transcoder.config.d_model for layer, transcoder in transcoders.items()}
    if len(set(widths.values())) > 1:
        raise UserError(
            f"{folder}: layers disagree about the model width ({widths}); the files are of different models"
        )
    return TranscoderSet(transcoders, config)


def _spans(layers: Mapping[int, object]) -> str:
    ordered = sorted(layers)
    contiguous = ordered == list(range(ordered[0], ordered[-1] + 1))
    return f"{ordered[0]}-{ordered[-1]}" if contiguous else ", ".join(map(str, ordered))


def _layer_files(folder: Path, record: object) -> dict[int, Path]:
    """Layer -> file, from `layers` and `transcoders`, or from the file names when the config lists neither."""
    where = folder / "config.yaml"
    if not isinstance(record, dict):
        raise UserError(f"{where} holds no keys; it should say model_kind: transcoder_set")
    if record.get("model_kind", "transcoder_set") != "transcoder_set":
        raise UserError(f"{where}: model_kind is {record['model_kind']!r}; only transcoder_set can be read")
    names, layers = record.get("transcoders"), record.get("layers")
    if names is None and layers is None:
        found = {int(path.stem[6:]): path for path in folder.glob("layer_*.safetensors") if path.stem[6:].isdigit()}
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
        if "://" in name or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{where}: {name!r} does not lie in the set's folder; copy the file there and name it so")
        files[layer] = folder / name
        if not files[layer].is_file():
            raise UserError(
                f"{files[layer]} is missing (layer {layer} of the set); copy it there or train the set anew"
            )
    return dict(sorted(files.items()))


def _strings(names: object, where: Path) -> list[str]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: transcoders must be a list of file names, not {names!r}")
    return names


def _set_config(folder: Path, record: dict[str, Any], files: Mapping[int, Path]) -> TranscoderSetConfig:
    where = folder / "config.yaml"
    top_k, k = record.get("top_k"), record.get("k")
    if top_k is not None and k is not None and top_k != k:
        raise UserError(f"{where}: top_k = {top_k} but k = {k}; make them agree")
    chosen = top_k if top_k is not None else k if k is not None else _PAPER_K
    n_model_layers = record.get("num_model_layers", max(files) + 1)
    for name, value in (("k", chosen), ("num_model_layers", n_model_layers)):
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {name} must be a positive number, not {value!r}")
    hooks = [record.get(key, default) for key, default in zip(_HOOK_KEYS, _HOOKS, strict=True)]
    return TranscoderSetConfig(
        n_model_layers=n_model_layers,
        k=chosen,
        activation=str(record.get("activation", "topk")),
        model_name=str(record.get("model_name", "")),
        input_hook=_HOOKS.get(hooks[0], str(hooks[0])),
        output_hook=_HOOKS.get(hooks[1], str(hooks[1])),
    )


def _load_layer(
    path: Path,
    layer: int,
    config: TranscoderSetConfig,
    d_model: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Transcoder:
    tensors = _read_tensors(path)
    missing = [name for name in _REQUIRED if name not in tensors]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is not a transcoder in this layout")
    has_threshold = activation_has_threshold(config.activation)
    if has_threshold and "threshold" not in tensors:
        raise UserError(f"{path} lacks threshold, which activation {config.activation!r} needs; copy the set anew")
    unknown = sorted(set(tensors) - {*_REQUIRED, "W_skip", *(["threshold"] if has_threshold else [])})
    if unknown:
        raise UserError(f"{path} holds {', '.join(unknown)}, which activation {config.activation!r} does not use")
    w_enc = tensors["W_enc"]
    if w_enc.ndim != 2:
        raise UserError(f"{path}: W_enc has shape {tuple(w_enc.shape)} where (features, model width) is expected")
    f, d = w_enc.shape
    if d_model is not None and d != d_model:
        raise UserError(
            f"{path}: W_enc has shape {(f, d)}, but the model's width is {d_model}, so ({f}, {d_model}) is expected; "
            "choose the set trained on this model"
        )
    expected = {"W_enc": (f, d), "W_dec": (f, d), "b_enc": (f,), "b_dec": (d,), "W_skip": (d, d), "threshold": (f,)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, but W_enc {(f, d)} asks for {expected[name]}"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; train or copy the set anew")
    try:
        one = TranscoderConfig(
            d_model=d,
            n_features=f,
            k=config.k,
            layer=layer,
            activation=config.activation,
            skip="W_skip" in tensors,
            input_hook=config.input_hook,
            output_hook=config.output_hook,
        )
        transcoder = Transcoder(one, dtype=dtype, device=device)
    except UserError as error:
        raise UserError(f"{path.parent / 'config.yaml'}: {error}") from error
    for name in (*_REQUIRED, "W_skip"):
        if name in tensors:
            set_weight(getattr(transcoder, name), tensors[name])
    if has_threshold:
        try:
            transcoder.activation.take_thresholds(tensors["threshold"])
        except ValueError as error:
            raise UserError(f"{path}: {error}; train or copy the set anew") from error
    return transcoder


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: not a complete safetensors file ({error}); copy it anew") from error
