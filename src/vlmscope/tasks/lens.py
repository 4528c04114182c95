"""Logit lens on soft tokens: what the residual stream at each would say if it ended there, layer by layer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.models.loading import VLM
    from vlmscope.tasks.registry import RunContext


@dataclass
class Config:
    """`word` is looked for in every state (null: the model's own next word); `count` words a place are written down."""

    word: str | None = None
    count: int = 3
    figure: bool = True


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Read the soft tokens of `image=` under `prompt=`."""
    import numpy as np

    from vlmscope.core.artifacts import write_json
    from vlmscope.core.errors import UserError
    from vlmscope.data.images import for_figures
    from vlmscope.features.readouts import token_lens
    from vlmscope.models.base import token_strings
    from vlmscope.models.batching import make_batch
    from vlmscope.report.picture_figures import soft_token_words
    from vlmscope.tasks.wiring import load_model, user_pictures

    if cfg.prompt is None:
        raise UserError("no prompt: add 'prompt=what is this ?'")
    if cfg.task.count < 1:
        raise UserError(f"task.count={cfg.task.count}: it counts words; choose 1 or more")
    pictures = user_pictures(cfg)
    if not pictures:
        raise UserError("task=lens reads soft tokens, which pictures have; add image=path/to/picture.png")
    vlm = load_model(cfg)
    inputs = vlm.prepare(cfg.prompt, pictures)
    batch = make_batch(vlm.adapter, [inputs])
    word = _word(vlm, batch, cfg.task.word)
    soft = np.flatnonzero(inputs.is_image)
    lens = token_lens(vlm.adapter, batch, np.append(soft, len(inputs) - 1), [word], cfg.task.count)
    on_soft = lens.rank[0, :, :-1]
    names = token_strings(vlm.tokenizer, lens.top[0].flatten().tolist())
    words = np.reshape(np.array(names, dtype=object), lens.top[0].shape)
    name, first = vlm.tokenizer.decode([word]).strip(), on_soft.min(1) == 0
    seen = np.flatnonzero(first)
    last = np.flatnonzero(lens.rank[0, :, -1] == 0)
    metrics = {
        "lens/first_state_soft": float(seen[0]) if len(seen) else -1.0,
        "lens/first_state_last": float(last[0]) if len(last) else -1.0,
        "lens/soft_share": float((on_soft == 0).mean(1).max()),
    }
    metrics |= {f"lens/state_{state:02d}/soft_share": float((row == 0).mean()) for state, row in enumerate(on_soft)}
    boxes = [list(box) if (box := inputs.patch_boxes[at]) is not None else None for at in soft]
    states = [
        {
            "state": state,
            "words": words[state].tolist(),
            "probabilities": lens.probability[0, state].tolist(),
            "rank": lens.rank[0, state].tolist(),
        }
        for state in range(len(on_soft))
    ]
    record = {"word": name, "positions": [*soft.tolist(), len(inputs) - 1], "boxes": boxes, "states": states}
    write_json(context.run_dir / "lens.json", record, indent=None)
    _say(name, on_soft, lens.rank[0, :, -1])
    if cfg.task.figure:
        arrays = for_figures(pictures)
        shown = [(int(inputs.image_index[at]), inputs.patch_boxes[at]) for at in soft]
        top, probability = words[:, :-1, 0], lens.word_probability[0, :, :-1]
        soft_token_words(arrays, shown, top, probability, name, context.run_dir / "figures" / "lens.png")
    return metrics


def _say(name: str, on_soft: Any, last: Any) -> None:
    print(f"  {name!r} is the most probable word at so many soft tokens, before each layer and after the last:")
    shown = ", ".join(f"{state}: {int((row == 0).sum())}" for state, row in enumerate(on_soft))
    print(f"  {shown} (of {on_soft.shape[1]}); its rank at the last position: {', '.join(map(str, last.tolist()))}")


def _word(vlm: "VLM", batch: Any, text: str | None) -> int:
    """The id of a word, or of the model's next one."""
    import torch

    from vlmscope.core.errors import UserError

    if text is None:
        with torch.no_grad():
            return int(vlm.adapter.next_logits(batch.tensors)[0].argmax())
    for spelt in (text, f" {text}"):
        ids = vlm.tokenizer(spelt, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != vlm.tokenizer.unk_token_id:
            return int(ids[0])
    raise UserError(f"task.word={text!r} is not one token of this model; choose a word that is")
