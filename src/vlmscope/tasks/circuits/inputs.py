"""The inputs of task=circuit: what is traced, and the sets of inputs that contrasts compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from vlmscope.circuits.spec_config import CircuitSpecConfig, ContrastConfig, InputSetConfig
    from vlmscope.config import AppConfig
    from vlmscope.models.base import ModelInputs
    from vlmscope.models.batching import InputBatch
    from vlmscope.models.loading import VLM


@dataclass(frozen=True)
class Asked:
    """A prompt with its pictures, before a model has seen it; `caption` tells people what it is."""

    prompt: str
    pictures: Sequence[Image.Image]
    caption: str


def traced_inputs(cfg: AppConfig, spec: CircuitSpecConfig | None) -> list[Asked]:
    """What is traced: the rows of `task.rows`, `prompt=` on `image=`, or the spec's own inputs.

    Raises:
        UserError: two of these are given, or something of them is not there.
    """
    from vlmscope.data.images import PictureFiles
    from vlmscope.data.prompts import read_rows
    from vlmscope.tasks.wiring import user_pictures

    if cfg.task.rows is not None:
        if cfg.prompt is not None or cfg.image is not None:
            raise UserError("task.rows= brings its own prompts and pictures; leave out prompt= and image=")
        rows, bad = read_rows(cfg.task.rows)
        if bad:
            raise UserError(f"{bad[0]}; correct the file")
        return [Asked(row.prompt, PictureFiles(row.images), row.id) for row in rows]
    if cfg.prompt is not None:
        return [Asked(cfg.prompt, user_pictures(cfg), cfg.prompt)]
    if cfg.image is not None:
        raise UserError("image= without prompt=: add 'prompt=what is this ?'")
    return [] if spec is None or spec.inputs is None else asked_of("circuit_spec.inputs", spec.inputs, (), cfg.seed)


def asked_of(where: str, inputs: InputSetConfig, prompts: Sequence[str], seed: int) -> list[Asked]:
    """A set of inputs: every prompt of every picture; `prompts` are asked where the set names none.

    Raises:
        UserError: there is no prompt, no such concept, or a picture cannot be opened.
    """
    from pathlib import Path

    from vlmscope.data.images import PictureFiles

    asked = list(inputs.prompts) or list(prompts)
    if not asked:
        raise UserError(f"{where}: what is asked? give prompts there, or prompt=")
    if inputs.concept is not None:
        found = [((picture,), inputs.concept) for picture in concept_pictures(inputs.concept, inputs.pictures, seed)]
    elif inputs.images:
        found = [(PictureFiles([path]), Path(path).name) for path in inputs.images]
    else:
        found = [((), "")]
    return [Asked(prompt, pictures, name or prompt) for prompt in asked for pictures, name in found]


def concept_pictures(concept: str, count: int, seed: int, split: str = "train") -> list[Image.Image]:
    """Pictures of one of Orrery's planets.

    Raises:
        UserError: no such planet.
    """
    from PIL import Image

    from vlmscope.data.orrery.dataset import concept_scenes, pictures

    return [Image.fromarray(found) for found in pictures(concept_scenes(concept, split, count, seed))]


def contrast_sets(
    cfg: AppConfig, where: str, contrast: ContrastConfig, prompts: Sequence[str]
) -> tuple[list[Asked], list[Asked]]:
    """The inputs on which features should be active, and those on which they should not.

    Raises:
        UserError: as `asked_of`; or the sides of pairs are asked for, and there are none.
    """
    if contrast.pairs is None:
        assert contrast.of is not None and contrast.against is not None, "checked when the spec was read"
        sets = (("of", contrast.of), ("against", contrast.against))
        first, second = (asked_of(f"{where}.{key}", one, prompts, cfg.seed) for key, one in sets)
        return first, second
    from vlmscope.data.pairs import load_pairs

    if cfg.pairs is None:
        raise UserError(f"{where}.pairs={contrast.pairs}: which pairs? choose some, such as pairs=planet")
    pairs = [pair for pair in load_pairs(cfg.pairs, "train") if pair.moves]
    if not pairs:
        raise UserError(f"{where}.pairs: no training pair's answers differ; give more pairs, or set pairs.train higher")
    sides = [[getattr(pair, side) for pair in pairs] for side in ("original", "counterfactual")]
    asked = [[Asked(side.prompt, side.images, side.answer) for side in of] for of in sides]
    return (asked[0], asked[1]) if contrast.pairs == "original" else (asked[1], asked[0])


def prepared(vlm: VLM, asked: Sequence[Asked]) -> list[ModelInputs]:
    """The model's inputs, in order."""
    return [vlm.prepare(one.prompt, list(one.pictures)) for one in asked]


def batches_of(vlm: VLM, inputs: Sequence[ModelInputs]) -> list[InputBatch]:
    """Inputs that align as batches; those that do not, apart."""
    from vlmscope.models.batching import make_batch

    groups: dict[tuple[int, bytes, tuple[object, ...]], list[ModelInputs]] = {}
    for one in inputs:
        groups.setdefault((len(one), one.is_image.tobytes(), tuple(one.patch_boxes)), []).append(one)
    return [make_batch(vlm.adapter, group) for group in groups.values()]
