"""What a configuration chose: model, transcoders, pictures, study, labels, and the origins that decide a run's result.

An origin names model, transcoders and data, files by their content. Paths are left out, since a folder may be moved,
and so is where a model computes (`model.device`, `model.offload`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.config.catalog import asset
from vlmscope.config.schema import RandomTranscodersConfig, TranscoderSetConfig
from vlmscope.core.artifacts import files_digest, flat, folder_digest
from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from vlmscope.config import AppConfig
    from vlmscope.core.records import FeatureId
    from vlmscope.data.config import SourceConfig
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.models.loading import VLM
    from vlmscope.scope import Scope
    from vlmscope.transcoders.formats import Choice
    from vlmscope.transcoders.transcoder import TranscoderSet

# Of a model's folder: what decides which tokens it is given, and what it makes of them.
_MODEL_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*/*.jinja")
_ABOUT = (".json", ".yaml")  # of a transcoder set


def limit_threads(cfg: AppConfig) -> None:
    """Use `trainer.threads` threads when set; torch's own choice otherwise."""
    import torch

    if cfg.trainer.threads is not None:
        if cfg.trainer.threads < 1:
            raise UserError(f"trainer.threads={cfg.trainer.threads}: must be 1 or more (at most {os.cpu_count()} help)")
        torch.set_num_threads(cfg.trainer.threads)


def load_model(cfg: AppConfig) -> VLM:
    """The model that `model=` chose: loaded from its folder or the hub, or a tiny random one made from `seed=`.

    Raises:
        UserError: the model is not there and cannot be fetched, or is not one that is supported.
    """
    limit_threads(cfg)
    chosen = cfg.model
    if chosen.family is None:
        from vlmscope.models.loading import load_named

        return load_named(chosen.path, chosen.hub, chosen.revision, chosen.dtype, chosen.device, chosen.offload)
    import torch

    from vlmscope.models.checkpoint import check_device
    from vlmscope.models.tiny import tiny_vlm

    check_device(chosen.device, chosen.dtype)
    vlm = tiny_vlm(chosen.family, seed=cfg.seed, dtype=getattr(torch, chosen.dtype))
    vlm.model.to(chosen.device)
    return vlm


def is_orrery(vlm: VLM) -> bool:
    """Whether this is the shipped model, however its path is written."""
    return bool(vlm.path) and Path(vlm.path).resolve() == Path(asset("orrery")).resolve()


def names_transcoders(overrides: Sequence[str]) -> bool:
    """Whether the command line says anything about transcoders; else they are Orrery's, which fit Orrery alone."""
    return any(override.lstrip("+~").startswith("transcoder") for override in overrides)


def load_scope(cfg: AppConfig, vlm: VLM, overrides: Sequence[str] = ("transcoder",)) -> Scope:
    """The model with the trained or random set that `transcoder=` chose, in its dtype.

    A trained one is looked at on the run's own input, and a warning is logged where it does not fit.

    Args:
        cfg: the configuration.
        vlm: the model.
        overrides: what the user typed; a tiny random model gets random transcoders when it names none.
    """
    from vlmscope.scope import Scope
    from vlmscope.training.evaluation import warn_if_unfit

    if isinstance(cfg.transcoder, RandomTranscodersConfig):
        return Scope(vlm, random_transcoders(cfg.transcoder, vlm))
    if cfg.model.family is not None and not names_transcoders(overrides):
        print("transcoders: random, as the model is; transcoder=path names trained ones")
        return Scope(vlm, random_transcoders(RandomTranscodersConfig(seed=cfg.seed), vlm))
    adapter = vlm.adapter
    found = trained_transcoders(cfg, adapter.n_layers, adapter.d_model, str(adapter.device), adapter.dtype.itemsize)
    scope = Scope(vlm, found.to(device=adapter.device, dtype=adapter.dtype).requires_grad_(False))
    warn_if_unfit(scope, cfg.prompt, user_pictures(cfg) if cfg.prompt is not None else [])
    return scope


def trained_transcoders(
    cfg: AppConfig, n_layers: int | None = None, d_model: int | None = None, device: str = "cpu", itemsize: int = 4
) -> TranscoderSet:
    """The set that `transcoder=` names, in float32 in CPU memory.

    Args:
        cfg: the run's configuration.
        n_layers: of the model, when the set must fit one; `d_model` likewise.
        d_model: the model's width.
        device: where the set will go, and must have room.
        itemsize: bytes of a number there.

    Raises:
        UserError: the group names no set, or the set is not there, too large, or not for this model.
    """
    from vlmscope.transcoders.formats import load_set

    folder, form, choice = chosen_set(cfg)
    _check_set_fits(folder, form, choice, device, itemsize)
    return load_set(folder, n_layers, d_model, format=form, choice=choice)


def chosen_set(cfg: AppConfig) -> tuple[Path, str, Choice]:
    """Folder (fetched from the hub if need be), format, and which of several sets `transcoder=` names.

    Raises:
        UserError: the group names no trained set, or it cannot be fetched.
    """
    from vlmscope.transcoders.formats import Choice
    from vlmscope.transcoders.hub import set_folder

    chosen = cfg.transcoder
    if not isinstance(chosen, TranscoderSetConfig):
        raise UserError("this task needs a trained transcoder set: choose transcoder=orrery, path or random")
    choice = Choice(chosen.width, chosen.l0, chosen.affine)
    return set_folder(chosen.path, chosen.revision, chosen.format, choice), chosen.format, choice


def _check_set_fits(folder: Path, form: str, choice: Choice, device: str, itemsize: int) -> None:
    """Refuse a set that is too large before it is read; what is wrong with its files is for its reader to say."""
    from math import prod

    from vlmscope.core.artifacts import tensor_heads
    from vlmscope.models.checkpoint import check_room
    from vlmscope.transcoders.formats import open_set

    try:
        files = [layer.path for layer in open_set(folder, form, choice).layers.values()]
        count = sum(prod(head.shape) for file in files for head in tensor_heads(file).values())
    except UserError:
        return
    advice = "choose narrower ones, or fewer layers (task=plan counts what they need)"
    check_room(count * 4, f"the transcoders in {folder}", "cpu", advice)  # they are read in float32
    if device != "cpu":
        check_room(count * itemsize, f"the transcoders in {folder}", device, advice)


def random_transcoders(config: RandomTranscodersConfig, vlm: VLM) -> TranscoderSet:
    """A random set of the model's width and number of layers, in its dtype; `transcoder=random`."""
    from vlmscope.models.checkpoint import check_room
    from vlmscope.transcoders.transcoder import random_set

    adapter = vlm.adapter
    width = 4 * adapter.d_model if config.n_features is None else config.n_features
    size = adapter.n_layers * 2 * width * adapter.d_model * adapter.dtype.itemsize
    check_room(size, "random transcoders", "cpu", "choose a smaller transcoder.n_features")
    shape = (adapter.n_layers, adapter.d_model, width, config.k, config.skip)
    found = random_set(*shape, config.seed, adapter.dtype, "random", config.activation, config.cross_layer)
    return found.to(adapter.device).requires_grad_(False)


def user_pictures(cfg: AppConfig) -> list[Image.Image]:
    """The pictures that `image=` names, in order."""
    from vlmscope.data.images import open_images

    return open_images(cfg.image or [])


def model_origin(cfg: AppConfig, weights: bool = True) -> dict[str, Any]:
    """The model that `model=` names: its weights (where asked for), configuration, tokenizer, processor and template.

    Raises:
        UserError: it is not there and cannot be fetched.
    """
    from vlmscope.models.checkpoint import model_folder

    chosen = cfg.model
    found: dict[str, Any] = {"model.dtype": chosen.dtype}
    if chosen.family is not None:
        return found | {"model.family": chosen.family, "seed": cfg.seed}
    folder = Path(model_folder(chosen.path, chosen.hub, chosen.revision))
    files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.name != "metrics.json"}
    if weights:
        found["model.weights"] = files_digest(sorted(folder.glob("*.safetensors")))
    return found | {f"model.{file.relative_to(folder)}": files_digest([file]) for file in sorted(files)}


def transcoder_origin(cfg: AppConfig, overrides: Sequence[str] = ("transcoder",)) -> dict[str, Any]:
    """The transcoders of `load_scope`.

    Raises:
        UserError: they are not there, or are no set.
    """
    from vlmscope.transcoders.formats import open_set

    if not isinstance(cfg.transcoder, TranscoderSetConfig):
        return flat("transcoder", asdict(cfg.transcoder))
    if cfg.model.family is not None and not names_transcoders(overrides):
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


def study_sources(cfg: AppConfig) -> dict[str, SourceConfig]:
    """The sources of any `data=` that can be studied, with absolute paths and the split that is studied.

    Shards that are not there are refused: what is missing is reported before anything heavy is imported.
    """
    from vlmscope.data.config import SourceConfig
    from vlmscope.data.orrery.scenes import KINDS
    from vlmscope.data.shards import read_index

    data = cfg.data
    if data.sources:
        sources = dict(data.sources)
    elif data.name == "orrery":
        if data.path is None:
            raise UserError("data.path is not set: give the folder with Orrery's shards (task=build_data writes them)")
        sources = {kind: SourceConfig("shards", data.path, split="val", stream=kind) for kind in KINDS}
    elif data.name == "folder":
        if not data.path:
            raise UserError("data.path is not set: give the folder with train.jsonl (docs/bring_your_own.md)")
        sources = {"folder": SourceConfig("folder", data.path)}
    else:
        raise UserError(f"data={data.name}: a study goes through orrery, folder, or a mix (docs/data.md)")
    for name, own in sources.items():
        if own.kind == "shards":
            read_index(Path(str(own.path)), f"data.path or data.sources.{name}.path")
    return {
        name: replace(own, split=cfg.study.split or own.split, path=own.path and str(Path(own.path).absolute()))
        for name, own in sources.items()
    }


def needed_study(cfg: AppConfig) -> Path:
    """The folder of the study that `study.path=` names, looked for before anything heavy is imported."""
    from vlmscope.core.study import study_folder

    if cfg.study.path is None:
        raise UserError(
            "no study: add study.path=FOLDER, the run folder of a finished task=study (python run.py task=study)"
        )
    return study_folder(cfg.study.path)


def study_origin(cfg: AppConfig, sources: Mapping[str, SourceConfig], overrides: Sequence[str]) -> dict[str, Any]:
    """Everything that decides a study, by name."""
    origin = model_origin(cfg) | transcoder_origin(cfg, overrides) | data_origin(cfg, sources)
    return origin | flat("study", cfg.study.decisive()) | {"seed": cfg.seed}


def made_study(cfg: AppConfig, scope: Scope, folder: Path) -> StudyFolder:
    """A study of `cfg.study` and `cfg.data`, made in one go in `folder`."""
    from vlmscope.features.study import data_record, make_study

    sources = study_sources(cfg)
    data = data_record(sources, cfg.study, cfg.data.max_bad_shards, cfg.data.name)
    return make_study(folder, scope, data, cfg.study, study_origin(cfg, sources, ("transcoder",)))


def look_for_labels(cfg: AppConfig) -> None:
    """Refuse an `attribution.labels` that is no finished study, before anything heavy is imported."""
    from vlmscope.core.study import study_folder

    if cfg.attribution.labels is not None:
        study_folder(cfg.attribution.labels)


def feature_labels(cfg: AppConfig, model: str, transcoders: TranscoderSet | None = None) -> dict[FeatureId, str]:
    """Label with score by feature from the study of `attribution.labels`, those no better than chance left out.

    Args:
        cfg: the run's configuration; without `attribution.labels` there are none.
        model: the model's name, which must be the study's.
        transcoders: whose features these are; None where only graphs are at hand.
    """
    if cfg.attribution.labels is None:
        return {}
    from vlmscope.features.labels import labels_for

    widths = None if transcoders is None else transcoders.widths
    return labels_for(cfg.attribution.labels, model, widths).texts()
