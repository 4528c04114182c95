"""Pages and JSON of features: what the field's viewers need, numbers that agree, and words that cannot become code."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from tests.unit.report.conftest import BOXES, HOSTILE
from tests.unit.report.feature_cases import (
    MARS_LABEL,
    N,
    make_feature_page,
    make_item,
    make_record,
    make_view,
    write_pages,
)
from tests.unit.report.test_html import Parsed

import vlmscope
from vlmscope.core.study import BINS, bin_edges
from vlmscope.features.labels import Label
from vlmscope.report import feature_page
from vlmscope.report.feature_page import Numbered, histogram, inert_json
from vlmscope.report.gallery import feature_json, quantile_name, write_gallery

SCHEMA = json.loads((Path(vlmscope.__file__).parent / "report" / "schema" / "feature.schema.json").read_text())


def body() -> dict:
    views = [
        make_view({4: 255, N + 3: 51}),
        make_view({N + 3: 255}, 3.0),
        make_view({N + 6: 255}, 2.0, item=make_item(number=2)),
        make_view({3: 255}, 1.0, "q1"),
        make_view({3: 255}, 2.0, "q2"),
    ]
    return feature_json(replace(make_feature_page(), record=make_record(views)), views)


def test_json_is_what_the_viewers_read() -> None:
    found = body()
    jsonschema.validate(found, SCHEMA)
    assert json.loads(json.dumps(found)) == found
    assert (found["index"], found["layer"], found["vlmscope"]["feature"]) == (5, 3, "L3/5")
    assert found["vlmscope"]["cantor"] == (3 + 5) * (3 + 5 + 1) // 2 + 5
    assert found["activation_frequency"] == 10 / 4600
    names = [group["quantile_name"] for group in found["examples_quantiles"]]
    assert names == ["Top activations", "Subsample interval 1", "Subsample interval 0"]
    assert quantile_name("q4", 4) == "Subsample interval 0"


def test_json_gives_a_picture_one_token_and_its_patches_beside_it() -> None:
    first, second, third = body()["examples_quantiles"][0]["examples"]
    assert first["tokens"] == ["<bos>", "<soi>", "[picture]", "<eoi>", "what", "is", "this", "?", "mars"]
    assert first["tokens_acts_list"] == pytest.approx([0, 0, 4.0, 0, 0.8, 0, 0, 0, 0])
    assert first["train_token_ind"] == 2
    assert first["token_kinds"] == ["text"] * 2 + ["image"] + ["text"] * 5 + ["answer"]
    (patches,) = first["patches"]
    assert (patches["rows"], patches["columns"]) == (4, 4)
    assert patches["levels"] == [0, 0, 255] + [0] * 13
    assert np.allclose(patches["boxes"], BOXES)
    assert second["train_token_ind"] == 4
    assert [one["is_repeated_datapoint"] for one in (first, second, third)] == [False, True, False]


def test_json_counts_what_the_record_counts() -> None:
    found = body()
    more = found["vlmscope"]
    assert found["histogram"] == [7, 0, 0, 0, 0, 0, 3]
    assert more["histogram_edges"] == bin_edges()[30:38].tolist()
    assert more["histogram_by_kind"] == {"text": [7, 0, 0, 0, 0, 0, 0], "image": [0] * 6 + [3], "answer": [0] * 7}
    assert list(zip(found["top_logits"], more["top_logit_values"], strict=True)) == [("mars", 0.4), ("red", 0.2)]


def test_nothing_hostile_becomes_a_tag_and_only_one_script_may_run(tmp_path: Path) -> None:
    write_pages(tmp_path)
    for path in sorted(tmp_path.glob("*.html")):
        text = path.read_text()
        assert "<script>alert" not in text
        parsed = Parsed(text)
        assert [attrs.get("type") for attrs in parsed.all("script")] == ["application/json", None]
        (policy,) = [meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta]
        (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
        sources = [attrs["src"] for _, attrs in parsed.tags if "src" in attrs]
        assert all(str(source).startswith("data:image/") for source in sources)
    assert HOSTILE in Parsed((tmp_path / "L3_6.html").read_text()).text


def test_json_in_a_page_cannot_end_its_element() -> None:
    value = {"a": "</script><!-- & \u2028 \u2029 <script>"}
    text = str(inert_json(value))
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value


def test_a_page_says_what_the_record_says() -> None:
    page = make_feature_page(label=MARS_LABEL)
    parsed = Parsed(page.render())
    assert page.title == "planet = mars" and page.main_kind == "text"
    assert {"0.97", "0.4", "0.7", "4.0", "9"} <= set(parsed.values)
    for said in ("9 of 200 inputs", "70.0\u00a0%", "“mars”", "at mars"):
        assert said in parsed.text, said
    heated = [attrs for tag, attrs in parsed.tags if tag == "span" and "data-levels" in attrs]
    assert [list(base64.b64decode(str(one["data-levels"]))) for one in heated] == [[0, 0, 255] + [0] * 13, [0] * 16]
    assert ["data-peak" in one for one in heated] == [True, False]
    assert "fires on 1 of 16 patches, most at top centre" in str(heated[0]["aria-label"])
    (image, *_) = parsed.all("img")
    assert str(image["src"]).startswith("data:image/png;base64,")


def test_a_label_that_does_not_beat_chance_is_no_title(tmp_path: Path) -> None:
    page = make_feature_page(label=Label("planet = venus", "auto", "items", 0.52, 0.4, 0.6))
    text = Parsed(page.render()).text
    assert page.title == "at mars"
    assert "No label that holds" in text and "planet = venus" in text
    (tile,) = Parsed(write_gallery(tmp_path, [page], "Features", "").read_text()).all("li")
    assert (tile["data-label"], tile["data-score"]) == ("unlabelled", "")
    assert make_feature_page(label=Label("mine", "hand")).title == "mine"
    assert "No label yet" in Parsed(make_feature_page().render()).text


def test_pictures_that_are_gone_are_told_in_their_place() -> None:
    parsed = Parsed(make_feature_page(gone=True).render())
    assert "Pictures are missing" in parsed.text and "no such file" in parsed.text
    assert not parsed.all("img") and parsed.text.count("picture not available") == 2


def test_equal_arrangements_and_pictures_are_written_once(tmp_path: Path) -> None:
    heat = Numbered()
    assert [heat.number(BOXES), heat.number(BOXES[:1]), heat.number(BOXES)] == [0, 1, 0]
    text = write_gallery(tmp_path, [make_feature_page(index=index) for index in range(20)], "Features", "").read_text()
    assert text.count("data:image/jpeg") == 1 and text.count('"geometries":[[0.0,0.0,0.25,0.25,') == 1


def test_a_histogram_is_drawn_to_scale() -> None:
    counts = np.zeros((3, BINS), np.int64)
    counts[0, 30], counts[1, 30], counts[2, 33] = 6, 2, 4
    page = make_feature_page()
    text = replace(page, record=replace(page.record, histogram=counts)).render()
    bars = {(bar["class"], bar["x"]): bar["height"] for bar in Parsed(text).all("rect") if "y" in bar}
    assert bars == {("image", "0.0"): "24.00", ("text", "0.0"): "72.00", ("answer", "225.0"): "48.00"}
    drawn = histogram(counts)
    assert [activation for _, activation in drawn.ticks] == [0.5, 1, 2]
    assert drawn.words == "12 firings; half of them are below 0.75, the fullest bin has 8"
    assert histogram(np.zeros((3, BINS), np.int64)).bins == []


USUAL = {"what": 1.0, "is": 1.0, "this": 0.9, "mars": 0.1}


@pytest.mark.parametrize(
    ("position", "usual", "guess"),
    [
        (N + 6, USUAL, "right before the answer “mars”"),
        (N + 4, USUAL, "at “is”"),
        (N + 7, USUAL, "at “mars”"),
        (4, USUAL, "on pictures where the text says “mars”"),
        (4, {**USUAL, "mars": 0.9}, "on pictures of many kinds"),
        (None, USUAL, "never fires in this study"),
    ],
)
def test_guesses_from_the_strongest_examples(position: int | None, usual: dict, guess: str) -> None:
    views = [] if position is None else [make_view({position: 255})] * 3
    assert feature_page.guess([(view.item.caption, view.places()) for view in views], usual) == guess
