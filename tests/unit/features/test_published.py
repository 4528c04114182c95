"""Published activation statistics, written in their own layout from a tiny model, are read as a study."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.published import KEPT, codes_of, write_statistics

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.study import IMAGE, KINDS, TEXT
from vlmscope.features.config import StudyConfig
from vlmscope.features.published import COUNTS, published_study, statistics_folder
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

CONFIG = StudyConfig(logits=2)


@pytest.fixture(scope="module")
def scope() -> Scope:
    vlm = tiny_gemma3(3)
    return Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 20, 4, seed=1).requires_grad_(False))


@pytest.fixture(scope="module")
def prompts(scope: Scope) -> list:
    pictures = [[tiny_image(0)], [], [tiny_image(1)], []]
    return [scope.inputs(f"what is {'the red ' * n}planet ?", images) for n, images in enumerate(pictures)]


@pytest.fixture(scope="module")
def source(scope: Scope, prompts: list, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_statistics(folder, scope, prompts, {0: "hf-dataset://some/set/a.png", 2: "hf-dataset://some/set/b.png"})
    (folder / "pictures").mkdir()
    tiny_image(0).save(folder / "pictures" / "a.png")
    return folder


def test_they_are_what_the_model_does(scope: Scope, prompts: list, source: Path, tmp_path: Path) -> None:
    study = published_study(tmp_path / "study", statistics_folder(str(source), None), scope, CONFIG)
    kinds = np.concatenate([np.where(inputs.is_image, IMAGE, TEXT) for inputs in prompts])
    assert study.info.items == 4
    assert study.info.positions == {name: int((kinds == n).sum()) for n, name in enumerate(KINDS)}
    codes, ends = [codes_of(scope, inputs) for inputs in prompts], np.cumsum([0, *map(len, prompts)])
    published = pq.read_table(study.path / COUNTS).to_pandas().set_index(["layer", "feature"]).tokens
    for layer in study.layers:
        acts = np.concatenate([each[layer].numpy() for each in codes])
        for record in study.features(layer):
            own = acts[:, record.feature.index]
            assert published.get((layer, record.feature.index), 0) == (own > 0).sum()
            kept = np.argsort(-own, kind="stable")[: min(KEPT, (own > 0).sum())]
            assert record.positions_fired == len(kept) == sum(len(e.positions) for e in record.examples)
            assert record.activation_sum == pytest.approx(own[kept].sum(), rel=1e-2)
            assert record.fired["image"] == (kinds[kept] == IMAGE).sum()
            for example in record.examples:
                place = ends[example.item // 256] + example.position
                assert example.activation == pytest.approx(own[place], rel=1e-2)
                view = study.view(example)
                assert view.activations.max() == pytest.approx(example.activation, rel=1e-6)
            assert [e.activation for e in record.examples] == sorted(e.activation for e in record.examples)[::-1]
    item = study.items[0]
    assert item.n_pictures == 1 and study.pictures(item)[0].size == tiny_image(0).size
    assert len(item.patch_boxes) == item.grids[0][0] ** 2 == int(prompts[0].is_image.sum())
    assert study.items[512].n_pictures == 0 and "hf-dataset://some/set/b.png" in study.items[512].origin
    assert study.items[256].tokens == tuple(prompts[1].tokens)
    # Made once: it is read again without the source.
    assert published_study(tmp_path / "study", tmp_path, scope, CONFIG).feature(FeatureId(0, 0)).feature.layer == 0


def test_what_cannot_be_read_is_one_line(scope: Scope, source: Path, tmp_path: Path) -> None:
    head = json.loads((source / "manifest.json").read_text())
    narrow = Scope(scope.vlm, random_set(scope.adapter.n_layers, scope.adapter.d_model, 4, 4))
    for number, (change, other, words) in enumerate(
        (
            ({"schema": "v2"}, scope, "its schema is not"),
            ({"model_name": "google/gemma-3-4b-it"}, scope, "has the statistics of google/gemma-3-4b-it"),
            ({"layers": None}, scope, "incomplete folder of activation statistics"),
            ({}, narrow, "it is another set"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("stats", "inputs"):
            (folder / name).symlink_to(source / name)
        (folder / "manifest.json").write_text(json.dumps(head | change))
        with pytest.raises(UserError, match=words):
            published_study(tmp_path / "study", folder, other, CONFIG)
    for path, words in (("/no/folder", "no manifest.json"), ("some/set", "add study.revision=")):
        with pytest.raises(UserError, match=words):
            statistics_folder(path, None)
