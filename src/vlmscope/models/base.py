"""What all of vlmscope sees of a model: the adapter of a family, named positions, norms and precision.

What every position of a tokenised prompt is: its token, picture, part of the picture and role.

What the rest of vlmscope may ask of a model, whatever its family.

Legend: B prompts, T positions, d model width, L layers, Hkv key/value heads, D head width, V vocabulary.
A decoder layer is `h = x + N2(Attn(N1(x)))`, `x' = h + N4(MLP(N3(h)))`; families without post norms lack N2 and N4.
Some go on to `c x' + v`: `stream_scale` is c, a learned constant, and `injections` are v, from the pictures alone.

The norms whose scales are frozen.

Float64 that stays float64.

Hugging Face computes RMSNorm, the eager softmax and rotary angles in float32 whatever the model's dtype (`x.float()`,
`dtype=torch.float32`), so a float64 model is only good to about 1e-7. `exact_float64` keeps those casts in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, PatchBox
from vlmscope.models.boxes import PicturePatches
from vlmscope.models.template import Dialogue, Turn


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """What each token stands for in text, a space before a word included.

    The vocabulary's own spelling is not for readers: byte-level ones write a space as another letter and every byte
    beyond ASCII as one. A token that is a part of a character is the replacement character.
    """
    return [tokenizer.decode([int(token)]) for token in ids]


def describe_inputs(
    soft_token_id: int | None,
    tokenizer: Any,
    tensors: dict[str, Tensor],
    turn: Turn,
    boxes: Sequence[Sequence[PatchBox]],
    written: np.ndarray,
    sizes: Sequence[tuple[int, int]] = (),
) -> ModelInputs:
    """Name every position of tokenised inputs.

    Args:
        soft_token_id: the id of soft tokens in `input_ids`, None for a text-only model.
        tokenizer: the model's tokenizer.
        tensors: the model's inputs, batch size 1.
        turn: the prompt in its template, from which the inputs were made.
        boxes: for each picture the box of each of its soft tokens, in order.
        written: `[T]` bool, tokens with a part of what the user wrote, as `written_by_user` finds them.
        sizes: width and height of each picture in pixels.

    Raises:
        UserError: boxes and soft tokens differ in number, so that the processor and the model do not belong together.
    """
    ids = [int(token) for token in tensors["input_ids"][0]]
    is_image = np.array([token == soft_token_id for token in ids])
    tokens = token_strings(tokenizer, ids)
    flat = [(picture, box) for picture, found in enumerate(boxes) for box in found]
    if len(flat) != is_image.sum():
        raise UserError(
            f"the processor made {is_image.sum()} soft tokens where the model's pictures have {len(flat)}; "
            "use the processor that was saved with the model"
        )
    image_index = np.full(len(ids), -1, dtype=np.int64)
    patch_boxes: list[PatchBox | None] = [None] * len(ids)
    for position, (picture, box) in zip(np.flatnonzero(is_image), flat, strict=True):
        image_index[position], patch_boxes[position] = picture, box
    # Special tokens that the user spells are the template's all the same.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    by_user = written & np.array([token not in special for token in ids])
    roles = np.select([is_image, by_user], ["image", "question"], "special").astype("<U8")
    roles[-1] = "last"
    return ModelInputs(tensors, tokens, is_image, image_index, patch_boxes, roles, turn.content, tuple(sizes))


def written_by_user(turn: Turn, replaced: Sequence[Mapping[str, Any]], offsets: np.ndarray) -> np.ndarray:
    """Which tokens hold a part of the prompt, told by characters.

    Neither words nor ids would do: a character may be several tokens, a token may reach from the template into the
    prompt, and what the processor puts around soft tokens may change how the text beside it is cut.

    Args:
        turn: the text before placeholders were replaced.
        replaced: what the processor put in the place of placeholders, in order: `span`, first and last character (past
            the end) in the turn, `text`, what stood there, and `replacement`.
        offsets: `[T, 2]`, first and last character (past the end) of every token in the text after the replacement.

    Returns:
        `[T]` bool. What replaces a placeholder is not written by the user, wherever it was spelt.
    """
    start, end = len(turn.before), len(turn.before) + len(turn.content)
    prompt = np.zeros(len(turn.text), dtype=bool)
    prompt[start:end] = True
    pieces, done = [], 0
    for change in replaced:
        first, last = change["span"]
        assert turn.text[first:last] == change["text"], "the processor was given another text than the turn"
        pieces += [prompt[done:first], np.zeros(len(change["replacement"]), dtype=bool)]
        done = last
    characters = np.concatenate([*pieces, prompt[done:]])
    assert offsets.max(initial=0) <= len(characters), "the processor added text that the turn does not have"
    return np.array([characters[first:last].any() for first, last in offsets], dtype=bool)


INJECTIONS = "injections"  # [B, n, T, d], among an `InputBatch`'s tensors


@dataclass(frozen=True)
class ModelInputs:
    """One prompt with its pictures, batch size 1, ready for the Hugging Face model's forward.

    Attributes:
        tensors: keyword arguments of `model(**tensors)`: `input_ids [1, T]`, `attention_mask [1, T]` and what else the
            family wants, such as `token_type_ids [1, T]`, `pixel_values [n_images, 3, height, width]`, `image_sizes`.
        tokens: T strings to show.
        is_image: `[T]` bool, soft tokens.
        image_index: `[T]` int64, which picture a soft token belongs to, -1 for text.
        patch_boxes: T entries, the part of the picture that a soft token stands for, None for text.
        roles: `[T]` strings of `vlmscope.core.records.ROLES`; `last` is the final position, which predicts the
            answer; `question` is what the user wrote; everything that the template adds is `special`.
        prompt: the prompt as the user wrote it.
        sizes: width and height of each picture in pixels, as it was given.
    """

    tensors: dict[str, Tensor]
    tokens: list[str]
    is_image: np.ndarray
    image_index: np.ndarray
    patch_boxes: list[PatchBox | None]
    roles: np.ndarray
    prompt: str
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def input_ids(self) -> list[int]:
        """The T token ids."""
        return [int(token) for token in self.tensors["input_ids"][0]]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class LayerNorms:
    """The norm modules of one decoder layer; None where the family has none."""

    attn_in: nn.Module
    attn_out_post: nn.Module | None
    mlp_in: nn.Module
    mlp_out_post: nn.Module | None

    def __iter__(self) -> Iterator[nn.Module | None]:
        """The four norms in the order of use."""
        return iter((self.attn_in, self.attn_out_post, self.mlp_in, self.mlp_out_post))


@dataclass(frozen=True)
class ScoreParts:
    """The modules that make the queries and keys of a decoder layer; norms act head by head, before RoPE."""

    query: nn.Module
    key: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None


class Adapter(ABC):
    """Everything that differs between families; the rest of vlmscope sees a model only through this."""

    model: Any
    n_layers: int
    d_model: int
    n_heads: int
    vocab_size: int
    # Whether positions come from the pictures (M-RoPE). Such a model remembers the shift that its last pictures made,
    # so that it must be told the positions whenever it is given embeddings instead of pictures.
    m_rope: bool = False
    # The family's usual template, for a model that came without one; "" where the family knows no turns.
    chat_template: str = ""
    # Whether the family was made for prompts with pictures alone.
    needs_pictures: bool = False
    # `token_type_ids` of an answer that follows the prompt.
    answer_type: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder's weights."""
        return self.output_weight(0).dtype

    @property
    def device(self) -> torch.device:
        """The device of the decoder's weights."""
        return self.output_weight(0).device

    @property
    @abstractmethod
    def has_vision(self) -> bool:
        """Whether the model takes pictures."""

    @property
    @abstractmethod
    def logit_softcap(self) -> float | None:
        """The cap c of `c tanh(u / c)`, by which the model's forward bends its unembedding's output u, or None."""

    def forward(self, tensors: Mapping[str, Tensor], **settings: Any) -> Any:
        """The Hugging Face forward, of a prompt's own inputs or of an `InputBatch`'s tensors.

        Args:
            tensors: keyword arguments of the model; `INJECTIONS` among them stand for what its pictures add to the
                stream between layers, which the model itself would take from pixels only.
            settings: such as `use_cache`.
        """
        return self.model(**tensors, **settings)

    def next_logits(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "b v"]:
        """The logits at the last position, `finite`."""
        return self.finite(self.forward(tensors, use_cache=False, logits_to_keep=1).logits[:, -1])

    def finite(self, logits: Tensor) -> Tensor:
        """The same logits of any shape: called wherever the model's are read, for a table of nan says nothing.

        Raises:
            UserError: some are infinite or no numbers.
        """
        if not bool(logits.isfinite().all()):
            name = str(self.dtype).removeprefix("torch.")
            todo = "try model.dtype=bfloat16 or float32" if self.dtype == torch.float16 else "check both"
            raise UserError(
                f"the model's logits are not finite in {name}: its activations overflow (float16 ends at 65504), its "
                f"weights are damaged, or an edit is too strong; {todo}"
            )
        return logits

    def positions_used(self, tensors: Mapping[str, Tensor]) -> int:
        """How many of the model's positions the inputs take: one a token, but with M-RoPE."""
        return int(tensors["input_ids"].shape[1])

    def check_length(self, tensors: Mapping[str, Tensor], answer: int = 0) -> None:
        """Refuse inputs that with an answer of so many tokens would leave the positions that the model was made for.

        RoPE computes further ones all the same, and the model would answer with nonsense.

        Raises:
            UserError: with both lengths.
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
        """What pictures add to the stream after the first n layers (DeepStack), 0 at other positions; None for nothing.

        Args:
            decoder_arguments: keyword arguments that the model handed to `decoder()`.
        """
        return None

    def stream_scale(self, layer: int) -> float:
        """The constant by which a layer multiplies all that leaves it."""
        return 1.0

    def value_norm(self, layer: int) -> nn.Module | None:
        """The norm of each head's values `[.., Hkv, D]`, after the value projection; None where the family has none."""
        return None

    @abstractmethod
    def decoder(self) -> nn.Module:
        """The text model whose forward takes `inputs_embeds`."""

    @abstractmethod
    def attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer."""

    @abstractmethod
    def mlp(self, layer: int) -> nn.Module:
        """The raw MLP: its input is `mlp_in` (after N3), its output `mlp_out` (before N4)."""

    @abstractmethod
    def norms(self, layer: int) -> LayerNorms:
        """The norms of a decoder layer."""

    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding."""

    @abstractmethod
    def lm_head(self) -> nn.Linear:
        """The unembedding, `weight [V, d]`."""

    @abstractmethod
    def norm_scale(self, norm: nn.Module, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The factor with `norm(x) == x * norm_scale(norm, x)`, in the dtype of `x`."""

    @abstractmethod
    def inverse_rms(self, norm: nn.Module, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
        """What of `norm_scale` depends on `x`, a number a row, in float32 at least."""

    @abstractmethod
    def norm_factor(self, norm: nn.Module, inverse_rms: Float[Tensor, "*batch 1"], dtype: torch.dtype) -> Tensor:
        """`norm_scale` from `inverse_rms`, in `dtype`: `[*batch, width]`, or `[*batch, 1]` of a norm without weight."""

    @abstractmethod
    def value_weight(self, layer: int) -> Float[Tensor, "hkv_times_head d"]:
        """The value projection: `v = attn_in @ weight.T (+ bias)`, rows ordered by key/value head."""

    @abstractmethod
    def value_bias(self, layer: int) -> Tensor | None:
        """The value projection's bias `[Hkv * D]`."""

    @abstractmethod
    def output_weight(self, layer: int) -> Float[Tensor, "d h_times_head"]:
        """The output projection: `attn_out = z @ weight.T (+ bias)`, columns ordered by query head."""

    @abstractmethod
    def output_bias(self, layer: int) -> Tensor | None:
        """The output projection's bias `[d]`."""

    @abstractmethod
    def score_parts(self, layer: int) -> ScoreParts:
        """The projections, with rows ordered by head, and norms that make queries and keys."""

    @abstractmethod
    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        """The prompt in its chat template with one placeholder a picture.

        Args:
            prompt: what the user says.
            n_images: the number of pictures.
            tokenizer: the model's tokenizer.
            chat_template: the template that came with the model, in Jinja; the family's usual one when None.

        Raises:
            UserError: when the prompt spells another number of placeholders than there are pictures.
        """

    def completed_turn(self, turn: Turn, tokenizer: Any) -> Turn:
        """The turn with what the family's processor adds by itself before it expands placeholders; mostly nothing.

        Args:
            turn: what `wrap_prompt` gave.
            tokenizer: the model's tokenizer.
        """
        return turn

    @abstractmethod
    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        """A conversation in its chat template, as one dialogue; one an exchange for a family that knows no turns.

        Args:
            exchanges: what user and assistant say, at least one; the pictures come with the first.
            n_images: the number of pictures.
            tokenizer: the model's tokenizer.
            chat_template: as in `wrap_prompt`.

        Raises:
            UserError: the exchanges spell placeholders that do not match the pictures, or the template has no answers.
        """

    @abstractmethod
    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        """The part of its picture that each soft token stands for.

        Args:
            tensors: the model's inputs with these pictures, batch size 1.
            sizes: width and height of each picture in pixels, as it was given.
            image_processor: the Hugging Face image processor that made the inputs, None for a text-only model.

        Returns:
            One list a picture, in the order of its soft tokens. A token that stands for no part of the picture, such
            as the end of a row, has a box without area.
        """

    @abstractmethod
    def vision_attention(self) -> list[nn.Module]:
        """The attention modules of the vision tower, from the first to the last that the decoder is given anything of.

        Returns:
            Modules that call transformers' attention interface; none for a text-only model.

        Raises:
            UserError: the tower's attention cannot be recorded.
        """

    @abstractmethod
    def vision_states(self) -> nn.Module:
        """The module of the vision tower whose output, or its first entry, is what the decoder's side is given.

        Its tokens are those of `vision_attention`, in the same order: `[B, S, d_v]`, or `[N, d_v]`.

        Raises:
            UserError: it is not known which that is.
        """

    @abstractmethod
    def vision_tower(self) -> Any:
        """The vision tower; only for a model that takes pictures."""

    @abstractmethod
    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        """The patches that the vision tower sees of each picture, and how they are pooled to soft tokens.

        Args:
            tensors: as for `soft_token_boxes`.
            sizes: as for `soft_token_boxes`, of one picture or more.
            image_processor: as for `soft_token_boxes`.

        Raises:
            UserError: it is not known how this tower holds its patches.
        """

    @abstractmethod
    def soft_token_id(self) -> int | None:
        """The token id that stands for a soft token in `input_ids`, or None for a text-only model."""


def all_norms(adapter: Adapter) -> Iterator[nn.Module]:
    """Every norm on the way of the stream: four a layer or fewer, those of values, and the final one.

    Norms of queries and keys are inside the frozen attention patterns.
    """
    for layer in range(adapter.n_layers):
        yield from (norm for norm in (*adapter.norms(layer), adapter.value_norm(layer)) if norm is not None)
    yield adapter.final_norm()


# A product of what stayed float64 with a table that was made in float32 (Gemma 4's pooling weights) would be an error.
_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.nn.functional.linear}


class _KeepFloat64(TorchFunctionMode):
    """Turns a cast of a float64 tensor to float32 into none; float32 models are unmoved."""

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
    """While active, casts of float64 tensors to float32 leave them in float64; float32 models compute as ever.

    For checks that compare two float64 computations to better than float32's accuracy.
    """
    with _KeepFloat64():
        yield
