"""Repositories of the Hugging Face hub at one commit, as local folders; shared by models and transcoder sets.

Only files of the caller's patterns are fetched, never a pickle and never code. huggingface_hub handles tokens
(`hf auth login`): none is read, kept or shown here.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from vlmscope.core.errors import UserError, first_line

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TIMEOUT = 5.0  # seconds to wait for an answer of the hub


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form `organisation/name`."""
    return bool(_HUB_ID.fullmatch(path))


def is_commit(revision: str) -> bool:
    """Whether `revision` pins one state of a repository; branches and tags move."""
    return bool(_COMMIT.fullmatch(revision))


def gb(size: float) -> str:
    """A number of bytes as text, such as `4.3 GB`; small ones in MB or kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


class FilePatterns(NamedTuple):
    """Patterns of the files to fetch from a repository: any in `allowed` and none in `ignored` must match."""

    allowed: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def select(self, names: Iterable[str]) -> list[str]:
        """The matching names, in order."""
        allowed = [name for name in names if any(fnmatch(name, pattern) for pattern in self.allowed)]
        return [name for name in allowed if not any(fnmatch(name, pattern) for pattern in self.ignored)]


def cached_folder(repo: str, revision: str) -> Path:
    """Folder of a repository at a commit in the local hub cache; it may be absent or incomplete."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / revision


def fetch(repo: str, revision: str, patterns: FilePatterns, refusal: Callable[[str], UserError]) -> Path:
    """Download a repository at a commit into the hub's cache, resuming an interrupted download.

    `refusal` builds the error to raise from a description of the problem. A repository without safetensors is refused.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    if constants.HF_HUB_OFFLINE:
        raise refusal("HF_HUB_OFFLINE forbids to fetch it")
    try:
        # A short request first: it returns the sizes, and fails at once without a network, where a download retries.
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        names = patterns.select(sizes)
        if not any(name.endswith(".safetensors") for name in names):
            raise UserError(
                f"{repo} has no safetensors at {revision}, and pickles are never read; choose another commit"
            )
        snapshot, cache = cached_folder(repo, revision), Path(constants.HF_HUB_CACHE)
        missing = sum(sizes[name] for name in names if not (snapshot / name).exists())
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.is_dir())).free
        if missing > free:
            raise refusal(f"it has {gb(missing)} to fetch but {cache} has {gb(free)} free (HF_HOME moves it)")
        print(f"fetching {repo} at {revision[:8]}: {gb(missing)} into {cache}", flush=True)
        allowed, ignored = list(patterns.allowed), list(patterns.ignored)
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=allowed, ignore_patterns=ignored, etag_timeout=_TIMEOUT
        )
        return Path(folder)
    except (HTTPError, OSError, ValueError) as error:
        raise refusal(reason(error)) from error


def reason(error: Any) -> str:
    """Short description of an error of the hub, the network or the disk."""
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
