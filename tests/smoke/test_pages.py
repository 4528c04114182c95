"""task=pages on the command line: from a study to pages, with a graph, without pictures, and what users get wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from tests.smoke.test_study import STUDY

import vlmscope
from vlmscope.app import main
from vlmscope.core.records import FeatureId
from vlmscope.features.labels import Label, set_path, write_labels
from vlmscope.features.study_files import StudyFolder

SCHEMA = Path(vlmscope.__file__).parent / "report" / "schema" / "feature.schema.json"


@pytest.fixture(scope="module")
def data(mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(mixed_data, tmp_path_factory.mktemp("data") / "data"))


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("study") / "run"
    assert main([*STUDY, f"data.path={data}", f"hydra.run.dir={run}"]) == 0
    return run


def pages(study: Path, run: Path, *more: str) -> tuple[Path, dict[str, float]]:
    """The folder of the pages and the metrics."""
    assert main(["task=pages", f"study.path={study}", f"hydra.run.dir={run}", "tracking=none", *more]) == 0
    return run / "pages", json.loads((run / "metrics.json").read_text())


def firing(study: Path, kind: int) -> FeatureId:
    """The feature of layer 1 that fires most at positions of a kind."""
    return FeatureId(1, int(StudyFolder(study).layer(1).fired[:, kind].argmax()))


def test_pages_of_named_features(study: Path, tmp_path: Path) -> None:
    picture, words = firing(study, 1), firing(study, 2)
    folder, metrics = pages(study, tmp_path, f"task.features=[{picture},{words}]")
    index = (folder / "index.html").read_text()
    assert index.index(f"<b>{picture}</b>") < index.index(f"<b>{words}</b>")
    record = StudyFolder(study).feature(picture)
    body = json.loads((folder / "features" / f"{picture.cantor}.json").read_text())
    jsonschema.validate(body, json.loads(SCHEMA.read_text()))
    assert body["act_max"] == pytest.approx(record.activation_max)
    found = body["examples_quantiles"][0]["examples"][0]
    assert max(found["tokens_acts_list"]) == pytest.approx(record.examples[0].activation)
    page = (folder / f"L1_{picture.index}.html").read_text()
    assert "data:image/" in page and f"L1_{words.index}.html" in page
    assert (metrics["pages/features"], metrics["pages/labelled"], metrics["pages/pictures_missing"]) == (2, 0, 0)


def test_pages_by_rule_with_labels(study: Path, tmp_path: Path) -> None:
    labelled, feature = tmp_path / "study", firing(study, 1)
    shutil.copytree(study, labelled)
    label = Label("red <b> things", "auto", score=0.9, beats_chance=True)
    write_labels(set_path(labelled / "study", "auto"), [(feature, label)])
    folder, metrics = pages(labelled, tmp_path / "a", "task.rule=score")
    assert "red &lt;b&gt; things" in (folder / f"L1_{feature.index}.html").read_text()
    assert metrics["pages/labelled"] == 1
    folder, _ = pages(study, tmp_path / "b", "task.rule=random", "task.top=5", "task.layers=[0,1]")
    names = sorted(path.name for path in folder.glob("L*.html"))
    assert len(names) == 5 and {name[:2] for name in names} == {"L0", "L1"}


def test_features_of_a_graph_link_to_it(study: Path, tmp_path: Path) -> None:
    trace = tmp_path / "my trace"
    question = ["prompt=what is this ?", "model=tiny", "task.figure=false", "tracking=none"]
    assert main(["task=trace", *question, f"hydra.run.dir='{trace}'"]) == 0
    folder, _ = pages(study, tmp_path / "run", f"task.from_graph='{trace}'", "task.top=30")
    texts = [path.read_text() for path in folder.glob("L*.html")]
    assert len(texts) == 30
    linked = [text for text in texts if "../../my%20trace/graph.json" in text]
    assert linked and all("what is this ?" in text for text in linked)


def test_pages_without_the_pictures_say_so(study: Path, data: Path, tmp_path: Path) -> None:
    feature, away = firing(study, 1), data.with_name("away")
    data.rename(away)
    try:
        folder, metrics = pages(study, tmp_path, f"task.features=[{feature}]")
    finally:
        away.rename(data)
    page = (folder / f"L1_{feature.index}.html").read_text()
    assert "Pictures are missing" in page and "picture not available" in page and "data:image" not in page
    assert metrics["pages/pictures_missing"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task.features=[L1/99999]"], "no feature L1/99999"),
        (["task.features=[L77/1]"], "has no layer 77"),
        (["task.features=[mars]"], "not a feature id"),
        (["task.rule=imge"], "did you mean 'image'"),
        (["task.rule=image", "task.features=[L1/1]"], "give one of them"),
        (["task.layers=[1]", "task.features=[L1/1]"], "goes with task.rule="),
        (["task.rule=score"], "no labels 'auto'"),
        (["task.labels=mine"], "labels/mine.parquet"),
        (["task.from_graph=/nowhere"], "is neither a run folder nor a file"),
        (["task.from_circuit=/nowhere"], "no circuit.yaml"),
        (["task.top=0"], "task.top=0"),
        (["study.path=/nowhere"], "no study.json"),
        (["study.path=null", "transcoder=random"], "no study: add study.path="),
    ],
)
def test_mistakes_are_one_line(
    study: Path, tmp_path: Path, arguments: list[str], words: str, refusal: Callable[..., str]
) -> None:
    assert words in refusal("task=pages", f"study.path={study}", f"hydra.run.dir={tmp_path}", *arguments)
