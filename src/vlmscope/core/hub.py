"""Repositories of the Hugging Face hub at one commit, as local folders; shared by models and transcoder sets.

Only the patterns that the caller names are fetched, never a pickle and never code. Tokens are huggingface_hub's own
affair (`hf auth login`): none is read, kept or shown here.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from vlmscope.core.errors import UserError, first_line

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TIMEOUT = 5.0  # seconds that the hub has to answer


def is_hub_id(path: str) -> bool:
    """Whether `path` reads as `organisation/name`."""
    return bool(_HUB_ID.fullmatch(path))


def is_commit(revision: str) -> bool:
    """Whether `revision` pins one state of a repository; branches and tags move."""
    return bool(_COMMIT.fullmatch(revision))


def gb(size: float) -> str:
    """Bytes as `4.3 GB`, small ones in MB or kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


class Wanted(NamedTuple):
    """Which files of a repository are fetched: those of a pattern in `allowed` and of none in `ignored`."""

    allowed: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def of(self, names: Iterable[str]) -> list[str]:
        """The names among these, in order."""
        chosen = [name for name in names if any(fnmatch(name, pattern) for pattern in self.allowed)]
        return [name for name in chosen if not any(fnmatch(name, pattern) for pattern in self.ignored)]


def cached_folder(repo: str, revision: str) -> Path:
    """Where the hub's cache on this machine has a repository at a commit; it may be absent or incomplete."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / revision


def fetch(repo: str, revision: str, wanted: Wanted, refusal: Callable[[str], UserError]) -> Path:
    """Download a repository at a commit into the hub's cache, or go on where a download stopped.

    `refusal` makes the error that is raised from what went wrong, in words. One without safetensors is refused.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    if constants.HF_HUB_OFFLINE:
        raise refusal("HF_HUB_OFFLINE forbids to fetch it")
    try:
        # One short question first: its answer tells the sizes, and without a network it fails at once, whereas a
        # download tries again and again.
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        # Refuse what has no safetensors or does not fit the disk; then say what is fetched.
        if not any(name.endswith(".safetensors") for name in wanted.of(sizes)):
            raise UserError(
                f"{repo} has no safetensors at {revision}, and pickles are never read; choose another commit"
            )
        snapshot, cache = cached_folder(repo, revision), Path(constants.HF_HUB_CACHE)
        missing = sum(sizes[name] for name in wanted.of(sizes) if not (snapshot / name).exists())
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.is_dir())).free
        if missing > free:
            raise refusal(f"it has {gb(missing)} to fetch but {cache} has {gb(free)} free (HF_HOME moves it)")
        print(f"fetching {repo} at {revision[:8]}: {gb(missing)} into {cache}", flush=True)
        allowed, ignored = list(wanted.allowed), list(wanted.ignored)
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=allowed, ignore_patterns=ignored, etag_timeout=_TIMEOUT
        )
        return Path(folder)
    except (HTTPError, OSError, ValueError) as error:
        raise refusal(reason(error)) from error


def push(folder: Path, repo: str, patterns: Sequence[str], private: bool, revision: str | None) -> str:
    """Upload the files of a folder that match into a repository, made if need be; returns the commit.

    A repository that is made is seen by its owner alone if `private`. The branch `revision` is made if need be; the
    main one when None.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"cannot push {folder} to {repo}: HF_HUB_OFFLINE forbids it; unset it")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        made = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, allow_patterns=list(patterns),
            commit_message="Transcoder set",
        )  # fmt: skip
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(f"cannot push {folder} to {repo}: {reason(error)}") from error
    return str(made.oid)


def reason(error: Any) -> str:
    """What went wrong, in some words."""
    from huggingface_hub import errors

    for kind, words in (
        (errors.GatedRepoError, "its licence must be accepted on its page first, and `hf auth login` done here"),
        (errors.RevisionNotFoundError, "the hub has no such revision of it"),
        (errors.RepositoryNotFoundError, "the hub has no such model, or it is private and wants `hf auth login`"),
    ):
        if isinstance(error, kind):
            return words
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return "the hub refuses access: accept its licence on its page, then `hf auth login`"
        return f"the hub answered {status}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename} cannot be written ({error.strerror})"
    return f"the hub cannot be reached ({type(error).__name__}: {first_line(error)})"
