"""Stand-ins for what is published for the paper's model: activation statistics of any model with its transcoders in
their own layout, and all that `experiment=paper_gemma3_4b` reads, of Orrery 2.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

import vlmscope
from vlmscope.core.artifacts import shipped
from vlmscope.data.orrery.dataset import concept_scenes, digit_scenes, pictures, scene_pairs
from vlmscope.models.base import ModelInputs
from vlmscope.scope import Scope
from vlmscope.transcoders.formats import save_set

KEPT = 4  # tokens of a feature at most


def codes_of(scope: Scope, inputs: ModelInputs) -> dict[int, torch.Tensor]:
    """Dense activations of a prompt by layer, [T, F]."""
    captured = scope.capture(scope.batch([inputs]))
    return {n: scope.transcoders[n].encode(x[0]).dense(scope.transcoders.widths[n]) for n, x in captured.items()}


def write_statistics(folder: Path, scope: Scope, prompts: Sequence[ModelInputs], pointers: Mapping[int, str]) -> None:
    """The strongest tokens of every feature over the prompts; `pointers` name the pictures of some of these."""
    (folder / "stats").mkdir(parents=True)
    (folder / "inputs").mkdir()
    codes = [codes_of(scope, inputs) for inputs in prompts]
    layers = []
    for layer in scope.transcoders.layers:
        acts = torch.cat([each[layer] for each in codes])  # [N, F]
        item = torch.cat([torch.full((len(each[layer]),), n) for n, each in enumerate(codes)])
        place = torch.cat([torch.arange(len(each[layer])) for each in codes])
        fired = (acts > 0).sum(0)
        alive = torch.nonzero(fired)[:, 0]
        slots = fired[alive].clamp(max=KEPT)
        best = [acts[:, f].argsort(descending=True)[:count] for f, count in zip(alive, slots, strict=True)]
        rows, feature = torch.cat(best), alive.repeat_interleave(slots)
        integers = {"feature_ids": alive, "slot_counts": slots, "input_ids": item[rows], "token_positions": place[rows]}
        tensors = {name: values.to(torch.int32) for name, values in integers.items()}
        tensors |= {"top_values": acts[rows, feature].to(torch.bfloat16), "firing_counts": fired[alive].long()}
        save_file(tensors, folder / f"stats/layer_{layer:02d}.safetensors")
        layers.append({"layer": layer, "filename": f"stats/layer_{layer:02d}.safetensors"})
    table = [
        {"input_id": n, "example_id": f"example-{n}", "text": inputs.prompt, "metadata_json": "{}",
         "image_references": [pointers[n]] if n in pointers else [],
         "token_ids": [*map(int, inputs.input_ids), 0], "token_mask": [True] * len(inputs) + [False],
         "token_type_ids": [*inputs.is_image.astype(int).tolist(), 0] if inputs.is_image.any() else None}
        for n, inputs in enumerate(prompts)
    ]  # fmt: skip
    half, parts = (len(table) + 1) // 2, []
    for n, part in enumerate((table[:half], table[half:])):
        types = pa.field("token_type_ids", pa.list_(pa.int8())), pa.field("image_references", pa.list_(pa.string()))
        schema = pa.Table.from_pylist(table).schema
        for field in types:
            schema = schema.set(schema.get_field_index(field.name), field)
        name = f"inputs/part-{n:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), folder / name)
        parts.append({"filename": name, "start": n * half, "end": n * half + len(part)})
    head = {"schema": "circuit-tracer-activation-stats-v1", "model_name": scope.vlm.name, "transcoder": {},
            "processor_tokens": sum(map(len, prompts)), "layers": layers, "inputs": parts}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(head))


def paper_stand_in(folder: Path) -> list[str]:
    """Pictures by concept, a set in the paper's format and statistics, written to `folder`; the overrides that take
    these, Orrery 2 in a folder of its own, and its words.
    """
    hands = scene_pairs("fingers", "test", 12, 0, "five", "six")
    scenes = {planet: concept_scenes(planet, "test", 12, 0) for planet in ("mars", "earth", "jupiter")}
    scenes |= {f"{side}_fingers": [getattr(pair, name) for pair in hands]
               for side, name in (("five", "original"), ("six", "counterfactual"))}  # fmt: skip
    scenes |= {
        "one_plus_two": digit_scenes("one", "test", 12, 0, "two"),
        "four_plus_five": digit_scenes("four", "test", 12, 0, "five"),
    }
    for concept, shown in scenes.items():
        (folder / concept).mkdir()
        for number, picture in enumerate(pictures(shown)):
            Image.fromarray(picture).save(folder / concept / f"{number:02d}.png")
    scope = vlmscope.load("orrery2")
    save_set(scope.transcoders, folder / "plt", format="paper")
    files = sorted(folder.glob("*/00.png"))
    prompts = [scope.inputs("what planet is this ?", [Image.open(file)]) for file in files]
    write_statistics(folder / "statistics", scope, prompts, {n: f"hf-dataset://{file}" for n, file in enumerate(files)})
    facts = {"planet": ("what planet is this ?", "{mars: mars, earth: earth}"),
             "colour": ("what colour is this planet ?", "{mars: red, earth: blue}"),
             "fingers": ("how many fingers are there ?", "{five_fingers: five, six_fingers: six}"),
             "sum": ("what is the sum of the digits ?", "{one_plus_two: three, four_plus_five: nine}")}  # fmt: skip
    words = [f"circuit.questions.{name}.{key}={value}" for name, fact in facts.items()
             for key, value in zip(("prompt", "answers"), fact, strict=True)]  # fmt: skip
    colours = {"picture": "what colour is this planet ?", "text": "what colour is {concept} ?",
               "words": "{mars: mars, earth: earth, jupiter: jupiter}",
               "answers": "{mars: red, earth: blue, jupiter: orange}"}  # fmt: skip
    words += [f"association.planets.questions.colour.{key}={value}" for key, value in colours.items()]
    given = {"model": "path", "model.path": shipped("assets/orrery2"), "model.device": "cpu", "model.name": "orrery2",
             "transcoder.path": folder / "plt", "study.published": folder / "statistics",
             "analysis.prompt": "describe this image in detail .", "analysis.new_tokens": 16,
             "circuit.concepts": "[mars,earth,five_fingers,six_fingers,one_plus_two,four_plus_five]"}  # fmt: skip
    given |= {f"images.{concept}": folder / concept for concept in scenes}
    return [*(f"{key}={value}" for key, value in given.items()), *words, "~association.planets.questions.place"]
