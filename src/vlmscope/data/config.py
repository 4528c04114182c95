"""Settings of data sources, counterfactual pairs and prompt sets: plain records, free of torch, for Hydra."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vlmscope.core.errors import UserError, check_choice, check_least
from vlmscope.core.records import CAPTION_REQUEST
from vlmscope.data.orrery.scenes import COMPOSED
from vlmscope.data.orrery.scenes import KINDS as SCENE_KINDS

KINDS = ("folder", "hf_text", "hf_image_label", "hf_cauldron", "shards", "orrery", "scenes")
ORRERY_STREAMS = ("text", "captions", "questions", "dialogues")
_HOLDS = {"folder": "train.jsonl (docs/bring_your_own.md)", "shards": "index.json (task=build_data writes it)"}


@dataclass
class SourceConfig:
    """One source of samples and its weight in a mix (schemas: docs/data.md)."""

    kind: str = "folder"  # one of `KINDS`
    path: str | None = None  # folder of `Dataset.save_to_disk`, of Parquet files, of our shards, or with train.jsonl
    hub: str | None = None  # a data set of the Hugging Face hub, streamed, where `path` is not given
    revision: str | None = None  # its commit, 40 hexadecimal digits
    subsets: list[str] = field(default_factory=list)  # configurations on the hub, or folders in `path`; they take turns
    split: str = "train"  # the split for training
    val_split: str | None = None  # the split for validation; None holds out `data.val_share` of `split`
    weight: float = 1.0  # its share of the tokens, relative to the other sources
    repeat: bool = False  # start again when it ends; else the mix continues without it
    limit: int | None = None  # use only this many samples, the first ones
    text: str = "text"  # hf_text: the column of texts
    image: str = "image"  # hf_image_label: the columns of pictures and of their class numbers or names
    label: str = "label"
    caption: str | None = None  # the column of captions, instead of `label`
    templates: list[str] = field(default_factory=lambda: ["a photo of a {label}."])  # one of them is drawn per picture
    request: str = CAPTION_REQUEST  # the user turn that a caption answers
    images: str | None = "images"  # hf_cauldron: the columns of pictures (a list, or one; None: none) and conversations
    texts: str = "texts"
    # shards: the name of the source that was written; orrery: one of `ORRERY_STREAMS`; scenes: a kind of scene
    stream: str | None = None


def check_source(name: str, source: SourceConfig) -> None:
    """Raise `UserError` for settings that cannot work, before anything is opened."""
    key = f"data.sources.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # the name becomes part of file and metric names
        raise UserError(f"{key}: name a source with letters, digits, _ and - only")
    check_choice(f"{key}.kind", source.kind, KINDS)
    if source.kind == "orrery":
        check_choice(f"{key}.stream", str(source.stream), ORRERY_STREAMS)
    if source.kind == "scenes":
        check_choice(f"{key}.stream", str(source.stream), (*SCENE_KINDS, *COMPOSED))
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
    """The data: Orrery's scenes, a folder of the user's own (docs/bring_your_own.md), or a mix (docs/data.md).

    `path` is a folder, or None for data generated during use, as Orrery's scenes are too while their default folder
    does not exist; for a mix, `task=build_data` writes its shards there.
    Orrery's scenes are of the kinds `scenes`.
    `val_share` of the user's own examples is held out for validation if there is no file or split for it.
    The rest configures a mix: rows per source that are shuffled with each other (`shuffle`), tokens per packed text
    (`context`), and corrupt shards that may be skipped (`max_bad_shards`).
    """

    name: str = "???"  # omegaconf: it must be given
    path: str | None = None
    val_share: float = 0.05
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    shuffle: int = 1000
    context: int = 2048
    max_bad_shards: int = 0
    scenes: list[str] = field(default_factory=lambda: list(SCENE_KINDS))

    def __post_init__(self) -> None:
        for kind in self.scenes:
            check_choice("data.scenes", kind, (*SCENE_KINDS, *COMPOSED))
        check_least("data", self, shuffle=1, context=2, max_bad_shards=0)
        for name, source in self.sources.items():
            check_source(name, source)
        if not 0 < self.val_share < 1:
            raise UserError(f"data.val_share={self.val_share}: it is a share; choose a number between 0 and 1")


@dataclass
class PairsConfig:
    """Pairs of inputs that differ in one fact (docs/circuits.md): of Orrery's scenes, of a file, or of icons."""

    change: str | None = None  # the fact of Orrery's scenes that differs
    path: str | None = None  # a JSONL file of the user's own pairs
    relations: list[str] = field(default_factory=list)  # asked of two icons (assets/eyes_pictures/relations.yaml)
    original: str | None = None  # the fact's word in every original, drawn when None
    counterfactual: str | None = None  # the same in every counterfactual
    train: int = 60  # pairs on which features are chosen
    test: int = 100  # pairs on which effects are measured, taken after those for `train`
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.change is not None) + (self.path is not None) + bool(self.relations) != 1:
            raise UserError(
                "pairs: give pairs.change=<fact> for Orrery's scenes, pairs.path=<file.jsonl> or "
                "pairs.relations=[...] for icons, one of them"
            )
        check_least("pairs", self, train=0, test=1)


WORDINGS = ("paper", "ours")


@dataclass
class PromptConfig:
    """One prompt of a set."""

    prompt: str  # the user's words; the model's template adds the picture placeholders
    images: list[str] = field(default_factory=list)  # descriptions of the pictures that it needs, in order
    answer: str | None = None  # a word that a correct answer contains; None where none is expected
    contrast: str | None = None  # name of the prompt in this set that it is compared with or patched from
    wording: str = "ours"  # who wrote the prompt, one of `WORDINGS`

    def __post_init__(self) -> None:
        check_choice(f"prompts: wording of {self.prompt!r}", self.wording, WORDINGS)


@dataclass
class PromptSetConfig:
    """The prompts of one case study; `source` names the paper's case (arXiv 2602.20330) and what is known of it."""

    source: str
    prompts: dict[str, PromptConfig]

    def __post_init__(self) -> None:
        for name, prompt in self.prompts.items():
            if prompt.contrast is not None and (prompt.contrast == name or prompt.contrast not in self.prompts):
                choices = ", ".join(key for key in self.prompts if key != name)
                raise UserError(f"prompts.{name}.contrast={prompt.contrast}: no other such prompt; choose {choices}")
