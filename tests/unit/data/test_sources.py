"""Sources of every kind, on small folders with the published schemas, written here with `datasets` itself."""

import io
import json
import os
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pictures
from pyarrow.parquet import write_table

from vlmscope.core.errors import UserError
from vlmscope.core.records import CAPTION_REQUEST, Conversation
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import ShuffledSource, open_source
from vlmscope.data.samples import WHOLE, RawSample, Share
from vlmscope.data.tables import row_parser

PNG, JPEG = "PNG", "JPEG"


def picture(number: int, form: str = PNG) -> bytes:
    buffer = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 255, (8 + number % 5, 9, 3), np.uint8)
    Pictures.fromarray(colours).save(buffer, form)
    return buffer.getvalue()


def text_table(count: int = 10) -> Dataset:
    return Dataset.from_dict({"text": [f"document {n}" for n in range(count)], "source": ["web"] * count})


def imagenet_table(count: int = 6) -> Dataset:
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    return Dataset.from_dict(
        {
            "image": [{"bytes": picture(n, JPEG), "path": None} for n in range(count)],
            "label": [n % 2 for n in range(count)],
        },
        Features({"image": Image(), "label": ClassLabel(names=names)}),
    )


def cauldron_table(count: int = 5, first: int = 0) -> Dataset:
    turn = {"user": Value("string"), "assistant": Value("string"), "source": Value("string")}
    rows: dict[str, list[Any]] = {"images": [], "texts": []}
    for n in range(first, first + count):
        rows["images"].append([{"bytes": picture(10 * n + k), "path": None} for k in range(n % 3)])
        rows["texts"].append([{"user": f"q {n} {k} ?", "assistant": f"a {k}", "source": "x"} for k in range(1 + n % 2)])
    return Dataset.from_dict(rows, Features({"images": List(Image()), "texts": List(turn)}))


def parquet(table: Dataset, folder: Path, parts: tuple[int, ...], split: str = "train") -> Path:
    """Files of uneven lengths, named as on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for number, size in enumerate(parts):
        table.select(range(start, start + size)).to_parquet(
            folder / f"{split}-{number:05d}-of-{len(parts):05d}.parquet"
        )
        start += size
    return folder


def samples(config: SourceConfig, share: Share = WHOLE, split: str | None = None) -> list[RawSample]:
    return [row() for row in open_source("it", config, split).open(share)]


@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_image_and_label_as_imagenet_has_them(tmp_path: Path, saved: str) -> None:
    if saved == "disk":
        DatasetDict({"train": imagenet_table(), "validation": imagenet_table(2)}).save_to_disk(tmp_path / "data")
    else:
        parquet(imagenet_table(), tmp_path / "data" / "data", (4, 2))
        parquet(imagenet_table(2), tmp_path / "data" / "data", (2,), "validation")
    config = SourceConfig("hf_image_label", str(tmp_path / "data"), val_split="validation")
    read = samples(config)
    assert len(read) == 6 and len(samples(config, split="validation")) == 2
    assert read[1].exchanges == ((CAPTION_REQUEST, "a photo of a goldfish."),)
    assert read[1].images == (picture(1, JPEG),)  # the very bytes: nothing was decoded and encoded again
    opened = read[0].opened()
    assert isinstance(opened, Conversation) and opened.images[0].mode == "RGB"
    config.templates = ["a {label}", "the {label} !"]
    captions = {one.exchanges[0].assistant for one in samples(config)}
    assert len({caption.split()[0] for caption in captions}) == 2  # every template has its turn


SFT = ["train_sft-00000-of-00001", "test_sft-00000-of-00001"]


@pytest.mark.parametrize(
    ("files", "split", "chosen"),
    [
        # The hub's names, those that Hugging Face's `load_dataset` knows, and folders.
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], "train", [0, 1]),
        (["data/train-00000-of-00001", "data/validation-00000-of-00001"], "validation", [1]),
        (SFT, "test_sft", [1]),
        (["mine-train-00000-of-00001", "mine-test-00000-of-00001"], "test", [1]),
        (["train/0000", "test/0000"], "test", [1]),
        (["contest_train", "contest_dev"], "dev", [1]),
        (["train-val", "val"], "val", [1]),
        (["questions/0", "answers/0"], "answers", [1]),
        # Files without a split's name are all of the training split, as `load_dataset` takes them.
        (["part-00000-of-00002", "part-00001-of-00002"], "train", [0, 1]),
        (["part-00000-of-00002", "part-00001-of-00002"], "val", "its files name no split"),
        # A split that no file carries.
        (["train", "validation"], "val", "has no split 'val'; .* one of train, validation"),
        (["test_0", "0"], "train", "has no split 'train'; .* one of test"),
        (["cats-00000-of-00001", "dogs-00000-of-00001"], "train", "one of cats, dogs"),
    ],
)
def test_a_split_is_the_files_that_carry_its_name(
    tmp_path: Path, files: list[str], split: str, chosen: list[int] | str
) -> None:
    for number, name in enumerate(files):
        (tmp_path / "it" / name).parent.mkdir(parents=True, exist_ok=True)
        text_table(30).select([number]).to_parquet(tmp_path / "it" / f"{name}.parquet")
    config = SourceConfig("hf_text", str(tmp_path / "it"), val_split=split)
    if isinstance(chosen, list):
        assert {one.text for one in samples(config, split=split)} == {f"document {n}" for n in chosen}
    else:
        with pytest.raises(UserError, match=chosen) as error:
            samples(config, split=split)
        assert str(tmp_path / "it") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_pictures_and_turns_as_the_cauldron_has_them(tmp_path: Path, saved: str) -> None:
    for name, first, count in (("vqav2", 0, 5), ("ai2d", 100, 2)):
        if saved == "disk":
            cauldron_table(count, first).save_to_disk(tmp_path / name)
        else:
            parquet(cauldron_table(count, first), tmp_path / name, (1, count - 1))
    read = samples(SourceConfig("hf_cauldron", str(tmp_path), subsets=["vqav2", "ai2d"]))
    asked = [one.exchanges[0].user for one in read]
    assert sorted(asked) == sorted([*(f"q {n} 0 ?" for n in range(5)), "q 100 0 ?", "q 101 0 ?"])
    assert asked[:4] == ["q 0 0 ?", "q 100 0 ?", "q 1 0 ?", "q 101 0 ?"]  # the subsets take turns
    two = next(one for one in read if one.exchanges[0].user == "q 2 0 ?")
    assert two.images == (picture(20), picture(21)) and len(two.exchanges) == 1
    assert next(one for one in read if one.exchanges[0].user == "q 1 0 ?").exchanges[1] == ("q 1 1 ?", "a 1")


@pytest.mark.parametrize("stored", [picture(1), "a/1.png", {"bytes": None, "path": "a/1.png"}])
def test_pictures_stored_as_bytes_or_as_paths_from_the_data_folder(tmp_path: Path, stored: Any) -> None:
    """Tables of tools other than `datasets` (Roblox/FAI-RL#81)."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(picture(1))
    rows = [{"images": [stored], "texts": [{"user": "q ?", "assistant": "a"}]}]
    write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    (read,) = samples(SourceConfig("hf_cauldron", str(tmp_path)))
    assert read.images == (picture(1),)


@pytest.mark.parametrize("saved", ["disk", "parquet"])
@pytest.mark.parametrize("layout", ["from", "parts", "json"])
def test_pictures_and_turns_of_other_layouts(tmp_path: Path, saved: str, layout: str) -> None:
    """As LLaVA's mixes have them (one picture a row), as chat templates take them, and encoded as JSON."""
    turns: list[Any] = [[{"from": "human", "value": "<image>\nq ?"}, {"from": "gpt", "value": "a"}]] * 3
    if layout == "parts":
        parts = [{"type": "text", "text": "q ?", "index": None}, {"type": "image", "text": None, "index": 0}]
        turns = [[{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[0] | {"text": "a"}]}]] * 3
    pictures = [{"bytes": picture(n), "path": None} for n in range(3)]
    data = {"image": pictures, "said": list(map(json.dumps, turns)) if layout == "json" else turns}
    table = Dataset.from_dict(data).cast_column("image", Image())
    table.save_to_disk(tmp_path / "it") if saved == "disk" else parquet(table, tmp_path / "it", (2, 1))
    read = samples(SourceConfig("hf_cauldron", str(tmp_path / "it"), images="image", texts="said"))
    assert [(one.images, one.exchanges) for one in read] == [((picture(n),), (("q ?", "a"),)) for n in range(3)]


def test_streams_are_shared_and_go_on_from_their_marks(tmp_path: Path) -> None:
    folder = parquet(text_table(23), tmp_path / "data", (9, 1, 5, 8))
    config = SourceConfig("hf_text", str(folder))
    for ranks, workers in product((1, 2, 3, 4), (1, 2)):
        seen = [one.text for n in range(ranks * workers) for one in samples(config, Share(n, ranks * workers))]
        assert sorted(seen) == sorted(f"document {n}" for n in range(23)), (ranks, workers)
    for share, stop in product((Share(), Share(1, 2), Share(2, 3)), (0, 1, 4, 7)):
        whole = [row().text for row in open_source("it", config).open(share)]
        reader = open_source("it", config).open(share)
        for _ in range(stop):
            next(reader)
        mark = json.loads(json.dumps(reader.mark()))
        assert [row().text for row in open_source("it", config).open(share, mark)] == whole[stop:]
    config.limit = 7
    for total in (1, 2, 3):
        assert sum(len(samples(config, Share(n, total))) for n in range(total)) == 7


def test_a_shuffled_stream_resumes_to_the_sample(tmp_path: Path) -> None:
    folder = parquet(cauldron_table(20), tmp_path / "data", (3, 10, 7))

    def stream() -> ShuffledSource:
        return ShuffledSource(open_source("it", SourceConfig("hf_cauldron", str(folder))), Share(), 6, 0, repeat=True)

    first = stream()
    whole = [first.next() for _ in range(50)]
    for stop in (0, 5, 6, 19, 20, 21, 33):
        one, other = stream(), stream()
        for _ in range(stop):
            one.next()
        other.load(json.loads(json.dumps(one.state())))
        assert [other.next() for _ in range(50 - stop)] == whole[stop:]


REFUSED = [
    ({"kind": "hf_text", "text": "body"}, "no column 'body'; the columns are text, source"),
    ({"kind": "hf_cauldron"}, "no column 'images'; the columns are text, source"),
    ({"kind": "hf_text", "path": "/nowhere"}, "no folder /nowhere"),
    ({"kind": "hf_text", "path": None}, "neither path nor hub"),
    ({"kind": "text"}, "kind=text: no such choice; did you mean 'hf_text'?"),
    ({"kind": "hf_text", "weight": 0.0}, "weight=0.0: a weight must be positive"),
    ({"kind": "hf_text", "limit": 0}, "limit=0: it must be at least 1"),
    ({"kind": "orrery", "stream": "songs"}, "stream=songs: no such choice"),
    ({"kind": "shards", "path": None}, "path is not set: give the folder with its index.json"),
    ({"kind": "shards"}, "no index.json in"),
    ({"kind": "folder"}, "no train.jsonl in"),
    ({"kind": "hf_image_label", "templates": ["a photo"]}, "each template must say where the {label} goes"),
    ({"kind": "hf_text", "path": None, "hub": "a/b", "revision": "main"}, "requested at 'main', which may change"),
    ({"kind": "hf_text", "path": None, "hub": "a/b", "revision": "0" * 40}, "HF_HUB_OFFLINE forbids to stream a/b"),
]


@pytest.mark.parametrize("saved", ["disk", "parquet"])
@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "data"
    text_table(4).save_to_disk(folder) if saved == "disk" else parquet(text_table(4), folder, (4,))
    with pytest.raises(UserError) as error:
        open_source("it", SourceConfig(**{"path": str(folder)} | changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("saved", ["disk", "parquet"])
def test_a_file_that_stopped_in_the_middle_is_named_in_one_line(tmp_path: Path, saved: str) -> None:
    folder, table = tmp_path / "data", imagenet_table(9)
    table.save_to_disk(folder, num_shards=3) if saved == "disk" else parquet(table, folder, (3, 3, 3))
    second = sorted([*folder.glob("*.arrow"), *folder.glob("*.parquet")])[1]
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    named = second if saved == "parquet" else folder
    with pytest.raises(UserError, match=rf"{named} .*(copy it again|write it again)") as error:
        open_source("it", SourceConfig("hf_image_label", str(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [("MAX_ROW_BYTES", 2**20, "at most 1,048,576"), ("MEMORY", 2**22, "more than the machine's memory")],
)
def test_a_row_group_that_no_memory_holds_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, reason: str
) -> None:
    """By its metadata alone: compressed, the row takes a few hundred bytes of the file."""
    texts = ["a", " " * 4_194_304 + "x", "b"]
    write_table(Dataset.from_dict({"text": texts}).data.table, tmp_path / "train.parquet", row_group_size=1)
    assert (tmp_path / "train.parquet").stat().st_size < 10**6
    monkeypatch.setattr(f"vlmscope.data.tables.{limit}", value)
    with pytest.raises(UserError, match=f"train.parquet.*4,19.* bytes.*{reason}"):
        samples(SourceConfig("hf_text", str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("pipe", "not a file"), ("large.png", "2,000 bytes"), ("none.png", "No such file"), ("/dev/zero", "not a file")],
)
def test_pictures_that_are_no_files_or_too_large_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    """A table or a folder of unknown origin may name any path: a device or a pipe would never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.png").write_bytes(b"x" * 2000)
    monkeypatch.setattr("vlmscope.data.samples.MAX_FILE_BYTES", 1000)
    (tmp_path / "train.jsonl").write_text(json.dumps({"images": [name], "text": "x"}))
    folder = open_source("it", SourceConfig("folder", str(tmp_path)))
    row = {"image": {"bytes": None, "path": str(tmp_path / name)}, "label": "x"}
    for read in (next(folder.open(WHOLE)), partial(row_parser(SourceConfig("hf_image_label")), row, "row 1")):
        with pytest.raises(UserError, match=rf"(line|row) 1: .*{reason}"):
            read()


def test_a_hub_data_set_is_streamed_and_what_is_wrong_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        assert args[0] == "a/b" and kwargs.keys() == {"split", "revision", "streaming"}
        if kwargs["revision"] is not None:
            raise ConnectionError("Couldn't reach the Hub\nwith details")
        return text_table(3).to_iterable_dataset()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", load)
    assert [one.text for one in samples(SourceConfig("hf_text", hub="a/b"))] == [f"document {n}" for n in range(3)]
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("vlmscope")]
    assert "the revision of a/b is not pinned" in warning and "add data.sources.it.revision=" in warning
    with pytest.raises(UserError, match=r"cannot stream a/b from the hub \(ConnectionError: Couldn't.*hf download a/b"):
        open_source("it", SourceConfig("hf_text", hub="a/b", revision="0" * 40))
