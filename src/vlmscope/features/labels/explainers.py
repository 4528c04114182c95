"""Explainers that are asked for a label: an endpoint, a local model, and what they are asked.

What an outside explainer is asked and what it answers: a protocol, implemented by `endpoint` and `local`.

An explainer behind an OpenAI-compatible chat endpoint, by the standard library alone. The key is never written.

An explainer that is a local model, of any family that the project reads.

A label from an outside explainer, scored as automatic ones are: on items that it was not shown.
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
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, generator
from vlmscope.data.images import decode_image, png_bytes
from vlmscope.features.labels.facts import ItemFacts, KnownItems, known_items, scoring_half
from vlmscope.features.labels.label import NONE, Label, detection
from vlmscope.features.study.items import StudyItems
from vlmscope.features.study.records import StudyFolder
from vlmscope.features.study.tables import item_hash
from vlmscope.models.conversations import greedy_answer
from vlmscope.models.loading import VLM

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


@dataclass(frozen=True)
class Shown:
    """One item for an explainer: its words, and its pictures as PNG bytes."""

    text: str
    pictures: tuple[bytes, ...] = ()


class Explainer(Protocol):
    """Proposes labels from examples and judges items by a label. Both may raise a `UserError`."""

    @property
    def name(self) -> str:
        """What its set of labels is called: letters, digits, `-` and `_`."""
        ...

    def propose(self, examples: Sequence[Shown]) -> str:
        """A label for what these examples, where the feature fires, have in common; "" when it has none."""
        ...

    def judge(self, label: str, items: Sequence[Shown]) -> list[float]:
        """For each item from 0 to 1, how sure it is that the feature fires on it; 0.5 when it does not say."""
        ...


def one_line(answer: str) -> str:
    """An answer as a label: its first line that says something, without quotes and full stop."""
    first = next((line for line in answer.splitlines() if line.strip()), "")
    return " ".join(first.split()).strip(" \"'.*")[:MOST_CHARACTERS]


def yes_or_no(answer: str) -> float:
    """1 for an answer that begins with yes, 0 for no, 0.5 for any other."""
    word = answer.strip().lower().lstrip("\"'*")
    return 1.0 if word.startswith("yes") else 0.0 if word.startswith("no") else 0.5


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


class LocalExplainer:
    """Labels are generated greedily; an item is judged by the probabilities of "yes" and of "no" as the next token."""

    def __init__(self, vlm: VLM, max_tokens: int = 24) -> None:
        """Look up the two answers.

        Raises:
            UserError: the tokenizer does not tell them apart.
        """
        self.vlm, self.max_tokens = vlm, max_tokens
        yes, no = self._first_tokens("yes"), self._first_tokens("no")
        self.yes, self.no = yes - no, no - yes
        if not self.yes or not self.no:
            raise UserError(
                f"{vlm.name} has no tokens of its own for yes and no, so it cannot judge; use another model"
            )

    @property
    def name(self) -> str:
        """The model's name, as a file's."""
        return re.sub(r"[^\w-]+", "_", self.vlm.name)

    def propose(self, examples: Sequence[Shown]) -> str:
        """One prompt with all examples and their pictures."""
        lines = [f"Example {number}: {example.text}" for number, example in enumerate(examples, start=1)]
        pictures = [picture for example in examples for picture in _opened(example)]
        inputs = self.vlm.prepare("\n".join([PROPOSE, *lines]), pictures)
        ids = greedy_answer(self.vlm.adapter, inputs, self.max_tokens)
        return self.vlm.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def judge(self, label: str, items: Sequence[Shown]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) for each item."""
        found = []
        for item in items:
            inputs = self.vlm.prepare(f"{JUDGE.format(label=label)}\n{item.text}", _opened(item))
            logits = self.vlm.adapter.next_logits(inputs.tensors)[0].float()
            yes, no = (torch.logsumexp(logits[sorted(ids)], 0) for ids in (self.yes, self.no))
            found.append(float(torch.sigmoid(yes - no)))
        return found

    def _first_tokens(self, word: str) -> set[int]:
        """The first token of the word, as it may be spelt at the beginning of an answer."""
        tokenizer, found = self.vlm.tokenizer, set()
        for spelt in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
            ids = tokenizer.encode(spelt, add_special_tokens=False)
            if ids and ids[0] != tokenizer.unk_token_id:
                found.add(ids[0])
        return found


def _opened(item: Shown) -> list[Image]:
    return [decode_image(png, "a picture for the explainer") for png in item.pictures]


SIDE = 512  # pixels of a picture that is sent


@dataclass(frozen=True)
class Material:
    """What explainers are shown of a study.

    Attributes:
        study: the study.
        shown: examples from which a label is proposed: the strongest.
        judged: items on which it fires and items on which it does not, each, by which the label is scored.
        seed: draws these.
    """

    study: StudyFolder
    shown: int
    judged: int
    seed: int = 0

    @cached_property
    def items(self) -> ItemFacts:
        """The items in the order of their hashes, and which are for scoring; no predicates."""
        return bare_items(self.study.items)

    def known(self, layer: int) -> KnownItems:
        """The rows of a layer."""
        return known_items(self.study, layer, self.study.examples(layer), self.items)

    def marked(self, feature: FeatureId) -> list[Shown]:
        """The strongest examples on items for proposing, with where they fire."""
        record = self.study.feature(feature)
        own = [one for one in record.group("top") if not self.items.half[self.items.places(np.array([one.item]))[0]]]
        out = []
        for example in own[: self.shown]:
            view = self.study.view(example)
            peak = example.position
            words = [
                f"<<{token}>>" if at == peak else token
                for at, token in enumerate(view.item.tokens)
                if view.item.kinds[at] != 1
            ]
            out.append(Shown(" ".join(words), self._pictures(example.item)))
        return out

    def plain(self, item: int) -> Shown:
        """An item as it is."""
        return Shown(self.study.items[item].caption, self._pictures(item))

    def _pictures(self, item: int) -> tuple[bytes, ...]:
        return tuple(png_bytes(picture, SIDE) for picture in self.study.pictures(self.study.items[item]))


def bare_items(items: StudyItems) -> ItemFacts:
    """Items without predicates: their order and halves are those of `item_facts`."""
    ids = items.ids[np.argsort(item_hash(items.ids), kind="stable")]
    return ItemFacts(ids, scoring_half(ids), (), np.zeros((len(ids), 0), dtype=np.float32))


def explain(explainer: Explainer, material: Material, feature: FeatureId) -> Label:
    """Ask for a label, and score it on held-out items of both kinds; without text when nothing can be shown.

    Raises:
        UserError: the explainer does not answer.
    """
    shown = material.marked(feature)
    if not shown:
        return NONE
    text = one_line(explainer.propose(shown))
    if not text:
        raise UserError(f"{explainer.name} gave no label for {feature}; try again, or another model")
    known = material.known(feature.layer)
    rows = known.rows(feature.index)
    drawn = known.item[rows][known.drawn[rows]]
    wanted = known.item[rows][known.drawn[rows] & known.positive[rows]]
    scoring = np.flatnonzero(material.items.half[: int(known.reach[feature.index])])
    rng = generator(material.seed, "judged", str(feature))
    positive = rng.permutation(np.intersect1d(wanted, scoring))[: material.judged]
    others = np.setdiff1d(scoring, wanted if known.strong[feature.index] else drawn)
    negative = rng.permutation(others)[: material.judged]
    items = [material.plain(int(material.items.ids[place])) for place in [*positive, *negative]]
    grades = np.array(explainer.judge(text, items))
    score = detection(grades[: len(positive)], grades[len(positive) :])
    strong = bool(known.strong[feature.index])
    if score is None:
        return Label(text, explainer.name, strong=strong)
    return Label(
        text, explainer.name, "items", score.auroc, score.low, score.high, score.balanced, score.p,
        score.positives, score.negatives, strong=strong,
    )  # fmt: skip
