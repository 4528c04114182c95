"""Labels from an outside explainer: a chat service proposes one from examples, and it is scored.

As automatic labels are, each is scored on items that the explainer was not shown: it judges, item by item, whether the
feature fires. `Endpoint` asks an OpenAI-compatible service, such as a model server on this machine, by the standard
library alone, and its key is never written.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, generator
from vlmscope.core.study import IMAGE, TOP
from vlmscope.data.images import png_bytes
from vlmscope.features.item_facts import ItemFacts, known_items
from vlmscope.features.labels import NONE, Label, detection
from vlmscope.features.study_files import StudyFolder

PROPOSE = (
    "Each example below is an input of a vision-language model on which one feature of it is active. Where it is most "
    "active stands between << and >>; pictures are tinted and framed where it is active on them. Say in one short "
    "phrase, without explanation, what the examples have in common."
)
JUDGE = (
    "A feature of a vision-language model is described as: {label}\n"
    "Is it active on the following input? Answer with one word, yes or no."
)
MOST_CHARACTERS = 120  # of a label
SIDE = 512  # pixels of a picture that is sent
_AGAIN = {408, 429, 500, 502, 503, 504}  # status codes that mean "later"
_TIMEOUT, _RETRIES = 60.0, 2  # seconds of a request, and more tries after an answer that says "later", or none


@dataclass(frozen=True)
class Shown:
    """One item for an explainer: its words, and its pictures as PNG bytes."""

    text: str
    pictures: tuple[bytes, ...] = ()


def one_line(answer: str) -> str:
    """An answer as a label: its first line that says something, without quotes and full stop."""
    first = next((line for line in answer.splitlines() if line.strip()), "")
    return " ".join(first.split()).strip(" \"'.*")[:MOST_CHARACTERS]


def yes_or_no(answer: str) -> float:
    """1 for an answer that begins with yes, 0 for no, 0.5 for any other."""
    word = answer.strip().lower().lstrip("\"'*")
    return 1.0 if word.startswith("yes") else 0.0 if word.startswith("no") else 0.5


class Endpoint:
    """`POST <url>/chat/completions`, pictures as data addresses. Any question may raise a `UserError`."""

    def __init__(self, url: str, model: str, key_variable: str = "OPENAI_API_KEY") -> None:
        """`url` goes up to `/v1`; the key is that of an environment variable, when it is set."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"task.url={url}: it must begin with http:// or https://")
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.name = re.sub(r"[^\w-]+", "_", model)  # of its set of labels

    def propose(self, examples: Sequence[Shown]) -> str:
        """A label for what these examples, where the feature fires, have in common; "" when it has none."""
        lines = [[f"Example {n}: {example.text}", *example.pictures] for n, example in enumerate(examples, start=1)]
        return one_line(self._ask([PROPOSE, *(part for line in lines for part in line)], max_tokens=40))

    def judge(self, label: str, items: Sequence[Shown]) -> list[float]:
        """Whether it says that the feature fires on each item (`yes_or_no`); each item is a question of its own."""
        questions = [[f"{JUDGE.format(label=label)}\n{item.text}", *item.pictures] for item in items]
        return [yes_or_no(self._ask(parts, max_tokens=5)) for parts in questions]

    def _ask(self, parts: Sequence[str | bytes], max_tokens: int) -> str:
        """The answer to a question of texts, and pictures as PNG bytes."""
        content: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                address = f"data:image/png;base64,{base64.b64encode(part).decode('ascii')}"
                content.append({"type": "image_url", "image_url": {"url": address}})
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        answer = self._send(urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers))
        try:
            return str(json.loads(answer)["choices"][0]["message"]["content"] or "")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.url} answered with what is no chat completion ({answer[:60]!r}); check task.url"
            ) from error

    def _send(self, request: urllib.request.Request) -> bytes:
        reason = ""
        for attempt in range(1 + _RETRIES):
            if attempt:
                time.sleep(min(0.5 * 2**attempt, 8.0))
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
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


def explain(
    explainer: Endpoint, study: StudyFolder, feature: FeatureId, shown: int, judged: int, seed: int = 0
) -> Label:
    """Ask for a label, and score it on held-out items of both kinds; without text when nothing can be shown.

    The label is proposed from the `shown` strongest examples of the proposing half, and scored on `judged` drawn items
    on which the feature fires and as many on which it does not.
    """
    facts = ItemFacts.without_predicates(study.items)

    def pictures(item: int) -> tuple[bytes, ...]:
        return tuple(png_bytes(picture, SIDE) for picture in study.pictures(study.items[item]))

    examples = []
    strongest = study.feature(feature).group(TOP)
    held_out = facts.half[facts.places(np.array([example.item for example in strongest], np.int64))]
    strongest = [example for example, scored in zip(strongest, held_out.tolist(), strict=True) if not scored]
    for example in strongest[:shown]:
        item = study.items[example.item]
        text = np.flatnonzero(item.kinds != IMAGE).tolist()
        words = [f"<<{item.tokens[i]}>>" if i == example.position else item.tokens[i] for i in text]
        examples.append(Shown(" ".join(words), pictures(example.item)))
    if not examples:
        return NONE
    label = explainer.propose(examples)
    if not label:
        raise UserError(f"{explainer.name} gave no label for {feature}; try again, or another model")
    known = known_items(study, feature.layer, study.examples(feature.layer), facts)
    rows, strong = known.rows(feature.index), bool(known.strong[feature.index])
    drawn = known.item[rows][known.drawn[rows]]
    firing = known.item[rows][known.drawn[rows] & known.positive[rows]]
    scoring = np.flatnonzero(facts.scoring[: int(known.reach[feature.index])])
    rng = generator(seed, "judged", str(feature))
    positive = rng.permutation(np.intersect1d(firing, scoring))[:judged]
    negative = rng.permutation(np.setdiff1d(scoring, firing if strong else drawn))[:judged]
    ids = facts.ids[np.concatenate([positive, negative])].tolist()
    grades = np.array(explainer.judge(label, [Shown(study.items[item].caption, pictures(item)) for item in ids]))
    score = detection(grades[: len(positive)], grades[len(positive) :])
    if score is None:
        return Label(label, explainer.name, strong=strong)
    return Label(label, explainer.name, "items", **vars(score), strong=strong)
