"""An explainer that is a local model, of any family that the project reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from PIL.Image import Image

from vlmscope.core.errors import UserError
from vlmscope.data.images import decode_image
from vlmscope.features.labels.explainer import JUDGE, PROPOSE, Shown
from vlmscope.models.answers import greedy_answer
from vlmscope.models.loading import VLM


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
