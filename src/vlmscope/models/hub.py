"""From a model of the Hugging Face hub, at one commit, to a local folder.

Order: a folder that is there; the hub's cache on this machine, without a network; a download into that cache. Only
safetensors, configuration and tokenizer files are fetched, never a pickle and never code.
"""

import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from vlmscope.core.errors import UserError
from vlmscope.models.checkpoint import is_complete
from vlmscope.models.placement import gb

ALLOWED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
IGNORED = ("*/*", "consolidated*")  # other copies of the weights
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TIMEOUT = 5.0  # seconds that the hub has to answer


def is_hub_id(path: str) -> bool:
    """Whether `path` reads as `organisation/name`."""
    return bool(_HUB_ID.fullmatch(path))


def is_commit(revision: str) -> bool:
    """Whether `revision` pins one state of a repository; branches and tags move."""
    return bool(_COMMIT.fullmatch(revision))


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
    return cached if is_complete(cached) else _fetch(source)


def cached_folder(repo: str, revision: str) -> Path:
    """Where the hub's cache on this machine has a repository at a commit; it may be absent or incomplete."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / revision


def _fetch(source: _Source) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    if constants.HF_HUB_OFFLINE:
        raise source.refusal("HF_HUB_OFFLINE forbids to fetch it")
    try:
        # One short question first: its answer tells the sizes, and without a network it fails at once, whereas a
        # download tries again and again.
        info = HfApi().model_info(source.repo, revision=source.revision, files_metadata=True, timeout=_TIMEOUT)
        _check_files(source, {file.rfilename: file.size or 0 for file in info.siblings or []})
        found = snapshot_download(
            source.repo,
            revision=source.revision,
            allow_patterns=list(ALLOWED),
            ignore_patterns=list(IGNORED),
            etag_timeout=_TIMEOUT,
        )
    except (HTTPError, OSError, ValueError) as error:
        raise source.refusal(_reason(error)) from error
    return Path(found)


def wanted(names: Iterable[str]) -> list[str]:
    """The files of a repository that are fetched."""
    chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in ALLOWED)]
    return [name for name in chosen if not any(fnmatch(name, pattern) for pattern in IGNORED)]


def _check_files(source: _Source, sizes: dict[str, int]) -> None:
    """Refuse a repository without safetensors, and a disk that is too small; then say what is fetched."""
    from huggingface_hub import constants

    names = wanted(sizes)
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{source.repo} has no safetensors at {source.revision}, and pickles are never read; choose another commit"
        )
    snapshot, cache = cached_folder(source.repo, source.revision), Path(constants.HF_HUB_CACHE)
    missing = sum(sizes[name] for name in names if not (snapshot / name).exists())
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if missing > free:
        raise source.refusal(f"it has {gb(missing)} to fetch but {cache} has {gb(free)} free (HF_HOME moves it)")
    print(f"fetching {source.repo} at {source.revision[:8]}: {gb(missing)} into {cache}", flush=True)


def _reason(error: Any) -> str:
    """What went wrong, in some words."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its licence must be accepted on its page first, and `hf auth login` done here"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or it is private and wants `hf auth login`"
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return "the hub refuses access: accept its licence on its page, then `hf auth login`"
        return f"the hub answered {status}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename} cannot be written ({error.strerror})"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"the hub cannot be reached ({type(error).__name__}{': ' + first if first else ''})"
