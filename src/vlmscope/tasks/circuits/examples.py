"""Inputs on which the features of a circuit are most active, for its diagram and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.core.intervention import FeatureExample
from vlmscope.core.records import FeatureId
from vlmscope.tasks.circuits.inputs import Asked, concept_pictures, prepared

if TYPE_CHECKING:
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.tasks.circuits.page import Scene

SEARCHED = 60  # inputs of contrasts and pairs in which top examples are looked for
PER_PLANET = 4  # of Orrery's pictures besides


def examples_of(
    features: Sequence[FeatureId], scene: Scene, study: StudyFolder | None, seed: int, count: int
) -> Mapping[FeatureId, tuple[FeatureExample, ...]]:
    """Inputs on which features are most active: of a study, or of what is at hand."""
    from vlmscope.data.images import png_bytes
    from vlmscope.features.top_examples import StudyItem, top_examples

    if study is not None:
        from vlmscope.features.top_examples import study_examples

        return {feature: study_examples(study, feature, count) for feature in features}
    pool = [*scene.asked, *spread(scene.others, SEARCHED), *of_orrery(scene, seed)]
    items = [
        StudyItem(inputs, one.caption, png_bytes(one.pictures[0], 256) if one.pictures else None)
        for inputs, one in zip(prepared(scene.scope.vlm, pool), pool, strict=True)
    ]
    return top_examples(scene.scope, features, items) if items else {}


def spread(asked: Sequence[Asked], count: int) -> list[Asked]:
    """At most so many, from the whole list."""
    return [asked[i] for i in np.unique(np.linspace(0, len(asked) - 1, count).astype(int))] if asked else []


def of_orrery(scene: Scene, seed: int) -> list[Asked]:
    """Pictures of every planet under the prompts that were traced, where the model is Orrery."""
    from vlmscope.data.orrery.scenes import PLANETS
    from vlmscope.tasks.wiring import is_orrery

    prompts = list(dict.fromkeys(one.prompt for one in scene.asked if one.pictures)) or ["what planet is this ?"]
    if not is_orrery(scene.scope.vlm):
        return []
    return [
        Asked(prompts[0], (picture,), planet)
        for planet in PLANETS
        for picture in concept_pictures(planet, PER_PLANET, seed + 1)
    ]
