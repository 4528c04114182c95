"""The files of a model, in a folder or on the hub, looked at before anything is loaded.

A model's order of search: a folder that is there; the hub's cache on this machine, without a network; a download into
that cache at one commit. Only safetensors, configuration and tokenizer files are fetched, never a pickle, never code.
"""

from __future__ import annotations

from pathlib import Path

from vlmscope.core.artifacts import read_json, refuse_lfs_pointer, tensor_heads
from vlmscope.core.errors import UserError
from vlmscope.core.hub import Wanted, cached_folder, fetch, is_commit, is_hub_id

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "download it again (a download goes on where it stopped)"
WANTED = Wanted(
    ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"),
    ("*/*", "consolidated*"),  # other copies of the weights
)


def read_config(folder: Path) -> dict[str, object]:
    """`config.json` of a model folder; a `UserError` when it is missing, is not JSON, or names no model type."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no model at {folder}: config.json is missing; give the folder of a Hugging Face model")
    refuse_lfs_pointer(path)
    config = read_json(path)
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path} names no model_type; it is not the config.json of a Hugging Face model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from, as its index names them; that they exist is not checked."""
    if (folder / _SINGLE).is_file():  # transformers takes it even where an index names other files
        return [folder / _SINGLE]
    index = folder / _INDEX
    if index.is_file():
        refuse_lfs_pointer(index)
        record = read_json(index)
        names = record.get("weight_map") if isinstance(record, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index} has no weight_map; {_AGAIN}")
        outside = [name for name in names.values() if Path(name).name != name]
        if outside:
            raise UserError(f"{index} names {outside[0]!r}, which does not lie in the folder; {_AGAIN}")
        return [folder / name for name in sorted(set(names.values()))]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        raise UserError(f"{index} is missing beside {shards[0].name}; {_AGAIN}")
    pickled = sorted(path for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has its weights as {pickled[0].name}, which is a pickle and never read; convert it to "
            "safetensors (save_pretrained does), or take a revision that has them"
        )
    raise UserError(f"{folder} has no weights{_interrupted(folder)}: {_SINGLE} is missing; {_AGAIN}")


def check_weights(folder: Path) -> None:
    """Raise a `UserError` that names the weight file that is missing, is a Git LFS pointer, or is cut off."""
    files = weight_files(folder)
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing ({len(missing)} of {len(files)} weight files are){_interrupted(folder)}; {_AGAIN}"
        )
    for path in files:
        tensor_heads(path)


def _interrupted(folder: Path) -> str:
    """Words for what an interrupted download left: beside a local folder, or among the blobs of the hub's cache."""
    places = (folder, folder / ".cache" / "huggingface" / "download", folder.parent.parent / "blobs")
    left = any(any(place.glob("*.incomplete")) for place in places if place.is_dir())
    return " (a download of it was interrupted)" if left else ""


def is_complete(folder: Path) -> bool:
    """Whether a folder has a configuration and all its weight files, whole."""
    try:
        read_config(folder)
        check_weights(folder)
    except UserError:
        return False
    return True


def model_folder(path: str, hub: str | None = None, revision: str | None = None) -> Path:
    """The local folder of a model, fetched into the hub's cache when it must be.

    Args:
        path: a folder, or a hub id when there is no such folder.
        hub: the hub id that belongs at `path`, if any.
        revision: the commit, 40 hexadecimal digits; only needed when the folder is not there.
    """
    repo = hub or (path if is_hub_id(path) else None)
    if repo is None or Path(path).is_dir():
        return Path(path)
    if revision is None or not is_commit(revision):
        given = "has no pinned revision here" if revision is None else f"is asked for at {revision!r}, which may move"
        raise UserError(
            f"no folder {path}, and the hub model {repo} {given}: add model.revision=<commit, 40 hex digits> (the "
            f"model's page lists them under Files, History), or put the model into a folder and give model.path="
        )

    def refusal(reason: str) -> UserError:
        local = f"models/{repo.partition('/')[2]}" if hub is None else path
        advice = f"and give model.path={local}, or put it elsewhere"
        if hub is not None:  # a configuration of conf/model names the place
            advice = "or set VLMSCOPE_MODELS to the folder that has it"
        download = f"hf download {repo} --revision {revision} --local-dir {local}"
        return UserError(f"no model at {local}, and {reason}: run `{download}` {advice}")

    cached = cached_folder(repo, revision)
    return cached if is_complete(cached) else fetch(repo, revision, WANTED, refusal)
