"""The circuit language: what a declaration may say, and one line for what it may not."""

from pathlib import Path

import pytest

from vlmscope.circuits.config import CircuitSpecConfig, ContrastConfig, InputSetConfig, SupernodeConfig
from vlmscope.config.resolve import declared_circuit
from vlmscope.core.errors import UserError
from vlmscope.core.records import PatchBox, Positions

MARS, EARTH = "{concept: mars}", "{concept: earth}"


def written(folder: Path, text: str) -> CircuitSpecConfig:
    (folder / "mine.yaml").write_text(text)
    return declared_circuit(CircuitSpecConfig(path=str(folder / "mine.yaml")))


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    spec = written(
        tmp_path,
        f"name: mine\nsupernodes:\n  mars: {{contrast: {{of: {MARS}, against: {EARTH}}}, layers: [1, 2]}}\n"
        "  dust: {ids: [L1/3], positions: {roles: [last], box: [0, 0, 0.5, 0.5]}}\n",
    )
    assert spec.name == "mine" and list(spec.supernodes) == ["mars", "dust"]
    mars, dust = spec.supernodes.values()
    assert mars.contrast == ContrastConfig(InputSetConfig("mars"), InputSetConfig("earth"))
    assert mars.layer_range([0, 1, 2, 3]) == [1, 2] and mars.where is None
    assert dust.where == Positions(("last",), PatchBox(0, 0, 0.5, 0.5))


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("{}", "mine.yaml: supernodes.a: nothing chooses its features"),
        ("{ids: [L1/3], influence: {}}", "ids and influence are given; give exactly one"),
        ("{idz: [L1/3]}", "no key .*idz.*did you mean"),
        ("{count: many}", "many"),
        ("{label: {query: x}}", "study"),
        ("{ids: [L1-3]}", "not a feature id"),
        ("{ids: [L1/3], count: 0}", "count=0"),
        ("{influence: {}, layers: [3, 1]}", "first and the last layer"),
        ("{influence: {share: 1.5}}", "share=1.5"),
        ("{label: {study: run, query: '  '}}", "query is empty"),
        (f"{{contrast: {{of: {MARS}}}}}", "needs two sets"),
        (f"{{contrast: {{of: {MARS}, against: {MARS}}}}}", "the same inputs"),
        (f"{{contrast: {{of: {MARS}, pairs: original}}}}", "brings both sets"),
        ("{contrast: {pairs: first}}", "pairs=first: no such choice"),
        (f"{{contrast: {{of: {{}}, against: {EARTH}}}}}", "names no inputs"),
        (f"{{contrast: {{of: {{concept: mars, images: [a]}}, against: {EARTH}}}}}", "not both"),
        (f"{{contrast: {{of: {{concept: mars, pictures: 0}}, against: {EARTH}}}}}", "pictures=0"),
        ("{ids: [L1/3], positions: {}}", "positions is empty"),
        ("{ids: [L1/3], positions: {roles: [picture]}}", "roles=picture: no such choice"),
        ("{ids: [L1/3], positions: {box: [0, 0, 1.2, 1]}}", "fractions 0 to 1"),
        ("{ids: [L1/3], positions: {box: [0.5, 0, 0.5, 1]}}", "fractions 0 to 1"),
        ("{ids: [L1/3], positions: {roles: [image], box: [0, 0, 0.5, 1]}}", "takes every soft token"),
        ("{ids: [L1/3], name: errors}", "cannot be a supernode's name"),
        ("{ids: [L1/3], name: a/b}", "cannot be a supernode's name"),
        ("{ids: [L1/3], name: 'answer: x'}", "cannot be a supernode's name"),
        ("{ids: [L1/3]}\n  b: {ids: [L1/3], name: a}", "supernodes: two are called 'a'"),
        ("[", "not valid YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_the_file(tmp_path: Path, node: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        written(tmp_path, f"supernodes:\n  a: {node}\n")
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_other_mistakes() -> None:
    with pytest.raises(UserError, match="it names a folder"):
        CircuitSpecConfig(name="../up")
    with pytest.raises(UserError, match="give one of them"):
        declared_circuit(CircuitSpecConfig(path="x.yaml", supernodes={"a": SupernodeConfig(["L1/3"])}))
