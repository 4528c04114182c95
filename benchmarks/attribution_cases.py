"""What the attribution benchmark measures on: a random Gemma 3, transcoders and a prompt, in one folder for both sides.

`case.json` beside `model/` (Hugging Face), `transcoders/` (circuit-tracer's layout) and the token ids of the prompt.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlmscope.activations import capture_state
from vlmscope.core.records import generator
from vlmscope.models.base import ModelInputs
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_gemma3
from vlmscope.transcoders.formats import load_set, save_set
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet, random_set, set_weight


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement. `active` is the number of active features aimed at by ReLU's biases; 0 leaves them."""

    name: str
    d_model: int
    n_layers: int
    n_tokens: int
    n_features: int
    activation: str
    k: int
    active: int = 0


SMALL = Case("small", 64, 4, 8, 256, "relu", 41, active=1156)
LARGE = Case("large", 256, 8, 16, 2048, "topk", 32)


def model_of(case: Case) -> VLM:
    """The random model: text only, heads together as wide as the stream, a window longer than any prompt here."""
    kinds = ("sliding_attention", "full_attention")
    return tiny_gemma3(
        text_only=True,
        d_model=case.d_model,
        n_heads=4,
        n_kv_heads=2,
        head_dim=case.d_model // 4,
        layer_types=[kinds[layer % 2] for layer in range(case.n_layers)],
        window=512,
        attention="eager",
    )


def prompt_of(case: Case, vlm: VLM) -> ModelInputs:
    """The beginning-of-sequence token, which the peer wants first, then random ones."""
    words = generator(0, "prompt", case.n_tokens).integers(20, len(vlm.tokenizer), case.n_tokens)
    ids = torch.from_numpy(words)[None].long()
    ids[0, 0] = int(vlm.tokenizer.bos_token_id)
    return ModelInputs(
        tensors={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        tokens=[str(word) for word in ids[0].tolist()],
        is_image=np.zeros(case.n_tokens, dtype=bool),
        image_index=np.full(case.n_tokens, -1),
        patch_boxes=[None] * case.n_tokens,
        roles=np.full(case.n_tokens, "question"),
        prompt="random",
    )


def transcoders_of(case: Case, vlm: VLM, inputs: ModelInputs) -> TranscoderSet:
    """Random ones that write after the MLP's post-norm, where the peer hooks Gemma 3."""
    drawn = random_set(case.n_layers, case.d_model, case.n_features, case.k, activation=case.activation)
    config = dataclasses.replace(drawn.config, output_hook="mlp_out_post", model_name="gemma3")
    out = {}
    for layer in range(case.n_layers):
        one = Transcoder(dataclasses.replace(drawn[layer].config, output_hook="mlp_out_post"))
        one.load_state_dict(drawn[layer].state_dict())
        out[layer] = one
    if case.active:
        state = capture_state(vlm.adapter, inputs)
        for layer, one in out.items():
            # The first position is dropped, so the biases are set for the others.
            drive = (state.mlp_in[layer, 1:] @ one.W_enc.T + one.b_enc).flatten()
            kept = drive.sort(descending=True).values[case.active // case.n_layers]
            set_weight(one.b_enc, one.b_enc.detach() - kept.detach())
    return TranscoderSet(out, config)


def write_case(case: Case, folder: Path) -> None:
    """Save what both sides load."""
    vlm = model_of(case)
    inputs = prompt_of(case, vlm)
    vlm.model.save_pretrained(folder / "model")
    vlm.tokenizer.save_pretrained(folder / "model")
    _for_older_readers(folder / "model")
    save_set(transcoders_of(case, vlm, inputs), folder / "transcoders", format="circuit_tracer")
    record = dataclasses.asdict(case) | {"input_ids": inputs.input_ids}
    (folder / "case.json").write_text(json.dumps(record))


def _for_older_readers(folder: Path) -> None:
    """Repeat in the words of transformers 4 what transformers 5 writes in its own, else rotary bases are defaults."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config["rope_parameters"]
    config["rope_theta"] = rope["full_attention"]["rope_theta"]
    config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    path.write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens", [])
    path.write_text(json.dumps(tokenizer))


def load_case(folder: Path) -> tuple[Case, VLM, ModelInputs, TranscoderSet]:
    """Read a case back, the model by transformers and the transcoders by their reader."""
    from transformers import Gemma3ForCausalLM

    record = json.loads((folder / "case.json").read_text())
    ids = record.pop("input_ids")
    case = Case(**record)
    vlm = model_of(case)
    saved = Gemma3ForCausalLM.from_pretrained(folder / "model")
    vlm.model.load_state_dict(saved.state_dict())
    inputs = prompt_of(case, vlm)
    assert inputs.input_ids == ids, "the prompt is not the one that was saved"
    return case, vlm, inputs, load_set(folder / "transcoders")
