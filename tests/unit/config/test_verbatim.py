"""Prompts, paths and words reach the configuration as they were typed; what is Hydra's stays Hydra's."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from vlmscope.config.resolve import quote_arguments
from vlmscope.tasks.settings import TASKS

AWKWARD = ["a=b", "#1", "a (1), new", "é/火", "a,b", "~/x", "it's", "a & b; c", "1e3", "007", "{a}", "a${b"]


def read(*arguments: str) -> Any:
    """What Hydra and OmegaConf make of the last of these arguments; several values where it sweeps."""
    text = quote_arguments(arguments, TASKS)[-1]
    parse = OverridesParser.create().parse_overrides
    override = parse([text])[0]
    jobs = [f"k={value}" for value in override.sweep_string_iterator()] if override.is_sweep_override() else [text]
    values = [job.value() for job in parse(jobs)]
    return OmegaConf.to_object(OmegaConf.create(values))


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize(
    "key",
    ["hydra.run.dir", "model.path", "transcoder.path", "study.path", "task.rows", "data.path", "tracking.uri", "image"]
    + ["task.donor_image", "data.sources.own.path", "+data.sources.own.path", "query"],
)
def test_paths_and_words_are_taken_as_they_are_written(key: str, text: str) -> None:
    assert read(f"{key}={text}") == [text]


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["image=[a b.png,c=d.png]"], [["a b.png", "c=d.png"]]),
        (["attribution.tokens=[(,=]"], [["(", "="]]),
        (["attribution.tokens=[1,007,true,null]"], [["1", "007", "true", "null"]]),
        (['attribution.tokens=[", (",.]'], [[", (", "."]]),  # a comma inside an item is quoted
        (["attribution.tokens=[[,]]"], [["[", "]"]]),
        (["attribution.tokens=[]"], [[]]),
        (["images.mars=[a (1).png]"], [["a (1).png"]]),
        (["hydra.searchpath=[file:///tmp/a=é]"], [["file:///tmp/a=é"]]),
        (["study.path=null"], [None]),
        (["study.path="], [""]),
        (['study.path="a, b"'], ["a, b"]),  # quoted for Hydra already
        (["study.path='a, b'"], ["a, b"]),
        ([r"study.path=a\,b\=c"], ["a,b=c"]),
        (["-m", "seed=0,1,2"], [0, 1, 2]),
        (["-m", "transcoder.activation=topk,jumprelu"], ["topk", "jumprelu"]),
        (["-m", "transcoder.activation=choice(topk,relu)"], ["topk", "relu"]),
        (["experiment=sparsity_frontier", "transcoder.activation=topk,relu"], ["topk", "relu"]),
        (["experiment=mine", "transcoder.activation=topk,relu"], ["topk", "relu"]),  # not in conf/: Hydra decides
        (["-m", "study.path=a=1,null,é"], ["a=1", None, "é"]),
        (["-m", 'study.path="a,b",c'], ["a,b", "c"]),
        (["-m", "image=[a=1,b],[c]"], [["a=1", "b"], ["c"]]),
        (["-m", "hydra.sweep.dir=a,b"], ["a,b"]),  # Hydra's own keys cannot be swept
    ],
)
def test_lists_quotes_interpolations_and_sweeps(arguments: list[str], values: list[object]) -> None:
    assert read(*arguments) == values


def test_an_interpolation_in_a_path_is_filled_in(monkeypatch) -> None:
    monkeypatch.setenv("WHERE", "é")
    assert read("hydra.run.dir=out=1/${oc.env:WHERE}/x") == ["out=1/é/x"]


def test_an_existing_file_is_meant_whatever_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.png", "${x}.png", '"q".png', "[1].png"):
        (tmp_path / name).write_bytes(b"")
        assert read("-m", f"image={name}") == [name]
        assert read(f"images.mars={name}") == [[name]]


def test_what_is_not_rewritten_and_what_is_a_new_name() -> None:
    same = ["-m", "seed=1,2", "--cfg", "job", "model=tiny", "task.batch={text:1}", "model.path=a/b.c", "~pairs"]
    assert quote_arguments(same, TASKS) == same
    assert quote_arguments(["+prompt=a, b", "+images.x=[a.png]", "images.y=a, b.png"], TASKS) == [
        'prompt="a, b"',
        "++images.x=[a.png]",
        '++images.y=["a, b.png"]',
    ]
    assert quote_arguments(["task.features={L1/7: 8.0}", "task.factors={L1/7: 2}", "task.features=[L1/7]"], TASKS) == [
        "++task.features={L1/7: 8.0}",
        "++task.factors={L1/7: 2}",
        "task.features=[L1/7]",
    ]
