"""Outside explainers: a small local server, a dead one, a tiny model; and hand labels over all of them."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.study import StudyInfo
from vlmscope.data.images import png_bytes
from vlmscope.features.explainers import Endpoint, LocalExplainer, Shown, one_line, yes_or_no
from vlmscope.features.labels import Label, Labels, labels_for, set_path, write_labels
from vlmscope.features.study_files import StudyFolder
from vlmscope.models.tiny import tiny_gemma3, tiny_image

RED = Shown("what is red ?", (png_bytes(tiny_image(1)),))


class _Service(BaseHTTPRequestHandler):
    """Says yes to what speaks of red; its first answer is "later"."""

    asked: list[dict] = []
    keys: list[str | None] = []
    status = [503]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.status:
            self.send_error(self.status.pop())
            return
        self.asked.append(body)
        self.keys.append(self.headers["Authorization"])
        content = body["messages"][0]["content"]
        words = content[0]["text"]
        said = (
            '"Red things."\nBecause ...' if words.startswith("Each example") else "Yes" if "is red" in words else "No."
        )
        answer = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer if self.path == "/v1/chat/completions" else b"<html>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    _Service.asked, _Service.keys, _Service.status = [], [], [503]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_again_and_answers(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "abc")
    endpoint = Endpoint(f"{service}/v1", "org/vlm-2", "SOME_KEY")
    assert endpoint.name == "org_vlm-2"
    assert one_line(endpoint.propose([RED, Shown("is it red ?")])) == "Red things"
    assert endpoint.judge("red things", [RED, Shown("the other")]) == [1.0, 0.0]
    pictures = [part["image_url"]["url"] for part in _Service.asked[0]["messages"][0]["content"] if "image_url" in part]
    assert len(pictures) == 1 and pictures[0].startswith("data:image/png;base64,iVBOR")
    assert set(_Service.keys) == {"Bearer abc"}


def test_an_endpoint_that_fails_is_one_line(service: str) -> None:
    with pytest.raises(UserError, match="no chat completion") as error:
        Endpoint(f"{service}/other", "m", retries=1).propose([RED])
    assert "\n" not in str(error.value)
    _Service.status = [401, 401]
    with pytest.raises(UserError, match="does not answer \\(status 401"):
        Endpoint(f"{service}/v1", "m").propose([RED])
    assert _Service.status == [401]  # a refusal is not asked again
    with pytest.raises(UserError, match="does not answer") as error:
        Endpoint("http://127.0.0.1:9/v1", "m", timeout=2, retries=0).propose([RED])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="must begin with http"):
        Endpoint("file:///etc", "m")


def test_answers_are_read_as_they_come() -> None:
    assert [yes_or_no(text) for text in ("Yes.", "no", "**No**", "perhaps")] == [1.0, 0.0, 0.0, 0.5]
    assert one_line("\n  'a  red\tplanet.'\nmore") == "a red planet"


def test_a_local_model_proposes_and_judges() -> None:
    explainer = LocalExplainer(tiny_gemma3(5), max_tokens=4)
    assert isinstance(explainer.propose([RED]), str)
    grades = explainer.judge("red", [RED, Shown("the other planet"), RED])
    assert all(0 < grade < 1 for grade in grades)
    assert grades[0] == grades[2] != grades[1]


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    info = StudyInfo("planted", {}, {0: 9}, {}, {"samples": 4}, 10, 10, {})
    (tmp_path / "study.json").write_text(json.dumps({"format": "vlmscope-study", "version": 1, **vars(info)}))
    return StudyFolder(tmp_path)


def _labelled(text: str, low: float) -> Label:
    return Label(text, "auto", "items", low + 0.1, low, low + 0.2, beats_chance=low > 0.5)


def test_hand_labels_win_and_survive_a_rerun(study: StudyFolder) -> None:
    one, other = FeatureId(0, 1), FeatureId(0, 2)
    write_labels(set_path(study.path, "auto"), [(one, _labelled("a", 0.6)), (other, _labelled("b", 0.4))])
    write_labels(set_path(study.path, "vlm"), [(one, _labelled("surer", 0.7)), (other, _labelled("worse", 0.3))])
    assert [Labels(study).of(feature).text for feature in (one, other)] == ["surer", "b"]
    assert Labels(study).texts() == {one: "surer (0.80)"}
    (study.path / "labels/hand.yaml").write_text("# mine\nL0/2: mars, seen or named\n")
    write_labels(set_path(study.path, "auto"), [(other, _labelled("new", 0.9))])
    found = Labels(study)
    assert str(found.of(other)) == "mars, seen or named" and found.of(other).source == "hand"
    assert not found.of(FeatureId(0, 3)).text
    assert labels_for(study.path, "planted", {0: 9}).texts()[other] == "mars, seen or named"


@pytest.mark.parametrize(
    ("text", "message"),
    [("L0/9: x", "no feature L0/9"), ("L7/1: x", "no layer 7"), ("5: x", "not a feature id"), ("L0/1:", "has no text"),
     ("- a", "holds no labels"), ("a: [", "not valid YAML")],
)  # fmt: skip
def test_a_wrong_hand_label_is_one_line(study: StudyFolder, text: str, message: str) -> None:
    path = study.path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Labels(study, path)
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_labels_of_another_model_are_refused(study: StudyFolder) -> None:
    with pytest.raises(UserError, match="of the model planted, not of other"):
        labels_for(study.path, "other", {0: 9})
    with pytest.raises(UserError, match="other transcoders"):
        labels_for(study.path, "planted", {0: 8})
    with pytest.raises(UserError, match="no labels; run task=label"):
        labels_for(study.path, "planted", {0: 9})
