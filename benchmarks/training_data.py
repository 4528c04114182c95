"""What `benchmarks/training.py` trains on: activations of Orrery on pictures, kept on disk, and token ids of its text.

Legend: T tokens, d model width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmscope.api import load
from vlmscope.core.artifacts import atomic_path
from vlmscope.core.records import generator
from vlmscope.data.orrery.dataset import ScenePool
from vlmscope.models.loading import VLM
from vlmscope.training.batches import LayerActivations, TokenPacker, chat_batch, collect
from vlmscope.training.batches import joined_activations as joined

PICTURES = {"planets": 14, "digits": 18, "shapes": 12, "hands": 8}  # scenes of a batch
LAYER = 4  # the layer whose transcoder is trained where one is
WIDE = 640
TOKENS = 81_920
VAL_TOKENS = 8_192
ALL_LAYERS_TOKENS = 8_192
SEQUENCE = 64
SEQUENCES, VAL_SEQUENCES = 3_200, 128


@dataclass(frozen=True)
class Activations:
    """Inputs and outputs [T, d] of a layer's MLP, to train on and to judge by."""

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor

    def wide(self, width: int = WIDE, tokens: int = 8_192) -> "Activations":
        """The first tokens, turned into a wider space by random orthonormal columns, with noise of a tenth there."""
        g = torch.Generator().manual_seed(0)
        turn = torch.linalg.qr(torch.randn(width, self.x.shape[1], generator=g)).Q.T

        def lift(rows: Tensor) -> Tensor:
            out = rows @ turn
            return out + 0.1 * out.std() * torch.randn(out.shape, generator=g)

        few = self.x_val[:1024], self.y_val[:1024]
        return Activations(lift(self.x[:tokens]), lift(self.y[:tokens]), lift(few[0]), lift(few[1]))


def prepare(data: Path, folder: Path) -> None:
    """Capture and save, unless it is there: `pictures`, `layers` and `text`, all of them safetensors."""
    if all((folder / f"{name}.safetensors").exists() for name in ("pictures", "layers", "text")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    vlm = load("orrery").vlm
    train, val = (_captured(vlm, ScenePool(data, split), n) for split, n in (("train", TOKENS), ("val", VAL_TOKENS)))
    own = {"x": train.by_layer[LAYER][0], "y": train.by_layer[LAYER][1]}
    own |= {"x_val": val.by_layer[LAYER][0], "y_val": val.by_layer[LAYER][1]}
    _save(own, folder / "pictures.safetensors")
    every = {}
    for layer, (x, y) in train.by_layer.items():
        every |= {f"x{layer}": x[:ALL_LAYERS_TOKENS].clone(), f"y{layer}": y[:ALL_LAYERS_TOKENS].clone()}
    _save(every, folder / "layers.safetensors")
    ids = {
        "train": _text(vlm, ScenePool(data, "train"), SEQUENCES),
        "val": _text(vlm, ScenePool(data, "val"), VAL_SEQUENCES),
    }
    _save(ids, folder / "text.safetensors")


def pictures(folder: Path) -> Activations:
    """What `prepare` kept of one layer."""
    return Activations(**load_file(folder / "pictures.safetensors"))


def layers(folder: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """What `prepare` kept of all layers: layer -> ([T, d], [T, d])."""
    found = load_file(folder / "layers.safetensors")
    return {n: (found[f"x{n}"], found[f"y{n}"]) for n in range(len(found) // 2)}


def text(folder: Path) -> tuple[Tensor, Tensor]:
    """Token ids to train on and to judge by, [sequences, 64] each: no padding, which the peer would not know."""
    found = load_file(folder / "text.safetensors")
    return found["train"], found["val"]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with atomic_path(path) as part:
        save_file(tensors, part)


@torch.no_grad()
def _captured(vlm: VLM, pool: ScenePool, tokens: int) -> LayerActivations:
    """That many tokens, in one random order, of batches of scenes with pictures."""
    parts: list[LayerActivations] = []
    while sum(part.n_tokens for part in parts) < tokens:
        scenes = pool.batch(1, len(parts), PICTURES)
        batch = chat_batch(scenes, vlm.tokenizer, int(vlm.processor.image_seq_length), generator(1, "chat", len(parts)))
        parts.append(collect(vlm.adapter, batch))
    whole = joined(parts)
    order = torch.from_numpy(generator(0, "order").permutation(whole.n_tokens)[:tokens])
    by_layer = {layer: (x[order], y[order]) for layer, (x, y) in whole.by_layer.items()}
    return LayerActivations(by_layer, whole.is_image[order])


def _text(vlm: VLM, pool: ScenePool, sequences: int) -> Tensor:
    """Text scenes, packed: the same scenes come again with other questions until there are enough."""
    documents: list[list[int]] = []
    wanted, found = sequences * SEQUENCE, 0
    while found < wanted:
        number = len(documents)
        batch = chat_batch(pool.batch(1, number, {"text": 32}), vlm.tokenizer, 0, generator(1, "text", number))
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            documents.append(ids[mask].tolist())
            found += len(documents[-1]) + 1
    eos = vlm.tokenizer.eos_token_id
    assert eos is not None
    packer = TokenPacker(eos, SEQUENCE)
    for document in documents:
        packer.add(document)
    return torch.tensor([packer.pop() for _ in range(sequences)])
