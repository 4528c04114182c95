"""Parts that the readers and writers of all formats share: sets before their weights are loaded, tensors, hooks, files.

Every reader translates into our convention: `W_enc` [F, d], `W_dec` [F, d], `b_enc` [F], `b_dec` [d], `W_skip` [d, d]
applied as `x @ W_skip.T`, `threshold` [F], and `W_later` [n, F, d], decoders to the n layers after its own.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmscope.core.artifacts import atomic_path, open_tensors
from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.streaming import StreamedRows, mapped_bytes, whole
from vlmscope.transcoders.transcoder import Transcoder, set_weight

REQUIRED = ("W_enc", "W_dec", "b_enc", "b_dec")
STORED_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int8": torch.int8,  # matrices, with a scale for each row in a tensor of this suffix; all else in float32
}
SCALE = "_scale"
READ_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# ReLU and JumpReLU fix no number of active features; if a format states none, estimates of memory use this one.
UNKNOWN_L0 = 64

Tensors = dict[str, Tensor]


class Choice(NamedTuple):
    """Selects one of several sets in a folder, by width ("16k"), sparsity ("small") and skip path; None: any."""

    width: str | None = None
    l0: str | None = None
    affine: bool | None = None


@dataclass(frozen=True)
class LayerSource:
    """One layer before it is loaded: its file, the file `where` of its settings, and these (None: the set's).

    `translate` maps the file's tensors to ours and refuses those that have no exact translation.
    """

    path: Path
    where: Path
    translate: Callable[[Tensors], Tensors] = dict
    k: int | None = None
    activation: str | None = None
    decoders: Path | None = None  # the file of the decoders where they have their own

    @property
    def files(self) -> list[Path]:
        """All files of tensors."""
        return [self.path] if self.decoders is None else [self.path, self.decoders]


@dataclass(frozen=True)
class SetSource:
    """A set before its weights are loaded: layer -> source, ascending."""

    config: TranscoderSetConfig
    layers: dict[int, LayerSource]


def read_tensors(path: Path, stream: bool = False) -> Tensors:
    """All tensors of a safetensors file; float8 and scaled int8 become float32. Those to `stream` stay in the file."""
    tensors = {}
    with open_tensors(path, "pt") as file:
        names = set(file.keys())
        bytes_of = mapped_bytes(path) if stream else {}
        for name in names - {name + SCALE for name in names}:
            head = file.get_slice(name)
            dtype = head.get_dtype()
            scaled = dtype == "I8" and name + SCALE in names
            if (
                not scaled and dtype not in READ_DTYPES and head.get_shape()
            ):  # a scalar is a setting, which the format reads
                raise UserError(
                    f"{path}: {name} is stored as {dtype}, and without a scale that says no weights; give the set in "
                    f"one of {', '.join(READ_DTYPES)}"
                )
            if stream and scaled:  # what is computed from a file is in memory, and must not be given back to the file
                raise UserError(
                    f"{path}: {name} is stored in int8, which is not read from disk in blocks; give transcoder.stream="
                    "false, or convert the set to bfloat16 on a machine with more memory"
                )
            if name in bytes_of and dtype in READ_DTYPES:
                kind = READ_DTYPES[dtype]
                if bytes_of[name].storage_offset() % kind.itemsize:
                    raise UserError(f"{path}: {name} is not aligned and cannot be streamed; convert the set first")
                tensors[name] = bytes_of[name].view(kind).view(head.get_shape())
                continue
            tensor = file.get_tensor(name)
            tensors[name] = tensor.float() if scaled or dtype.startswith("F8") else tensor
            if scaled:
                tensors[name] *= file.get_tensor(name + SCALE)[..., None]
    return tensors


def eight_bits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [.., d] as int8, and the scales [..] in float32 of its rows, at least 1e-30."""
    scale = matrix.abs().amax(-1).float().clamp_min(1e-28) / 127
    return (matrix / scale[..., None]).round().to(torch.int8).contiguous(), scale


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Write tensors, converted to a dtype of `STORED_DTYPES`, atomically."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor).detach().cpu()
        if dtype == "int8" and tensor.ndim > 1:
            stored[name], stored[name + SCALE] = eight_bits(tensor)
        else:
            stored[name] = tensor.to(torch.float32 if dtype == "int8" else STORED_DTYPES[dtype]).contiguous()
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})


def own_tensors(transcoder: Transcoder) -> Tensors:
    """A layer's tensors in our convention, with `threshold` [F] if the nonlinearity has one."""
    tensors = {name: getattr(transcoder, name) for name in (*REQUIRED, "W_skip")}
    tensors["threshold"] = transcoder.activation.thresholds
    tensors["W_later"] = torch.stack([later.detach() for later in transcoder.W_later]) if transcoder.W_later else None
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def taken(tensors: Tensors, names: Mapping[str, str], optional: Iterable[str], path: Path) -> Tensors:
    """Rename tensors, theirs -> ours; UserError if one that is not optional is missing, or if there is another one."""
    missing = [name for name in names if name not in tensors and name not in set(optional)]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it is not a transcoder in this layout")
    unknown = sorted(set(tensors) - set(names))
    if unknown:
        raise UserError(f"{path} holds {', '.join(unknown)}, which this layout does not have; nothing is left out")
    return {names[name]: tensor for name, tensor in tensors.items()}


def not_below_0(tensors: Tensors, path: Path) -> Tensors:
    """The same tensors; UserError for negative thresholds, with which other tools' JumpReLU passes negative numbers."""
    if "threshold" in tensors and bool((tensors["threshold"] < 0).any()):
        raise UserError(
            f"{path} has thresholds below 0, so that features can be negative; only those that cannot can be read"
        )
    return tensors


def transposed(tensors: Tensors, *names: str) -> Tensors:
    """The same tensors, with the matrices of these names transposed."""
    return {n: t.mT if n in names and t.ndim == 2 else t for n, t in tensors.items()}


def positive(value: object, name: str, where: Path) -> int:
    """`value`, which must be a positive whole number."""
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {name} must be a positive whole number, not {value!r}")
    return value


def l0_of(value: object) -> int | None:
    """A stated mean number of active features as a k of at least 1; None unless it is a positive finite number."""
    return max(1, round(value)) if isinstance(value, int | float) and 0 < value < math.inf else None


def record_of(value: Any, where: Path) -> dict[str, Any]:
    """The content of a configuration file, which must be a mapping."""
    if not isinstance(value, dict):
        raise UserError(f"{where} holds no keys; it is not a transcoder's configuration")
    return value


_GEMMA = re.compile(r"gemma-?[23]", re.IGNORECASE)


def own_hook(theirs: str, model_name: str) -> str:
    """Our name of a hook point that other tools name without its layer; an unknown name is returned unchanged.

    `mlp.hook_in` and `mlp.hook_out` are the raw MLP. `hook_mlp_out` is after the norm that follows the MLP, which only
    Gemma 2 and 3 have. `ln2.hook_normalized` is before that norm's weight and `hook_mlp_in` before the norm itself, so
    neither is `mlp_in`.
    """
    if theirs == "hook_mlp_out":
        return "mlp_out_post" if _GEMMA.search(model_name) else "mlp_out"
    known = {
        "mlp.hook_in": "mlp_in",
        "ln2.hook_out": "mlp_in",
        "mlp.hook_out": "mlp_out",
        "ln2_post.hook_out": "mlp_out_post",
    }
    return known.get(theirs, theirs)


def their_hook(ours: str, model_name: str) -> str:
    """The inverse of `own_hook`."""
    if ours == "mlp_out_post" and _GEMMA.search(model_name):
        return "hook_mlp_out"
    return {"mlp_in": "mlp.hook_in", "mlp_out": "mlp.hook_out", "mlp_out_post": "ln2_post.hook_out"}.get(ours, ours)


def build_layer(
    source: LayerSource,
    layer: int,
    config: TranscoderSetConfig,
    d_model: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    stream: bool = False,
) -> Transcoder:
    """Load one layer; refuse a tensor that is missing, unknown, of the wrong shape or not finite.

    With `stream` encoder and decoders stay in their file, and are found not to be finite only when they are read.
    """
    path, activation = source.path, source.activation or config.activation
    stored = {name: tensor for file in source.files for name, tensor in read_tensors(file, stream).items()}
    tensors = source.translate(stored)
    has_threshold = activation in ("batchtopk", "jumprelu")
    needed = (*REQUIRED, "threshold") if has_threshold else REQUIRED
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}, which activation {activation!r} needs; copy the set again")
    unknown = sorted(set(tensors) - {*needed, "W_skip", "W_later"})
    if unknown:
        raise UserError(f"{path} holds {', '.join(unknown)}, which activation {activation!r} does not use")
    rows = _streamed(tensors, stored, dtype, device) if stream else None
    f, d = _checked_shapes(path, tensors, d_model, dtype, () if rows is None else ("W_enc", "W_dec", "W_later"))
    k = source.k or config.k
    writes = 1 + len(tensors.get("W_later", ()))
    try:
        layer_config = TranscoderConfig(
            d_model=d,
            n_features=f,
            k=k if activation == "topk" else min(k, f),
            layer=layer,
            activation=activation,
            skip="W_skip" in tensors,
            input_hook=config.input_hook,
            output_hook=config.output_hook,
            writes=writes,
        )
        transcoder = Transcoder(layer_config, dtype=dtype, device=device, rows=rows)
    except UserError as error:
        raise UserError(f"{source.where}: {error}") from error
    for name in ("b_enc", "b_dec", "W_skip") if stream else (*REQUIRED, "W_skip"):
        if name in tensors:
            set_weight(getattr(transcoder, name), tensors[name])
    for parameter, tensor in zip(transcoder.W_later, tensors.get("W_later", ()), strict=True):
        if not stream:
            set_weight(parameter, tensor)
    if writes > 1 and layer + writes > config.n_model_layers:
        raise UserError(f"{path}: W_later writes {writes - 1} layers ahead, past the model's last; copy it again")
    if has_threshold:
        try:
            transcoder.activation.take_thresholds(tensors["threshold"])
        except ValueError as error:
            raise UserError(f"{path}: {error}; train or copy the set again") from error
    for matrix in rows or ():
        if isinstance(matrix, StreamedRows):
            matrix.give_back()
    return transcoder


def _streamed(tensors: Tensors, stored: Tensors, dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Encoder, decoder and later decoders that stay in the mapped file; a tensor that was computed is in memory."""
    mapped = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
    return [
        StreamedRows(matrix, dtype, device)
        if matrix.untyped_storage().data_ptr() in mapped
        else matrix.to(device, dtype)
        for matrix in (tensors["W_enc"], tensors["W_dec"], *tensors.get("W_later", ()))
    ]


def _checked_shapes(
    path: Path, tensors: Tensors, d_model: int | None, dtype: torch.dtype, unread: Collection[str] = ()
) -> tuple[int, int]:
    """F and d; the shapes of all tensors are checked, and the values of all but those that are `unread`."""
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
    expected["W_later"] = (len(tensors.get("W_later", ())), f, d)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, but W_enc {(f, d)} asks for {expected[name]}"
            )
        if name in unread:
            continue
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; train or copy the set again")
        most = torch.finfo(dtype).max
        if torch.finfo(tensor.dtype).max > most and bool((tensor.abs() > most).any()):
            raise UserError(f"{path}: {name} holds values that {dtype} cannot; give a dtype that can")
    return f, d
