"""Whole studies of tiny models against loops, in parts, interrupted, and of data that is damaged."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlmscope.activations import capture_mlp
from vlmscope.core.errors import UserError
from vlmscope.core.records import TOWER, FeatureId
from vlmscope.core.study import ANSWER, IMAGE, KINDS, TEXT, TOP
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import NumberedRows, open_source, row_of
from vlmscope.data.samples import Share
from vlmscope.features.config import StudyConfig
from vlmscope.features.study import (
    CaptionedPrompt,
    StudyPart,
    data_record,
    finish,
    run_part,
    study_alone,
    study_parts,
    top_examples,
)
from vlmscope.features.study_files import StudyFolder, open_sources
from vlmscope.features.study_tables import tower_positions
from vlmscope.models.base import VisionStack
from vlmscope.models.batching import LOSS_MASK, encode
from vlmscope.models.tiny import tiny_gemma3, tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

WIDTH = 20
CONFIG = StudyConfig(top=3, samples=6, quantiles=2, window=2, logits=2, batch_size=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def vlm():
    return tiny_gemma3(3)


def _set(vlm, activation: str = "topk", cross_layer: bool = False):
    shape = (vlm.adapter.n_layers, vlm.adapter.d_model, WIDTH, 4)
    return random_set(*shape, seed=1, activation=activation, cross_layer=cross_layer).requires_grad_(False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows: pictures with one or two exchanges, and texts; some are equal."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for n in range(20):
        tiny_image(n % 7).save(folder / f"{n}.png")
        turns = [{"user": "what is this ?", "assistant": "red"}, {"user": "the other one ?", "assistant": "two"}]
        lines.append(
            {"images": [f"{n}.png"], "texts": turns[: 1 + n % 2]} if n % 4 else {"text": "the red planet " * (n + 1)}
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _sources(data: Path) -> dict[str, SourceConfig]:
    return {"mine": SourceConfig("folder", str(data))}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _in_parts(study: Path, scope: Scope, data: Path, total: int, stop: Callable[[int], None] | None = None):
    described, origin = data_record(_sources(data), CONFIG), {"is": "same"}
    for index in range(total):
        share = Share(index, total)
        rows = NumberedRows(open_sources(described), CONFIG.batch_size, share)
        run_part(scope, rows, StudyPart(study, share, origin), CONFIG, stop or (lambda _rows: None))
    return finish(study, scope, study_parts(study, total, origin), CONFIG, described)


@pytest.mark.parametrize(
    ("activation", "cross_layer"),
    [("topk", False), ("jumprelu", False), ("relu", False), ("topk", True)],
)
def test_a_study_equals_a_plain_loop(vlm, data: Path, tmp_path: Path, activation: str, cross_layer: bool) -> None:
    transcoders = _set(vlm, activation, cross_layer)
    study = study_alone(tmp_path / "study", Scope(vlm, transcoders), _sources(data), CONFIG)
    source = open_source("mine", _sources(data)["mine"])
    items, acts, kinds = [], {layer: [] for layer in transcoders.layers}, []
    for row in range(20):
        raw = row_of(source, row)
        for forward in encode(vlm, raw.opened()):
            ids, said = forward["input_ids"][0], forward.pop(LOSS_MASK)[0]
            kind = np.where(said, ANSWER, TEXT) if raw.exchanges else np.full(len(ids), TEXT)
            kinds.append(np.where(ids == vlm.adapter.soft_token_id(), IMAGE, kind))
            items.append(row * 256)
            for layer, (x, _) in capture_mlp(vlm.adapter, forward).items():
                acts[layer].append(transcoders[layer].encode(x[0]).dense(WIDTH).numpy())
    assert study.info.items == len(items)
    everything = np.concatenate(kinds)
    assert study.info.positions == {name: int((everything == n).sum()) for n, name in enumerate(KINDS)}
    for layer in transcoders.layers:
        for record in study.features(layer):
            own = [one[:, record.feature.index] for one in acts[layer]]
            flat = np.concatenate(own)
            for n, name in enumerate(KINDS):
                assert record.fired[name] == (flat[everything == n] > 0).sum()
                assert record.histogram[n].sum() == record.fired[name]
            assert record.activation_sum == pytest.approx(float(flat.sum()), rel=1e-4, abs=1e-4)
            assert record.activation_max == pytest.approx(float(flat.max(initial=0)), rel=1e-4)
            peaks = np.array([one.max() for one in own])
            assert record.items_fired == (peaks > 0).sum()
            top = record.group(TOP)
            assert [e.activation for e in top] == pytest.approx(np.sort(peaks[peaks > 0])[::-1][:3].tolist(), rel=1e-4)
            assert len(record.examples) - len(top) == min(6, (peaks > 0).sum())


@pytest.fixture(scope="module")
def study(vlm, data: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return study_alone(tmp_path_factory.mktemp("study") / "study", Scope(vlm, _set(vlm)), _sources(data), CONFIG)


def test_parts_and_interruptions_give_the_same_files(vlm, data: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    scope = Scope(vlm, _set(vlm))
    assert _in_parts(tmp_path / "one", scope, data, 1).info.items == 20
    whole = _files(tmp_path / "one")
    assert {Path(name).parts[0] for name in whole} == {
        "examples", "features", "geometry.parquet", "items.parquet", "study.json", "vocabulary.parquet",
    }  # fmt: skip
    _in_parts(tmp_path / "three", scope, data, 3)
    assert _files(tmp_path / "three") == whole
    for after in (4, 12, 20):

        def stop(rows: int, after: int = after) -> None:
            if rows >= after:
                raise Killed

        with pytest.raises(Killed):
            _in_parts(tmp_path / f"{after}", scope, data, 1, stop)
        _in_parts(tmp_path / f"{after}", scope, data, 1)
        assert _files(tmp_path / f"{after}") == whole


def test_a_state_of_other_settings_or_processes_is_refused(vlm, data: Path, tmp_path: Path) -> None:
    folder, origin = tmp_path / "study", {"is": "these"}
    rows = NumberedRows(open_sources(data_record(_sources(data), CONFIG)), 4, Share(0, 2))
    run_part(Scope(vlm, _set(vlm)), rows, StudyPart(folder, Share(0, 2), origin), CONFIG)
    with pytest.raises(UserError, match="other settings"):
        StudyPart(folder, Share(0, 2), {"is": "others"})
    with pytest.raises(UserError, match="begun by 2 processes, this is one of 3"):
        StudyPart(folder, Share(0, 3), origin)
    with pytest.raises(UserError, match="part 2 of 2 .* is not finished"):
        study_parts(folder, 2, origin)


def test_items_lead_back_to_pictures_words_and_patches(vlm, data: Path, study: StudyFolder) -> None:
    record = next(r for r in study.features(1) if r.fired["image"] and r.fired["answer"])
    views = [study.view(example) for example in record.examples]
    with_picture = [view for view in views if view.item.n_pictures]
    for view in views:
        item = view.item
        assert item.row == item.id // 256
        assert item.tokens[-1] == vlm.tokenizer.decode([int(item.token_ids[-1])])
        pictures = [picture.tobytes() for picture in study.pictures(item)]
        assert pictures == [tiny_image(item.row % 7).tobytes()] * item.n_pictures
    for view in with_picture:
        soft = view.item.kinds == IMAGE
        assert view.item.exchanges[0].user == "what is this ?"
        assert len(view.item.patch_boxes) == soft.sum() == len(view.patch_activations) == 4
        assert view.item.grids == ((2, 2),)
        np.testing.assert_array_equal(view.picture_levels(0), view.levels[soft])
    text = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(text.replace("what is this", "what was this"))
    with pytest.raises(UserError, match="not what the study saw"):
        StudyFolder(study.path).pictures(with_picture[0].item)
    (data / "train.jsonl").write_text(text)


def test_what_a_study_does_not_have_is_one_line(study: StudyFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no layer 9; it has 0, 1, 2, 3"):
        study.feature(FeatureId(9, 0))
    with pytest.raises(UserError, match="no feature L1/20: layer 1 has 0 to 19"):
        study.feature(FeatureId(1, WIDTH))
    with pytest.raises(UserError, match="finished task=study"):
        StudyFolder(tmp_path / "nothing")
    assert StudyFolder(study.path.parent).path == study.path  # the run folder around it
    damaged = Path(shutil.copytree(study.path, tmp_path / "damaged"))
    (damaged / "items.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot read .*items.parquet"):
        StudyFolder(damaged).items  # noqa: B018


def test_damaged_pictures_are_skipped_up_to_a_limit(vlm, tmp_path: Path) -> None:
    def study_of(lines: list[dict], name: str, **changed) -> StudyFolder:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) or "\n")
        return study_alone(tmp_path / name, Scope(vlm, _set(vlm)), _sources(tmp_path), replace(CONFIG, **changed))

    for n in (0, 2, 3, 4):
        tiny_image(n).save(tmp_path / f"{n}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    lines = [{"images": [f"{n}.png"], "text": "the red planet"} for n in range(5)]
    study = study_of(lines, "study")
    assert study.info.skipped == {"mine": 2}
    assert (study.info.items, study.info.rows) == (3, 5)
    assert set(study.items.ids) == {0, 2 * 256, 4 * 256}
    with pytest.raises(UserError, match=r"2 rows of the data cannot be used, the last: .*line 4.*max_skipped=1"):
        study_of(lines, "strict", max_skipped=1)
    with pytest.raises(UserError, match="no row of the data could be used"):
        study_of(lines[1:2], "none")
    with pytest.raises(UserError, match="holds no example"):
        study_of([], "empty")


@pytest.mark.parametrize("family", ["gemma3_text", "paligemma", "qwen2_5_vl", "idefics3"])
def test_families(family: str, tmp_path: Path) -> None:
    """No picture; turns apart (PaliGemma), grids by picture (Qwen), tiles (Idefics3)."""
    vlm = tiny_vlm(family)
    turns = [{"user": "what is this ?", "assistant": "red"}, {"user": "the other one ?", "assistant": "two"}]
    for n in range(3):
        tiny_image(n).resize((20 + 8 * n, 24)).save(tmp_path / f"{n}.png")
    lines = [{"images": [f"{n}.png"], "texts": turns} for n in range(3)]
    lines = lines if vlm.adapter.has_vision else [{"text": "the red planet"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = study_alone(tmp_path / "study", Scope(vlm, _set(vlm)), _sources(tmp_path), replace(CONFIG, max_skipped=0))
    assert study.info.items == len(lines) * (2 if family == "paligemma" else 1)
    for number in study.items.ids:
        item = study.items[number]
        assert len(item.patch_boxes) == (item.kinds == IMAGE).sum() == len(item.pictures)
        assert (item.kinds == ANSWER).any() == vlm.adapter.has_vision


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma4"])
def test_a_study_of_the_vision_tower_equals_a_plain_loop(family: str, tmp_path: Path) -> None:
    """Class tokens, windows, tiles, padding: positions are patches row by row, and a picture counts once."""
    vlm = tiny_vlm(family)
    stack = VisionStack(vlm.adapter)
    tower = random_set(stack.n_layers, stack.d_model, WIDTH, 4, seed=1, site="tower").requires_grad_(False)
    turns = [{"user": "what is this ?", "assistant": "red"}, {"user": "the other one ?", "assistant": "two"}]
    sizes = [(20, 24), (28, 24), (24, 24), (24, 24), (24, 24)]  # the last ones share a forward
    for n, size in enumerate(sizes):
        tiny_image(n).resize(size).save(tmp_path / f"{n}.png")
    lines = [{"images": [f"{n}.png"], "texts": turns} for n in range(len(sizes))] + [{"text": "the red planet"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scope = Scope(vlm, tower)
    study = study_alone(tmp_path / "study", scope, _sources(tmp_path), CONFIG)
    assert study.layers == [TOWER + layer for layer in range(stack.n_layers)] and study.info.items == len(sizes)
    peaks: dict[int, list[np.ndarray]] = {layer: [] for layer in study.layers}
    for n in range(len(sizes)):
        inputs = vlm.prepare("what is this ?", [tiny_image(n).resize(sizes[n])])
        tokens, kinds, boxes = tower_positions(vlm, inputs.tensors, inputs.sizes)
        item = study.items[n * 256]
        assert np.array_equal(item.kinds, kinds) and item.patch_boxes == tuple(boxes[0])
        assert set(item.tokens) <= {"[class]", vlm.tokenizer.decode([vlm.adapter.soft_token_id()])}
        for layer, (x, _) in capture_mlp(stack, inputs.tensors).items():
            acts = tower[layer].encode(x.flatten(0, 1)[tokens]).dense(WIDTH).numpy()
            peaks[TOWER + layer].append(acts.max(0))
            for record in study.features(TOWER + layer):
                for example in record.group(TOP):
                    if example.item == item.id:
                        expected = acts[:, record.feature.index]
                        found = example.activations(len(tokens))[kinds == IMAGE]
                        assert found == pytest.approx(expected[kinds == IMAGE], abs=1e-3 + float(expected.max()) / 255)
    for layer, values in peaks.items():
        for record in study.features(layer):
            expected = np.stack(values)[:, record.feature.index]
            assert record.activation_max == pytest.approx(expected.max(), rel=1e-4)
            assert record.items_fired == (expected > 0).sum() and not record.top_logits
    # The examples of chosen features are those of the study.
    record = next(record for record in study.features(TOWER) if record.items_fired)
    shown = [CaptionedPrompt(vlm.prepare("what is this ?", [tiny_image(n).resize(sizes[n])]), "", None)
             for n in range(len(sizes))]  # fmt: skip
    (examples,) = top_examples(scope, [record.feature], shown, 3).values()
    assert [e.activation for e in examples] == pytest.approx([e.activation for e in record.group(TOP)], rel=1e-4)
    assert len(examples[0].patch_boxes) == len(examples[0].patch_activations)
