"""From a model of the Hugging Face hub, at one commit, to a local folder.

Order: a folder that is there; the hub's cache on this machine, without a network; a download into that cache. Only
safetensors, configuration and tokenizer files are fetched, never a pickle and never code.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vlmscope.core.errors import UserError
from vlmscope.core.hub import Wanted, cached_folder, fetch, is_commit, is_hub_id
from vlmscope.models.checkpoint import is_complete

__all__ = ["WANTED", "cached_folder", "is_commit", "is_hub_id", "model_folder", "wanted"]

WANTED = Wanted(
    ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"),
    ("*/*", "consolidated*"),  # other copies of the weights
)


class _Source(NamedTuple):
    """A repository at a commit, the folder that a copy of it may lie in, and whether a model's config names that."""

    repo: str
    revision: str
    local: str
    preset: bool

    def refusal(self, reason: str) -> UserError:
        """The one line that says what to download and where to put it."""
        where = "set VLMSCOPE_MODELS to the folder that has it" if self.preset else "put it elsewhere"
        given = "" if self.preset else f" and give model.path={self.local}"
        return UserError(
            f"no model at {self.local}, and {reason}: run `hf download {self.repo} --revision {self.revision} "
            f"--local-dir {self.local}`{given}, or {where}"
        )


def model_folder(path: str, hub: str | None = None, revision: str | None = None) -> Path:
    """The local folder of a model, fetched into the hub's cache when it must be.

    Args:
        path: a folder, or a hub id when there is no such folder.
        hub: the hub id that belongs at `path`, if any.
        revision: the commit, 40 hexadecimal digits; only needed when the folder is not there.

    Raises:
        UserError: the revision is not pinned, or the model can neither be found nor fetched; the message says what to
            download and where to put it.
    """
    repo = hub or (path if is_hub_id(path) else None)
    if repo is None or Path(path).is_dir():
        return Path(path)
    local = path if hub is not None else f"models/{repo.partition('/')[2]}"
    if revision is None or not is_commit(revision):
        given = "has no pinned revision here" if revision is None else f"is asked for at {revision!r}, which may move"
        raise UserError(
            f"no folder {path}, and the hub model {repo} {given}: add model.revision=<commit, 40 hex digits> (the "
            f"model's page lists them under Files, History), or put the model into a folder and give model.path="
        )
    source = _Source(repo, revision, local, hub is not None)
    cached = cached_folder(repo, revision)
    return cached if is_complete(cached) else fetch(repo, revision, WANTED, source.refusal)


def wanted(names: Iterable[str]) -> list[str]:
    """The files of a repository that are fetched."""
    return WANTED.of(names)
