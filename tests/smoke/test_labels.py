"""task=label and task=find on the command line, labels in a graph, and what users get wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlmscope.app import main
from vlmscope.features.item_facts import item_facts, study_facts, words_of
from vlmscope.features.labels import Labels
from vlmscope.features.study_files import StudyFolder
from vlmscope.models.tiny import tiny_image

TINY = ["model=tiny", "tracking=none"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of a tiny model on rows with facts: every other picture is of a red planet."""
    root = tmp_path_factory.mktemp("labels")
    lines = []
    for n in range(60):
        colour = "red" if n % 2 else "blue"
        tiny_image(n % 7).save(root / f"{n}.png")
        texts = [{"user": f"what is this {'planet' if n % 4 < 2 else 'other one'} ?", "assistant": colour}]
        lines.append({"images": [f"{n}.png"], "texts": texts, "facts": {"colour": colour, "number": n % 3}})
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = root / "run"
    sizes = ["study.top=6", "study.samples=12", "data=folder", f"data.path={root}", "task.labels=true", "task.keep=4"]
    assert main(["task=study", *TINY, *sizes, f"hydra.run.dir={run}"]) == 0
    whole = (run / "study/labels/auto.parquet").read_bytes()
    assert Labels(StudyFolder(run / "small")).all().keys() == Labels(StudyFolder(run)).all().keys()
    assert (
        main(
            [
                "task=label",
                "task.shuffled=0",
                "task.kind=scene",
                *TINY,
                f"study.path={run}",
                f"hydra.run.dir={root / 'same'}",
            ]
        )
        == 0
    )
    assert (run / "study/labels/auto.parquet").read_bytes() == whole  # what task=study writes
    assert main(["task=label", "task.kind=colour", *TINY, f"study.path={run}", f"hydra.run.dir={root / 'label'}"]) == 0
    return run


def features_found(folder: Path, *arguments: str) -> list[dict]:
    assert main(["task=find", *arguments, *TINY, f"hydra.run.dir={folder}"]) == 0
    return json.loads((folder / "find.json").read_text())["features"]


def test_labels_come_with_scores_and_facts(study: Path) -> None:
    metrics = json.loads((study.parent / "label/metrics.json").read_text())
    assert metrics["label/features"] == sum(StudyFolder(study).info.n_features.values())
    assert metrics["label/labelled"] > 0
    assert 0 <= metrics["label_shuffled/beats_chance"] <= metrics["label_shuffled/features"]
    assert metrics["label_shuffled/beats_chance_frac"] <= 0.1
    # The colour alone is a rule that every label is held against, of these random features near chance.
    assert 0.3 < metrics["label/auroc_kind_alone"] <= 1 and metrics["label/kind_only"] <= metrics["label/items"]
    labels = Labels(StudyFolder(study)).all()
    assert any("red" in words_of(label.text) for label in labels.values())
    assert all(label.score is not None and label.low is not None for label in labels.values())
    before = (study / "study/labels/auto.parquet").read_bytes()
    again = ["task.kind=colour", f"study.path={study}", f"hydra.run.dir={study.parent / 'again'}"]
    assert main(["task=label", *TINY, *again]) == 0
    assert (study / "study/labels/auto.parquet").read_bytes() == before


def test_features_are_found_by_words_and_by_a_picture(study: Path, tmp_path: Path) -> None:
    (cached,) = (study / "study/index").glob("item_facts_*.safetensors")
    own = StudyFolder(study)
    fresh, kept = item_facts(own.items), study_facts(own)
    assert fresh.names == kept.names and np.array_equal(fresh.matrix, kept.matrix)
    assert np.array_equal(fresh.ids, kept.ids) and np.array_equal(fresh.half, kept.half)
    cached.write_bytes(b"damaged")  # is made anew
    assert np.array_equal(study_facts(own).matrix, fresh.matrix) and cached.stat().st_size > 100
    words = features_found(tmp_path / "words", "query=red, planets", "task.count=3", f"study.path={study}")
    assert words and {"layer", "index", "label", "score", "why"} <= set(words[0])
    assert any("red" in one["why"] or "planet" in one["why"] for one in words)
    assert (tmp_path / "words/figures/find.png").stat().st_size > 10_000
    own = [f"image={study.parent / '1.png'}", "prompt=what is this planet ?", "task.count=20", "task.figure=false"]
    ranked = features_found(tmp_path / "picture", *own, f"study.path={study}")
    relevance = [one["relevance"] for one in ranked]
    assert relevance == sorted(relevance, reverse=True) and all(one["activation"] > 0 for one in ranked)


def test_hand_labels_are_found_and_reach_the_graph(study: Path, tmp_path: Path) -> None:
    def nodes(folder: str, *arguments: str) -> dict[str, str]:
        assert main([*arguments, *TINY, "task.figure=false", f"hydra.run.dir={tmp_path / folder}"]) == 0
        graph = json.loads((tmp_path / folder / "graph.json").read_text())
        return {node["node_id"]: node["clerp"] for node in graph["nodes"] if node["feature_type"].startswith("cross")}

    trace = ["task=trace", "prompt=what is this ?", f"image={study.parent / '1.png'}"]
    node, label = next(iter(nodes("plain", *trace).items()))
    assert label == ""
    feature = "L{}/{}".format(*node.split("_"))
    hand = study / "study/labels/hand.yaml"
    hand.write_text(f"{feature}: a zebra\n")
    try:
        labels = f"attribution.labels={study}"
        assert nodes("trace", *trace, labels, "task.page=true")[node] == "a zebra"
        page = (tmp_path / "trace/graph.html").read_text()
        assert "a zebra" in page and '"features":{"L' in page  # labels of nodes, and examples of features
        assert set(nodes("bare", *trace, "attribution.labels=none").values()) == {""}
        runs = [f"task.{side}={tmp_path / 'trace'}" for side in ("first", "second")]
        compared = ["task=compare", *runs, "task.figure=false", f"hydra.run.dir={tmp_path / 'compared'}", *TINY]
        assert main(compared) == 0  # with the labels that the traces gave
        header, *rows = (tmp_path / "compared/nodes.csv").read_text().splitlines()
        assert header.endswith(",label")
        assert [row for row in rows if row.endswith(",a zebra")] == [r for r in rows if r.startswith(f"{feature},")]
        assert main([*compared, "attribution.labels=none"]) == 0
        assert "zebra" not in (tmp_path / "compared/nodes.csv").read_text()
        (found,) = features_found(tmp_path / "words", "query=zebras", f"study.path={study}")
        assert f"L{found['layer']}/{found['index']}" == feature and found["source"] == "hand"
    finally:
        hand.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=label"], "no study: add study.path="),
        (["task=label", "study.path=nowhere"], "no study.json in nowhere"),
        (["task=find", "query=red", "study.path=nowhere"], "no study.json in nowhere"),
        (["task=structure", "study.path=nowhere"], "no study.json in nowhere"),
        (["task=label", "study.path=STUDY", "task.shuffled=-1"], "task.shuffled=-1: it must be at least 0"),
        (["task=find", "study.path=STUDY"], "give one of the two"),
        (["task=find", "study.path=STUDY", "query=xylophone"], "no feature of"),
        (["task=find", "study.path=STUDY", "query=?"], "has no word"),
        (["task=find", "study.path=STUDY", "image=PICTURE", "model=tiny", "model.family=llava"], "not of"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    study: Path, tmp_path: Path, refusal: Callable[..., str], arguments: list[str], message: str
) -> None:
    own = [one.replace("STUDY", str(study)).replace("PICTURE", str(study.parent / "1.png")) for one in arguments]
    assert message in refusal(TINY[0], *own, f"hydra.run.dir={tmp_path / 'run'}")
