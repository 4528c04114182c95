"""Load what a configuration names (model, transcoders, pictures, study, labels) and record the origins of a result.

An origin identifies model, transcoders and data, files by content. Paths are left out, since folders may be moved, and
so is where a model computes (`model.device`, `model.offload`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.config.catalog import asset
from vlmscope.config.schema import RandomTranscodersConfig, TranscoderSetConfig
from vlmscope.core.artifacts import files_digest, flat, folder_digest
from vlmscope.core.errors import UserError
from vlmscope.core.launch import LARGE_MODULES, import_quickly, program
from vlmscope.core.records import TOWER
from vlmscope.core.study import NO_LABELS

if TYPE_CHECKING:
    from PIL import Image

    from vlmscope.config import AppConfig
    from vlmscope.core.records import FeatureId
    from vlmscope.data.config import SourceConfig
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.models.base import Adapter, Stack
    from vlmscope.models.loading import VLM
    from vlmscope.scope import Scope
    from vlmscope.transcoders.formats import Choice
    from vlmscope.transcoders.transcoder import TranscoderSet

# Files of a model's folder that decide its input tokens and its computation, besides the weights.
_MODEL_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*/*.jinja")

_KEPT: dict[str, tuple[str, Any]] | None = None
_tell: Callable[[str], None] = print


def keep_loaded(tell: Callable[[str], None]) -> None:
    """Keep the last model and the last transcoders of this process for its next runs, as a worker does.

    `tell` is called with what is being loaded, and with "running" after it.
    """
    global _KEPT, _tell
    _KEPT, _tell = {}, tell


def _kept(what: str, key: Any, load: Callable[[], Any]) -> Any:
    """What `load` returns, or what it returned last if that had the same key and things are kept."""
    if _KEPT is None:
        return load()
    if what not in _KEPT or _KEPT[what][0] != repr(key):
        _KEPT.pop(what, None)  # before the next is loaded, or both would need room
        _tell(f"loading the {what}")
        _KEPT[what] = repr(key), load()
        _tell("running")
    return _KEPT[what][1]


def limit_threads(cfg: AppConfig) -> None:
    """Use `trainer.threads` threads if set, else torch's default."""
    import torch

    if cfg.trainer.threads is not None:
        if cfg.trainer.threads < 1:
            raise UserError(f"trainer.threads={cfg.trainer.threads}: must be 1 or more (at most {os.cpu_count()} help)")
        torch.set_num_threads(cfg.trainer.threads)


def load_model(cfg: AppConfig) -> VLM:
    """Load the model of `model=` from its folder or the hub, or make a tiny random one from `seed=`.

    Raises:
        UserError: the model is missing and cannot be fetched, or is not supported.
    """
    import_quickly(*LARGE_MODULES)
    limit_threads(cfg)
    return _kept("model", (cfg.model, cfg.seed), lambda: _load_model(cfg))


def _load_model(cfg: AppConfig) -> VLM:
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


def is_default(vlm: VLM) -> bool:
    """Whether this is the default model, Orrery 2, by resolved path."""
    return bool(vlm.path) and Path(vlm.path).resolve() == Path(asset("orrery2")).resolve()


def names_transcoders(overrides: Sequence[str]) -> bool:
    """Whether the command line sets transcoders; the default ones are Orrery 2's, which fit Orrery 2 only."""
    return any(override.lstrip("+~").startswith("transcoder") for override in overrides)


def load_scope(cfg: AppConfig, vlm: VLM, overrides: Sequence[str] = ("transcoder",)) -> Scope:
    """The model with the trained or random set of `transcoder=`, in the model's dtype.

    A trained set is evaluated on the run's prompt, if there is one, and a warning is logged if it does not fit. A tiny
    random model gets random transcoders if the user's `overrides` name none.
    """
    from vlmscope.scope import Scope
    from vlmscope.training.evaluation import warn_if_unfit

    if isinstance(cfg.transcoder, RandomTranscodersConfig):
        return random_scope(cfg.transcoder, vlm, cfg.attribution.tower)
    if cfg.model.family is not None and not names_transcoders(overrides):
        print("transcoders: random, since the model is random; transcoder=path loads trained ones")
        return random_scope(RandomTranscodersConfig(seed=cfg.seed), vlm, cfg.attribution.tower)
    adapter = vlm.adapter
    _check_own_set(cfg, vlm)

    def trained() -> TranscoderSet:
        device, itemsize = str(adapter.device), adapter.dtype.itemsize
        loaded = trained_transcoders(cfg, adapter, device, itemsize)
        return loaded.to(device=adapter.device, dtype=adapter.dtype).requires_grad_(False)

    scope = Scope(vlm, _kept("transcoders", (cfg.model, cfg.transcoder), trained), tower=_trained_tower(cfg, vlm))
    warn_if_unfit(scope, cfg.prompt, user_pictures(cfg) if cfg.prompt is not None else [])
    return scope


def _check_own_set(cfg: AppConfig, vlm: VLM) -> None:
    """Refuse the transcoders of one shipped model for another, which has the same sizes."""
    own, chosen = Path(f"{vlm.path}_transcoders"), Path(str(getattr(cfg.transcoder, "path", "")))
    if (
        chosen not in (own, Path(f"{vlm.path}_tower_transcoders"))
        and own.is_dir()
        and own.parent == chosen.parent == Path(asset(""))
    ):
        name = Path(str(vlm.path)).name
        raise UserError(f"{chosen.name} are not the transcoders of {name}: choose transcoder={name}")


def _trained_tower(cfg: AppConfig, vlm: VLM) -> TranscoderSet | None:
    """The set of `transcoder.tower` where the run asks for it, in the model's dtype."""
    from vlmscope.transcoders.formats import load_set

    if not cfg.attribution.tower:
        return None
    path, adapter = getattr(cfg.transcoder, "tower", None), vlm.adapter
    if path is None:
        raise UserError(
            "attribution.tower=true needs transcoders of the vision tower: train them with transcoder.site=tower and "
            "give transcoder.tower=FOLDER (model=orrery2 transcoder=orrery2 has a set)"
        )
    loaded = _kept("tower transcoders", path, lambda: load_set(path))
    return loaded.to(device=adapter.device, dtype=adapter.dtype).requires_grad_(False)


def random_scope(config: RandomTranscodersConfig, vlm: VLM, tower: bool = False) -> Scope:
    """The model with random transcoders, of its vision tower too if asked for and there is one."""
    from vlmscope.models.base import VisionStack
    from vlmscope.scope import Scope

    below = random_transcoders(config, vlm, VisionStack(vlm.adapter)) if tower and vlm.adapter.has_vision else None
    return Scope(vlm, random_transcoders(config, vlm), tower=below)


def trained_transcoders(
    cfg: AppConfig, adapter: Adapter | None = None, device: str = "cpu", itemsize: int = 4
) -> TranscoderSet:
    """Load the set of `transcoder=` in float32 into CPU memory.

    Args:
        cfg: the run's configuration.
        adapter: the model whose decoder or vision tower the set must fit, if any.
        device: device that the set will be moved to, which must have room.
        itemsize: bytes per number on that device.

    Raises:
        UserError: the group names no set, or the set is missing, too large, or not for this model.
    """
    from vlmscope.models.base import stack_of
    from vlmscope.transcoders.formats import load_set, open_set

    folder, form, choice = chosen_set(cfg)
    stream = must_stream(folder, form, choice, device, itemsize, getattr(cfg.transcoder, "stream", None))
    stack = None if adapter is None else stack_of(adapter, open_set(folder, form, choice).config.site)
    n_layers, d_model = (None, None) if stack is None else (stack.n_layers, stack.d_model)
    return load_set(folder, n_layers, d_model, format=form, choice=choice, stream=stream)


def chosen_set(cfg: AppConfig) -> tuple[Path, str, Choice]:
    """Folder (fetched from the hub if necessary), format and choice among several sets of `transcoder=`.

    Raises:
        UserError: the group names no trained set, or it cannot be fetched.
    """
    from vlmscope.transcoders.formats import Choice
    from vlmscope.transcoders.hub import set_folder

    chosen = cfg.transcoder
    if not isinstance(chosen, TranscoderSetConfig):
        raise UserError("this task needs a trained transcoder set: choose transcoder=orrery2, path or random")
    choice = Choice(chosen.width, chosen.l0, chosen.affine)
    return set_folder(chosen.path, chosen.revision, chosen.format, choice), chosen.format, choice


def must_stream(
    folder: Path, form: str, choice: Choice, device: str = "cpu", itemsize: int = 4, stream: bool | None = None
) -> bool:
    """Whether a set stays on disk: as `stream` says, by default where it would not fit into memory.

    Raises:
        UserError: `stream` is False and the set is too large, before it is read.
    """
    from math import prod

    from vlmscope.core.artifacts import tensor_heads
    from vlmscope.models.checkpoint import check_room
    from vlmscope.transcoders.formats import open_set

    if stream:
        return True
    try:
        files = [file for layer in open_set(folder, form, choice).layers.values() for file in layer.files]
        count = sum(prod(head.shape) for file in files for head in tensor_heads(file).values())
    except UserError:  # its reader reports damaged files
        return False
    try:
        advice = "leave transcoder.stream=false away, or choose narrower ones (task=plan counts what they need)"
        for where, size in dict.fromkeys([("cpu", 4), (device, itemsize if device != "cpu" else 4)]):
            check_room(count * size, f"the transcoders in {folder}", where, advice)  # they are read in float32
    except UserError as error:
        if stream is False:
            raise
        print(f"{error.args[0].partition(';')[0]}: they are read from disk as they are used (transcoder.stream=true)")
        return True
    return False


def random_transcoders(config: RandomTranscodersConfig, vlm: VLM, stack: Stack | None = None) -> TranscoderSet:
    """A random set of the decoder's (or a `stack`'s) width, number of layers and dtype, as for `transcoder=random`."""
    from vlmscope.models.checkpoint import check_room
    from vlmscope.transcoders.transcoder import random_set

    stack, adapter = stack or vlm.adapter, vlm.adapter
    width = 4 * stack.d_model if config.n_features is None else config.n_features
    size = stack.n_layers * 2 * width * stack.d_model * adapter.dtype.itemsize
    check_room(size, "random transcoders", "cpu", "choose a smaller transcoder.n_features")
    shape = (stack.n_layers, stack.d_model, width, config.k, config.skip)
    crosses = config.cross_layer and stack.site == "decoder"
    transcoders = random_set(*shape, config.seed, adapter.dtype, "random", config.activation, crosses, stack.site)
    return transcoders.to(adapter.device).requires_grad_(False)


def user_pictures(cfg: AppConfig) -> list[Image.Image]:
    """Open the pictures of `image=`, in order."""
    from vlmscope.data.images import open_images

    return open_images(cfg.image or [])


def model_origin(cfg: AppConfig, weights: bool = True) -> dict[str, Any]:
    """Origin of the model: weights (if `weights`), configuration, tokenizer, processor and template.

    Raises:
        UserError: the model is missing and cannot be fetched.
    """
    from vlmscope.features.shipped import weights_digest
    from vlmscope.models.checkpoint import model_folder

    chosen = cfg.model
    origin: dict[str, Any] = {"model.dtype": chosen.dtype}
    if chosen.family is not None:
        return origin | {"model.family": chosen.family, "seed": cfg.seed}
    folder = Path(model_folder(chosen.path, chosen.hub, chosen.revision))
    files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.name != "metrics.json"}
    if weights:
        origin["model.weights"] = weights_digest(folder)
    return origin | {f"model.{file.relative_to(folder)}": files_digest([file]) for file in sorted(files)}


def transcoder_origin(cfg: AppConfig, overrides: Sequence[str] = ("transcoder",)) -> dict[str, Any]:
    """Origin of the transcoders that `load_scope` loads.

    Raises:
        UserError: they are missing or not a set.
    """
    from vlmscope.features.shipped import set_files

    if not isinstance(cfg.transcoder, TranscoderSetConfig):
        return flat("transcoder", asdict(cfg.transcoder))
    below = {}
    if cfg.attribution.tower and cfg.transcoder.tower is not None:
        below = {"transcoder.tower": folder_digest(cfg.transcoder.tower)}
    if cfg.model.family is not None and not names_transcoders(overrides):
        return {"transcoder": "random", "seed": cfg.seed}
    folder, form, choice = chosen_set(cfg)
    files = {"transcoder.files": files_digest(set_files(folder, form, choice))}
    return {**files, **flat("transcoder", choice._asdict()), **below}


def study_digest(path: str) -> str:
    """Digest of a study, given its folder or run folder: its head, which records its origin, and its labels."""
    from vlmscope.core.study import MANIFEST

    patterns = [f"{prefix}{name}" for prefix in ("", "study/") for name in (MANIFEST, "labels/*.parquet")]
    return files_digest(file for pattern in patterns for file in sorted(Path(path).glob(pattern)))


def data_origin(cfg: AppConfig, sources: Mapping[str, SourceConfig] | None = None) -> dict[str, Any]:
    """Origin of the data of `data=`, with `sources` in place of its own if given."""
    chosen = cfg.data
    sources = chosen.sources if sources is None else sources
    # Where a mix is written, and how many corrupt shards are tolerated, do not change a row.
    origin = flat("data", {k: v for k, v in asdict(chosen).items() if k not in ("path", "sources", "max_bad_shards")})
    if not sources and chosen.path is not None:
        origin["data.files"] = folder_digest(chosen.path)
    for name, source in sources.items():
        origin |= flat(f"data.sources.{name}", {k: v for k, v in asdict(source).items() if k != "path"})
        if source.path is not None:
            origin[f"data.sources.{name}.files"] = folder_digest(source.path)
    return origin


def study_sources(cfg: AppConfig) -> dict[str, SourceConfig]:
    """The sources of a study of `data=`, with absolute paths and the split to study.

    Missing shards are refused here, before heavy imports.
    """
    from vlmscope.data.config import SourceConfig
    from vlmscope.data.orrery.dataset import scene_shards
    from vlmscope.data.shards import read_index

    data = cfg.data
    if data.sources:
        sources = dict(data.sources)
    elif data.name == "orrery":
        folder = scene_shards(data.path)
        kind, path = ("scenes", None) if folder is None else ("shards", str(folder))
        sources = {stream: SourceConfig(kind, path, split="val", stream=stream) for stream in data.scenes}
    elif data.name == "folder":
        if not data.path:
            raise UserError("data.path is not set: give the folder with train.jsonl (docs/bring_your_own.md)")
        sources = {"folder": SourceConfig("folder", data.path)}
    else:
        raise UserError(f"data={data.name}: a study goes through orrery, folder, or a mix (docs/data.md)")
    studied = {}
    for name, source in sources.items():
        if source.kind == "shards":
            read_index(Path(str(source.path)), f"data.path or data.sources.{name}.path")
        path = source.path and str(Path(source.path).absolute())
        studied[name] = replace(source, split=cfg.study.split or source.split, path=path)
    return studied


def shipped_study(cfg: AppConfig, tower: bool = False) -> Path | None:
    """Folder of the labelled study that is shipped with exactly this model and these transcoders; None without one.

    With `tower` that of the transcoders below the soft tokens, `transcoder.tower`.
    """
    from vlmscope.features.shipped import shipped_study as find
    from vlmscope.models.checkpoint import model_folder

    if cfg.model.family is not None or not isinstance(cfg.transcoder, TranscoderSetConfig):
        return None
    model = model_folder(cfg.model.path, cfg.model.hub, cfg.model.revision)
    if tower:
        return None if cfg.transcoder.tower is None else find(model, cfg.transcoder.tower)
    return find(model, *chosen_set(cfg))


def needed_study(cfg: AppConfig, shipped: bool = False) -> Path:
    """Folder of the study of `study.path=`, checked before heavy imports; else, if allowed, of the shipped one."""
    from vlmscope.core.study import study_folder

    if cfg.study.path is None and shipped and (found := shipped_study(cfg)) is not None:
        print(f"study: {found}, which comes with this model and these transcoders; study.path= names another")
        return found
    if cfg.study.path is None:
        raise UserError(
            f"no study: add study.path=FOLDER, the run folder of a finished task=study ({program()} task=study)"
        )
    return study_folder(cfg.study.path)


def study_origin(cfg: AppConfig, sources: Mapping[str, SourceConfig], overrides: Sequence[str]) -> dict[str, Any]:
    """Origin of a study: model, transcoders, data, settings and seed."""
    origin = model_origin(cfg) | transcoder_origin(cfg, overrides) | data_origin(cfg, sources)
    return origin | flat("study", cfg.study.decisive()) | {"seed": cfg.seed}


def made_study(cfg: AppConfig, scope: Scope, folder: Path) -> StudyFolder:
    """Make the study of `cfg.study` in `folder`: of published statistics, or of `cfg.data`."""
    if cfg.study.published is not None:
        from vlmscope.features.published import published_study, statistics_folder

        source = statistics_folder(cfg.study.published, cfg.study.revision)
        return published_study(folder, source, scope, cfg.study)
    from vlmscope.features.study import data_record, make_study

    sources = study_sources(cfg)
    data = data_record(sources, cfg.study, cfg.data.max_bad_shards, cfg.data.name)
    return make_study(folder, scope, data, cfg.study, study_origin(cfg, sources, ("transcoder",)))


def look_for_labels(cfg: AppConfig) -> None:
    """Raise `UserError` if `attribution.labels`, or `tower_labels`, is neither a finished study nor `none`, before
    heavy imports.
    """
    from vlmscope.core.study import study_folder

    for named in (cfg.attribution.labels, cfg.attribution.tower_labels):
        if named not in (None, NO_LABELS):
            study_folder(named)


def labels_folder(cfg: AppConfig, tower: bool = False) -> Path | None:
    """The study that names features: that of `attribution.labels`, else the one that is shipped with these.

    With `tower` that of the vision tower's features, of graphs that have any.
    """
    named = cfg.attribution.tower_labels if tower else cfg.attribution.labels
    if NO_LABELS in (named, cfg.attribution.labels) or (tower and not cfg.attribution.tower):
        return None
    return shipped_study(cfg, tower) if named is None else Path(named)


def label_folders(cfg: AppConfig) -> list[Path]:
    """Both studies that name features, as far as there are any."""
    return [folder for tower in (False, True) if (folder := labels_folder(cfg, tower)) is not None]


def feature_labels(
    cfg: AppConfig, model: str, scope: Scope | None = None, graphs: Sequence[Path] = ()
) -> dict[FeatureId, str]:
    """Labels with scores by feature, except those no better than chance; empty without a study (`labels_folder`).

    Args:
        cfg: the run's configuration.
        model: name of the model, which must be that of the study.
        scope: the features' transcoders; None if only graph files are available, which do not name theirs.
        graphs: files of earlier traces; unless `attribution.labels` is set, they keep the labels that they were given.
    """
    named, labels = cfg.attribution.labels, {}
    if named is None and graphs:
        from vlmscope.attribution.export import saved_labels

        labels = saved_labels(graphs)
    for tower in (False, True):
        folder = None if named is None and scope is None else labels_folder(cfg, tower)
        if folder is not None:
            from vlmscope.features.labels import labels_for

            widths = None if scope is None else scope.at(TOWER if tower else 0).widths
            labels |= labels_for(folder, model, widths).texts()
    return labels
