"""What decides a run's result besides its own settings, by name: model, transcoders and data, files by their content.

Paths are left out, since a folder may be moved, and so is where a model computes (`model.device`, `model.offload`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.core.origin import files_digest, flat, folder_digest

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.data.config import SourceConfig

# Of a model's folder: what decides which tokens it is given, and what it makes of them.
_MODEL_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*/*.jinja")
_ABOUT = (".json", ".yaml")  # of a transcoder set


def model_origin(cfg: AppConfig, weights: bool = True) -> dict[str, Any]:
    """The model that `model=` names: its weights (where asked for), configuration, tokenizer, processor and template.

    Raises:
        UserError: it is not there and cannot be fetched.
    """
    from vlmscope.models.checkpoint import model_folder

    chosen = cfg.model
    found: dict[str, Any] = {"model.dtype": chosen.dtype}
    if chosen.tiny is not None:
        return found | {"model.tiny": chosen.tiny, "seed": cfg.seed}
    folder = Path(model_folder(chosen.path, chosen.hub, chosen.revision))
    files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.name != "metrics.json"}
    if weights:
        found["model.weights"] = files_digest(sorted(folder.glob("*.safetensors")))
    return found | {f"model.{file.relative_to(folder)}": files_digest([file]) for file in sorted(files)}


def transcoder_origin(cfg: AppConfig, overrides: Sequence[str] = ("transcoder",)) -> dict[str, Any]:
    """The transcoders that `load_transcoders` gives.

    Raises:
        UserError: they are not there, or are no set.
    """
    from vlmscope.config.schema import TranscoderSetConfig
    from vlmscope.tasks.wiring import chosen_set, names_transcoders
    from vlmscope.transcoders.formats import open_set

    if not isinstance(cfg.transcoder, TranscoderSetConfig):
        return flat("transcoder", asdict(cfg.transcoder))
    if cfg.model.tiny is not None and not names_transcoders(overrides):
        return {"transcoder": "random", "seed": cfg.seed}
    folder, form, choice = chosen_set(cfg)
    layers = {layer.path for layer in open_set(folder, form, choice).layers.values()}
    about = {
        file for at in (folder, *(path.parent for path in layers)) for file in at.glob("*.*") if file.suffix in _ABOUT
    }
    return {"transcoder.files": files_digest(sorted(layers | about)), **flat("transcoder", choice._asdict())}


def study_digest(path: str) -> str:
    """Of a study (its folder, or the run folder around it): its head, which records what it was made of, and labels."""
    from vlmscope.core.study import MANIFEST

    wanted = [f"{at}{name}" for at in ("", "study/") for name in (MANIFEST, "labels/*.parquet")]
    return files_digest(file for pattern in wanted for file in sorted(Path(path).glob(pattern)))


def data_origin(cfg: AppConfig, sources: Mapping[str, SourceConfig] | None = None) -> dict[str, Any]:
    """The data of `data=`, or `sources` in its place."""
    chosen = cfg.data
    sources = chosen.sources if sources is None else sources
    # Where a mix is written, and how many corrupt shards are borne, do not change a row.
    found = flat("data", {k: v for k, v in asdict(chosen).items() if k not in ("path", "sources", "max_bad_shards")})
    if not sources and chosen.path is not None:
        found["data.files"] = folder_digest(chosen.path)
    for name, one in sources.items():
        found |= flat(f"data.sources.{name}", {k: v for k, v in asdict(one).items() if k != "path"})
        if one.path is not None:
            found[f"data.sources.{name}.files"] = folder_digest(one.path)
    return found
