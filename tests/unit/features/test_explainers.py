"""Labels by a chat service: a small local server, and a dead one."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlmscope.core.errors import UserError
from vlmscope.data.images import png_bytes
from vlmscope.features.explainers import Endpoint, Shown, one_line, yes_or_no
from vlmscope.models.tiny import tiny_image

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
        words = body["messages"][0]["content"][0]["text"]
        answer = "Yes" if "is red" in words else "No."
        answer = '"Red things."\nBecause ...' if words.startswith("Each example") else answer
        completion = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(completion if self.path == "/v1/chat/completions" else b"<html>")

    def log_message(self, format: str, *args: object) -> None:
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
    assert endpoint.propose([RED, Shown("is it red ?")]) == "Red things"
    assert endpoint.judge("red things", [RED, Shown("the other")]) == [1.0, 0.0]
    pictures = [part["image_url"]["url"] for part in _Service.asked[0]["messages"][0]["content"] if "image_url" in part]
    assert len(pictures) == 1 and pictures[0].startswith("data:image/png;base64,iVBOR")
    assert set(_Service.keys) == {"Bearer abc"}


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [("SERVICE/other", [503], "no chat completion"), ("SERVICE/v1", [401, 401], r"does not answer \(status 401"),
     ("http://127.0.0.1:9/v1", [], "does not answer"), ("file:///etc", [], "must begin with http")],
)  # fmt: skip
def test_an_endpoint_that_fails_is_one_line(
    service: str, url: str, status: list[int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    _Service.status = status
    with pytest.raises(UserError, match=message) as error:
        Endpoint(url.replace("SERVICE", service), "m").propose([RED])
    assert "\n" not in str(error.value)
    assert 401 not in status or len(status) == 1  # a refusal is not asked again


def test_answers_are_read_as_they_come() -> None:
    assert [yes_or_no(text) for text in ("Yes.", "no", "**No**", "perhaps")] == [1.0, 0.0, 0.0, 0.5]
    assert one_line("\n  'a  red\tplanet.'\nmore") == "a red planet"
