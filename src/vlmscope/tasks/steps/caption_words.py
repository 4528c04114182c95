"""Which words of a caption are read from the picture, and which from the text so far?

Two answers. The attribution graph of a whole generated caption says of each word how much of the influence that ends
at tokens ends at the picture's, the prompt's and the caption's own earlier ones. And a caption that was begun about
another scene is laid beside the picture: whose word comes next, the picture's or the text's?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vlmscope.attribution.influence import end_sources
from vlmscope.attribution.targets import choose_targets
from vlmscope.attribution.trace import attribute
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import Scene
from vlmscope.interventions.run import generate_batch
from vlmscope.metrics.causal import bootstrap_mean, bootstrap_rate
from vlmscope.models.conversations import continued
from vlmscope.replacement.model import build_replacement
from vlmscope.tasks.steps.intervene import rate_metrics

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

SOURCES = ("picture", "prompt", "text so far")
REST = "other words"


@dataclass(frozen=True)
class Caption:
    """A scene and its generated caption: token `ids`, the `words` that they are, and which facts the words name.

    `slots[i]` is the fact that word i names, or `REST`.
    """

    scene: Scene
    ids: list[int]
    words: tuple[str, ...]
    slots: tuple[str, ...]


@dataclass(frozen=True)
class WordSources:
    """Of one fact's word in captions of one kind of scene: mean shares of influence by `SOURCES`, and whose word comes
    when the text so far is another scene's (None where nothing of it differs).
    """

    kind: str
    slot: str
    shares: tuple[Rate, ...]
    error: Rate
    bias: Rate
    follows_picture: Rate | None = None
    follows_text: Rate | None = None


def run(bench: Bench) -> None:
    """Leaves a `WordSources` for each kind and fact in `bench.records`; metrics under captions/."""
    config = bench.cfg.captions
    rows: list[WordSources] = []
    shown: list[dict] = []
    for kind in config.kinds:
        captions, right = captions_of(bench, kind, max(config.graphs, config.conflicts))
        bench.metrics |= rate_metrics(f"captions/{kind}/right", bootstrap_rate(right))
        if not captions:
            raise UserError(f"captions.kinds: none of the captions of {kind} is right, so its words say nothing")
        traced = shares_of(bench, kind, captions[: config.graphs], shown)
        conflicts = conflicts_of(bench, captions[: config.conflicts])
        for slot, values in sorted(traced.items(), key=lambda found: found[0] == REST):
            row = word_sources(kind, slot, np.array(values), conflicts.get(slot))
            bench.metrics |= source_metrics(row)
            rows.append(row)
    write_json(bench.run_dir / "caption_words.json", {"captions": shown})
    bench.records["caption_words"] = {"rows": rows, "shown": shown}


def captions_of(bench: Bench, kind: str, count: int) -> tuple[list[Caption], list[bool]]:
    """The rightly captioned of `count` test scenes, and which are."""
    config = bench.cfg.captions
    scenes = [make_scene("test", kind, index, config.seed) for index in range(count)]
    if any(scene.image is None for scene in scenes):
        raise UserError(f"captions.kinds: scenes of {kind!r} have no pictures; choose planets, digits, shapes, hands")
    pictures = [Image.fromarray(scene.image) for scene in scenes if scene.image is not None]
    found: list[Caption] = []
    right = []
    for start in range(0, count, 64):
        some = bench.inputs(pictures[start : start + 64], config.prompt)
        for scene, ids in zip(scenes[start:], generate_batch(bench.vlm.adapter, some, config.max_new_tokens),
                              strict=False):  # fmt: skip
            words = tuple(bench.vlm.tokenizer.decode([token], skip_special_tokens=True).strip() for token in ids)
            words = words[:-1] if words and not words[-1] else words  # the end of the turn
            answer = next(q.answer for q in scene.questions if q.group == "caption").split()
            right.append(list(words) == answer)
            if right[-1]:
                found.append(Caption(scene, ids[: len(words)], words, slots_of(scene, words)))
    return found, right


def slots_of(scene: Scene, words: Sequence[str]) -> tuple[str, ...]:
    """The fact that each word of a right caption names; each fact once, in the order of reading."""
    left = {q.group: q.answer for q in scene.questions if q.group not in ("caption", "sum")}
    slots = []
    for word in words:
        # The plural of a shape's name begins with it.
        name = next((n for n, v in left.items() if word == v or (n == "shape" and word.startswith(v))), REST)
        left.pop(name, None)
        slots.append(name)
    return tuple(slots)


def shares_of(bench: Bench, kind: str, captions: Sequence[Caption], shown: list[dict]) -> dict[str, list[np.ndarray]]:
    """Slot -> for each caption [5]: shares of `SOURCES` among tokens, then of errors and constants among everything."""
    found: dict[str, list[np.ndarray]] = {}
    for caption in tqdm(captions, desc=f"graphs of captions: {kind}", unit="graph"):
        assert caption.scene.image is not None
        inputs = bench.vlm.prepare(bench.cfg.captions.prompt, [Image.fromarray(caption.scene.image)])
        config = replace(bench.cfg.attribution, answer=" ".join(caption.words), weights="uniform")
        whole = continued(bench.vlm.adapter, inputs, caption.ids[:-1], bench.vlm.tokenizer)
        replacement = build_replacement(bench.scope, whole)
        targets = choose_targets(replacement, config, bench.vlm.tokenizer, tuple(caption.ids))
        graph = attribute(replacement, config, bench.vlm.tokenizer, bench.vlm.name, targets)
        sources = end_sources(graph)
        groups = np.where(whole.is_image, 0, np.where(np.arange(len(whole)) < len(inputs), 1, 2))
        shares = sources.of_tokens(groups, len(SOURCES))
        rows = np.concatenate([shares, sources.error[:, None], sources.bias[:, None]], 1)
        shown.append({"kind": kind, "words": list(caption.words), "picture": rows[:, 0].round(4).tolist()})
        by_slot: dict[str, list[np.ndarray]] = {}
        for slot, row in zip(caption.slots, rows, strict=True):
            by_slot.setdefault(slot, []).append(row)
        for slot, some in by_slot.items():
            found.setdefault(slot, []).append(np.mean(some, axis=0))
    return found


def conflicts_of(bench: Bench, captions: Sequence[Caption]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Slot -> whether the word that comes is the picture's, and whether it is the text's, where these differ.

    The picture is a caption's own, the text so far that of the next caption whose word in that slot is another one.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for slot in dict.fromkeys(slot for slot in captions[0].slots if slot != REST):
        cases: dict[int, list[tuple[Caption, Caption]]] = {}
        for i, own in enumerate(captions):
            for other in [*captions[i + 1 :], *captions[:i]]:
                at = other.slots.index(slot) if slot in other.slots else -1
                if (
                    at > 0
                    and slot in own.slots
                    and word(own, slot) != word(other, slot)
                    and own.slots[: at + 1] == (other.slots[: at + 1])
                ):
                    cases.setdefault(at, []).append((own, other))
                    break
        picture, text = [], []
        for at, pairs in cases.items():
            said = next_tokens(bench, pairs, at)
            picture += [token == own.ids[at] for token, (own, _) in zip(said, pairs, strict=True)]
            text += [token == other.ids[at] for token, (_, other) in zip(said, pairs, strict=True)]
        if picture:
            found[slot] = (np.array(picture), np.array(text))
    return found


def word(caption: Caption, slot: str) -> int:
    """The token in a slot."""
    return caption.ids[caption.slots.index(slot)]


@torch.no_grad()
def next_tokens(bench: Bench, pairs: Sequence[tuple[Caption, Caption]], at: int) -> list[int]:
    """The most probable token after the first `at` tokens of the second caption, beside the first one's picture."""
    inputs = []
    for own, other in pairs:
        assert own.scene.image is not None
        prompt = bench.vlm.prepare(bench.cfg.captions.prompt, [Image.fromarray(own.scene.image)])
        inputs.append(continued(bench.vlm.adapter, prompt, other.ids[:at], bench.vlm.tokenizer))
    logits = bench.scope.forward(bench.scope.batch(inputs))
    return logits.argmax(-1).tolist()


def word_sources(
    kind: str, slot: str, values: np.ndarray, conflict: tuple[np.ndarray, np.ndarray] | None
) -> WordSources:
    """Means over captions, values [n, 5], and over conflicts."""
    means = [bootstrap_mean(column) for column in values.T]
    picture, text = (None, None) if conflict is None else (bootstrap_rate(hits) for hits in conflict)
    return WordSources(kind, slot, tuple(means[:3]), means[3], means[4], picture, text)


def source_metrics(row: WordSources) -> dict[str, float]:
    """`captions/planets/colour/from_picture` and the like."""
    key = f"captions/{row.kind}/{row.slot.replace(' ', '_')}"
    metrics: dict[str, float] = {}
    for name, rate in zip(SOURCES, row.shares, strict=True):
        metrics |= rate_metrics(f"{key}/from_{name.replace(' ', '_')}", rate)
    metrics |= rate_metrics(f"{key}/from_errors", row.error)
    for name, rate in (("picture", row.follows_picture), ("text", row.follows_text)):
        if rate is not None:
            metrics |= rate_metrics(f"{key}/follows_{name}", rate)
    return metrics
