"""The workbench's studies: filters against the study's own numbers, neighbours against their definition."""

import json
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from tests.unit.viewer.test_server import HOST, run_folder

from vlmscope.core.records import FeatureId
from vlmscope.core.study import TOP
from vlmscope.data.config import SourceConfig
from vlmscope.features.config import StudyConfig
from vlmscope.features.labels import Label, set_path, write_labels
from vlmscope.features.study import study_alone
from vlmscope.features.study_files import StudyFolder
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set
from vlmscope.viewer.server import create_app
from vlmscope.viewer.studies import OpenStudy

WIDTH, LAYERS, ROWS = 20, 4, 24
LABEL = Label("the <b>red</b> one", "auto", "items", 0.9, 0.8, 0.95, beats_chance=True)
CHANCE = Label("no better than chance", "auto", "items", 0.5, 0.4, 0.6)


def study_run(root: Path, data: Path) -> Path:
    """The run folder `study/mine` of a study, of which L1/3 has a label; `data` gets its pictures."""
    lines = []
    for n in range(ROWS):
        tiny_image(n % 7).save(data / f"{n}.png")
        picture = {"images": [f"{n}.png"], "texts": [{"user": "what is this ?", "assistant": "red"}]}
        lines.append(picture if n % 3 else {"text": "the red planet " * (n + 1)})
    (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = run_folder(root, "study/mine", "study", {})
    vlm = tiny_gemma3(2)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, WIDTH, 4, seed=1, activation="topk")
    config = StudyConfig(top=3, samples=ROWS, quantiles=2, window=2, logits=2, batch_size=4, checkpoint_every=2)
    sources = {"mine": SourceConfig("folder", str(data))}
    study = study_alone(run / "study", Scope(vlm, transcoders.requires_grad_(False)), sources, config)
    write_labels(set_path(study.path, "auto"), [(FeatureId(1, 3), LABEL), (FeatureId(1, 4), CHANCE)])
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    study_run(root, tmp_path_factory.mktemp("data"))
    return root


@pytest.fixture(scope="module")
def client(root: Path) -> TestClient:
    return TestClient(create_app(root), base_url=f"http://{HOST}")


@pytest.fixture(scope="module")
def study(root: Path) -> StudyFolder:
    return StudyFolder(root / "study/mine")


def names(client: TestClient, query: str) -> list[str]:
    return [row["feature"] for row in client.get(f"/api/studies/study/mine/features?limit=500&{query}").json()["rows"]]


def test_a_study_is_listed(client: TestClient) -> None:
    (body,) = (row for row in client.get("/api/studies").json()["studies"] if row["id"] == "study/mine")
    assert (body["items"], body["labels"]) == (ROWS, ["auto"])
    assert body["layers"] == [{"layer": layer, "name": f"L{layer}", "features": WIDTH} for layer in range(LAYERS)]


def test_filters_keep_what_the_study_counts(client: TestClient, study: StudyFolder) -> None:
    records = [record for layer in study.layers for record in study.features(layer)]
    pictures = [r.feature for r in records if r.fired["image"] > sum(r.fired.values()) / 2]
    assert pictures and names(client, "modality=image&sort=feature") == [str(feature) for feature in pictures]
    rare = [r for r in records if 0 < r.items_fired <= ROWS / 2]
    assert rare and set(names(client, f"density_min={0.5 / ROWS}&density_max=0.5")) == {str(r.feature) for r in rare}
    assert names(client, "layer=1&sort=feature") == [f"L1/{index}" for index in range(WIDTH)]
    strongest = max(records, key=lambda r: r.activation_max).feature
    assert names(client, "sort=activation")[0] == str(strongest)
    assert names(client, "label=yes") == names(client, "score_min=0.85") == names(client, "words=RED+l1/3") == ["L1/3"]
    assert names(client, "words=nothing+like+it") == []
    page = client.get("/api/studies/study/mine/features?offset=3&limit=2&sort=feature").json()
    assert (page["total"], [row["feature"] for row in page["rows"]]) == (LAYERS * WIDTH, ["L0/3", "L0/4"])


def test_a_feature_has_its_examples_with_pictures_and_levels(client: TestClient, study: StudyFolder) -> None:
    record = next(r for r in study.features(1) if r.fired["image"] and len(r.group(TOP)) == 3)
    body = client.get(f"/api/studies/study/mine/features/{record.feature}").json()
    assert (body["items_fired"], body["fired"]) == (record.items_fired, record.fired)
    for kind, row in zip(("text", "image", "answer"), record.histogram, strict=True):
        assert sum(body["histogram"][kind]) == row.sum()
    top = body["groups"][0]
    assert top["name"] == TOP and top["examples"][0]["activation"] == record.group(TOP)[0].activation
    view = next(view for view in map(study.view, record.group(TOP)) if view.item.n_pictures)
    shown = next(one for one in top["examples"] if one["origin"] == view.item.origin)
    (picture,) = shown["pictures"]
    assert picture["levels"] == view.picture_levels(0).tolist()
    assert np.allclose(picture["boxes"], view.picture_boxes(0), atol=1e-4)
    assert picture["url"].startswith("data:image/")
    assert [token["text"] for token in shown["tokens"] if token["peak"]]
    row = client.get(f"/api/studies/study/mine/features?words={record.feature}&limit=1").json()["rows"][0]
    assert (row["thumbnail"] is None) == bool(row["excerpt"])


def test_what_fires_together_is_the_share_of_inputs_in_common(root: Path, study: StudyFolder) -> None:
    """With as many samples as inputs the study has all of them, so the estimate is exact."""
    fires = {
        record.feature: {example.item for example in record.examples if example.group != TOP}
        for layer in study.layers
        for record in study.features(layer)
        if record.items_fired
    }
    opened = OpenStudy("study/mine", root / "study/mine")
    checked = 0
    for feature, own in fires.items():
        for other in opened.feature(feature)["neighbours"]["coactivation"]:
            theirs = fires[FeatureId.parse(other["feature"])]
            assert other["value"] == pytest.approx(len(own & theirs) / len(own | theirs))
            checked += 1
    assert checked


@pytest.mark.parametrize(
    ("address", "status", "says"),
    [
        ("features?sort=colour", 400, "sort is one of"),
        ("features?limit=100000", 400, "limit is 1 to"),
        ("features/L9/1", 400, "no layer 9"),
        ("features/L1/999", 400, "no feature L1/999"),
        ("features/x/y", 400, "x/y"),
    ],
)
def test_what_a_study_lacks_is_one_line(client: TestClient, address: str, status: int, says: str) -> None:
    answer = client.get(f"/api/studies/study/mine/{address}")
    assert answer.status_code == status and says in answer.json()["error"]


def test_no_study_outside_the_root(client: TestClient) -> None:
    assert client.get("/api/studies/..%2F..%2Fetc/features").status_code == 404
    assert client.get("/api/studies/study/other/features").status_code == 404
