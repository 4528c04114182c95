"""The self-check of a transcoder set that was just loaded: a warning that names the layers where it does not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from vlmscope.models.loading import VLM
    from vlmscope.transcoders.transcoder import TranscoderSet

_LOG = logging.getLogger(__name__)
_SCENES = 4  # of each kind: some 440 tokens


def warn_if_unfit(
    vlm: VLM, transcoders: TranscoderSet, prompt: str | None, pictures: Sequence[Image] = ()
) -> dict[int, float]:
    """Log a warning for layers with an FVU above 1 on the run's own input, or on Orrery's scenes when it has none.

    Args:
        vlm: the model.
        transcoders: the set.
        prompt: what the run asks, None when its inputs come later.
        pictures: of the prompt.

    Returns:
        FVU by layer; empty when there was nothing to look at.

    Raises:
        UserError: the set's hook points are not ones that the model has.
    """
    from vlmscope.training.load_check import check_hooks, fvu_on_load

    check_hooks(vlm.adapter, transcoders)
    forwards = _inputs(vlm, prompt, pictures)
    if not forwards:
        return {}
    found, tokens = fvu_on_load(vlm, transcoders, forwards)
    bad = {layer: value for layer, value in found.items() if not value <= 1}
    if bad:
        named = ", ".join(f"{layer} ({value:.3g})" for layer, value in bad.items())
        _LOG.warning(
            "the transcoders do not fit %s: FVU above 1 on %d tokens in layer %s; are they for this model, revision, "
            "hook point and format?",
            vlm.name,
            tokens,
            named,
        )
    return found


def _inputs(vlm: VLM, prompt: str | None, pictures: Sequence[Image]) -> list[Mapping[str, Tensor]]:
    if prompt is not None:
        try:
            return [vlm.prepare(prompt, pictures).tensors]
        except UserError:
            return []  # the task says so itself, in its own words
    return [_orrery_scenes(vlm)] if _speaks_orrery(vlm) else []


def _speaks_orrery(vlm: VLM) -> bool:
    from vlmscope.data.orrery.facts import vocabulary

    return {"<image_soft_token>", *vocabulary()} <= vlm.tokenizer.get_vocab().keys()


def _orrery_scenes(vlm: VLM) -> dict[str, Tensor]:
    """Some scenes as one batch. Digits are left out: their library takes longer to load than all the rest."""
    from vlmscope.core.seeds import generator
    from vlmscope.data.chat import chat_batch
    from vlmscope.data.orrery.scene import make_scene

    scenes = [make_scene("val", kind, i) for kind in ("planets", "shapes", "hands", "text") for i in range(_SCENES)]
    return chat_batch(scenes, vlm.tokenizer, int(vlm.processor.image_seq_length), generator(0, "load check"))
