"""Transcoder sets on the Hugging Face hub: from a repository at one commit to a set, and from a folder to a repository.

Order: a folder that is there; the hub's cache on this machine, without a network; a download into that cache. Only
safetensors, YAML, JSON and Markdown travel, never a pickle and never code.
"""

from pathlib import Path

import torch

from vlmscope.core.errors import UserError
from vlmscope.core.hub import Wanted, cached_folder, fetch, is_commit, is_hub_id, push
from vlmscope.transcoders.formats import ANY, Choice, detect, load_set, open_set
from vlmscope.transcoders.transcoder import TranscoderSet

ALLOWED = ("*.safetensors", "*.yaml", "*.json", "*.md")


def set_folder(path: str | Path, revision: str | None = None, format: str = "auto", choice: Choice = ANY) -> Path:
    """The local folder of a set, fetched into the hub's cache when it must be.

    Args:
        path: a folder, or a hub id when there is no such folder.
        revision: the commit, 40 hexadecimal digits; only needed for a hub id.
        format: as in `load_set`.
        choice: of Gemma Scope's many sets, the one that is fetched.

    Raises:
        UserError: the revision is not pinned, or the set can neither be found nor fetched.
    """
    repo = str(path)
    if Path(path).is_dir() or not is_hub_id(repo):
        return Path(path)
    if revision is None or not is_commit(revision):
        given = "has no pinned revision here" if revision is None else f"is asked for at {revision!r}, which may move"
        raise UserError(
            f"no folder {repo}, and the hub repository {repo} {given}: add transcoder.revision=<commit, 40 hex digits> "
            "(its page lists them under Files, History), or give the folder of a set"
        )

    def refusal(why: str) -> UserError:
        return UserError(
            f"no folder {repo}, and {why}: run `hf download {repo} --revision {revision} --local-dir FOLDER` and give "
            "transcoder.path=FOLDER"
        )

    cached = cached_folder(repo, revision)
    readable = _is_readable(cached, format, choice)
    if readable and (cached / "config.yaml").is_file():
        return cached  # it lists its files, and they are there
    try:
        return fetch(repo, revision, _wanted(choice), refusal)
    except UserError:
        # In other layouts a download that stopped cannot be told from a set of few layers.
        if readable:
            return cached
        raise


def _wanted(choice: Choice) -> Wanted:
    """All of a repository, or one of the sets of Gemma Scope, of which a repository has many."""
    if choice == ANY:
        return Wanted(ALLOWED)
    end = {True: "_affine", False: "", None: "*"}[choice.affine]
    one = f"*layer_*_width_{choice.width or '*'}_l0_{choice.l0 or '*'}{end}/"
    return Wanted((f"{one}params.safetensors", f"{one}config.json"))


def _is_readable(folder: Path, format: str, choice: Choice) -> bool:
    try:
        return folder.is_dir() and bool(open_set(folder, format, choice).layers)
    except UserError:
        return False


def from_pretrained(
    path: str | Path,
    revision: str | None = None,
    n_layers: int | None = None,
    d_model: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    format: str = "auto",
    choice: Choice = ANY,
) -> TranscoderSet:
    """A set from a folder or from the hub: `set_folder`, then `load_set`, whose arguments the others are.

    Raises:
        UserError: as those two.
    """
    return load_set(set_folder(path, revision, format, choice), n_layers, d_model, dtype, device, format, choice)


def push_to_hub(folder: str | Path, repo: str, private: bool = True, revision: str | None = None) -> str:
    """Upload the folder of a set, its card included.

    Args:
        folder: a set in any format; it is opened first.
        repo: `organisation/name`; made if need be.
        private: whether a repository that is made is private.
        revision: the branch, made if need be; the main one when None.

    Returns:
        The commit that pins what was uploaded.

    Raises:
        UserError: the folder is no set or has no card, the name is no hub id, or the hub refuses.
    """
    folder = Path(folder)
    if not is_hub_id(repo):
        raise UserError(f"cannot push to {repo!r}: it is no hub id; write it as organisation/name")
    open_set(folder, detect(folder).name)
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no README.md; write the set's card first (task=convert makes one)")
    return push(folder, repo, ALLOWED, private, revision)
