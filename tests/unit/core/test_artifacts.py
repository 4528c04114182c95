"""What is read back is what was written, and a failed write leaves the old file."""

import json
import os
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from vlmscope import attention as map_io
from vlmscope.attribution.export import load_graph
from vlmscope.circuits.circuit import load_circuit
from vlmscope.core import artifacts
from vlmscope.core.errors import NoRoom, UserError
from vlmscope.features.labels import read_hand
from vlmscope.models.loading import load_vlm
from vlmscope.transcoders.formats import load_set
from vlmscope.transcoders.hub import parts_of


def test_tensors_keep_every_bit_shape_dtype_and_metadata(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "transposed": rng.normal(size=(3, 5)).T,
        "strided": np.arange(12, dtype=np.int16)[::3],
        "scalar": np.array(3.5, dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=bool),
        "half": rng.normal(size=7).astype(np.float16),
        "special": np.array([np.nan, np.inf, -0.0]),
    }
    path = tmp_path / "new" / "folder" / "x.safetensors"
    artifacts.save_tensors(path, arrays, {"prompt": "a, b"})
    loaded, metadata = artifacts.load_tensors(path)
    assert metadata == {"prompt": "a, b"}
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    artifacts.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError, match="half way"), artifacts.atomic_path(path) as temporary:
        temporary.write_text("{")
        raise RuntimeError("half way")
    with pytest.raises(ValueError, match="JSON"):
        artifacts.write_json(path, {"a": float("nan")})
    assert artifacts.read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("reader", [artifacts.read_text, artifacts.read_json, artifacts.read_yaml])
def test_a_byte_order_mark_is_no_part_of_a_text(reader, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf[1]")
    assert reader(tmp_path / "a") in ("[1]", [1])


def test_leftovers_of_dead_processes_and_of_an_earlier_one_of_this_number_go(tmp_path: Path) -> None:
    dead, own, alive = 99_999_999, os.getpid(), os.getppid()
    kept = {f".x.{alive}.0123abcd.tmp.json", ".x.tmp.json", "x.json", f".x.{dead}.tmp.json", f"x.{dead}.0123abcd.tmp"}
    gone = {f".x.{dead}.0123abcd.tmp.json", f".a.b.{own}.0123abcd.tmp", f"below/.x.{dead}.0123abcd.tmp.safetensors"}
    for name in kept | gone:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    folder = tmp_path / f".row.{dead}.89abcdef.tmp"
    folder.mkdir()
    (folder / f".x.{dead}.0123abcd.tmp.png").write_bytes(b"half")
    artifacts.remove_leftovers(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert not folder.exists()
    with artifacts.atomic_path(tmp_path / "y.json") as temporary:  # the names are those that are made
        temporary.write_text("{")
        artifacts.remove_leftovers(tmp_path)
        assert not temporary.exists()
        temporary.write_text("{}")


# A few hundred bytes that unfold to 10^30 values: the list of the line before ten times, thirty times over.
BOMB = b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 31))


@pytest.mark.parametrize(
    ("name", "content", "reader"),
    [
        ("x.json", b'{"a": ', artifacts.read_json),
        ("x.json", b"\xff\xfe", artifacts.read_json),
        ("x.yaml", b"a: [1", artifacts.read_yaml),
        ("x.yaml", b"!!python/object/apply:os.getcwd []", artifacts.read_yaml),
        ("x.yaml", b"day: 2024-13-45", artifacts.read_yaml),
        ("x.yaml", b"a: !!bool maybe", artifacts.read_yaml),
        ("x.yaml", b"a: " + b"9" * 5000, artifacts.read_yaml),
        ("x.yaml", b"&a [*a]", artifacts.read_yaml),
        ("x.yaml", b"a0: &a0 [x]\n" + BOMB, artifacts.read_yaml),
        ("x.json", b"[" * 5000, artifacts.read_json),
        ("x.json", None, artifacts.read_json),
        ("x.safetensors", None, artifacts.load_tensors),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_file(tmp_path, name, content, reader) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as raised:
        reader(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_only_errors_of_writing_become_the_users(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        artifacts.write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(FileNotFoundError), artifacts.atomic_path(tmp_path / "x.json"):
        (tmp_path / "other").read_text()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with artifacts.atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a.txt").read_text() == "a"
    with pytest.raises(UserError, match="out is there already"), artifacts.atomic_folder(tmp_path / "deep" / "out"):
        raise AssertionError("must not be entered")
    with pytest.raises(RuntimeError), artifacts.atomic_folder(tmp_path / "broken") as folder:
        (folder / "a.txt").write_text("a")
        raise RuntimeError
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"), artifacts.atomic_folder(tmp_path / "file" / "out"):
        raise AssertionError("must not be entered")
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "file"}
    (tmp_path / "empty").mkdir()
    with artifacts.atomic_folder(tmp_path / "empty") as folder:
        (folder / "a.txt").write_text("a")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["a.txt"]


def safetensors(header: object, body: int = 8, length: int | None = None) -> bytes:
    """The bytes of a file with this header, true or not: `body` zeros after it, `length` as the header's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(body)


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "empty": b"",
    "a page": b"<html>Access to this file is restricted</html>",
    "a length past the end": safetensors({"a": tensor()}, length=2**63),
    "no JSON": safetensors(b"{a:"),
    "a hundred thousand brackets": safetensors(b"[" * 100_000),
    "cut off": safetensors({"a": tensor()}, body=7),
    "more behind it": safetensors({"a": tensor()}, body=9),
    "offsets that overlap": safetensors({"a": tensor(), "b": tensor(offsets=(4, 12))}, body=12),
    "a shape of 2^80": safetensors({"a": tensor(shape=(2**40, 2**40))}),
    "a dtype that there is not": safetensors({"a": tensor("X" * 5000)}),
    "metadata of numbers": safetensors({"__metadata__": {"format": 1}, "a": tensor()}),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
}
# Whole files, with nothing in them that the reader looks for, or with what numpy does not know.
WRONG = {
    "no tensors": safetensors({}, 0),
    "others": safetensors({"a": tensor()}),
    "bfloat16": safetensors({"a": tensor("BF16", (4,))}),
    "float8": safetensors({"a": tensor("F8_E4M3", (8,))}),
    "brackets": safetensors({"__metadata__": {"format": "vlmscope.graph", "meta": "[" * 9999}, "a": tensor()}),
}


def model(path: Path) -> object:
    (path.parent / "config.json").write_text('{"model_type": "gemma3"}')
    return load_vlm(path.parent)


def transcoders(path: Path) -> object:
    (path.parent / "config.yaml").write_text("activation: topk\ntop_k: 1\nk: 1\n")
    return load_set(path.parent)


DOORS: dict[str, Callable[[Path], object]] = {
    "x.safetensors": artifacts.load_tensors,
    "graph.safetensors": load_graph,
    "maps.safetensors": map_io.load_maps,
    "model.safetensors": model,
    "layer_0.safetensors": transcoders,
}


@pytest.mark.parametrize("name", DOORS)
def test_a_broken_safetensors_file_is_one_line_at_every_door(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for why, content in (BROKEN | WRONG).items():
        if name == "x.safetensors" and why in ("no tensors", "others", "brackets"):
            continue  # whole, and nobody asks what is in it
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            DOORS[name](path)
        message = str(caught.value)
        assert tmp_path.name in message and "\n" not in message and len(message) < 700, (why, message)


YAML_DOORS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config.yaml": ("top_k: {}", load_set),
    "README.md": ("---\nlicense: {}\n---\n", lambda f: parts_of((f / "README.md").read_text())),
    "circuit.yaml": ("version: {}", load_circuit),
    "labels.yaml": ("L0/0: {}", lambda f: read_hand(f / "labels.yaml", cast(Any, None))),
}


@pytest.mark.parametrize("name", YAML_DOORS)
def test_no_yaml_makes_an_object_of_python(name: str, tmp_path: Path) -> None:
    text, read = YAML_DOORS[name]
    for tag in ("object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir"):
        (tmp_path / name).write_text(text.format(f"!!python/{tag} ['{tmp_path / 'made'}']"))
        with pytest.raises(UserError, match=f"(?i){Path(name).stem}") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


def picture(path: Path) -> None:
    with artifacts.atomic_path(path) as temporary:
        Image.effect_noise((400, 400), 90).save(temporary, "PNG")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: artifacts.write_text(path, "x" * 300_000),
        lambda path: artifacts.save_tensors(path, {"a": np.zeros(50_000)}),
        picture,
    ],
)
def test_a_full_disk_is_one_line(write: Callable[[Path], None], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # each file may grow to 100 KB
    try:
        with pytest.raises(NoRoom, match="cannot write .*/a.file: File too large; make room"):
            write(tmp_path / "a.file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []
