"""Gemma 3, with pictures (`Gemma3ForConditionalGeneration`) and text only (`Gemma3ForCausalLM`).

Embeddings are scaled by sqrt(d); sliding and full layers have their own RoPE base; soft tokens of one picture see each
other. None of it matters to attribution, which takes the attention patterns and the embeddings as the model computed
them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

from vlmscope.core.conversation import Exchange
from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import WHOLE, grid_boxes
from vlmscope.models.decoders import DecoderAdapter
from vlmscope.models.patches import PicturePatches, batched_tiles, pooled
from vlmscope.models.template import Dialogue, Span, Turn, spelt_in_first, spelt_placeholders


class Gemma3Adapter(DecoderAdapter):
    """Both Gemma 3 classes; the text model is `decoder()` in either."""

    @property
    def has_vision(self) -> bool:
        return isinstance(self.model, Gemma3ForConditionalGeneration)

    @property
    def logit_softcap(self) -> float | None:
        # Hugging Face applies the cap in the text-only class alone.
        return None if self.has_vision else self.model.config.final_logit_softcapping

    def decoder(self) -> Any:
        return self.model.model.language_model if self.has_vision else self.model.model

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        lead = ""
        if self.has_vision:
            self._refuse_soft_tokens(prompt, tokenizer)
            if not spelt_placeholders(prompt, tokenizer.boi_token, n_images):
                lead = tokenizer.boi_token * n_images
        elif n_images:
            raise UserError(
                f"{type(self.model).__name__} takes no pictures but {n_images} were given; leave image= out"
            )
        # Gemma's turn is the same in every checkpoint, and the embedded model's words need these very tokens.
        bos = tokenizer.bos_token or ""
        return Turn(f"{bos}<start_of_turn>user\n{lead}", prompt, "<end_of_turn>\n<start_of_turn>model\n")

    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        if self.has_vision:
            spelt_in_first(exchanges, tokenizer.boi_token, n_images)
            self._refuse_soft_tokens("".join(text for exchange in exchanges for text in exchange), tokenizer)
        spans: list[Span] = []
        for number, exchange in enumerate(exchanges):
            turn = self.wrap_prompt(exchange.user, 0 if number else n_images, tokenizer)
            before = turn.text.removeprefix(tokenizer.bos_token or "") if number else turn.text
            spans += [Span(before, False), Span(exchange.assistant, True), Span("<end_of_turn>\n", False)]
        return [Dialogue(tuple(spans))]

    def _refuse_soft_tokens(self, text: str, tokenizer: Any) -> None:
        if tokenizer.image_token in text:
            raise UserError(
                f"the prompt spells {tokenizer.image_token}; write {tokenizer.boi_token} once for each picture"
            )

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        # The projector pools patches in row-major order and the processor resizes the whole picture without cropping.
        side = round(int(self.model.config.mm_tokens_per_image) ** 0.5) if self.has_vision else 0
        return [grid_boxes(side, side) for _ in sizes]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        vision = self.model.config.vision_config
        side = int(vision.image_size) // int(vision.patch_size)
        factor = side // round(int(self.model.config.mm_tokens_per_image) ** 0.5)
        return [pooled(tiles, factor) for tiles in batched_tiles([[WHOLE] for _ in sizes], side, side)]

    def soft_token_id(self) -> int | None:
        return super().soft_token_id() if self.has_vision else None


make_adapter = Gemma3Adapter
