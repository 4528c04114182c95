"""Training data that a model with eyes writes itself: texts, and continuations of questions about pictures and names.

The transcoders of `assets/gemma3_270m_eyes_transcoders` learn from these. No text of others is needed, and the
tokens are those that the model meets when it answers. Texts are sampled at temperature 1 from the first token on.
Each question of `relations.yaml` is asked of training pictures and of written names, and continued greedily.

    python -m vlmscope.training.sampled FOLDER_OF_EYES OUT

writes `OUT/train.jsonl` with its pictures, for data=folder data.path=OUT (docs/bring_your_own.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vlmscope.core.artifacts import atomic_folder, write_text
from vlmscope.core.records import derive, generator
from vlmscope.data.icons import on_ground, read_icons, read_relations
from vlmscope.models.eyes import joined_folder
from vlmscope.models.loading import VLM, load_vlm

TEXTS, LENGTH = 128, 128  # sampled texts, and tokens of each
QUESTIONS, ANSWER = 1000, 8  # questions of pictures and as many of names; tokens of a continuation
_BATCH = 64


@torch.no_grad()
def continued(vlm: VLM, rows: Sequence[dict[str, Tensor]], tokens: int, sample: bool) -> list[str]:
    """The model's continuation of inputs of one length, each a forward's arguments of batch size 1."""
    together = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    ids = vlm.model.generate(**together, max_new_tokens=tokens, do_sample=sample, **plain)
    start = together["input_ids"].shape[1]
    return [vlm.tokenizer.decode(row[start:], skip_special_tokens=True) for row in ids]


def texts(vlm: VLM, count: int, length: int, seed: int) -> Iterator[dict[str, Any]]:
    """Texts that the model writes after its first token."""
    first = torch.tensor([[vlm.tokenizer.bos_token_id]])
    row = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    for start in tqdm(range(0, count, _BATCH), desc="texts", unit="batch"):
        torch.manual_seed(derive(seed, "sampled", start))
        for text in continued(vlm, [row] * min(_BATCH, count - start), length, sample=True):
            if text.strip():
                yield {"text": text}


def questions(vlm: VLM, count: int, folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Questions of training pictures, which are written into `folder`, and of their written names, with answers."""
    table, relations = read_icons("train"), list(read_relations().values())
    rng = generator(seed, "sampled questions")
    asked: dict[int, list[tuple[dict[str, Any], dict[str, Tensor]]]] = {}
    for number in rng.permutation(len(table))[:count]:
        row = table.iloc[int(number)]
        fitting = [relation for relation in relations if row.label in relation.answers] or relations
        relation = fitting[int(rng.integers(len(fitting)))]
        ground = tuple(int(value) for value in rng.integers(256, size=3)) if rng.random() < 0.5 else (255, 255, 255)
        picture = on_ground(row.image, ground)
        name = f"pictures/{number}.png"
        picture.save(folder / name)
        seen = vlm.prepare(relation.asked(), [picture])
        read = vlm.prepare(relation.asked(row.label))
        asked.setdefault(len(seen), []).append(({"images": [name], "user": relation.asked()}, seen.tensors))
        asked.setdefault(-len(read), []).append(({"user": relation.asked(row.label)}, read.tensors))
    for rows in tqdm(asked.values(), desc="questions", unit="length"):
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            answers = continued(vlm, [tensors for _, tensors in some], ANSWER, sample=False)
            for (facts, _), answer in zip(some, answers, strict=True):
                pictures = {"images": facts["images"]} if "images" in facts else {}
                yield {**pictures, "texts": [{"user": facts["user"], "assistant": answer}]}


def write_sampled(eyes: Path, out: Path, seed: int = 0, count: int = TEXTS, asked: int = QUESTIONS) -> None:
    """Write the folder of training data of a model with eyes."""
    vlm = load_vlm(joined_folder(eyes), dtype="bfloat16")  # half the time
    with atomic_folder(out) as folder:
        (folder / "pictures").mkdir()
        lines = [*texts(vlm, count, LENGTH, seed), *questions(vlm, asked, folder, seed)]
        write_text(folder / "train.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    write_sampled(Path(sys.argv[1]), Path(sys.argv[2]))
