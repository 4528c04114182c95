"""Where a run's code came from: git commit and package versions."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = (
    "vlmscope",
    "torch",
    "transformers",
    "tokenizers",
    "pytorch-lightning",
    "hydra-core",
    "mlflow",
    "numpy",
    "safetensors",
)


def git_state() -> tuple[str, bool]:
    """The commit that this code runs from and whether tracked files differ from it; ("none", False) without git."""
    folder = Path(__file__).resolve().parent
    try:
        commit, changes = (
            subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=20).stdout
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return "none", False
    return commit.strip(), bool(changes.strip())


def package_versions() -> dict[str, str]:
    """Version of Python and of each package that can change a number."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def tags() -> dict[str, str]:
    """Provenance as tags of a tracked run."""
    commit, dirty = git_state()
    found = {"git_commit": commit, "git_dirty": str(dirty).lower()}
    if commit != "none":
        found["mlflow.source.git.commit"] = commit
    return found | {f"version.{name}": version for name, version in package_versions().items()}
