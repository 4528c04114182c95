"""The self-check of a transcoder set that was just loaded: a warning that names the layers where it does not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.data.orrery.scenes import vocabulary
from vlmscope.data.packing import chat_batch
from vlmscope.models.loading import VLM
from vlmscope.scope import Scope
from vlmscope.training.evaluation import check_hooks, fvu_on_load

_LOG = logging.getLogger(__name__)
_SCENES = 4  # of each kind: some 440 tokens
_PICTURE = 256  # pixels a side
PLAIN = (
    "The river rises in the hills to the north and runs for some two hundred miles before it meets the sea. For most "
    "of that way it is slow and wide, and the towns along its banks have lived by it since the middle ages: first by "
    "fishing, then by the mills, and in the last century by the trade in coal and timber that the railways brought. "
    "In 1894 a flood carried three of the old bridges away. Two of them were built again in iron; the third, at the "
    "lower ford, was never replaced, and people still cross there by a small ferry that holds two cars and about a "
    "dozen passengers. What would you show a visitor who has only one afternoon, and why?"
)


def warn_if_unfit(scope: Scope, prompt: str | None, pictures: Sequence[Image.Image] = ()) -> dict[int, float]:
    """Log a warning for layers with an FVU above 1 on the run's own prompt, or on Orrery's scenes when it has none.

    Returns FVU by layer, empty when there was nothing to look at.
    """
    check_hooks(scope)
    forward = _input(scope.vlm, prompt, pictures)
    if forward is None:
        return {}
    fvus, tokens = fvu_on_load(scope, [forward])
    bad = {layer: value for layer, value in fvus.items() if not value <= 1}
    if bad:
        named = ", ".join(f"{layer} ({value:.3g})" for layer, value in bad.items())
        _LOG.warning(
            "the transcoders do not fit %s: FVU above 1 on %d tokens in layer %s; are they for this model, revision, "
            "hook point and format?",
            scope.vlm.name,
            tokens,
            named,
        )
    return fvus


def warn_on_load(scope: Scope) -> dict[int, float]:
    """`warn_if_unfit` where no run says what to look at: Orrery's scenes, else a text and a picture of colours.

    A warning too when the model's vocabulary lacks words of the text.
    """
    if speaks_orrery(scope.vlm):
        return warn_if_unfit(scope, None)
    # Red rises from left to right and green from top to bottom.
    rise = Image.linear_gradient("L").resize((_PICTURE, _PICTURE))
    colours = Image.merge("RGB", (rise.rotate(90), rise, Image.new("L", rise.size, 128)))
    fvus = warn_if_unfit(scope, PLAIN, [colours] if scope.adapter.has_vision else [])
    if not fvus:
        _LOG.warning(
            "the transcoders were not tried on %s: its vocabulary lacks words of the check's text", scope.vlm.name
        )
    return fvus


def speaks_orrery(vlm: VLM) -> bool:
    """Whether the model's vocabulary has the words of Orrery's scenes."""
    return {"<image_soft_token>", *vocabulary()} <= vlm.tokenizer.get_vocab().keys()


def _input(vlm: VLM, prompt: str | None, pictures: Sequence[Image.Image]) -> dict[str, Tensor] | None:
    if prompt is not None:
        try:
            return vlm.prepare(prompt, pictures).tensors
        except UserError:
            return None  # the task says so itself, in its own words
    if not speaks_orrery(vlm):
        return None
    from vlmscope.data.orrery.rendering import make_scene

    # Some scenes as one batch. Digits are left out: their library takes longer to load than all the rest.
    scenes = [make_scene("val", kind, i) for kind in ("planets", "shapes", "hands", "text") for i in range(_SCENES)]
    return chat_batch(scenes, vlm.tokenizer, int(vlm.processor.image_seq_length), generator(0, "load check"))
