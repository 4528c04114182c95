"""Pages and JSON of features: what the field's viewers need, numbers that agree, and words that cannot become code."""

import base64
import hashlib
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from tests.unit.report.conftest import BOXES, HOSTILE
from tests.unit.report.feature_cases import (
    FACTS,
    INFO,
    N,
    make_feature_page,
    make_item,
    make_record,
    make_view,
    photo,
    write_pages,
)
from tests.unit.report.test_html import Parsed

import vlmscope
from vlmscope.core.study import BINS, bin_edges
from vlmscope.report import feature_page as feature_words
from vlmscope.report.feature_page import HEIGHT, PageLabel, StudyFacts, histogram, inert_json
from vlmscope.report.gallery import Gallery, feature_json, quantile_name
from vlmscope.report.thumbnails import Geometries, HeatPicture, thumbnail

SCHEMA = Path(vlmscope.__file__).parent / "report" / "schema" / "feature.schema.json"


def body() -> dict:
    views = [
        make_view({4: 255, N + 3: 51}),
        make_view({N + 3: 255}, 3.0),
        make_view({N + 6: 255}, 2.0, item=make_item(number=2)),
        make_view({3: 255}, 1.0, "q1"),
        make_view({3: 255}, 2.0, "q2"),
    ]
    return feature_json(make_record(views), views, INFO, {"label": None})


def test_json_is_what_the_viewers_read() -> None:
    found = body()
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
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


def test_schema_refuses_what_is_broken() -> None:
    schema = json.loads(SCHEMA.read_text())
    for damage in (
        lambda b: b.pop("act_max"),
        lambda b: b["examples_quantiles"][0]["examples"][0].pop("train_token_ind"),
        lambda b: b["examples_quantiles"][0]["examples"][0]["patches"][0]["levels"].append(256),
    ):
        found = body()
        damage(found)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(found, schema)


def scripts(page: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", page, re.DOTALL)


def test_nothing_hostile_becomes_a_tag_and_only_one_script_may_run(tmp_path: Path) -> None:
    write_pages(tmp_path)
    for path in sorted(tmp_path.glob("*.html")):
        text = path.read_text()
        assert "<script>alert" not in text
        parsed = Parsed(text)
        assert [attrs.get("type") for attrs in parsed.all("script")] == ["application/json", None]
        (policy,) = [meta["content"] for meta in parsed.all("meta") if "http-equiv" in meta]
        (script,) = scripts(text)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert policy == (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'")
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
    page = make_feature_page(label=PageLabel("planet = mars", "auto", 0.97, 0.9, 0.99, True))
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


def test_a_label_that_does_not_beat_chance_is_no_title() -> None:
    page = make_feature_page(label=PageLabel("planet = venus", "auto", 0.52, 0.4, 0.6))
    text = Parsed(page.render()).text
    assert page.title == "at mars"
    assert "No label that holds" in text and "planet = venus" in text
    gallery = Gallery("Features", "", FACTS)
    gallery.add(page)
    assert gallery.tiles[0].label_class == "unlabelled" and gallery.tiles[0].score is None
    assert make_feature_page(label=PageLabel("mine", "hand")).title == "mine"
    assert "No label yet" in Parsed(make_feature_page().render()).text


def test_pictures_that_are_gone_are_told_in_their_place() -> None:
    page = make_feature_page(gone=True)
    parsed = Parsed(page.render())
    assert "Pictures are missing" in parsed.text and "no such file" in parsed.text
    assert not parsed.all("img") and parsed.text.count("picture not available") == 2


def test_equal_arrangements_and_pictures_are_written_once() -> None:
    heat = Geometries()
    assert [heat.number(BOXES), heat.number(BOXES[:1]), heat.number(BOXES)] == [0, 1, 0]
    assert heat.table()[1] == [0.0, 0.0, 0.25, 0.25]
    gallery = Gallery("Features", "", FACTS)
    for index in range(20):
        gallery.add(make_feature_page(index=index))
    assert gallery.render().count("data:image/jpeg") == 1
    gallery.arrange([tile.feature for tile in reversed(gallery.tiles)])
    assert [tile.feature.index for tile in gallery.tiles] == list(range(19, -1, -1))


def test_thumbnails_keep_small_pictures_and_shrink_large_ones() -> None:
    data, *size = thumbnail(photo(64, 32))
    assert size == [64, 32] and data[:4] == b"\x89PNG"
    data, *size = thumbnail(photo(900, 450))
    assert size == [128, 64] and data[:3] == b"\xff\xd8\xff"
    with pytest.raises(ValueError, match="16 patch boxes but 1 levels"):
        HeatPicture(data, 1, 1, "", BOXES, np.zeros(1, np.uint8), False)


def test_a_histogram_is_drawn_to_scale() -> None:
    counts = np.zeros((3, BINS), np.int64)
    counts[0, 30], counts[1, 30], counts[2, 33] = 6, 2, 4
    drawn = histogram(counts)
    high = {(bar.kind, bar.x): bar.height for bar in drawn.bars}
    assert high == {("image", 0.0): HEIGHT / 4, ("text", 0.0): HEIGHT * 3 / 4, ("answer", 225.0): HEIGHT / 2}
    assert [text for _, text in drawn.ticks] == ["0.5", "1", "2"]
    assert drawn.most == 8
    assert histogram(np.zeros((3, BINS), np.int64)).bars == ()


def places(at: int, item=None):
    view = make_view({at: 255}, item=item)
    return (view.item.caption, view.places())


def test_guesses_from_the_strongest_examples() -> None:
    usual = {"what": 1.0, "is": 1.0, "this": 0.9, "mars": 0.1}
    question, answer, picture = N + 4, N + 7, 4
    assert feature_words.guess([places(N + 6)] * 3, usual) == "right before the answer “mars”"
    assert feature_words.guess([places(question)] * 3, usual) == "at “is”"
    assert feature_words.guess([places(answer)] * 3, usual) == "at “mars”"
    assert feature_words.guess([places(picture)] * 3, usual) == "on pictures where the text says “mars”"
    assert feature_words.guess([places(picture)] * 3, {**usual, "mars": 0.9}) == "on pictures of many kinds"
    assert feature_words.guess([], usual) == "never fires in this study"


def test_words_for_numbers_and_tokens() -> None:
    assert [feature_words.chance(*pair) for pair in ((0, 9), (1, 26), (9, 10), (5, 5))] == [
        "0 of 9",
        "1 in 26",
        "9.0 of 10",
        "all",
    ]
    assert [feature_words.shown_token(t) for t in ("▁what", "Ġthe", "\n", " ")] == ["what", "the", "⏎", "␣"]
    assert (
        feature_words.special("<end_of_turn>") and not feature_words.special("<") and not feature_words.special("a<b>")
    )
    assert StudyFacts("m", "t", 1, {"text": 2, "image": 3, "answer": 0}, (0,)).all_positions == 5
