"""What is read back is what was written, and a failed write leaves the old file."""

import json
from pathlib import Path

import numpy as np
import pytest

from vlmscope.core import artifacts
from vlmscope.core.errors import UserError


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


def test_the_temporary_file_is_beside_the_target_and_keeps_its_suffix(tmp_path: Path) -> None:
    with artifacts.atomic_path(tmp_path / "x.safetensors") as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".safetensors")
        temporary.write_bytes(b"1")
    assert (tmp_path / "x.safetensors").read_bytes() == b"1"


def test_json_and_yaml_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"text": "Überschrift: {x}, ${y}\n"}}
    artifacts.write_json(tmp_path / "x.json", value)
    artifacts.write_yaml(tmp_path / "x.yaml", value)
    assert artifacts.read_json(tmp_path / "x.json") == value
    assert artifacts.read_yaml(tmp_path / "x.yaml") == value
    assert list(artifacts.read_yaml(tmp_path / "x.yaml")) == ["b", "a"]
    artifacts.write_json(tmp_path / "n.json", {"x": np.float32(0.5), "y": np.arange(2), "p": Path("q")})
    assert json.loads((tmp_path / "n.json").read_text()) == {"x": 0.5, "y": [0, 1], "p": "q"}


@pytest.mark.parametrize(
    ("name", "content", "reader"),
    [
        ("x.json", b'{"a": ', artifacts.read_json),
        ("x.json", b"\xff\xfe", artifacts.read_json),
        ("x.yaml", b"a: [1", artifacts.read_yaml),
        ("x.yaml", b"!!python/object/apply:os.getcwd []", artifacts.read_yaml),
        ("x.safetensors", b"\x08\x00\x00\x00", artifacts.load_tensors),
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


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        artifacts.write_json(tmp_path / "file" / "x.json", {})


def test_an_error_of_reading_another_file_inside_stays_what_it_is(tmp_path: Path) -> None:
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
