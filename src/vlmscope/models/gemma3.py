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
from vlmscope.models.template import Dialogue, Turn


class Gemma3Adapter(DecoderAdapter):
    """Both Gemma 3 classes; the text model is `decoder()` in either."""

    placeholder = "<start_of_image>"
    # The published one, but that it takes what is said verbatim (theirs trims it).
    chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ item['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    )

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
        self._check(prompt, n_images, tokenizer)
        return super().wrap_prompt(prompt, n_images, tokenizer, chat_template)

    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        self._check("".join(text for exchange in exchanges for text in exchange), n_images, tokenizer)
        return super().wrap_exchanges(exchanges, n_images, tokenizer, chat_template)

    def _check(self, text: str, n_images: int, tokenizer: Any) -> None:
        if self.has_vision and tokenizer.image_token in text:
            raise UserError(
                f"the prompt spells {tokenizer.image_token}; write {self.placeholder} once for each picture"
            )
        if n_images and not self.has_vision:
            raise UserError(
                f"{type(self.model).__name__} takes no pictures but {n_images} were given; leave image= out"
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
