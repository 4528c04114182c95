"""Settings of data sources and pairs: plain records, free of torch, for Hydra.

Settings of one source of samples: a plain record, free of torch and of `datasets`, so that Hydra can register it.

Settings of counterfactual pairs: a plain record, so that Hydra can register it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vlmscope.core.errors import UserError
from vlmscope.core.records import CAPTION_REQUEST

KINDS = ("folder", "hf_text", "hf_image_label", "hf_cauldron", "shards", "orrery")
ORRERY_STREAMS = ("text", "captions", "questions", "dialogues")


@dataclass
class SourceConfig:
    """Where samples come from and how much of a mix they are (schemas: docs/data.md).

    Attributes:
        kind: one of `KINDS`.
        path: a local folder: what `Dataset.save_to_disk` wrote, Parquet files, our shards, or one with `train.jsonl`.
        hub: a data set of the Hugging Face hub, streamed, where `path` is not given.
        revision: its commit, 40 hexadecimal digits.
        subsets: configurations of a hub data set, or folders inside `path`, which take turns; none takes the default.
        split: which split is trained on.
        val_split: which one is validated on; None holds `data.val_share` of `split` out.
        weight: its share of the tokens, relative to the other sources.
        repeat: start again when it ends; else the other sources go on without it.
        limit: use the first so many samples only.
        text: column of texts (`hf_text`).
        image, label: columns of pictures and of their class numbers or names (`hf_image_label`).
        caption: column of captions, instead of `label`.
        templates: what is made of a label; each picture gets one of them.
        request: what a caption answers.
        images, texts: columns of pictures (a list, or one; None: there are none) and of conversations (`hf_cauldron`).
        stream: of `shards` the name of a source that was written; of `orrery` one of `ORRERY_STREAMS`.
    """

    kind: str = "folder"
    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    subsets: list[str] = field(default_factory=list)
    split: str = "train"
    val_split: str | None = None
    weight: float = 1.0
    repeat: bool = False
    limit: int | None = None
    text: str = "text"
    image: str = "image"
    label: str = "label"
    caption: str | None = None
    templates: list[str] = field(default_factory=lambda: ["a photo of a {label}."])
    request: str = CAPTION_REQUEST
    images: str | None = "images"
    texts: str = "texts"
    stream: str | None = None


def check_source(name: str, source: SourceConfig) -> None:
    """Refuse settings that cannot work, before anything is opened.

    Raises:
        UserError: with the key and what to do.
    """
    key = f"data.sources.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # it becomes part of file names and of metrics' names
        raise UserError(f"{key}: name a source with letters, digits, _ and - only")
    if source.kind not in KINDS:
        raise UserError(f"{key}.kind={source.kind}: no such kind; choose one of {', '.join(KINDS)}")
    if not 0 < source.weight < float("inf"):
        raise UserError(f"{key}.weight={source.weight}: a weight must be positive; to leave a source out: ~{key}")
    if source.limit is not None and source.limit < 1:
        raise UserError(f"{key}.limit={source.limit}: it must be at least 1, or null for all")
    if source.kind == "orrery" and source.stream not in ORRERY_STREAMS:
        raise UserError(f"{key}.stream={source.stream}: choose one of {', '.join(ORRERY_STREAMS)}")
    if source.kind in ("folder", "shards") and not source.path:
        raise UserError(f"{key}.path is not set: give the folder with its {_HOLDS[source.kind]}")
    if source.kind.startswith("hf_") and not (source.path or source.hub):
        raise UserError(f"{key} has neither path nor hub: give {key}.path=/folder, or the name of a hub data set")
    wrong = [template for template in source.templates if "{label}" not in template]
    if source.kind == "hf_image_label" and source.caption is None and (wrong or not source.templates):
        raise UserError(f"{key}.templates={wrong}: each template must say where the {{label}} goes")


_HOLDS = {"folder": "train.jsonl (docs/bring_your_own.md)", "shards": "index.json (task=build_data writes it)"}


@dataclass
class PairsConfig:
    """Pairs of inputs that differ in one fact (docs/circuits.md).

    Attributes:
        change: the fact of Orrery's scenes that differs; None for pairs of one's own.
        path: a JSONL file of one's own pairs.
        original: the fact's word in every original, drawn when None.
        counterfactual: the same in every counterfactual.
        train: pairs on which features are chosen.
        test: pairs on which effects are measured; of one's own, those that are left.
        seed: of the pairs.
    """

    change: str | None = None
    path: str | None = None
    original: str | None = None
    counterfactual: str | None = None
    train: int = 60
    test: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.change is None) == (self.path is None):
            raise UserError(
                "pairs: give pairs.change=<fact> for Orrery's scenes or pairs.path=<file.jsonl>, one of them"
            )
        if self.train < 0:
            raise UserError(f"pairs.train={self.train}: it counts pairs; choose 0 or more")
        if self.test < 1:
            raise UserError(f"pairs.test={self.test}: it counts pairs; choose 1 or more")
