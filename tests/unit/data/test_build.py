"""Shards of a mix: each sample once for any number of processes, whole after any interruption, and read back."""

import gzip
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import webdataset as wds
from datasets import Dataset

from vlmscope.core.artifacts import read_json, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange
from vlmscope.data import build
from vlmscope.data.build import BuildSettings, build_mix
from vlmscope.data.config import SourceConfig
from vlmscope.data.images import encode_png
from vlmscope.data.mixing import open_source
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.samples import WHOLE, RawSample, Share, held_out
from vlmscope.data.shards import write_tar

PNG = encode_png(make_scene("train", "shapes", 0).image)


def sources(folder: Path) -> dict[str, SourceConfig]:
    """Texts of which every third is there twice, and scenes."""
    texts = [f"text {n}" for n in range(60)] + [f"text {n}" for n in range(0, 60, 3)] + [""]
    if not folder.exists():
        Dataset.from_dict({"text": texts}).save_to_disk(folder)
    return {
        "words": SourceConfig("hf_text", str(folder)),
        "scenes": SourceConfig("orrery", stream="questions", limit=20, val_split="val"),
    }


def settings(folder: Path, **changes: Any) -> BuildSettings:
    return BuildSettings(**{"folder": folder, "shard_size": 7, "parts": 3, "val_share": 0.2} | changes)


def contents(folder: Path) -> Counter[bytes]:
    """All samples of all shards that the index knows, by digest."""
    found: Counter[bytes] = Counter()
    for name, entry in read_json(folder / "index.json")["shards"].items():
        read = [RawSample.from_shard(one) for one in wds.WebDataset(str(folder / name), shardshuffle=False)]  # pyright: ignore[reportAttributeAccessIssue]
        assert len(read) == entry["samples"] > 0
        if entry["kind"] == "words":
            assert all(held_out(one, 0.2) == (entry["split"] == "val") for one in read)
        found.update(one.digest() for one in read)
    return found


def expected(folder: Path) -> set[bytes]:
    made = sources(folder)
    words = {RawSample(text=f"text {n}").digest() for n in range(60)}
    scenes = [row() for split in ("train", "val") for row in open_source("scenes", made["scenes"], split).open(WHOLE)]
    return words | {one.digest() for one in scenes}


@pytest.mark.parametrize("processes", [1, pytest.param(2, id="two")])
def test_each_sample_is_written_once_with_its_bytes(tmp_path: Path, processes: int) -> None:
    made = sources(tmp_path / "words")
    figures = build_mix(made, settings(tmp_path / "out"), processes)
    found = contents(tmp_path / "out")
    assert set(found) == expected(tmp_path / "words") and set(found.values()) == {1}
    assert figures["data/rows"] == 81 + 40 and figures["data/samples"] == 60 + 40
    assert figures["data/duplicates"] == 20 and figures["data/unusable"] == 1
    index = read_json(tmp_path / "out" / "index.json")
    assert index["duplicates"] == 20 and index["meta"]["parts"] == 3
    assert build_mix(made, settings(tmp_path / "out"), processes)["data/shards_written"] == 0
    # No pixel tensors: what is written is the very file.
    scene = next(open_source("x", SourceConfig("shards", str(tmp_path / "out"), stream="scenes")).open(WHOLE))()
    assert scene.images[0] == encode_png(make_scene("train", "planets", 0).image)


class Die(NamedTuple):
    """Raises once, at the n-th call."""

    original: Callable[..., Any]
    calls: list[int]
    at: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(1)
        if len(self.calls) == self.at:
            raise KeyboardInterrupt
        return self.original(*args, **kwargs)


@pytest.mark.parametrize("where", ["write_tar", "write_json"])
@pytest.mark.parametrize("at", [1, 5])
def test_an_interrupted_build_goes_on_without_loss_or_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, at: int
) -> None:
    made = sources(tmp_path / "words")
    monkeypatch.setattr(build, where, Die(getattr(build, where), [], at))
    with pytest.raises(KeyboardInterrupt):
        build_mix(made, settings(tmp_path / "out"))
    figures = build_mix(made, settings(tmp_path / "out"))
    found = contents(tmp_path / "out")
    assert set(found) == expected(tmp_path / "words") and set(found.values()) == {1}
    assert figures["data/duplicates"] == 20 and figures["data/rows"] == 121


def flip(path: Path) -> None:
    """One bit in the middle; the length stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def read(path: Path) -> Any:
    """The content of a file; the index lists shards in the order in which they were written."""
    return read_json(path) if path.suffix == ".json" else path.read_bytes()


ONE, DIGESTS = "train-words-all-000-00001.tar", "digests/words-all-001-00002.bin"


@pytest.mark.parametrize(("files", "harm"), [(ONE, flip), (ONE, Path.unlink), (DIGESTS, flip), ("*.tar", flip)])
def test_a_part_is_written_again_from_a_damaged_shard_on_bit_for_bit(
    tmp_path: Path, files: str, harm: Callable[[Path], None]
) -> None:
    made, out = sources(tmp_path / "words"), tmp_path / "out"
    build_mix(made, settings(out))
    before = {path: (read(path), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    victims = list(out.glob(files))
    for path in victims:
        harm(path)
    figures = build_mix(made, settings(out))
    index = read_json(out / "index.json")
    harmed, touched = {path.name for path in victims}, set()
    for key, part in index["parts"].items():
        names = [{*chunk["shards"], f"{key}-{number:05d}.bin"} for number, chunk in enumerate(part["chunks"])]
        first = next((number for number, own in enumerate(names) if own & harmed), len(names))
        touched |= {name for own in names[first:] for name in own if name.endswith(".tar")}
    assert figures["data/shards_written"] == len(touched) > 0
    for path, (content, time) in before.items():
        assert read(path) == content, path
        if path.suffix == ".tar":
            assert (path.stat().st_mtime_ns == time) == (path.name not in touched), path
    assert build_mix(made, settings(out))["data/shards_written"] == 0


def test_other_sources_and_settings_are_refused(tmp_path: Path) -> None:
    made = sources(tmp_path / "words")
    build_mix(made, settings(tmp_path / "out"))
    with pytest.raises(UserError, match="describes other data"):
        build_mix(made, settings(tmp_path / "out", shard_size=8))
    Dataset.from_dict({"text": ["other"]}).save_to_disk(tmp_path / "words")
    with pytest.raises(UserError, match=r"\(data.sources.words \w+ -> \w+\); restore them, or choose another data"):
        build_mix(made, settings(tmp_path / "out"))
    made["scenes"].limit = 21
    with pytest.raises(UserError, match="describes other data"):
        build_mix(made, settings(tmp_path / "out"))


def test_a_mistake_in_another_process_is_one_line_here(tmp_path: Path) -> None:
    made = sources(tmp_path / "words")
    Dataset.from_dict({"text": [" "] * 30}).save_to_disk(tmp_path / "blank")
    made["words"] = SourceConfig("hf_text", str(tmp_path / "blank"))
    with pytest.raises(UserError, match="none of 7 rows of data.sources.words can be used; the last: words row"):
        build_mix(made, settings(tmp_path / "out"), 2)


def shards(folder: Path, sizes: tuple[int, ...] = (5, 1, 4, 7)) -> Path:
    """A stream in shards of uneven sizes."""
    index: dict[str, Any] = {"meta": {}, "shards": {}}
    number = 0
    for which, size in enumerate(sizes):
        body = []
        for _ in range(size):
            sample = RawSample((PNG,), (Exchange("what ?", f"answer {number}"),), origin=f"row {number}")
            body.append(sample.to_shard(f"s-{number:04d}"))
            number += 1
        name = f"train-s-{which}.tar"
        index["shards"][name] = {"split": "train", "kind": "s"} | write_tar(folder / name, body)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def answers(folder: Path, share: Share = WHOLE, max_bad: int = 0, mark: Any = None) -> list[str]:
    source = open_source("it", SourceConfig("shards", str(folder), stream="s"), None, max_bad)
    return [row().exchanges[0].assistant for row in source.open(share, mark)]


def test_uneven_shards_are_shared_without_loss_or_repeat(tmp_path: Path) -> None:
    shards(tmp_path)
    for total in range(1, 21):
        parts = [answers(tmp_path, Share(n, total)) for n in range(total)]
        assert sum(parts, []) == [f"answer {n}" for n in range(17)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    source = open_source("it", SourceConfig("shards", str(tmp_path), stream="s"))
    for share in (WHOLE, Share(1, 3)):
        reader = source.open(share)
        whole = answers(tmp_path, share)
        for done in range(len(whole) + 1):
            assert answers(tmp_path, share, 0, json.loads(json.dumps(reader.mark()))) == whole[done:]
            next(reader, None)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


@pytest.mark.parametrize("harm", [truncate, Path.unlink])
def test_a_corrupt_shard_is_skipped_with_a_count_up_to_a_limit(
    tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    shards(tmp_path)
    harm(tmp_path / "train-s-0.tar")
    with pytest.raises(UserError, match=r"train-s-0.tar is corrupt .*number 1, and data.max_bad_shards=0"):
        answers(tmp_path)
    assert answers(tmp_path, max_bad=1) == [f"answer {n}" for n in range(5, 17)]
    assert re.search(r"train-s-0.tar is corrupt .*left out \(1 of at most 1\)", caplog.text)
    truncate(tmp_path / "train-s-3.tar")
    with pytest.raises(UserError, match="number 2, and data.max_bad_shards=1"):
        answers(tmp_path, max_bad=1, mark={"row": 9, "bad": 1})  # a pass that goes on counts those before


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None, **pax: str) -> bytes:
    """A tar member whose header says what is given, whatever its content is."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax
    body = b'{"text": "x", "images": [], "origin": "o"}' if kind == tarfile.REGTYPE else b""
    info.size = len(body) if size is None else size
    return info.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512)


HOSTILE = {
    "parent": (member("a/../../out.json"), "leaves the shard"),
    "absolute": (member("/tmp/out.json"), "'/tmp/out.json' leaves the shard"),
    "symbolic link": (member("x.json", tarfile.SYMTYPE, "/etc/passwd"), "'x.json' is no plain file"),
    "sparse": (member("x.json", **{"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)}), "is no plain file"),
    "larger than the shard": (member("x.json", size=2**33), "'x.json' claims 8,589,934,592 bytes"),
    "twice": (member("x.json") * 2, "'x.json' is there twice"),
    "gzip": (None, "not a gzip|invalid header|not a tar|bad checksum"),
    "no json": (member("x.png"), "json"),
    "cut in a member": (member("x.json")[:700], "unexpected end of data|truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_members_that_no_shard_of_ours_has_make_it_corrupt(tmp_path: Path, case: str) -> None:
    """Nothing is unpacked, and no member is read that is not a plain file inside the shard's own bytes."""
    shards(tmp_path, (2, 3))
    (content, reason), path = HOSTILE[case], tmp_path / "train-s-0.tar"
    good = path.read_bytes()
    end = b"" if case.startswith("cut") else bytes(1024)
    path.write_bytes(gzip.compress(good) if content is None else content + end)
    index = read_json(tmp_path / "index.json")
    index["shards"][path.name] |= {"bytes": path.stat().st_size, "samples": 1}
    write_json(tmp_path / "index.json", index)
    with pytest.raises(UserError, match=rf"train-s-0.tar is corrupt \((.*{reason}.*)\), number 1") as error:
        answers(tmp_path)
    assert "\n" not in str(error.value)
    assert answers(tmp_path, max_bad=1) == [f"answer {n}" for n in range(2, 5)]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["index.json", "train-s-0.tar", "train-s-1.tar"]


@pytest.mark.parametrize(
    "change",
    [
        lambda index: [],
        lambda index: {"shards": index["shards"]},
        lambda index: index | {"shards": {"../x.tar": index["shards"]["train-s-0.tar"]}},
        lambda index: index | {"shards": {"train-s-0.tar": {"split": "train", "kind": "s"}}},
    ],
)
def test_an_index_of_another_shape_is_one_line(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    shards(tmp_path, (1,))
    with pytest.raises(UserError, match=r"no samples of stream 'z', split 'train'; it has s \(train\)"):
        open_source("it", SourceConfig("shards", str(tmp_path), stream="z"))
    write_json(tmp_path / "index.json", change(read_json(tmp_path / "index.json")))
    with pytest.raises(UserError, match=r"index.json is not an index of shards; correct data.sources.it.path"):
        answers(tmp_path)
