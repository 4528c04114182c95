"""Hub models: found in a folder or in the cache without a network, fetched at a commit, refused in one line."""

import re
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from omegaconf import OmegaConf

from vlmscope.app import main
from vlmscope.config.catalog import conf_dir
from vlmscope.core.errors import UserError
from vlmscope.core.hub import is_commit, is_hub_id
from vlmscope.models.checkpoint import WANTED, model_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "some-org/tiny-vlm"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; a network is allowed as far as the environment goes, and its functions count calls."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.setattr(huggingface_hub, "HfApi", never)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def fill_cache(cache: Path, sharded: Path, leave_out: str = "") -> Path:
    """As huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    home = cache / f"models--{REPO.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(sharded.iterdir())):
        blob = home / "blobs" / f"{number:040x}"
        shutil.copy(path, f"{blob}.incomplete" if path.name == leave_out else blob)
        if path.name != leave_out:
            (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


class Hub:
    """Stands for the hub: sizes of files, and what a download does."""

    def __init__(self, sharded: Path, failure: Exception | None = None, names: list[str] | None = None) -> None:
        self.saved, self.failure, self.downloads = sharded, failure, []
        self.names = names if names is not None else [path.name for path in sharded.iterdir()]

    def model_info(self, repo: str, *, revision: str, files_metadata: bool, timeout: float) -> SimpleNamespace:
        assert (repo, revision, files_metadata) == (REPO, COMMIT, True) and timeout <= 10
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=1000) for name in self.names])

    def download(self, repo: str, **settings: Any) -> str:
        self.downloads.append((repo, settings))
        return str(self.saved)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Hub":
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)
        return self


def response(status: int) -> Any:
    """What a hub error carries, of the HTTP library that huggingface_hub uses."""
    import importlib

    httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # pyright: ignore
    return httpx.Response(status, request=httpx.Request("GET", "https://hub/x"))


def test_a_folder_and_the_cache_are_taken_without_a_network(cache: Path, sharded: Path) -> None:
    assert model_folder(str(sharded)) == model_folder(str(sharded), REPO, COMMIT) == sharded
    snapshot = fill_cache(cache, sharded)
    assert model_folder(REPO, None, COMMIT) == model_folder("models/tiny-vlm", REPO, COMMIT) == snapshot


def test_a_cached_model_runs_and_bears_its_name(cache: Path, sharded: Path, tmp_path: Path) -> None:
    fill_cache(cache, sharded)
    run = [f"hydra.run.dir={tmp_path / 'run'}", "tracking=none", "transcoder=random", "attribution.max_nodes=20"]
    asked = ["task=trace", "model=path", f"model.path={REPO}", f"model.revision={COMMIT}", "prompt=what is this ?"]
    assert main([*asked, *run]) == 0
    assert '"tiny-vlm"' in (tmp_path / "run" / "graph.json").read_text()


def test_a_missing_model_is_fetched_at_its_commit(
    cache: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(sharded).install(monkeypatch)
    assert model_folder(REPO, None, COMMIT) == sharded
    ((repo, settings),) = hub.downloads
    assert (repo, settings["revision"]) == (REPO, COMMIT)
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in settings["allow_patterns"])
    assert f"fetching {REPO} at 01234567: {len(hub.names)}.0 kB into {cache}" in capsys.readouterr().out


def test_half_a_download_goes_on(cache: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(cache, sharded, leave_out=sorted(sharded.glob("*.safetensors"))[1].name)
    hub = Hub(sharded).install(monkeypatch)
    model_folder(REPO, None, COMMIT)
    assert len(hub.downloads) == 1


def test_nothing_but_weights_configuration_and_tokenizer_is_wanted() -> None:
    names = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    never = ["pytorch_model.bin", "modeling_own.py", "original/model.safetensors", "consolidated.safetensors", "a.pt"]
    assert WANTED.select([*names, *never]) == names


FAILURES = [
    (lambda: errors.GatedRepoError("x", response=response(403)), "licence must be accepted on its page first"),
    (lambda: errors.RepositoryNotFoundError("x", response=response(401)), "the hub has no such model, or it is priv"),
    (lambda: errors.HfHubHTTPError("x", response=response(403)), "the hub refuses access"),
    (lambda: TimeoutError("timed out\nlater"), "the hub cannot be reached (TimeoutError: timed out)"),
    (lambda: PermissionError(13, "Permission denied", "/cache"), "/cache cannot be written (Permission denied)"),
]


@pytest.mark.parametrize(("failure", "words"), FAILURES, ids=[words[:30] for _, words in FAILURES])
def test_what_the_hub_refuses_is_one_line(
    failure: Any, words: str, cache: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(sharded, failure()).install(monkeypatch)
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        model_folder("models/tiny-vlm", REPO, COMMIT)
    assert "\n" not in str(raised.value)
    assert f"hf download {REPO} --revision {COMMIT} --local-dir models/tiny-vlm" in str(raised.value)


def test_no_network_fails_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # a port that no one listens on
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} s to try again"))
    with pytest.raises(UserError, match=r"the hub cannot be reached \(ConnectError"):
        model_folder(REPO, None, COMMIT)


def test_what_is_refused_before_anything_is_fetched(
    cache: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for revision in (None, "main", COMMIT[:10]):
        with pytest.raises(UserError, match=r"add model.revision=<commit, 40 hex digits>"):
            model_folder(REPO, None, revision)
    Hub(sharded, names=["config.json", "pytorch_model.bin"]).install(monkeypatch)
    with pytest.raises(UserError, match="has no safetensors at .* pickles are never read"):
        model_folder(REPO, None, COMMIT)
    hub = Hub(sharded).install(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_500))
    with pytest.raises(UserError, match=r"it has \d+\.0 kB to fetch but .* has 2\.5 kB free"):
        model_folder(REPO, None, COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids.*--local-dir models/tiny-vlm` and give model.path="):
        model_folder(REPO, None, COMMIT)
    assert not hub.downloads


def test_published_models_are_pinned() -> None:
    assert is_hub_id("google/gemma-3-4b-it") and is_hub_id("a/b")
    for path in ("/a/b", "./a/b", "../b", "a", "a/b/c", "~/a", "a/.b", "C:/b"):
        assert not is_hub_id(path), path
    for path in (conf_dir() / "model").glob("*.yaml"):
        record: Any = OmegaConf.to_container(OmegaConf.load(path))
        assert not record.get("hub") or (is_hub_id(record["hub"]) and is_commit(record["revision"]))
