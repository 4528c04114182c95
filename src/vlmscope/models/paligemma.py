"""PaliGemma (Gemma decoder) and PaliGemma 2 (Gemma 2): a SigLIP tower's patches as soft tokens before the prompt.

Everything up to the answer sees everything (`token_type_ids` is 0 there); generated tokens are causal. Gemma 2's cap on
attention scores is part of the frozen patterns; of logits that it caps, graphs explain those before the cap.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vlmscope.core.conversation import Exchange
from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import WHOLE, grid_boxes
from vlmscope.models.decoders import DecoderAdapter
from vlmscope.models.patches import PicturePatches, batched_tiles, pooled
from vlmscope.models.template import Dialogue, Span, Turn, spelt_placeholders


class PaliGemmaAdapter(DecoderAdapter):
    """One soft token a patch of the whole picture, resized without cropping."""

    needs_pictures = True
    answer_type = 1

    @property
    def logit_softcap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        # There is no chat: the processor adds the first token after the pictures and a newline after the prompt.
        if not n_images:
            raise UserError("PaliGemma answers about pictures only; give at least one")
        lead = "" if spelt_placeholders(prompt, self.placeholder, n_images) else self.placeholder * n_images
        return Turn(lead, prompt, "")

    def completed_turn(self, turn: Turn, tokenizer: Any) -> Turn:
        bos = tokenizer.bos_token
        if not turn.before:  # the user placed the pictures
            end = turn.content.rfind(self.placeholder) + len(self.placeholder)
            return Turn("", turn.content[:end] + bos + turn.content[end:], "\n")
        return Turn(turn.before + bos, turn.content, "\n")

    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        if any(self.placeholder in exchange.assistant for exchange in exchanges):
            raise UserError(f"an answer spells {self.placeholder}, which stands for a picture; take it out")
        prompts = [self.wrap_prompt(exchange.user, n_images, tokenizer) for exchange in exchanges]
        return [
            Dialogue((Span(prompt.text, False),), suffix=exchange.assistant)
            for prompt, exchange in zip(prompts, exchanges, strict=True)
        ]

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        return [grid_boxes(self._side, self._side) for _ in sizes]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        return [pooled(tiles) for tiles in batched_tiles([[WHOLE] for _ in sizes], self._side, self._side)]

    @property
    def _side(self) -> int:
        """Patches down and across a picture."""
        vision = self.model.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)
