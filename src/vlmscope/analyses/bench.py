"""Shared by the parts of one experiment: the model, the pictures, the run folder and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from PIL import Image

from vlmscope.circuits.cases import answer_token, pairs_by_question
from vlmscope.config.wiring import feature_labels, load_model, load_scope
from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.data.images import open_images
from vlmscope.data.inputs import UsedPictures, content_key
from vlmscope.data.orrery.dataset import concept_scenes, pictures
from vlmscope.data.orrery.scenes import PLANETS
from vlmscope.metrics.rates import without_baselines

Shown = TypeVar("Shown", Image.Image, np.ndarray)
# What a picture of each split is for, where nothing more exact is known.
PURPOSES = {"train": "features", "val": "strengths", "test": "trials"}

if TYPE_CHECKING:
    from vlmscope.circuits.config import CircuitConfig
    from vlmscope.config import AppConfig
    from vlmscope.core.records import FeatureId
    from vlmscope.data.config import PairsConfig
    from vlmscope.data.inputs import Pair
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.models.base import ModelInputs
    from vlmscope.models.loading import VLM
    from vlmscope.scope import Scope
    from vlmscope.transcoders.transcoder import TranscoderSet


@dataclass
class Bench:
    """Model, study, circuit and pictures of an experiment; each is loaded on first use.

    `records` passes results of an experiment module's `trials` on to its `analyse`; `analysis` are its settings.
    `overrides` is what the user typed, where a tiny model is to get random transcoders (see `load_scope`).
    """

    cfg: AppConfig
    run_dir: Path
    records: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    overrides: Sequence[str] = ("transcoder",)
    analysis: Any = None
    used: UsedPictures = field(default_factory=UsedPictures)

    @cached_property
    def vlm(self) -> VLM:
        """The model."""
        return load_model(self.cfg)

    @cached_property
    def scope(self) -> Scope:
        """The model with its transcoders."""
        return load_scope(self.cfg, self.vlm, self.overrides)

    @cached_property
    def study(self) -> StudyFolder:
        """The study of all features that `study.path` names, or one made in the run folder as task=study makes it."""
        from vlmscope.config.wiring import made_study
        from vlmscope.features.study_files import StudyFolder

        path = self.cfg.study.path
        return StudyFolder(path) if path is not None else made_study(self.cfg, self.scope, self.run_dir / "study")

    @property
    def transcoders(self) -> TranscoderSet:
        """Those of `scope`."""
        return self.scope.transcoders

    @cached_property
    def labels(self) -> dict[FeatureId, str]:
        """Names of features; empty without `attribution.labels`."""
        return feature_labels(self.cfg, self.vlm.name, self.scope)

    @property
    def circuit_config(self) -> CircuitConfig:
        """The `circuit` group, which the experiment must have chosen."""
        if self.cfg.circuit is None:
            raise UserError("this experiment needs a circuit: choose one, such as circuit=mars_earth")
        return self.cfg.circuit

    @property
    def all_concepts(self) -> list[str]:
        """Every planet, or the concepts of `circuit` if these are none."""
        concepts = self.circuit_config.concepts
        return list(PLANETS) if set(concepts) <= set(PLANETS) else concepts

    def concept_pictures(
        self, concept: str, split: str, count: int, seed: int | None = None, purpose: str = ""
    ) -> list[Image.Image]:
        """At most `count` pictures of a concept: the user's own, `images.<concept>` to test on,
        `images.<concept>_train` to find features on and `_val` to settle strengths on, else Orrery's. Without a `seed`
        the circuit's is taken; `purpose` is for `pictures.json`.
        """
        key = concept if split == "test" else f"{concept}_{split}"
        files = self.cfg.images.get(key)
        if files:
            shown = open_images(files[:count])
        elif concept not in PLANETS:
            raise UserError(
                f"no pictures of {concept}: give images.{key}=[...] or a folder, or choose a planet: "
                f"{', '.join(PLANETS)}"
            )
        else:
            seed = self.circuit_config.seed if seed is None else seed
            shown = [Image.fromarray(p) for p in pictures(concept_scenes(concept, split, count, seed))]
            key = f"{concept} {split} {seed}"
        return self.recorded(split, key, shown, purpose)

    def recorded(self, split: str, name: str, shown: list[Shown], purpose: str = "") -> list[Shown]:
        """The pictures, after recording that they test (split "test") or choose something (`UsedPictures`)."""
        keys = {f"{name} {number}": content_key([image]) for number, image in enumerate(shown)}
        self.used.add(split == "test", purpose or PURPOSES[split], keys)
        return shown

    def inputs(self, images: Sequence[Image.Image | np.ndarray], prompt: str) -> list[ModelInputs]:
        """One prompt for each picture, an array being uint8 [H, W, 3]."""
        shown = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
        return [self.vlm.prepare(prompt, [image]) for image in shown]

    def rows(self, setting: str) -> Any:
        """The rows of the run's trials in a setting, controls and baselines left out."""
        table: Any = pd.read_parquet(self.run_dir / "trials.parquet")
        return without_baselines(table[(table.setting == setting) & (table.control == "")])

    def write_table(self, name: str, table: pd.DataFrame, compression: Any = "snappy") -> None:
        """Write `<name>.parquet` into the run folder."""
        with atomic_path(self.run_dir / f"{name}.parquet") as temporary:
            table.to_parquet(temporary, index=False, compression=compression)

    def token(self, word: str) -> int:
        """The id of an answer word, which must be one token."""
        return answer_token(self.scope, word)

    def pairs(self, split: str, config: PairsConfig | None = None) -> dict[str, list[Pair]]:
        """The counterfactual pairs of a split by question, which the run must have; or those of `config`."""
        if self.cfg.pairs is None:
            raise UserError("this experiment needs pairs: choose some, such as pairs=first_digit")
        groups = pairs_by_question(config or self.cfg.pairs, split)
        keys = {name: key for pairs in groups.values() for pair in pairs for name, key in pair.contents.items()}
        self.used.add(split == "test", PURPOSES[split], keys)
        return groups
