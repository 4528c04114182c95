"""What maps cost: seconds and memory of rollout beside the vision tower's own forward, and bytes a picture.

    python -m benchmarks.where [--model orrery|paper] [--layers 5] [--repeat 3]

"paper" is Gemma 3's tower in its own shapes (4096 patches, 16 heads, width 1152, 256 soft tokens) with random weights
and `--layers` layers instead of 27, before a decoder of a few thousand weights: enough for seconds and bytes.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from benchmarks.measured import measured
from PIL import Image
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from vlmscope.activations import capture_vision_attention
from vlmscope.api import load
from vlmscope.attention import save_maps, token_maps
from vlmscope.attribution.config import WhereConfig
from vlmscope.attribution.vision import feature_path_maps, vision_path
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.features.readouts import image_features
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import make_batch
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_vlm
from vlmscope.replacement import build_replacement

PROMPT = "what is this ?"


def paper_shapes(layers: int) -> tuple[VLM, ModelInputs]:
    """A model with Gemma 3's tower, and a picture of 896 x 896 pixels for it."""
    small = tiny_vlm("gemma3", 0)
    text = small.model.config.get_text_config().to_dict()
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
        "model_type": "siglip_vision_model",
    }
    known = small.model.config.to_dict() | {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 256}
    model = Gemma3ForConditionalGeneration(Gemma3Config(**known)).eval()
    processor = small.processor
    processor.image_processor.size = {"height": 896, "width": 896}
    processor.image_seq_length = 256
    soft = "".join([processor.tokenizer.image_token] * 256)
    processor.full_image_sequence = f"\n\n{processor.tokenizer.boi_token}{soft}{processor.tokenizer.eoi_token}\n\n"
    vlm = VLM(model, processor, adapter_for(model), "paper_shapes")
    return vlm, vlm.prepare(PROMPT, [Image.effect_noise((896, 896), 60).convert("RGB")])


def timed(name: str, repeat: int, run: Callable[[], object]) -> None:
    """One row of the table: the median of seconds and of added memory, after one run that does not count."""
    run()
    found = []
    for _ in range(repeat):
        with measured() as record:
            run()
        found.append(record)
    seconds, megabytes = (median(record[key] for record in found) for key in ("seconds", "added_mb"))
    print(f"| {name} | {seconds:.3f} | {max(megabytes, 0):.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("orrery", "paper"), default="orrery")
    parser.add_argument("--layers", type=int, default=5, help="of the tower, for --model paper")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.model == "orrery":
        scope = load("orrery", check=False)
        image = make_scene("test", "shapes", 3, seed=5).image
        assert image is not None
        vlm, inputs = scope.vlm, scope.inputs("which shape is this ?", [Image.fromarray(image)])
    else:
        scope, (vlm, inputs) = None, paper_shapes(arguments.layers)
    adapter = vlm.adapter
    print("| | seconds | peak memory added, MB |\n| --- | --- | --- |")
    timed("tower, and what enters the decoder", arguments.repeat, lambda: make_batch(adapter, [inputs]))
    for pool in ("mean", "max"):
        config = WhereConfig(pool=pool)
        timed(
            f"... with rollout and similarity, pool {pool}",
            arguments.repeat,
            lambda c=config: token_maps(vlm, inputs, c),
        )
    timed(
        "... with the last 4 layers' attention kept whole",
        arguments.repeat,
        lambda: capture_vision_attention(vlm, inputs, range(-4, 0)),
    )
    if scope is not None:
        batch = make_batch(adapter, [inputs])
        (best,) = image_features(scope, batch, 1)
        with torch.no_grad():
            timed("whole model", arguments.repeat, lambda: adapter.forward(inputs.tensors, use_cache=False))
        replacement = build_replacement(scope, inputs)
        path = vision_path(vlm, inputs)
        timed("replacement model", arguments.repeat, lambda: build_replacement(scope, inputs))
        timed("vision path, once a prompt", arguments.repeat, lambda: vision_path(vlm, inputs))
        timed("... one feature's map", arguments.repeat, lambda: feature_path_maps(replacement, path, [best.feature]))
    made = token_maps(vlm, inputs, WhereConfig())
    with tempfile.TemporaryDirectory() as folder:
        size = save_maps(Path(folder) / "maps.safetensors", tokens=made["rollout"])
        tile = made["rollout"][0].tiles[0]
        soft, patches = len(tile.tokens), tile.values[0].size
        print(f"\n{soft} soft tokens, {patches} patches: {size} bytes a picture; float32 would be {4 * soft * patches}")


if __name__ == "__main__":
    main()
