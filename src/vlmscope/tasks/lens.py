"""Logit lens on soft tokens: the words that each layer's residual stream would predict at each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError, check_least

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.models.batching import InputBatch
    from vlmscope.models.loading import VLM
    from vlmscope.tasks.registry import RunContext


@dataclass
class Config:
    """`word` is ranked in every state (null: the model's own next word); `count` words per position are written."""

    word: str | None = None
    count: int = 3
    figure: bool = True

    def __post_init__(self) -> None:
        check_least("task", self, count=1)


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Read the soft tokens of `image=` under `prompt=`."""
    import numpy as np

    from vlmscope.config.wiring import load_model, user_pictures
    from vlmscope.core.artifacts import write_json
    from vlmscope.data.images import for_figures
    from vlmscope.features.readouts import token_lens
    from vlmscope.models.base import token_strings
    from vlmscope.models.batching import make_batch
    from vlmscope.report.pictures import soft_token_words

    if cfg.prompt is None:
        raise UserError("no prompt: add 'prompt=what is this ?'")
    pictures = user_pictures(cfg)
    if not pictures:
        raise UserError("task=lens reads soft tokens, which pictures have; add image=path/to/picture.png")
    vlm = load_model(cfg)
    inputs = vlm.prepare(cfg.prompt, pictures)
    batch = make_batch(vlm.adapter, [inputs])
    word = word_id(vlm, batch, cfg.task.word)
    name = vlm.tokenizer.decode([word]).strip()
    soft = np.flatnonzero(inputs.is_image)
    lens = token_lens(vlm.adapter, batch, np.append(soft, len(inputs) - 1), [word], cfg.task.count)
    names = token_strings(vlm.tokenizer, lens.top[0].flatten().tolist())
    words = np.reshape(np.array(names, dtype=object), lens.top[0].shape)
    on_soft, at_last = lens.rank[0, :, :-1], lens.rank[0, :, -1]  # the last position comes after the soft tokens
    states = [
        {
            "state": state,
            "words": words[state].tolist(),
            "probabilities": lens.probability[0, state].tolist(),
            "rank": lens.rank[0, state].tolist(),
        }
        for state in range(len(on_soft))
    ]
    boxes = [None if box is None else list(box) for box in (inputs.patch_boxes[i] for i in soft)]
    record = {"word": name, "positions": [*soft.tolist(), len(inputs) - 1], "boxes": boxes, "states": states}
    write_json(context.run_dir / "lens.json", record, indent=None)
    print(f"  {name!r} is the most probable word at so many soft tokens, before each layer and after the last:")
    shown = ", ".join(f"{state}: {int((row == 0).sum())}" for state, row in enumerate(on_soft))
    print(f"  {shown} (of {len(soft)}); its rank at the last position: {', '.join(map(str, at_last.tolist()))}")
    if cfg.task.figure:
        places = [(int(inputs.image_index[i]), inputs.patch_boxes[i]) for i in soft]
        top, probability = words[:, :-1, 0], lens.word_probability[0, :, :-1]
        path = context.run_dir / "figures" / "lens.png"
        soft_token_words(for_figures(pictures), places, top, probability, name, path)
    first_soft, first_last = np.flatnonzero(on_soft.min(1) == 0), np.flatnonzero(at_last == 0)
    return {
        "lens/first_state_soft": float(first_soft[0]) if len(first_soft) else -1.0,
        "lens/first_state_last": float(first_last[0]) if len(first_last) else -1.0,
        "lens/soft_share": float((on_soft == 0).mean(1).max()),
        **{f"lens/state_{state:02d}/soft_share": float((row == 0).mean()) for state, row in enumerate(on_soft)},
    }


def word_id(vlm: VLM, batch: InputBatch, text: str | None) -> int:
    """The id of a word of one token, or of the model's next token."""
    import torch

    if text is None:
        with torch.no_grad():
            return int(vlm.adapter.next_logits(batch.tensors)[0].argmax())
    for spelt in (text, f" {text}"):  # many tokenizers have words with their leading space only
        ids = vlm.tokenizer(spelt, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != vlm.tokenizer.unk_token_id:
            return int(ids[0])
    raise UserError(f"task.word={text!r} is not one token of this model; choose a word that is")
