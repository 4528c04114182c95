"""Naming of pictures by artists that training did not have, and facts asked of pictures next to the written names.

Controls: the same question of another picture of the same kind (shuffled) and of a white one (blank). Only facts count
that the text model answers from the written name, so that what is measured is the eyes. Answers are greedy and whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from PIL import Image

from vlmscope.analyses.bench import Bench
from vlmscope.core.records import generator
from vlmscope.data.icons import Relation, on_ground, read_icons, read_relations
from vlmscope.interventions.run import generate_batch
from vlmscope.metrics.rates import share_rate

BATCH = 32


@dataclass
class Settings:
    """The `split` whose pictures are asked, at most `most` of them; `naming` is the prompt that repeats a name."""

    split: str
    naming: str
    relations: list[str]
    most: int


def right(bench: Bench, prompts: Sequence[str], images: Sequence[Image.Image | None], answers: Sequence[str]) -> Any:
    """Whether the greedy answer to each prompt (of a picture, or of text alone) begins with the whole answer."""
    tokenizer = bench.vlm.tokenizer
    wanted = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    asked = [
        bench.vlm.prepare(prompt, [] if image is None else [image])
        for prompt, image in zip(prompts, images, strict=True)
    ]
    said: list[str] = [""] * len(asked)
    hits = [False] * len(asked)
    by_shape: dict[tuple[int, int], list[int]] = {}
    for row, each in enumerate(asked):
        by_shape.setdefault((len(each), len(wanted[row])), []).append(row)
    for (_, length), rows in by_shape.items():
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            for row, ids in zip(some, generate_batch(bench.vlm.adapter, [asked[r] for r in some], length), strict=True):
                said[row], hits[row] = tokenizer.decode(ids), ids[:length] == wanted[row]
    return pd.DataFrame({"said": said, "right": hits})


def analyse(bench: Bench) -> dict[str, float]:
    """Write naming, named, relations, known and facts (Parquet); metrics `naming/<kind>` and `relation/<name>/<of>`."""
    own = bench.analysis
    table = read_icons(own.split)
    order = generator(bench.cfg.seed, "eyes accuracy").permutation(len(table))[: own.most]
    table = table.iloc[sorted(order)].reset_index(drop=True)
    table["image"] = [on_ground(image) for image in table.image]
    table["other"] = shuffled(table, bench.cfg.seed)
    bench.recorded("test", f"{own.split} icons", list(table.image))
    return naming(bench, table) | relations(bench, table, read_relations(own.relations))


def shuffled(table: pd.DataFrame, seed: int) -> list[Image.Image]:
    """For each picture another concept's of the same kind, if there is one."""
    rng, others = generator(seed, "shuffled"), []
    for _, row in table.iterrows():
        pool = table[(table.kind == row.kind) & (table.label != row.label)]
        others.append(row.image if pool.empty else pool.image.iloc[int(rng.integers(len(pool)))])
    return others


def naming(bench: Bench, table: pd.DataFrame) -> dict[str, float]:
    """Names of pictures, next to those of other pictures of the kind, and to written names."""
    prompt, names = Relation(bench.analysis.naming, {}), [f" {label}" for label in table.label]
    written = sorted(set(table.label))
    known = right(bench, [prompt.asked(c) for c in written], [None] * len(written), [f" {c}" for c in written]).right
    metrics = share_rate(known.to_numpy()).metrics("naming/text")
    asked, parts, rows = prompt.asked(), [], []
    for of in ("image", "other"):
        found = right(bench, [asked] * len(table), list(table[of]), names)
        parts.append(table[["kind", "artist", "label"]].assign(pictures=of.replace("image", "own"), **found))
    every: Any = pd.concat(parts)
    bench.write_table("naming", every)
    seen = every[every.pictures == "own"]
    groups = {"flags": seen.kind == "country", "other": ~seen.kind.isin(["country", "planet"])}
    groups |= {str(kind): seen.kind == kind for kind in sorted(set(seen.kind) - {"country"})}
    groups |= {str(artist): seen.artist == artist for artist in sorted(set(seen.artist))}
    for name, mask in groups.items():
        part, control = seen[mask], every[(every.pictures == "other")][mask.to_numpy()]
        if len(part):
            rate = share_rate(part.right.to_numpy(), groups=list(part.label))
            metrics |= rate.metrics(f"naming/{name}")
            row = {"pictures of": name, "n": len(part), "named rightly": rate.value, "low": rate.ci_low}
            rows.append(row | {"high": rate.ci_high, "shuffled": float(control.right.mean())})
    bench.write_table("named", pd.DataFrame(rows))
    return metrics


def relations(bench: Bench, table: pd.DataFrame, asked: dict[str, Relation]) -> dict[str, float]:
    """Facts that the text model knows, asked of pictures, of names, of other pictures, and of a white one."""
    white = Image.new("RGB", table.image[0].size, (255, 255, 255))
    facts, parts, rows, metrics = [], [pd.DataFrame(columns=["relation", "asked of", "label", "right"])], [], {}
    for name, relation in asked.items():
        concepts, answers = list(relation.answers), list(relation.answers.values())
        found = right(bench, [relation.asked(c) for c in concepts], [None] * len(concepts), answers)
        facts.append(pd.DataFrame({"relation": name, "concept": concepts, "answer": answers}).join(found))
        known = {concept for concept, hit in zip(concepts, found.right, strict=True) if hit}
        metrics |= share_rate(found.right.to_numpy()).metrics(f"relation/{name}/text")
        shown = table[table.label.isin(known)].reset_index(drop=True)
        if shown.empty:
            continue
        right_answers = [relation.answers[label] for label in shown.label]
        sources = {"picture": list(shown.image), "shuffled": list(shown.other), "blank": [white] * len(shown)}
        row: dict[str, Any] = {"relation": name, "facts": len(concepts), "known from the name": len(known)}
        for of, images in sources.items():
            said = right(bench, [relation.asked()] * len(shown), images, right_answers)
            labels = {"relation": name, "asked of": of, "label": shown.label, "artist": shown.artist}
            parts.append(said.assign(**labels))
            rate = share_rate(said.right.to_numpy(), groups=list(shown.label))
            metrics |= rate.metrics(f"relation/{name}/{of}")
            row |= {of: rate.value, **({"low": rate.ci_low, "high": rate.ci_high} if of == "picture" else {})}
        rows.append(row | {"pictures": len(shown)})
    for file, found in (("facts", pd.concat(facts)), ("relations", pd.concat(parts)), ("known", pd.DataFrame(rows))):
        bench.write_table(file, found)
    return metrics
