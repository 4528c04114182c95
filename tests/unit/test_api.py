"""`vlmscope.load`: folders and hub ids, and the check that the transcoders fit; what a Scope runs."""

import json
import logging
import shutil
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import vlmscope
from vlmscope import api
from vlmscope.attribution.export import load_graph, node_id
from vlmscope.attribution.influence import top_features
from vlmscope.config.catalog import asset
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import FeatureId
from vlmscope.interventions.edits import steer_plan
from vlmscope.interventions.run import generate_edited, run_edited
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.transcoders.formats import save_set
from vlmscope.transcoders.transcoder import random_set, set_weight

MODEL, SET, COMMIT = "some-org/tiny-vlm", "me/tiny-set", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a set whose reconstructions are far too large."""
    folder = tmp_path_factory.mktemp("saved")
    vlm = tiny_vlm("gemma3", 0)
    vlm.model.save_pretrained(folder / "model")
    vlm.processor.save_pretrained(folder / "model")
    made = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 48, 4, seed=1)
    for transcoder in made.transcoders.values():
        set_weight(transcoder.W_dec, 1000 * transcoder.W_dec)
    save_set(made, folder / "set")
    return folder


@pytest.fixture
def cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with both in it, and a hub that must not be asked."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.setattr(huggingface_hub, "HfApi", never)
    monkeypatch.chdir(tmp_path)
    for repo, name in ((MODEL, "model"), (SET, "set")):
        target = tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
        shutil.copytree(saved / name, target)
    return tmp_path


def test_hub_ids_are_taken_from_the_cache_and_an_unfit_set_is_named(
    cache: Path, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scope = vlmscope.load(MODEL, SET, revision=COMMIT, transcoder_revision=COMMIT)
    (said,) = [record.getMessage() for record in caplog.records if "do not fit" in record.getMessage()]
    assert "the transcoders do not fit tiny-vlm: FVU above 1 on " in said and "layer 0 (" in said
    assert int(said.partition(" on ")[2].split()[0]) > 200
    assert scope.vlm.name == "tiny-vlm"
    local = vlmscope.load(saved / "model", saved / "set", check=False)
    inputs = scope.inputs("what is this ?")
    assert (scope.vlm.model(**inputs.tensors).logits == local.vlm.model(**inputs.tensors).logits).all()
    assert (scope.transcoders[1].W_dec == local.transcoders[1].W_dec).all()


def test_a_hub_id_needs_its_commit(cache: Path, saved: Path) -> None:
    with pytest.raises(UserError, match=r"add model.revision=<commit"):
        vlmscope.load(MODEL, saved / "set")
    with pytest.raises(UserError, match=r"no model 'orery'; did you mean 'orrery'\?"):
        vlmscope.load("orery")
    with pytest.raises(UserError, match=r"add transcoder.revision=<commit"):
        vlmscope.load(saved / "model", SET)


@pytest.fixture(scope="module")
def orrery() -> Any:
    return vlmscope.load(check=False)


@pytest.mark.parametrize("call", ["trace", "where"])
def test_a_wrong_setting_is_one_line_with_the_nearest_name(orrery: Any, call: str) -> None:
    wrong = {"trace": "max_node", "where": "head_shar"}[call]
    with pytest.raises(UserError, match=rf"no setting '{wrong}'; did you mean '{wrong}.'"):
        getattr(vlmscope, call)(orrery, "what is this ?", [tiny_image(0).resize((64, 64))], **{wrong: 3})


MARS, QUESTION = Path(asset("pictures/mars.png")), "what planet is this ?"


def test_pictures_are_paths_pictures_or_arrays_one_or_several(orrery: Any) -> None:
    with Image.open(MARS) as opened:
        picture = opened.convert("RGB")
    expected = orrery.inputs(QUESTION, [MARS]).tensors["pixel_values"]
    for given in (MARS, str(MARS), picture, np.asarray(picture), [picture], np.asarray(picture)[None]):
        assert (orrery.inputs(QUESTION, given).tensors["pixel_values"] == expected).all()
    assert len(orrery.inputs("what is this ?", None).sizes) == 0
    for wrong in (np.zeros((4, 4)), np.zeros((4, 4, 5), np.uint8), 3.0):
        with pytest.raises(UserError, match="a picture is a"):
            orrery.inputs(QUESTION, [wrong])


@pytest.mark.parametrize("mode", ["free", "all"])
def test_an_edit_tells_before_after_and_its_controls(orrery: Any, mode: str) -> None:
    """The probabilities are those of edited runs, made one by one; the answer is the generated one."""
    inputs, wide = orrery.inputs(QUESTION, MARS), {FeatureId(6, index): 30.0 for index in range(40)}
    result = vlmscope.steer(orrery, QUESTION, MARS, wide, mode=mode, controls=2, max_new_tokens=3)
    plan = steer_plan(orrery, wide, len(inputs))
    batch = orrery.batch([inputs])
    for side, edits in (("before", {}), ("after", plan)):
        expected = run_edited(orrery, batch, edits)[0].softmax(-1)
        said = getattr(result, side)
        assert [p for _, p in said.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-6)
        assert said.answer == generate_edited(orrery, inputs, edits, 3)
    assert str(result) == result.after.answer and result.after.answer in repr(result)
    assert [(each.name, each.draws) for each in result.controls] == [("matched", 2), ("random_direction", 2)]
    frame = result.to_frame()
    assert list(frame["mode"].unique()) == (["free"] if mode == "free" else ["direct", "frozen_attention", "free"])
    assert len(frame) == (5 if mode == "free" else 11)
    assert "other features" in result._repr_html_()


def test_a_patch_with_itself_changes_nothing(orrery: Any) -> None:
    result = vlmscope.patch(orrery, QUESTION, MARS, MARS, ["L5/709", "L4/1802"], controls=1, max_new_tokens=3)
    assert dict(result.before.top) == pytest.approx(dict(result.after.top)) and result.before.answer == str(result)
    for call, says in (
        (lambda: vlmscope.steer(orrery, QUESTION, MARS, {"L5/709": 0}, mode="fre"), "did you mean 'free'"),
        (lambda: vlmscope.steer(orrery, QUESTION, MARS, {}), "no features"),
        (lambda: vlmscope.steer(orrery, QUESTION, MARS, {"L5-709": 0}), "not a feature id"),
        (lambda: vlmscope.patch(orrery, QUESTION, MARS, MARS, ["L99/1"]), "the transcoders have layers"),
        (lambda: vlmscope.patch(orrery, QUESTION, MARS, MARS, ["L5/1"], controls=-1), "at least 0"),
    ):
        with pytest.raises(UserError, match=says):
            call()


def test_a_trace_shows_its_features_and_saves_the_files_of_the_task(
    orrery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = vlmscope.trace(orrery, QUESTION, MARS, max_nodes=300, patches=True)
    best = traced.top_features(3)
    assert [row.feature for row in best] == list(top_features(traced.graph, 3))
    assert 0 < best[2].share <= best[0].share < 1 and best[0].place
    at = (traced.graph.nodes.layer == best[0].feature.layer) & (traced.graph.nodes.index == best[0].feature.index)
    assert best[0].positions == int((at & (traced.graph.nodes.kind == NodeKind.FEATURE)).sum())
    frame = traced.to_frame()
    assert len(frame) == traced.pruned.n_nodes and frame.influence.is_monotonic_decreasing
    assert set(frame[frame.kind == "token"].place) >= {"picture, top left", "'planet' at 22"}
    assert str(best[0].feature) in repr(traced) and str(best[0].feature) in traced._repr_html_()
    network = traced.to_networkx()
    assert (len(network), network.size()) == (traced.pruned.n_nodes, traced.pruned.n_edges)
    end = max(network, key=lambda node: network.nodes[node]["kind"] == "logit")
    assert network.in_degree(end) and not network.out_degree(end)
    row = int(np.flatnonzero([node_id(traced.graph, n) == end for n in range(traced.graph.n_nodes)])[0])
    sources, weights = traced.graph.incoming(row)
    known = {node_id(traced.graph, source): weight for source, weight in zip(sources.tolist(), weights, strict=True)}
    assert all(known[source] == edge["weight"] for source, _, edge in network.in_edges(end, data=True))
    shown: list[Any] = []
    monkeypatch.setattr(api, "_WITH_EXAMPLES", 1)
    monkeypatch.setattr("webbrowser.open", shown.append)
    traced.show()
    monkeypatch.setattr("builtins.display", shown.append, raising=False)  # as in a notebook
    traced.show()
    page = Path(url2pathname(urlparse(shown[0]).path)).read_text()
    assert json.dumps(traced.top_features(1)[0].label)[1:-1] in page and escape(page)[-5000:] in shown[1]._repr_html_()
    folder = traced.save(tmp_path / "saved")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"graph.json", "graph.safetensors", "patches.safetensors", "figures/graph.png"}
    assert len(traced.maps) == len(traced.graph.logit_tokens)
    assert np.array_equal(load_graph(folder / "graph.safetensors").graph.weights, traced.graph.weights)
    with pytest.raises(UserError, match="patches=True needs a picture"):
        vlmscope.trace(orrery, "what planet is this ?", patches=True)
    with pytest.raises(UserError, match=r"study.json"):
        vlmscope.trace(orrery, "what planet is this ?", labels=str(tmp_path))


def test_where_features_look() -> None:
    scope = vlmscope.load(check=False)
    picture = tiny_image(0).resize((64, 64))
    found = vlmscope.where(scope, "what is this ?", [picture], top=2)
    assert len(found.maps) == 2
    for maps in found.maps.values():
        assert {"rollout", "similarity", "vision_path", "activation"} == set(maps)
    name = str(next(iter(found.maps)))
    again = vlmscope.where(scope, "what is this ?", [picture], [name], pool="mean")
    assert list(map(str, again.maps)) == [name]
    frame = again.to_frame()
    values = again.maps[FeatureId.parse(name)]["activation"][0].tiles[0].values
    assert frame[frame.kind == "activation"].value.tolist() == values.ravel().tolist()
    assert name in repr(again) and again.plot().width > again.plot().height > 100
    with pytest.raises(UserError, match="no picture"):
        vlmscope.where(scope, "what is this ?", [])


def test_a_scope_runs_the_model_as_hugging_face_does(saved: Path, tmp_path: Path) -> None:
    """`inputs`, `batch`, `capture` and `forward` against the model's own forward and a plain hook."""
    scope = vlmscope.load(saved / "model", saved / "set", check=False)
    tiny_image(0).save(tmp_path / "0.png")
    asked = [scope.inputs("what is this ?", [image]) for image in (tmp_path / "0.png", tiny_image(1))]
    batch = scope.batch(asked)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        handle = scope.adapter.mlp(1).register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
        expected = torch.stack([scope.vlm.model(**one.tensors).logits[0, -1] for one in asked])
        handle.remove()
    torch.testing.assert_close(scope.forward(batch), expected, rtol=1e-4, atol=1e-5)
    captured = scope.capture(batch, [1])
    assert list(captured) == [1] and list(scope.capture(batch)) == scope.transcoders.layers
    torch.testing.assert_close(captured[1], torch.stack(seen), rtol=1e-4, atol=1e-5)
