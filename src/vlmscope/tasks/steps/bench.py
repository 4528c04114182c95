"""What the parts of one experiment share: the model, the pictures, the run folder and its metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.data.images import open_images
from vlmscope.data.orrery.dataset import concept_scenes, pictures
from vlmscope.data.orrery.scenes import PLANETS
from vlmscope.tasks.studies.feature_labels import feature_labels
from vlmscope.tasks.wiring import load_model, load_scope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vlmscope.circuits.circuit import Circuit
    from vlmscope.circuits.config import CircuitConfig, InterventionConfig
    from vlmscope.config import AppConfig
    from vlmscope.core.records import FeatureId
    from vlmscope.features.study.records import StudyFolder
    from vlmscope.interventions.edits import Plan
    from vlmscope.models.base import ModelInputs
    from vlmscope.models.loading import VLM
    from vlmscope.scope import Scope
    from vlmscope.transcoders.transcoder import TranscoderSet


@dataclass
class Bench:
    """What an experiment takes its model, study, circuit and pictures from; each is loaded on first use.

    `records` hands what `trials` of an experiment's module made over to its `analyse`.
    `overrides` is what the user typed, where a tiny model is to get random transcoders (see `load_scope`);
    `analysis` are the settings of the experiment's own module.
    """

    cfg: AppConfig
    run_dir: Path
    records: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    overrides: Sequence[str] = ("transcoder",)
    analysis: Any = None

    @cached_property
    def vlm(self) -> VLM:
        """The model, loaded on first use."""
        return load_model(self.cfg)

    @cached_property
    def scope(self) -> Scope:
        """The model with its transcoders, which are loaded on first use."""
        return load_scope(self.cfg, self.vlm, self.overrides)

    @cached_property
    def study(self) -> StudyFolder:
        """The study of all features that `study.path` names, or one made in the run folder as task=study makes it."""
        from vlmscope.features.study.records import StudyFolder
        from vlmscope.tasks.studies.data import made_study

        own = self.cfg.study.path
        return StudyFolder(own) if own is not None else made_study(self.cfg, self.scope, self.run_dir / "study")

    @property
    def transcoders(self) -> TranscoderSet:
        """Those of `scope`."""
        return self.scope.transcoders

    @cached_property
    def labels(self) -> dict[FeatureId, str]:
        """What features are called; empty without `attribution.labels`."""
        return feature_labels(self.cfg, self.vlm.name, self.transcoders)

    @property
    def circuit_config(self) -> CircuitConfig:
        """The `circuit` group.

        Raises:
            UserError: the experiment chose none.
        """
        if self.cfg.circuit is None:
            raise UserError("this experiment needs a circuit: choose one, such as circuit=mars_earth")
        return self.cfg.circuit

    @property
    def intervention(self) -> InterventionConfig:
        """The `intervention` group."""
        return self.cfg.intervention

    def concept_pictures(self, concept: str, split: str, count: int, seed: int | None = None) -> list[Image.Image]:
        """Pictures of a concept: the user's own, `images.<concept>` to test on and `images.<concept>_train` to find
        features on (at most `count`), else Orrery's. Without a `seed` the circuit's is taken.

        Raises:
            UserError: the user gives none and Orrery has no such planet.
        """
        key = concept if split == "test" else f"{concept}_{split}"
        own = self.cfg.images.get(key)
        if own:
            return open_images(own if split == "test" else own[:count])
        if concept not in PLANETS:
            raise UserError(
                f"no pictures of {concept}: give images.{key}=[...], or choose a planet: {', '.join(PLANETS)}"
            )
        seed = self.circuit_config.seed if seed is None else seed
        return [Image.fromarray(p) for p in pictures(concept_scenes(concept, split, count, seed))]

    def inputs(self, images: list[Image.Image], prompt: str) -> list[ModelInputs]:
        """One prompt for each picture."""
        return [self.vlm.prepare(prompt, [image]) for image in images]

    def steer(self, circuit: Circuit, roles: np.ndarray, question: str | None = None, **changed: Any) -> Plan:
        """The configured steering plan from the first concept to the second for prompts of these position roles.

        Args:
            circuit: what to steer.
            roles: [T] position roles.
            question: whose levels to take; the mean over all questions when None.
            changed: `strength`, `gate` or `limit`, to differ from the configuration.
        """
        from vlmscope.circuits.plans import steer_plan

        settings = {"strength": self.intervention.strength, "gate": self.intervention.gate} | changed
        recipient, donor = self.circuit_config.concepts
        return steer_plan(circuit, recipient, donor, roles, question=question, **settings)

    def token(self, word: str) -> int:
        """The id of an answer word.

        Raises:
            UserError: the tokenizer does not have it as one token.
        """
        ids = self.vlm.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.vlm.tokenizer.unk_token_id:
            raise UserError(f"the answer {word!r} is not one token of this model: choose one that is")
        return int(ids[0])

    def words(self, logits: Tensor, count: int = 5) -> tuple[tuple[str, float], ...]:
        """The most probable next words of logits [V] with their probabilities."""
        given = logits.double().numpy(force=True)
        shifted = np.exp(given - given.max())
        probabilities = shifted / shifted.sum()
        order = np.argsort(-probabilities)[:count]
        from vlmscope.models.base import token_strings

        names = token_strings(self.vlm.tokenizer, order)
        return tuple((name, float(probabilities[i])) for name, i in zip(names, order, strict=True))
