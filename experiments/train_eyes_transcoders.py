"""Training data for transcoders of a model with eyes: texts that it writes itself, and facts about pictures and names.

No text of others is needed. Texts are sampled at temperature 1 from the first token on. Each question of
`relations.yaml` is asked of training pictures and of written names, with its answer.

    python experiments/train_eyes_transcoders.py FOLDER_OF_EYES OUT

writes `OUT/train.jsonl`, and `OUT/val.jsonl` of other artists' pictures, for data=folder data.path=OUT
(docs/bring_your_own.md).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vlmscope.core.artifacts import atomic_folder, write_text
from vlmscope.core.errors import UserError
from vlmscope.core.records import derive, generator
from vlmscope.data.icons import on_ground, read_icons, read_relations
from vlmscope.models.eyes import joined_folder
from vlmscope.models.loading import VLM, load_vlm

LENGTH = 128  # tokens of a sampled text
# File -> split of the pictures, sampled texts, and questions of pictures, with as many of names.
FILES = {"train": ("train", 640, 6000), "val": ("test", 16, 150)}
_BATCH = 128  # texts at once


@torch.no_grad()
def texts(vlm: VLM, count: int, length: int, seed: int) -> Iterator[dict[str, Any]]:
    """Texts that the model writes after its first token."""
    for start in tqdm(range(0, count, _BATCH), desc="texts", unit="batch"):
        torch.manual_seed(derive(seed, "sampled", start))
        first = torch.full((min(_BATCH, count - start), 1), vlm.tokenizer.bos_token_id)
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ids = vlm.model.generate(
            input_ids=first, attention_mask=torch.ones_like(first), max_new_tokens=length, **settings
        )
        written = (vlm.tokenizer.decode(row[1:], skip_special_tokens=True) for row in ids)
        yield from ({"text": text} for text in written if text.strip())


def questions(split: str, count: int, folder: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Questions of a split's pictures, which are written into `folder`, and of their written names, with answers."""
    table, relations = read_icons(split), list(read_relations().values())
    table = table[table.label.isin({label for relation in relations for label in relation.answers})]
    rng = generator(seed, "sampled questions")
    for number, which in enumerate(rng.integers(len(table), size=count)):
        row = table.iloc[int(which)]
        fitting = [relation for relation in relations if row.label in relation.answers]
        relation = fitting[int(rng.integers(len(fitting)))]
        red, green, blue = (int(value) for value in rng.integers(256, size=3))
        ground = (red, green, blue) if rng.random() < 0.5 else (255, 255, 255)
        name, answer = f"pictures/{split}_{number}.png", relation.answers[row.label]
        on_ground(row.image, ground).save(folder / name)
        yield {"images": [name], "texts": [{"user": relation.asked(), "assistant": answer}]}
        yield {"texts": [{"user": relation.asked(row.label), "assistant": answer}]}


def write_sampled(eyes: Path, out: Path, seed: int = 0) -> None:
    """Write the folder of training data of a model with eyes."""
    vlm = load_vlm(joined_folder(eyes), dtype="bfloat16")  # half the time
    with atomic_folder(out) as folder:
        (folder / "pictures").mkdir()
        for number, (file, (split, count, asked)) in enumerate(FILES.items()):
            lines = [*texts(vlm, count, LENGTH, seed + number), *questions(split, asked, folder, seed + number)]
            write_text(folder / f"{file}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("eyes", type=Path, help="folder of the model's eyes, such as assets/gemma3_270m_eyes")
    parser.add_argument("out", type=Path, help="folder to write")
    given = parser.parse_args()
    try:
        write_sampled(given.eyes, given.out)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
