"""Settings of data sources, counterfactual pairs and prompt sets: plain records, free of torch, for Hydra."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vlmscope.core.errors import UserError, check_choice, check_least
from vlmscope.core.records import CAPTION_REQUEST

KINDS = ("folder", "hf_text", "hf_image_label", "hf_cauldron", "shards", "orrery")
ORRERY_STREAMS = ("text", "captions", "questions", "dialogues")
_HOLDS = {"folder": "train.jsonl (docs/bring_your_own.md)", "shards": "index.json (task=build_data writes it)"}


@dataclass
class SourceConfig:
    """Where samples come from and how much of a mix they are (schemas: docs/data.md)."""

    kind: str = "folder"  # one of `KINDS`
    path: str | None = None  # what `Dataset.save_to_disk` wrote, Parquet files, our shards, or one with train.jsonl
    hub: str | None = None  # a data set of the Hugging Face hub, streamed, where `path` is not given
    revision: str | None = None  # its commit, 40 hexadecimal digits
    subsets: list[str] = field(default_factory=list)  # configurations on the hub, or folders in `path`; they take turns
    split: str = "train"  # which split is trained on
    val_split: str | None = None  # which one is validated on; None holds `data.val_share` of `split` out
    weight: float = 1.0  # its share of the tokens, relative to the other sources
    repeat: bool = False  # start again when it ends; else the other sources go on without it
    limit: int | None = None  # use the first so many samples only
    text: str = "text"  # hf_text: the column of texts
    image: str = "image"  # hf_image_label: the columns of pictures and of their class numbers or names
    label: str = "label"
    caption: str | None = None  # the column of captions, instead of `label`
    templates: list[str] = field(default_factory=lambda: ["a photo of a {label}."])  # each picture gets one of them
    request: str = CAPTION_REQUEST  # what a caption answers
    images: str | None = "images"  # hf_cauldron: the columns of pictures (a list, or one; None: none) and conversations
    texts: str = "texts"
    stream: str | None = None  # of shards the name of the source that was written; of orrery one of `ORRERY_STREAMS`


def check_source(name: str, source: SourceConfig) -> None:
    """Refuse settings that cannot work, before anything is opened."""
    key = f"data.sources.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # it becomes part of file names and of metrics' names
        raise UserError(f"{key}: name a source with letters, digits, _ and - only")
    check_choice(f"{key}.kind", source.kind, KINDS)
    if source.kind == "orrery":
        check_choice(f"{key}.stream", str(source.stream), ORRERY_STREAMS)
    check_least(key, source, limit=1)
    if not 0 < source.weight < float("inf"):
        raise UserError(f"{key}.weight={source.weight}: a weight must be positive; to leave a source out: ~{key}")
    if source.kind in _HOLDS and not source.path:
        raise UserError(f"{key}.path is not set: give the folder with its {_HOLDS[source.kind]}")
    if source.kind.startswith("hf_") and not (source.path or source.hub):
        raise UserError(f"{key} has neither path nor hub: give {key}.path=/folder, or the name of a hub data set")
    wrong = [template for template in source.templates if "{label}" not in template]
    if source.kind == "hf_image_label" and source.caption is None and (wrong or not source.templates):
        raise UserError(f"{key}.templates={wrong}: each template must say where the {{label}} goes")


@dataclass
class DataConfig:
    """Which data: Orrery's scenes, a folder of the user's own (docs/bring_your_own.md), or a mix (docs/data.md).

    `path` is a folder, None for data made while they are used; of a mix, where `task=build_data` writes its shards.
    `val_share` of the user's own examples is held out for validation where they come without a file or split for it.
    For a mix: its `sources`; `shuffle` rows of a source are shuffled with each other; texts are packed to `context`
    tokens; so many corrupt shards, or files of a local table, are skipped (`max_bad_shards`).
    """

    name: str = "???"  # omegaconf: it must be given
    path: str | None = None
    val_share: float = 0.05
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    shuffle: int = 1000
    context: int = 2048
    max_bad_shards: int = 0

    def __post_init__(self) -> None:
        check_least("data", self, shuffle=1, context=2, max_bad_shards=0)
        for name, source in self.sources.items():
            check_source(name, source)
        if not 0 < self.val_share < 1:
            raise UserError(f"data.val_share={self.val_share}: it is a share; choose a number between 0 and 1")


@dataclass
class PairsConfig:
    """Pairs of inputs that differ in one fact (docs/circuits.md)."""

    change: str | None = None  # the fact of Orrery's scenes that differs; None for pairs of one's own
    path: str | None = None  # a JSONL file of one's own pairs
    original: str | None = None  # the fact's word in every original, drawn when None
    counterfactual: str | None = None  # the same in every counterfactual
    train: int = 60  # pairs on which features are chosen
    test: int = 100  # pairs on which effects are measured; of one's own, those that are left
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.change is None) == (self.path is None):
            raise UserError(
                "pairs: give pairs.change=<fact> for Orrery's scenes or pairs.path=<file.jsonl>, one of them"
            )
        check_least("pairs", self, train=0, test=1)


WORDINGS = ("paper", "ours")


@dataclass
class PromptConfig:
    """One prompt of a set."""

    prompt: str  # what the user says; the model's template adds the pictures' placeholders
    images: list[str] = field(default_factory=list)  # in words, the pictures that it needs, in order
    answer: str | None = None  # the word that a right answer has, None where none is expected
    contrast: str | None = None  # the prompt of the same set that it is compared with or patched from
    wording: str = "ours"  # whose words these are, of `WORDINGS`

    def __post_init__(self) -> None:
        check_choice(f"prompts: wording of {self.prompt!r}", self.wording, WORDINGS)


@dataclass
class PromptSetConfig:
    """The prompts of one case study; `source` says which of the paper's (arXiv 2602.20330) and what is known of it."""

    source: str
    prompts: dict[str, PromptConfig]

    def __post_init__(self) -> None:
        for name, prompt in self.prompts.items():
            if prompt.contrast is not None and (prompt.contrast == name or prompt.contrast not in self.prompts):
                others = ", ".join(other for other in self.prompts if other != name)
                raise UserError(f"prompts.{name}.contrast={prompt.contrast}: no other such prompt; choose {others}")
