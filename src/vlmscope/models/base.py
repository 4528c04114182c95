"""The interface to a model: an `Adapter` around it, and one prompt as `ModelInputs`.

Legend: B prompts, T positions, d model width, L layers, Hkv key/value heads, D head width, V vocabulary.
A decoder layer is `h = x + N2(Attn(N1(x)))`, `x' = h + N4(MLP(N3(h)))`; families without post norms lack N2 and N4.
Some then compute `c x' + v`: `stream_scale` is c, a learned constant, and `injections` are v, from the pictures alone.
RMSNorm is `x * rsqrt(mean(x^2) + eps) * (offset + w)`. Scaled embeddings, kinds of RoPE, query/key norms, sliding
windows, caps on attention scores and masks need no code here: attribution takes embeddings and attention patterns as
the model computed them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, PatchBox
from vlmscope.models.boxes import WHOLE, PicturePatches, batched_tiles, grid_boxes, pooled, tower_kind
from vlmscope.models.checkpoint import computing_device, materialised
from vlmscope.models.template import Dialogue, Turn, dialogue, user_turn

Tensors = Mapping[str, Tensor]  # keyword arguments of a forward
Size = tuple[int, int]  # width and height of a picture in pixels
Sizes = Sequence[Size]
INJECTIONS = "injections"  # [B, n, T, d], among an `InputBatch`'s tensors


@dataclass(frozen=True)
class ModelInputs:
    """One prompt with its pictures, batch size 1, ready for the Hugging Face model's forward."""

    # Keyword arguments of `model(**tensors)`: `input_ids [1, T]`, `attention_mask [1, T]` and the family's own, such
    # as `token_type_ids [1, T]`, `pixel_values [n_images, 3, height, width]`, `image_sizes`.
    tensors: dict[str, Tensor]
    tokens: list[str]  # T strings for display
    is_image: np.ndarray  # `[T]` bool, soft tokens
    image_index: np.ndarray  # `[T]` int64, which picture a soft token belongs to, -1 for text
    patch_boxes: list[PatchBox | None]  # T entries, the part of the picture that a soft token stands for, None for text
    # `[T]` strings of `vlmscope.core.records.ROLES`; `last` is the final position, which predicts the answer;
    # `question` is the user's text; everything that the template adds is `special`.
    roles: np.ndarray
    prompt: str  # the prompt as the user wrote it
    sizes: tuple[Size, ...] = ()  # of each picture as it was given

    @property
    def input_ids(self) -> list[int]:
        """The T token ids."""
        return [int(token) for token in self.tensors["input_ids"][0]]

    def __len__(self) -> int:
        return len(self.tokens)


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Each token as text, its leading space included; a part of a character becomes the replacement character."""
    return [tokenizer.decode([int(token)]) for token in ids]


class LayerNorms(NamedTuple):
    """The norm modules of one decoder layer in the order of use; None where the family has none."""

    attn_in: nn.Module
    attn_out_post: nn.Module | None
    mlp_in: nn.Module
    mlp_out_post: nn.Module | None


class ScoreParts(NamedTuple):
    """The modules that make the queries and keys of a decoder layer; norms act head by head, before RoPE."""

    query: nn.Module
    key: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None


class Decoder(NamedTuple):
    """Differences between decoders: the constant added to a norm's weight, and whether there are post norms."""

    norm_offset: float
    post_norms: bool


LLAMA, GEMMA, GEMMA2 = Decoder(0.0, False), Decoder(1.0, False), Decoder(1.0, True)
DECODERS = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen2_5_vl_text": LLAMA,
    "qwen3": LLAMA,
    "qwen3_vl_text": LLAMA,
}


class Stack:
    """Layers whose MLPs a set of transcoders imitates: a model's decoder (its `Adapter`), or its vision tower."""

    site = "decoder"  # of `vlmscope.transcoders.config.HOOKS`
    model: Any  # the Hugging Face model
    n_layers: int
    d_model: int  # width of the stream

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        raise NotImplementedError

    def mlp(self, layer: int) -> nn.Module:
        """The raw MLP, whose input and output are those of transcoders."""
        raise NotImplementedError

    def after_mlp(self, layer: int) -> nn.Module | None:
        """The norm between the MLP's output and the stream, None where there is none."""
        return None

    def soft_token_id(self) -> int | None:
        """The id of soft tokens in `input_ids`, or None for a text-only model."""
        raise NotImplementedError

    def run(self, tensors: Tensors) -> None:
        """Run the model on its own inputs as far as these layers go."""
        raise NotImplementedError

    def tokens(self, tensors: Tensors, shape: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids` and, where there is padding, `attention_mask` of what the MLPs see, `shape` each."""
        raise NotImplementedError


class Adapter(Stack):
    """A Hugging Face model whose decoder is of the Llama or Gemma line, which use the same names for their parts.

    Most families differ only in the class attributes; a family overrides methods for the rest. By default every tile of
    a picture is a square grid of patches, pooled in blocks (`pool`) to soft tokens, row by row.

    Raises:
        UserError: the model has no language-model head, or its decoder is not in `decoders`.
    """

    decoders: Mapping[str, Decoder] = DECODERS  # by `model_type`
    decoder_name = "language_model"
    tower_name = "vision_tower"
    reads_tower_norm = True  # whether the tower's last state is read through its own norm
    caps_logits = False  # whether the Hugging Face class applies the decoder's `final_logit_softcapping`
    placeholder = "<image>"  # of a picture in a prompt
    chat_template = ""  # for a model without its own; "" for a family without turns
    needs_pictures = False
    answer_type = 0  # `token_type_ids` of an answer that follows the prompt
    takes_masks = False  # whether the class takes in place of `attention_mask` what it makes of it for its decoder
    # Positions depend on the pictures (M-RoPE). Such a model remembers the shift of its last pictures, so that it needs
    # explicit positions whenever its input is embeddings instead of pictures.
    m_rope = False

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        if not isinstance(getattr(model, "lm_head", None), nn.Linear):
            raise UserError(f"{name} has no language-model head; load the ForConditionalGeneration class")
        text = model.config.get_text_config()
        if text.model_type not in self.decoders:
            raise UserError(
                f"{name} has a decoder of type {text.model_type!r}, which is not known to be exact here (mixtures of "
                f"experts, parallel blocks, cross-attention are not); choose one of: {', '.join(sorted(self.decoders))}"
            )
        self.model = model
        self._kind = self.decoders[text.model_type]
        self.has_vision = getattr(model.config, "vision_config", None) is not None
        self.n_layers = int(text.num_hidden_layers)
        self.d_model = int(text.hidden_size)
        self.n_heads = int(text.num_attention_heads)
        self.vocab_size = int(text.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        return self._layer(0).self_attn.o_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return computing_device(self._layer(0).self_attn.o_proj)

    # Forwards

    def run(self, tensors: Tensors) -> None:
        # Logits are not needed: one position of them takes less memory than [B, T, V].
        self.forward(tensors, use_cache=False, logits_to_keep=1)

    def tokens(self, tensors: Tensors, shape: Sequence[int]) -> dict[str, Tensor]:
        return dict(tensors)

    def arguments_of(self, module: nn.Module, tensors: Tensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which a forward first calls a module; the forward ends there."""

        class Reached(Exception):
            """Ends the forward: nothing after the call is needed."""

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise Reached(args, dict(kwargs))

        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.forward(tensors, use_cache=False)
        except Reached as reached:
            args, kwargs = reached.args
            return args, kwargs
        finally:
            handle.remove()
        raise AssertionError("the forward did not reach the module")

    def forward(self, tensors: Tensors, **settings: Any) -> Any:
        """The Hugging Face forward of a prompt's own inputs, or of an `InputBatch`'s tensors with `INJECTIONS`."""
        return self.model(**tensors, **settings)

    def next_logits(self, tensors: Tensors) -> Float[Tensor, "b v"]:
        """The logits at the last position, `finite`."""
        return self.finite(self.forward(tensors, use_cache=False, logits_to_keep=1).logits[:, -1])

    def finite(self, logits: Tensor) -> Tensor:
        """The same logits, or a `UserError` where they are not finite; called wherever logits of the model are read."""
        if not bool(logits.isfinite().all()):
            name = str(self.dtype).removeprefix("torch.")
            todo = "try model.dtype=bfloat16 or float32" if self.dtype == torch.float16 else "check both"
            raise UserError(
                f"the model's logits are not finite in {name}: its activations overflow (float16 ends at 65504), its "
                f"weights are damaged, or an edit is too strong; {todo}"
            )
        return logits

    def positions_used(self, tensors: Tensors) -> int:
        """How many of the model's positions the inputs take: one per token, fewer with M-RoPE."""
        return int(tensors["input_ids"].shape[1])

    def check_length(self, tensors: Tensors, answer: int = 0) -> None:
        """Refuse inputs that exceed the model's positions, together with an answer of so many tokens.

        RoPE would compute further positions without an error, and the model would answer with nonsense.
        """
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        used = self.positions_used(tensors)
        if longest is not None and used + answer > longest:
            more = f" and its answer up to {answer}" if answer else ""
            raise UserError(
                f"the input is too long: {used} positions{more}, the model has {longest} positions; shorten "
                f"{'it, or ask for a shorter answer' if answer else 'it (data: lower task.max_tokens)'}"
            )

    def injections(self, decoder_arguments: Mapping[str, Any]) -> Float[Tensor, "b n t d"] | None:
        """What pictures add to the stream after the first n layers (DeepStack), 0 at other positions; None if nothing.

        It is read from the keyword arguments of the call of `decoder()`.
        """
        return None

    # The decoder

    def decoder(self) -> Any:
        """The text model whose forward takes `inputs_embeds`."""
        return getattr(
            self.model.model, self.decoder_name, self.model.model
        )  # text-only classes have no such attribute

    def _layer(self, layer: int) -> Any:
        return self.decoder().layers[layer]

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self._layer(layer).self_attn

    def mlp(self, layer: int) -> nn.Module:
        """The raw MLP: its input is `mlp_in` (after N3), its output `mlp_out` (before N4)."""
        return self._layer(layer).mlp

    def after_mlp(self, layer: int) -> nn.Module | None:
        return self.norms(layer).mlp_out_post

    def norms(self, layer: int) -> LayerNorms:
        """The norms of a decoder layer."""
        block = self._layer(layer)
        attn_in, after_attention = block.input_layernorm, block.post_attention_layernorm
        if not self._kind.post_norms:  # Llama's name for the norm before the MLP, after the attention
            return LayerNorms(attn_in, None, after_attention, None)
        return LayerNorms(attn_in, after_attention, block.pre_feedforward_layernorm, block.post_feedforward_layernorm)

    def final_norm(self) -> nn.Module:
        """The norm before the unembedding."""
        return self.decoder().norm

    def lm_head(self) -> nn.Linear:
        """The unembedding, `weight [V, d]`."""
        return self.model.lm_head

    @property
    def logit_softcap(self) -> float | None:
        """The cap c in the logits `c tanh(u / c)` of the model's forward, u the unembedding's output; or None."""
        text = self.model.config.get_text_config()
        return getattr(text, "final_logit_softcapping", None) if self.caps_logits else None

    def norm_scale(self, norm: nn.Module, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The factor with `norm(x) == x * norm_scale(norm, x)`, in the dtype of `x`."""
        return self.norm_factor(norm, self.inverse_rms(norm, x), x.dtype).expand_as(x)

    def inverse_rms(self, norm: nn.Module, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
        """The part of `norm_scale` that depends on `x`, one number per row, at least in float32."""
        # Half precision is normalised in float32, as the model does.
        wide = x if x.dtype == torch.float64 else x.float()
        eps = float(getattr(norm, "eps", None) or norm.variance_epsilon)  # pyright: ignore[reportArgumentType]
        return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)

    def norm_factor(self, norm: nn.Module, inverse_rms: Float[Tensor, "*batch 1"], dtype: torch.dtype) -> Tensor:
        """`norm_scale` from `inverse_rms`, in `dtype`: `[*batch, width]`, or `[*batch, 1]` of a norm without weight."""
        if getattr(norm, "weight", None) is None:  # a norm of values has none
            return inverse_rms.to(dtype)
        return (inverse_rms * (self._kind.norm_offset + materialised(norm).to(inverse_rms.dtype))).to(dtype)

    def stream_scale(self, layer: int) -> float:
        """The constant by which a layer multiplies its output."""
        return 1.0

    def value_norm(self, layer: int) -> nn.Module | None:
        """The norm of each head's values `[.., Hkv, D]`, after the value projection; None where the family has none."""
        return None

    def value_projection(self, layer: int) -> nn.Module:
        """`v = attn_in @ weight.T (+ bias)`, rows ordered by key/value head: weight `[Hkv * D, d]`."""
        return self._layer(layer).self_attn.v_proj

    def value_weight(self, layer: int) -> Float[Tensor, "hkv_times_head d"]:
        """The value projection's weight, offloaded or not."""
        return materialised(self.value_projection(layer))

    def value_bias(self, layer: int) -> Tensor | None:
        """The value projection's bias `[Hkv * D]`."""
        return _bias(self.value_projection(layer))

    def output_weight(self, layer: int) -> Float[Tensor, "d h_times_head"]:
        """The output projection: `attn_out = z @ weight.T (+ bias)`, columns ordered by query head."""
        return materialised(self._layer(layer).self_attn.o_proj)

    def output_bias(self, layer: int) -> Tensor | None:
        """The output projection's bias `[d]`."""
        return _bias(self._layer(layer).self_attn.o_proj)

    def score_parts(self, layer: int) -> ScoreParts:
        """The projections, with rows ordered by head, and norms that make queries and keys."""
        module = self._layer(layer).self_attn
        return ScoreParts(
            module.q_proj, module.k_proj, getattr(module, "q_norm", None), getattr(module, "k_norm", None)
        )

    # Prompts

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        """The prompt in a chat template (the family's usual one when None) with one placeholder per picture."""
        self._check_text(prompt, n_images, tokenizer)
        return user_turn(tokenizer, chat_template or self.chat_template, prompt, self.placeholder, n_images)

    def completed_turn(self, turn: Turn, tokenizer: Any) -> Turn:
        """The turn with the text that the family's processor adds before it expands placeholders; mostly none."""
        return turn

    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        """A conversation in its chat template, as one dialogue; one per exchange for a family without turns."""
        self._check_text("\n".join(text for exchange in exchanges for text in exchange), n_images, tokenizer)
        return [dialogue(tokenizer, chat_template or self.chat_template, exchanges, self.placeholder, n_images)]

    def _check_text(self, text: str, n_images: int, tokenizer: Any) -> None:
        """Refuse pictures for a text-only model, and soft tokens in the text without their placeholder."""
        if not self.has_vision:
            if n_images:
                name = type(self.model).__name__
                raise UserError(f"{name} takes no pictures but {n_images} were given; leave image= out")
            return
        soft = tokenizer.convert_ids_to_tokens(self.soft_token_id())
        if text.count(soft) != text.count(self.placeholder) * self.placeholder.count(soft):
            raise UserError(f"the prompt spells {soft}; write {self.placeholder} once for each picture")

    def soft_token_id(self) -> int | None:
        return int(self.model.config.image_token_id) if self.has_vision else None

    # Pictures

    def vision_tower(self) -> Any:
        """The vision tower; only for a model that takes pictures."""
        return getattr(self.model.model, self.tower_name)

    def vision_attention(self) -> list[nn.Module]:
        """The attention modules of the vision tower, from the first to the last that is read."""
        if not self.has_vision:
            return []
        kind = tower_kind(self.vision_tower())
        return [layer.get_submodule(kind.attention) for layer in self.vision_layers()]

    def vision_layers(self) -> list[Any]:
        """The layers of the vision tower, from the first to the last that is read."""
        layers = self.vision_tower().get_submodule(tower_kind(self.vision_tower()).layers)
        return list(layers)[: self._last_state(len(layers))]

    def patch_padding(self, tensors: Tensors) -> Tensor | None:
        """Which of the tower's tokens [N] are padding, bool; None where none is."""
        return None

    def vision_states(self) -> nn.Module:
        """The module of the vision tower whose output (or its first entry) is read: `[B, S, d_v]` or `[N, d_v]`."""
        tower = self.vision_tower()
        kind = tower_kind(tower)
        layers = tower.get_submodule(kind.layers)
        last = self._last_state(len(layers))
        if self.reads_tower_norm and kind.norm and last == len(layers):
            return tower.get_submodule(kind.norm)
        return layers[last - 1]

    def _last_state(self, n_layers: int) -> int:
        """Index of the last hidden state of the tower that is read; 0 is the input of the first layer."""
        read = getattr(self.model.config, "vision_feature_layer", -1)
        states = [read] if isinstance(read, int) else read
        return max(state if state >= 0 else n_layers + 1 + state for state in states)

    @property
    def tile_side(self) -> int:
        """Patches down and across a tile."""
        vision = self.model.config.vision_config
        size, patch = (getattr(vision, name) for name in ("image_size", "patch_size"))
        return int(size) // int(patch) if isinstance(size, int) else size[0] // patch[0]

    @property
    def pool(self) -> int:
        """Patches down and across a soft token."""
        return 1

    def grids(self, tensors: Tensors, sizes: Sizes) -> Sequence[tuple[int, int]]:
        """Rows and columns of patches of a tile of each picture."""
        return [(self.tile_side, self.tile_side)] * len(sizes)

    def tiles(self, size: Size, image_processor: Any) -> list[PatchBox]:
        """The part of a picture of this size that each of its tiles shows."""
        return [WHOLE]

    def soft_token_boxes(self, tensors: Tensors, sizes: Sizes, image_processor: Any) -> list[list[PatchBox]]:
        """The part of its picture that each soft token stands for: one list per picture.

        A token that stands for no part, such as the end of a row, has a box without area. `tensors` are the model's
        inputs with these pictures, batch size 1, made by `image_processor` (None for a text-only model).
        """
        boxes = []
        for size, (rows, columns) in zip(sizes, self.grids(tensors, sizes) if sizes else (), strict=True):
            tiles, grid = self.tiles(size, image_processor), (rows // self.pool, columns // self.pool)
            boxes.append([box for tile in tiles for box in grid_boxes(*grid, tile)])
        return boxes

    def picture_patches(self, tensors: Tensors, sizes: Sizes, image_processor: Any) -> list[PicturePatches]:
        """The patches of each picture (one or more) in the vision tower, and their pooling to soft tokens."""
        windows = [self.tiles(size, image_processor) for size in sizes]
        tiles = batched_tiles(windows, *self.grids(tensors, sizes)[0], tower_kind(self.vision_tower()).n_class)
        return [pooled(picture, self.pool) for picture in tiles]


class VisionStack(Stack):
    """The layers of a model's vision tower up to the last that is read; its tokens are patches and class tokens.

    Raises:
        UserError: the model takes no pictures.
    """

    site = "tower"

    def __init__(self, adapter: Adapter) -> None:
        if not adapter.has_vision:
            raise UserError(f"{type(adapter.model).__name__} takes no pictures: it has no vision tower")
        self.adapter, self.model = adapter, adapter.model
        self.layers: list[Any] = adapter.vision_layers()
        self.n_layers, self.d_model = len(self.layers), int(adapter.vision_tower().config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.adapter.dtype

    @property
    def device(self) -> torch.device:
        return self.adapter.device

    def mlp(self, layer: int) -> nn.Module:
        return self.layers[layer].mlp

    def soft_token_id(self) -> int | None:
        return self.adapter.soft_token_id()

    def run(self, tensors: Tensors) -> None:
        self.adapter.arguments_of(self.adapter.decoder(), tensors)

    def tokens(self, tensors: Tensors, shape: Sequence[int]) -> dict[str, Tensor]:
        # All patches are one kind of token, that of soft tokens.
        view = {"input_ids": torch.full(tuple(shape), self.soft_token_id() or 0, device=self.device)}
        padding = self.adapter.patch_padding(tensors)
        return view if padding is None else view | {"attention_mask": (~padding).reshape(tuple(shape)).long()}


def stack_of(adapter: Adapter, site: str) -> Stack:
    """The layers of a site of `vlmscope.transcoders.config.HOOKS`."""
    return adapter if site == "decoder" else VisionStack(adapter)


def _bias(projection: Any) -> Tensor | None:
    return None if projection.bias is None else materialised(projection, "bias")


def all_norms(adapter: Adapter) -> Iterator[nn.Module]:
    """All norms except those of queries and keys, which are inside the frozen attention patterns."""
    for layer in range(adapter.n_layers):
        yield from (norm for norm in (*adapter.norms(layer), adapter.value_norm(layer)) if norm is not None)
    yield adapter.final_norm()


# Products of a tensor that stayed in float64 with a float32 table (Gemma 4's pooling weights) would raise an error.
_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.nn.functional.linear}


class _KeepFloat64(TorchFunctionMode):
    """Skips casts of float64 tensors to float32; float32 models are not affected."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            if func in (Tensor.to, Tensor.type):
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        if func in _PRODUCTS and {torch.float32, torch.float64} <= {a.dtype for a in args if isinstance(a, Tensor)}:
            args = tuple(a.to(torch.float64) if isinstance(a, Tensor) else a for a in args)
        return func(*args, **kwargs)


@contextmanager
def exact_float64() -> Iterator[None]:
    """While active, casts of float64 tensors to float32 leave them in float64; float32 models are not affected.

    Hugging Face computes RMSNorm, the eager softmax and rotary angles in float32 whatever the model's dtype, so a
    float64 model is otherwise only good to about 1e-7. For checks that compare two float64 computations.
    """
    with _KeepFloat64():
        yield
