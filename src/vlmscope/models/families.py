"""The supported families, each an `Adapter` with its differences, and the adapter of a loaded model.

Gemma 3 and 4 (pictures, or text alone), PaliGemma 1 and 2, LLaVA-1.5, LLaVA-OneVision, Idefics3 and SmolVLM, InternVL,
Qwen2.5-VL and Qwen3-VL. Attention patterns are frozen as the model computed them, so that no adapter deals with
positions in rows and columns (M-RoPE), soft tokens that see each other, or caps on attention scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, PatchBox
from vlmscope.models import boxes as places
from vlmscope.models.base import INJECTIONS, Adapter, Decoder, Size, Sizes, Tensors
from vlmscope.models.template import Dialogue, Span, Turn, spelt_placeholders


def _chatml(image: str) -> str:
    """ChatML (Qwen's turns) with the text `image` for each picture."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% for item in message['content'] %}{{ 'IMAGE' if item['type'] == 'image' else item['text'] }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ).replace("IMAGE", image)


class Gemma3Adapter(Adapter):
    """`Gemma3ForConditionalGeneration` and `Gemma3ForCausalLM`: the whole picture, resized without cropping."""

    placeholder = "<start_of_image>"
    caps_logits = True
    takes_masks = True
    # The published template, except that it does not trim texts.
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
    def logit_softcap(self) -> float | None:
        return None if self.has_vision else super().logit_softcap  # only the text-only class applies the cap

    @property
    def pool(self) -> int:
        return self.tile_side // round(int(self.model.config.mm_tokens_per_image) ** 0.5)


class Gemma4Adapter(Adapter):
    """`Gemma4ForConditionalGeneration` and `Gemma4ForCausalLM`, where every layer is dense.

    Each layer multiplies what leaves it by a constant; values are normalised head by head; full layers may have wider
    heads, fewer of them for keys and values, and values that are the keys before their norm. All of it is affine once
    the norms' scales are frozen. Pictures keep their aspect ratio: the grid of soft tokens follows it without cropping.
    """

    placeholder = "<|image|>"
    decoders = {"gemma4_text": Decoder(norm_offset=0.0, post_norms=True)}
    caps_logits = True
    chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
        "{% for item in message['content'] %}{{ '<|image|>' if item['type'] == 'image' else item['text'] }}"
        "{% endfor %}{{ '<turn|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
    )
    # Setting -> the part that it switches on; with each, a layer depends on more than the stream that enters it.
    _refused = {
        "hidden_size_per_layer_input": "per-layer embeddings, as in E2B and E4B",
        "num_kv_shared_layers": "layers that reuse keys and values of earlier ones",
        "enable_moe_block": "mixture-of-experts MLPs, as in 26B-A4B",
    }

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        text = model.config.get_text_config()
        for setting, part in self._refused.items():
            if getattr(text, setting, None):
                raise UserError(
                    f"{type(model).__name__} has {part} ({setting} = {getattr(text, setting)}), which attribution does "
                    "not cover; choose a dense Gemma 4, such as 31B"
                )

    def value_norm(self, layer: int) -> nn.Module | None:
        return self._layer(layer).self_attn.v_norm

    def value_projection(self, layer: int) -> nn.Module:
        attention = self._layer(layer).self_attn
        return attention.k_proj if attention.v_proj is None else attention.v_proj

    def stream_scale(self, layer: int) -> float:
        return float(self._layer(layer).layer_scalar)

    @property
    def pool(self) -> int:
        return int(self.model.config.vision_config.pooling_kernel_size)

    def grids(self, tensors: Tensors, sizes: Sizes) -> list[tuple[int, int]]:
        # The tensor holds column and row of every patch, -1 for padding.
        return [(rows, columns) for columns, rows in (tensors["image_position_ids"].amax(1) + 1).tolist()]

    def patch_padding(self, tensors: Tensors) -> Tensor | None:
        return (tensors["image_position_ids"] < 0).all(-1).flatten()

    def picture_patches(self, tensors: Tensors, sizes: Sizes, image_processor: Any) -> list[places.PicturePatches]:
        # Patches come row by row, followed by padding that the tower masks.
        length, pictures = tensors["image_position_ids"].shape[1], []
        for number, (rows, columns) in enumerate(self.grids(tensors, sizes)):
            tokens = number * length + np.arange(rows * columns)
            pictures.append(
                places.pooled([places.Tile(rows, columns, places.grid_boxes(rows, columns), tokens)], self.pool)
            )
        return pictures


class PaliGemmaAdapter(Adapter):
    """PaliGemma (Gemma decoder) and PaliGemma 2 (Gemma 2): patches of the whole picture before the prompt.

    Attention is bidirectional up to the answer (`token_type_ids` is 0 there), and causal in it. Where Gemma 2 caps
    logits, graphs explain those before the cap.
    """

    needs_pictures = True
    answer_type = 1
    caps_logits = True

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        # There is no chat: the processor adds the first token after the pictures and a newline after the prompt.
        if not n_images:
            raise UserError("PaliGemma answers about pictures only; give at least one")
        lead = "" if spelt_placeholders(prompt, self.placeholder, n_images) else self.placeholder * n_images
        return Turn(lead, prompt, "")

    def completed_turn(self, turn: Turn, tokenizer: Any) -> Turn:
        bos = tokenizer.bos_token
        if turn.before:
            return Turn(turn.before + bos, turn.content, "\n")
        end = turn.content.rfind(self.placeholder) + len(self.placeholder)  # the user placed the pictures
        return Turn("", turn.content[:end] + bos + turn.content[end:], "\n")

    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        if any(self.placeholder in exchange.assistant for exchange in exchanges):
            raise UserError(f"an answer spells {self.placeholder}, which stands for a picture; take it out")
        prompts = [self.wrap_prompt(exchange.user, n_images, tokenizer).text for exchange in exchanges]
        return [
            Dialogue((Span(prompt, False),), suffix=exchange.assistant)
            for prompt, exchange in zip(prompts, exchanges, strict=True)
        ]


class LlavaAdapter(Adapter):
    """LLaVA-1.5: one soft token per patch; the class token, if the model keeps it, stands for the whole picture."""

    reads_tower_norm = False
    chat_template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% for item in message['content'] %}{{ '<image>\\n' if item['type'] == 'image' else item['text'] }}"
        "{% endfor %} {% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )

    def grids(self, tensors: Tensors, sizes: Sizes) -> list[tuple[int, int]]:
        patch = int(self.model.config.vision_config.patch_size)
        height, width = tensors["pixel_values"].shape[-2:]
        return [(height // patch, width // patch)] * len(sizes)

    def tiles(self, size: Size, image_processor: Any) -> list[PatchBox]:
        return [places.seen_window(size, image_processor)]

    def soft_token_boxes(self, tensors: Tensors, sizes: Sizes, image_processor: Any) -> list[list[PatchBox]]:
        patches = super().soft_token_boxes(tensors, sizes, image_processor)
        tokens = int((tensors["input_ids"] == self.soft_token_id()).sum()) // max(len(sizes), 1)
        # One token more than patches: the class token, unless `vision_feature_select_strategy` drops it.
        return [
            places.grid_boxes(1, 1, places.seen_window(size, image_processor)) * (tokens - len(boxes)) + boxes
            for size, boxes in zip(sizes, patches, strict=True)
        ]

    def picture_patches(self, tensors: Tensors, sizes: Sizes, image_processor: Any) -> list[places.PicturePatches]:
        first = int(self.model.config.vision_feature_select_strategy == "default")  # dropped, whatever the tower
        pictures = super().picture_patches(tensors, sizes, image_processor)
        return [
            places.PicturePatches(tiles, sparse.csr_array(sparse.eye_array(len(tiles[0])))[first:])
            for tiles, _ in pictures
        ]


class _Canvas(NamedTuple):
    """A picture laid out on tiles, from which LLaVA-OneVision makes rows of tokens."""

    tiles: tuple[int, int]  # down and across
    side: int  # patches down and across a tile
    window: PatchBox  # the part of the picture that all tiles together show; it reaches beyond the picture
    # Rows of patches without those that are all padding; none of a strip thinner than a patch if their number is even.
    kept_rows: np.ndarray
    kept_columns: np.ndarray  # likewise across
    shape: tuple[int, int]  # rows and columns of soft tokens, fewer than patches where there are too many

    def boxes(self) -> list[PatchBox]:
        """The boxes of the tokens; that of a token that ends a row has no area and lies at the row's end."""
        rows, columns = self.shape
        if not rows:
            return []
        width, height = self.window.right - self.window.left, self.window.bottom - self.window.top
        down, across = (number * self.side for number in self.tiles)
        left, right = (self.kept_columns[0], self.kept_columns[-1] + 1) if columns else (0, across)
        window = PatchBox(
            self.window.left + width * left / across,
            self.window.top + height * self.kept_rows[0] / down,
            self.window.left + width * right / across,
            self.window.top + height * (self.kept_rows[-1] + 1) / down,
        )
        cells, boxes = places.grid_boxes(rows, columns, window), []
        for number, row in enumerate(places.grid_boxes(rows, 1, window)):
            boxes += cells[number * columns : (number + 1) * columns]
            boxes.append(PatchBox(row.right, row.top, row.right, row.bottom))
        return boxes

    def pooling(self, n_class: int) -> sparse.csr_array:
        """`[rows * (columns + 1), sum of P]`: weights of the tiles' tokens in each token; 0 for those that end rows."""
        side, (rows, columns) = self.side, self.shape
        down, across = (number * side for number in self.tiles)
        shape = (rows * (columns + 1), self.tiles[0] * self.tiles[1] * (n_class + side * side))
        if not rows * columns:
            return sparse.csr_array(shape)
        by_row, by_column = _resized(self.kept_rows, down, rows), _resized(self.kept_columns, across, columns)
        grid = sparse.coo_array(sparse.kron(by_row, by_column))
        row, column = np.divmod(grid.col, across)
        tile = row // side * self.tiles[1] + column // side
        source = tile * (n_class + side * side) + n_class + row % side * side + column % side
        target = grid.row // columns * (columns + 1) + grid.row % columns
        return sparse.csr_array((grid.data, (target, source)), shape=shape)


def _resized(kept: np.ndarray, length: int, size: int) -> np.ndarray:
    """`[size, length]`: linear interpolation of the kept cells to `size`, the identity for as many."""
    cells = torch.eye(len(kept), dtype=torch.float64)
    weights = np.zeros((size, length))
    weights[:, kept] = torch.nn.functional.interpolate(cells[None], size=size, mode="linear")[0].T.numpy()
    return weights


class LlavaOnevisionAdapter(Adapter):
    """LLaVA-OneVision: one picture in several resolutions, several in one.

    A single picture is shown whole, then as tiles that keep its aspect ratio, their tokens in rows that end with a
    learned token. Each of several pictures is padded to a square, and its tokens end with one such token.
    """

    reads_tower_norm = False
    chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
        "{% for item in message['content'] %}{{ '<image>' if item['type'] == 'image' else '\\n' + item['text'] }}"
        "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )

    def soft_token_boxes(self, tensors: Tensors, sizes: Sizes, image_processor: Any) -> list[list[PatchBox]]:
        side = self.tile_side
        if len(sizes) == 1:
            return [places.grid_boxes(side, side) + self._canvas(sizes[0]).boxes()]
        end = PatchBox(1.0, 1.0, 1.0, 1.0)
        return [[*places.grid_boxes(side, side, places.square_window(size)), end] for size in sizes]

    def picture_patches(self, tensors: Tensors, sizes: Sizes, image_processor: Any) -> list[places.PicturePatches]:
        side, n_class = self.tile_side, places.tower_kind(self.vision_tower()).n_class
        if len(sizes) > 1:
            tiles = places.batched_tiles([[places.square_window(size)] for size in sizes], side, side, n_class)
            end = sparse.csr_array((1, side * side + n_class))
            return [
                places.PicturePatches(t, sparse.csr_array(sparse.vstack([places.pool_tile(t[0]), end]))) for t in tiles
            ]
        canvas = self._canvas(sizes[0])
        windows = [[places.WHOLE, *places.grid_windows(*canvas.tiles, canvas.window)]]
        (tiles,) = places.batched_tiles(windows, side, side, n_class)
        pooling = sparse.block_diag([places.pool_tile(tiles[0]), canvas.pooling(n_class)])
        return [places.PicturePatches(tiles, sparse.csr_array(pooling))]

    def _canvas(self, size: Size) -> _Canvas:
        config, (width, height), side = self.model.config, size, self.tile_side
        best = select_best_resolution((height, width), config.image_grid_pinpoints)
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        down, across = get_patch_output_size(blank, best, ChannelDimension.FIRST)
        # The resized picture lies in the middle of the tiles, and the model drops rows or columns that are all padding.
        top, left = (best[0] - down) // 2, (best[1] - across) // 2
        window = PatchBox(-left / across, -top / down, (best[1] - left) / across, (best[0] - top) / down)
        tiles = (best[0] // int(config.vision_config.image_size), best[1] // int(config.vision_config.image_size))
        rows, columns = (number * side for number in tiles)
        kept = unpad_image(torch.empty(1, rows, columns), (height, width)).shape[1:]
        # Both sides lose as many. A strip thinner than a patch may lose all: only the ends of rows remain.
        kept_rows, kept_columns = (
            np.arange((n - k) // 2, (n + k) // 2) for n, k in zip((rows, columns), kept, strict=True)
        )
        rows, columns = kept
        ratio = math.sqrt(rows * columns / (int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2))
        shape = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
        return _Canvas(tiles, side, window, kept_rows, kept_columns, shape)


class Idefics3Adapter(Adapter):
    """Idefics3 and SmolVLM: tiles of a picture, then the whole of it, pooled by pixel shuffle.

    Row and column tokens between the tiles are text. A picture no larger than a tile is only shown whole.
    """

    decoder_name = "text_model"
    tower_name = "vision_model"
    chat_template = (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
        "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
        "{% for item in message['content'] %}{{ '<image>' if item['type'] == 'image' else item['text'] }}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )

    @property
    def pool(self) -> int:
        return int(self.model.config.scale_factor)

    def tiles(self, size: Size, image_processor: Any) -> list[PatchBox]:
        # Tiles are cut from the picture resized to whole tiles, so they cover all of it, whatever its aspect ratio.
        width, height = size
        _, rows, columns = image_processor.get_number_of_image_patches(height, width)
        return [*places.grid_boxes(rows, columns), places.WHOLE]

    def picture_patches(self, tensors: Tensors, sizes: Sizes, image_processor: Any) -> list[places.PicturePatches]:
        pictures, seen = super().picture_patches(tensors, sizes, image_processor), self._seen(tensors)
        if seen is None or bool(seen.all()):
            return pictures
        return places.masked(pictures, [self.tiles(size, image_processor) for size in sizes], seen[0].numpy(force=True))

    def patch_padding(self, tensors: Tensors) -> Tensor | None:
        seen = self._seen(tensors)
        if seen is None:
            return None
        shown = tensors["pixel_values"].flatten(0, 1).flatten(1).any(1)  # the model drops tiles that are all padding
        return ~seen.flatten(0, 1)[shown].flatten()

    def _seen(self, tensors: Tensors) -> Tensor | None:
        """Patches [B, tiles, rows, columns] that the tower does not mask: those that are not all padding."""
        mask = tensors.get("pixel_attention_mask")
        patch = int(self.model.config.vision_config.patch_size)
        return None if mask is None else torch.nn.functional.max_pool2d(mask.float(), patch).bool()


class InternVLAdapter(Adapter):
    """InternVL: tiles of a picture, then the whole of it, pooled by pixel shuffle.

    A picture that fits one tile best is only shown whole.
    """

    placeholder = "<IMG_CONTEXT>"
    chat_template = _chatml("<IMG_CONTEXT>\\n")

    @property
    def pool(self) -> int:
        return round(1 / self.model.config.downsample_ratio)

    def tiles(self, size: Size, image_processor: Any) -> list[PatchBox]:
        width, height = size
        tile = (image_processor.size["height"], image_processor.size["width"])
        columns, rows = get_optimal_tiled_canvas(
            (height, width), tile, image_processor.min_patches, image_processor.max_patches
        )
        return [*places.grid_boxes(rows, columns), places.WHOLE] if rows * columns > 1 else [places.WHOLE]


class Qwen3VLAdapter(Adapter):
    """Qwen3-VL: pictures at nearly their own resolution, 4 patches a soft token, and DeepStack (arXiv 2406.04334).

    DeepStack adds features of earlier tower layers to the soft tokens after the first decoder layers. The decoder takes
    them as constants, so the replacement model stays affine: `injections` of a soft token belong to its source.
    """

    tower_name = "visual"
    m_rope = True
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    chat_template = _chatml(placeholder)

    @property
    def pool(self) -> int:
        return int(self.model.config.vision_config.spatial_merge_size)

    def positions_used(self, tensors: Tensors) -> int:
        if "image_grid_thw" not in tensors:
            return super().positions_used(tensors)
        # A picture takes as many positions as its longer side has soft tokens.
        grids = tensors["image_grid_thw"].clone()
        grids[:, 1:] //= self.pool
        saved = int((grids.prod(1) - grids.amax(1)).sum()) // len(tensors["input_ids"])
        return super().positions_used(tensors) - saved

    def forward(self, tensors: Tensors, **settings: Any) -> Any:
        injections = tensors.get(INJECTIONS)
        if injections is None:
            return super().forward(tensors, **settings)

        def hook(_module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            size, n_layers, length, width = injections.shape
            everywhere = torch.ones(size, length, dtype=torch.bool, device=injections.device)
            rows = [injections[:, layer].reshape(-1, width) for layer in range(n_layers)]
            return args, {**kwargs, "visual_pos_masks": everywhere, "deepstack_visual_embeds": rows}

        # The model's forward computes DeepStack's features from pixels only, so they are passed to its decoder.
        handle = self.decoder().register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return super().forward({name: t for name, t in tensors.items() if name != INJECTIONS}, **settings)
        finally:
            handle.remove()

    def injections(self, decoder_arguments: Mapping[str, Any]) -> Tensor | None:
        features = decoder_arguments.get("deepstack_visual_embeds")
        if not features:
            return None
        where, embeddings = decoder_arguments["visual_pos_masks"], decoder_arguments["inputs_embeds"]
        size, length, width = embeddings.shape
        dense = embeddings.new_zeros(size, len(features), length, width)
        for layer, rows in enumerate(features):
            dense[:, layer][where] = rows.to(dense)
        return dense

    def grids(self, tensors: Tensors, sizes: Sizes) -> list[tuple[int, int]]:
        return [(rows, columns) for _, rows, columns in tensors["image_grid_thw"].tolist()]

    def picture_patches(self, tensors: Tensors, sizes: Sizes, image_processor: Any) -> list[places.PicturePatches]:
        vision = self.model.config.vision_config
        pixels = getattr(vision, "window_size", None)  # only Qwen2.5-VL's tower has windows
        window = None if pixels is None else pixels // self.pool // vision.patch_size
        tiles = places.merged_tiles(self.grids(tensors, sizes), self.pool, window)
        return [places.pooled([tile], self.pool) for tile in tiles]


class Qwen2_5_VLAdapter(Qwen3VLAdapter):
    """Qwen2.5-VL: a tower with windows, a system turn in the usual template, and no DeepStack."""

    chat_template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + Qwen3VLAdapter.chat_template


class Family(NamedTuple):
    """The adapter of a family, and the names of its model and processor in `transformers`."""

    adapter: type[Adapter]
    model: str
    processor: str = "AutoTokenizer"


FAMILIES = {  # by `model_type`
    "gemma3": Family(Gemma3Adapter, "Gemma3ForConditionalGeneration", "Gemma3Processor"),
    "gemma3_text": Family(Gemma3Adapter, "Gemma3ForCausalLM"),
    "gemma4": Family(Gemma4Adapter, "Gemma4ForConditionalGeneration", "Gemma4Processor"),
    "gemma4_text": Family(Gemma4Adapter, "Gemma4ForCausalLM"),
    "idefics3": Family(Idefics3Adapter, "Idefics3ForConditionalGeneration", "Idefics3Processor"),
    "internvl": Family(InternVLAdapter, "InternVLForConditionalGeneration", "InternVLProcessor"),
    "llava": Family(LlavaAdapter, "LlavaForConditionalGeneration", "LlavaProcessor"),
    "llava_onevision": Family(
        LlavaOnevisionAdapter, "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor"
    ),
    "paligemma": Family(PaliGemmaAdapter, "PaliGemmaForConditionalGeneration", "PaliGemmaProcessor"),
    "qwen2_5_vl": Family(Qwen2_5_VLAdapter, "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "qwen3_vl": Family(Qwen3VLAdapter, "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"),
    "smolvlm": Family(Idefics3Adapter, "SmolVLMForConditionalGeneration", "SmolVLMProcessor"),
}
# Families that users may try, and the part of them that the replacement model does not represent.
_REFUSED = {
    "gemma3n": "per-layer embeddings and AltUp streams",
    "idefics": "cross-attention layers",
    "llama4": "mixture-of-experts MLPs",
    "mllama": "cross-attention layers",
    "qwen3_vl_moe": "mixture-of-experts MLPs",
}


def family_of(model_type: str, where: str) -> Family:
    """The family of a `model_type`, or a `UserError` that names the known ones and `where` the type was read."""
    known = ", ".join(sorted(FAMILIES))
    if model_type in _REFUSED:
        raise UserError(
            f"models of type {model_type!r} have {_REFUSED[model_type]}, which attribution does not cover ({where}); "
            f"choose one of: {known}"
        )
    if model_type not in FAMILIES:
        raise UserError(f"models of type {model_type!r} are not supported ({where}); choose one of: {known}")
    return FAMILIES[model_type]


def adapter_for(model: Any) -> Adapter:
    """The adapter of a Hugging Face model, chosen by `model.config.model_type`."""
    return family_of(str(model.config.model_type), type(model).__name__).adapter(model)
