"""An explainer behind an OpenAI-compatible chat endpoint, by the standard library alone. The key is never written."""

from __future__ import annotations

import base64
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from vlmscope.core.errors import UserError
from vlmscope.features.labels.explainer import JUDGE, PROPOSE, Shown, yes_or_no

_AGAIN = {408, 429, 500, 502, 503, 504}


class Endpoint:
    """`POST <url>/chat/completions`, pictures as data addresses."""

    def __init__(
        self, url: str, model: str, key_variable: str = "OPENAI_API_KEY", timeout: float = 60.0, retries: int = 2
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: up to `/v1`.
            model: what the service calls the model.
            key_variable: the environment variable with the key; unset, none is sent.
            timeout: seconds of one request.
            retries: more tries after an answer that says "later", or none.
        """
        if not url.startswith(("http://", "https://")):
            raise UserError(f"task.url={url}: it must begin with http:// or https://")
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.timeout, self.retries = timeout, retries

    @property
    def name(self) -> str:
        """The model's name, as a file's."""
        return re.sub(r"[^\w-]+", "_", self.model)

    def propose(self, examples: Sequence[Shown]) -> str:
        """One request with all examples."""
        content: list[dict[str, Any]] = [{"type": "text", "text": PROPOSE}]
        for number, example in enumerate(examples, start=1):
            content += [{"type": "text", "text": f"Example {number}: {example.text}"}, *_pictures(example)]
        return self._ask(content, 40)

    def judge(self, label: str, items: Sequence[Shown]) -> list[float]:
        """One request an item, so that no answer hangs on another item."""
        ask = JUDGE.format(label=label)
        return [
            yes_or_no(self._ask([{"type": "text", "text": f"{ask}\n{item.text}"}, *_pictures(item)], 5))
            for item in items
        ]

    def _ask(self, content: list[dict[str, Any]], max_tokens: int) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        answer = self._sent(request)
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.url} answered with what is no chat completion ({answer[:60]!r}); check task.url"
            ) from error

    def _sent(self, request: urllib.request.Request) -> bytes:
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2**attempt, 8.0))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                reason = f"status {error.code} {error.reason}"
                if error.code not in _AGAIN:
                    break
            except (OSError, ValueError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(
            f"{self.url} does not answer ({reason}); check task.url, task.name_at_url, and the key in "
            f"{self.key_variable}"
        )


def _pictures(item: Shown) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"}}
        for png in item.pictures
    ]
