"""A small folder of one's own data, for commands that train on it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmscope.models.tiny import tiny_image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for number in range(8):
        tiny_image(number).resize((12 + 4 * number, 20)).save(folder / f"{number}.png")
        turns = [{"user": "what is this ?", "assistant": "red"}, {"user": "the other one ?", "assistant": "two"}]
        lines.append({"images": [f"{number}.png"], "texts": turns[: 1 + number % 2]})
    lines.append({"text": "the red planet and the other one"})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with questions and texts without; to be read alone: tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("mixed_data")
    lines = []
    for n in range(12):
        tiny_image(n).save(folder / f"{n}.png")
        texts = [{"user": "what is this ?", "assistant": "red" if n % 2 else "the other one"}]
        lines.append({"images": [f"{n}.png"], "texts": texts} if n % 3 else {"text": "the red planet and the other"})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; the one line that says why."""
    from vlmscope.app import main

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments, "tracking=none"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return refused
