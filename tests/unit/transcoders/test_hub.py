"""Sets on the hub: found in a folder or in the cache without a network, fetched at a commit."""

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from vlmscope.core.errors import UserError
from vlmscope.transcoders.formats import Choice, save_set
from vlmscope.transcoders.hub import from_pretrained, set_folder
from vlmscope.transcoders.transcoder import TranscoderSet, random_set

REPO, COMMIT = "some-org/some-set", "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for the hub: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def model_info(self, repo: str, **settings: Any) -> SimpleNamespace:
        self.calls.append("info")
        files = [path for path in (self.root / repo).rglob("*") if path.is_file()]
        siblings = [SimpleNamespace(rfilename=str(f.relative_to(self.root / repo)), size=10) for f in files]
        return SimpleNamespace(siblings=siblings)

    def snapshot_download(self, repo: str, *, revision: str, allow_patterns: list[str], **_: Any) -> str:
        """As the real one: only files that match, into the cache's folder of the commit."""
        target = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
        for path in (self.root / repo).rglob("*"):
            name = str(path.relative_to(self.root / repo))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


def a_set(activation: str = "topk") -> TranscoderSet:
    return random_set(2, 6, 24, 4, seed=3, activation=activation)


def same(first: TranscoderSet, second: TranscoderSet) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return first.layers == second.layers and all(torch.equal(a, b) for a, b in pairs)


def test_a_set_is_fetched_at_its_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_set(a_set(), tmp_path / "set")
    save_set(a_set(), hub.root / REPO)
    for name in ("README.md", "pytorch_model.bin", "code.py"):
        (hub.root / REPO / name).write_text("x")
    assert same(from_pretrained(REPO, COMMIT, n_layers=2, d_model=6), a_set())
    names = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert names == {"README.md", "config.yaml", "layer_0.safetensors", "layer_1.safetensors"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # from now on the cache is enough
    assert same(from_pretrained(REPO, COMMIT), a_set())
    assert same(from_pretrained(tmp_path / "set"), a_set())


def test_half_a_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    save_set(a_set(), hub.root / REPO)
    folder = set_folder(REPO, COMMIT)
    (folder / "layer_1.safetensors").unlink()
    assert same(from_pretrained(REPO, COMMIT), a_set())
    save_set(a_set("relu"), hub.root / "a/lens", format="sae_lens")
    folder = set_folder("a/lens", COMMIT)
    shutil.rmtree(folder / "layer_1")
    assert from_pretrained("a/lens", COMMIT).layers == [0, 1]


def test_of_gemma_scope_only_the_chosen_set_is_fetched(hub: Hub, tmp_path: Path) -> None:
    for width in ("16k", "262k"):
        for layer in (0, 1):
            for name in ("params.safetensors", "config.json", "examples.safetensors"):
                path = hub.root / REPO / "transcoder_all" / f"layer_{layer}_width_{width}_l0_small_affine" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")
    folder = set_folder(REPO, COMMIT, choice=Choice("16k", "small", True))
    names = {str(path.relative_to(folder / "transcoder_all")) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        f"layer_{layer}_width_16k_l0_small_affine/{name}"
        for layer in (0, 1)
        for name in ("params.safetensors", "config.json")
    }


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12]])
def test_a_commit_is_asked_for(hub: Hub, revision: str | None) -> None:
    with pytest.raises(UserError, match="add transcoder.revision=<commit, 40 hex digits>"):
        set_folder(REPO, revision)
    assert not hub.calls
