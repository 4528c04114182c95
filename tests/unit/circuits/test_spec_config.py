"""The circuit language: what a declaration may say, and one line for what it may not."""

from pathlib import Path

import pytest

from vlmscope.circuits.spec_config import (
    CircuitSpecConfig,
    ClusterConfig,
    ContrastConfig,
    InfluenceConfig,
    InputSetConfig,
    LabelConfig,
    PositionsConfig,
    SupernodeConfig,
)
from vlmscope.config.resolve import declared_circuit
from vlmscope.core.errors import UserError
from vlmscope.core.records import PatchBox, Positions

MARS, EARTH = InputSetConfig(concept="mars"), InputSetConfig(concept="earth")
IDS = ["L1/3"]


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (SupernodeConfig(), "nothing chooses its features"),
        (SupernodeConfig(ids=IDS, influence=InfluenceConfig()), "ids and influence are given; give exactly one"),
        (SupernodeConfig(ids=["L1-3"]), "not a feature id"),
        (SupernodeConfig(ids=IDS, count=0), "count=0"),
        (SupernodeConfig(influence=InfluenceConfig(), layers=[3, 1]), "first and the last layer"),
        (SupernodeConfig(influence=InfluenceConfig(share=1.5)), "share=1.5"),
        (SupernodeConfig(cluster=ClusterConfig("run", 1, "colour")), "kind=colour: no such choice"),
        (SupernodeConfig(label=LabelConfig("run", "  ")), "query is empty"),
        (SupernodeConfig(contrast=ContrastConfig(of=MARS)), "needs two sets"),
        (SupernodeConfig(contrast=ContrastConfig(of=MARS, against=MARS)), "the same inputs"),
        (SupernodeConfig(contrast=ContrastConfig(of=MARS, pairs="original")), "brings both sets"),
        (SupernodeConfig(contrast=ContrastConfig(pairs="first")), "pairs=first: no such choice"),
        (SupernodeConfig(contrast=ContrastConfig(InputSetConfig(), EARTH)), "names no inputs"),
        (SupernodeConfig(contrast=ContrastConfig(InputSetConfig("mars", ["a"]), EARTH)), "not both"),
        (SupernodeConfig(contrast=ContrastConfig(InputSetConfig("mars", pictures=0), EARTH)), "pictures=0"),
        (SupernodeConfig(IDS, positions=PositionsConfig()), "positions is empty"),
        (SupernodeConfig(IDS, positions=PositionsConfig(["picture"])), "roles=picture: no such choice"),
        (SupernodeConfig(IDS, positions=PositionsConfig(box=[0, 0, 1.2, 1])), "fractions 0 to 1"),
        (SupernodeConfig(IDS, positions=PositionsConfig(box=[0.5, 0, 0.5, 1])), "fractions 0 to 1"),
        (SupernodeConfig(IDS, positions=PositionsConfig(["image"], [0, 0, 0.5, 1])), "takes every soft token"),
        (SupernodeConfig(IDS, name="errors"), "cannot be a supernode's name"),
        (SupernodeConfig(IDS, name="a/b"), "cannot be a supernode's name"),
        (SupernodeConfig(IDS, name="answer: x"), "cannot be a supernode's name"),
    ],
)
def test_what_makes_no_sense_is_refused(node: SupernodeConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        CircuitSpecConfig(supernodes={"mars": node})


def test_names_are_used_once() -> None:
    for said, nodes in (
        ("two supernodes are called 'b'", {"a": SupernodeConfig(IDS, name="b"), "b": SupernodeConfig(IDS)}),
        ("cannot be", {"question": SupernodeConfig(IDS)}),
    ):
        with pytest.raises(UserError, match=said):
            CircuitSpecConfig(supernodes=nodes)
    with pytest.raises(UserError, match="it names a folder"):
        CircuitSpecConfig(name="../up")


def test_positions_are_records() -> None:
    node = SupernodeConfig(IDS, positions=PositionsConfig(["last"], [0, 0, 0.5, 1]))
    assert node.where == Positions(("last",), PatchBox(0, 0, 0.5, 1))
    assert SupernodeConfig(IDS).where is None
    assert SupernodeConfig(layers=[1, 2]).layer_range([0, 1, 2, 3]) == [1, 2]


def written(folder: Path, text: str) -> CircuitSpecConfig:
    (folder / "mine.yaml").write_text(text)
    return declared_circuit(CircuitSpecConfig(path=str(folder / "mine.yaml")))


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        "name: mine\nsupernodes:\n  mars: {contrast: {of: {concept: mars}, against: {concept: earth}}, count: 3}\n"
        "  dust: {ids: [L1/3], positions: {box: [0, 0, 0.5, 0.5]}}\n",
    )
    assert found.name == "mine" and list(found.supernodes) == ["mars", "dust"]
    assert found.supernodes["mars"].contrast == ContrastConfig(MARS, EARTH)
    assert found.supernodes["dust"].where == Positions((), PatchBox(0, 0, 0.5, 0.5))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "no declaration"),
        ("supernodes: {a: {idz: [L1/3]}}\n", "no key .*idz.*did you mean"),
        ("supernodes: {a: {count: many}}\n", "many"),
        ("supernodes: {a: {}}\n", "mine.yaml: supernodes.a: nothing chooses"),
        ("supernodes: {a: {label: {query: x}}}\n", "study"),
        ("supernodes: [\n", "not valid YAML"),
    ],
)
def test_mistakes_in_a_file_name_it(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        written(tmp_path, text)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_file_and_supernodes_are_two_declarations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give one of them"):
        declared_circuit(CircuitSpecConfig(path=str(tmp_path / "x.yaml"), supernodes={"a": SupernodeConfig(IDS)}))
