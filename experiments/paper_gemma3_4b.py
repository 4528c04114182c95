"""Steered captions of the paper's concepts, and what published activation statistics say of the circuits' features."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from vlmscope.analyses.bench import Bench
from vlmscope.circuits.cases import bystanders
from vlmscope.circuits.circuit import load_circuit
from vlmscope.circuits.experiment import Declared
from vlmscope.core.study import IMAGE
from vlmscope.data.images import png_bytes
from vlmscope.features.published import COUNTS, statistics_folder
from vlmscope.interventions.run import whole_answers, without_special
from vlmscope.interventions.trials import Setting, Trial
from vlmscope.metrics.rates import share_rate


@dataclass
class Settings:
    """Captions answer `prompt`; `words` name a concept in one. `features` of each supernode are looked up."""

    prompt: str
    words: dict[str, list[str]] = field(default_factory=dict)
    pictures: int = 10
    new_tokens: int = 80
    matched: int = 3
    features: int = 8


def check(cfg: Any) -> None:
    """Look for the published statistics before anything is loaded."""
    if cfg.study.published is not None:
        statistics_folder(cfg.study.published, cfg.study.revision)


def named(text: str, words: Sequence[str]) -> bool:
    """Whether a text has one of the words, whatever its case."""
    return any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in words)


def trials(bench: Bench, declared: Declared) -> Iterator[Trial]:
    """Captions. Published statistics are read first: those of another set stop the run before its trials."""
    if bench.cfg.study.published is not None:
        print(f"published statistics: {bench.study.info.items:,} inputs", flush=True)
    return captions(bench, declared)


def captions(bench: Bench, declared: Declared) -> Iterator[Trial]:
    """Captions of a recipient's test pictures under the exchange: do they name the donor, and not the recipient?"""
    settings, scope, steer = bench.analysis, bench.scope, bench.cfg.trials["steer"]
    pairs = dict.fromkeys((each.tags["recipient"], each.tags["donor"]) for each in declared.cases["test"])
    for recipient, donor in pairs:
        own, others = (settings.words.get(concept, []) for concept in (recipient, donor))
        if not own or not others:
            continue
        images = bench.concept_pictures(recipient, "test", settings.pictures)
        inputs = [scope.inputs(settings.prompt, [image]) for image in images]
        before = [text for _, text in whole_answers(scope, inputs, settings.new_tokens)]

        def score(
            _: Sequence[str], answers: Sequence[Sequence[int]], own: list[str] = own, others: list[str] = others
        ) -> dict[str, Any]:
            texts = [scope.vlm.tokenizer.decode(without_special(scope.vlm.tokenizer, ids)) for ids in answers]
            return {"hit": [named(text, others) and not named(text, own) for text in texts]}

        hits = np.array([named(text, others) and not named(text, own) for text in before])
        key = f"captions/{recipient}_{donor}"
        bench.metrics |= share_rate(hits).metrics(f"{key}/before")
        bench.metrics[f"{key}/own_before"] = float(np.mean([named(text, own) for text in before]))
        ids = [f"{recipient} {number}" for number in range(len(images))]
        cases = bystanders(scope, "captions", "caption", inputs, ids).tagged({"recipient": recipient, "donor": donor})
        cases = replace(cases, texts=tuple(before), score=score, pngs=tuple(png_bytes(image, 128) for image in images))
        setting = Setting("captions", "generate", strength=steer.strength or 1.0, matched=settings.matched,
                          new_tokens=settings.new_tokens)  # fmt: skip
        yield Trial("caption", declared.operation(steer, cases, None), [cases], [setting])


def analyse(bench: Bench) -> dict[str, float]:
    """published.parquet: the features of most influence in each supernode, and the tokens that activate them most."""
    columns = ["circuit", "supernode", "feature", "influence"]
    columns += ["fires on", "strongest on pictures", "strongest tokens", "pictures"]
    if bench.cfg.study.published is None:
        bench.write_table("published", pd.DataFrame(columns=columns))
        return {}
    study, rows = bench.study, []
    fires = pq.read_table(study.path / COUNTS).to_pandas().set_index(["layer", "feature"]).tokens
    for folder in sorted((bench.run_dir / "circuits").iterdir()):
        for name, node in load_circuit(folder).supernodes.items():
            for member in sorted(node.features, key=lambda m: -m.influence)[: bench.analysis.features]:
                record, feature = study.feature(member.feature), member.feature
                shown = [study.view(example) for example in record.examples[:5]]
                pictures = {view.item.origin for view in shown if (view.item.kinds == IMAGE).any()}
                tokens = [view.item.tokens[view.example.position] for view in shown]
                of_all = fires.get((feature.layer, feature.index), 0) / (study.info.settings["tokens"] or np.nan)
                on_pictures = record.fired["image"] / max(record.positions_fired, 1)
                facts = (str(feature), member.influence, of_all, on_pictures, " | ".join(tokens))
                rows.append((folder.name, name, *facts, "; ".join(sorted(pictures)[:3])))
    table = pd.DataFrame(rows, columns=columns)
    bench.write_table("published", table)
    return {"published/features": float(len(table)), "published/silent": float(np.mean(table["fires on"] == 0))}
