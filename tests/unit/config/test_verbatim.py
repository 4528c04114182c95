"""A prompt reaches the configuration exactly as it was typed."""

import random

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from vlmscope.config.verbatim import quote, quote_arguments

NASTY = [
    "",
    "what planet is this ?",
    "red, green, blue",
    "a (b) [c] {d: e} <start_of_image>",
    "he said \"yes\" and 'no'",
    "a=b=c",
    "${oc.env:HOME} and $x and ${",
    r"\${escaped} \\${twice}",
    "ends with \\",
    'ends with "',
    r"\"",
    "two\nlines\\\n",
    "null",
    "1e3",
    "True",
    "range(1,3)",
    "choice(a,b)",
    "# no comment",
    "  spaces  ",
    "tab\tand é and 火星",
    "-m --help",
]


def round_trip(text: str) -> str:
    override = OverridesParser.create().parse_overrides([f"prompt={quote(text)}"])[0]
    assert not override.is_sweep_override()
    config = OmegaConf.create({"prompt": None})
    OmegaConf.update(config, "prompt", override.value())
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return resolved["prompt"]


@pytest.mark.parametrize("text", NASTY)
def test_nasty_prompts(text: str) -> None:
    assert round_trip(text) == text


def test_random_prompts() -> None:
    rng = random.Random(0)
    pieces = [
        "\\",
        '"',
        "'",
        "${",
        "$",
        "{",
        "}",
        "a",
        " ",
        ",",
        "(",
        ")",
        "=",
        "\n",
        "<x>",
        "[",
        "]",
        ":",
        "#",
        "null",
    ]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        assert round_trip(text) == text


def test_which_arguments_are_rewritten(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my picture (1), new.png").write_bytes(b"")
    assert quote_arguments(["+prompt=a, b", "prompt_file=a b.txt", "-m", "seed=1,2", "--cfg", "job"]) == [
        'prompt="a, b"',
        'prompt_file="a b.txt"',
        "-m",
        "seed=1,2",
        "--cfg",
        "job",
    ]
    assert quote_arguments(["image=my picture (1), new.png", "image=[a.png,b.png]", "image=a.png,b.png"]) == [
        'image="my picture (1), new.png"',
        "image=[a.png,b.png]",
        "image=a.png,b.png",
    ]
    assert quote_arguments(["images.mars=a, b.png", "+images.x=[a.png]"]) == [
        '++images.mars=["a, b.png"]',
        "++images.x=[a.png]",
    ]
    assert quote_arguments(["task.donor_image=my picture (1), new.png", "task.donor_prompt=a, b {c}"]) == [
        'task.donor_image="my picture (1), new.png"',
        'task.donor_prompt="a, b {c}"',
    ]
    assert quote_arguments(["task.features={L1/7: 8.0}", "task.features=[L1/7]"]) == [
        "++task.features={L1/7: 8.0}",
        "task.features=[L1/7]",
    ]
