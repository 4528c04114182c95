"""Do maps over patches mean something? Pointing and deletion on Orrery's scenes, which know where objects are.

    python -m benchmarks.patches [--pictures 40] [--deleted 6] [--out outputs/benchmarks/patches]

Pointing: share of cases whose largest cell lies on what the question asks for (at least a quarter of the cell), beside
the share that a random cell of the same grid would reach, and the patch of most contrast, which needs no model.
Deletion: the answer's probability while patches are painted in the picture's mean colour, largest first, as the mean
over the curve (lower is better). Only rightly answered questions count.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlmscope.api import load
from vlmscope.attribution.adjoint import target_readers
from vlmscope.attribution.targets import choose_logits
from vlmscope.attribution.vision import vision_path
from vlmscope.core.records import generator
from vlmscope.core.results import Curve
from vlmscope.data.orrery.dataset import covered, object_mask
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import Scene
from vlmscope.models.batching import make_batch
from vlmscope.models.boxes import grid_boxes
from vlmscope.replacement import build_replacement
from vlmscope.report.figures import dose_response
from vlmscope.scope import Scope

QUESTIONS = {
    "first digit": ("digits", "first", "what is the first digit ?"),
    "second digit": ("digits", "second", "what is the second digit ?"),
    "planet": ("planets", "name", "what planet is this ?"),
    "shape": ("shapes", "shape", "which shape is this ?"),
    "colour of shapes": ("shapes", "shape_colour", "what colour are the shapes ?"),
}
DELETED = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64)
SIDE = 8  # patches


@dataclass
class Case:
    """One rightly answered question: `maps` name -> square grid, `mask [64, 64]` of what is asked for."""

    question: str
    scene: Scene
    prompt: str
    answer: int
    mask: np.ndarray
    maps: dict[str, np.ndarray]


def maps_of(scope: Scope, image: np.ndarray, prompt: str) -> tuple[int, dict[str, np.ndarray]]:
    """The most probable token and the maps of its logit."""
    inputs = scope.inputs(prompt, [Image.fromarray(image)])
    replacement = build_replacement(scope, inputs)
    targets = choose_logits(replacement, 0.01, 1)
    cells = image.astype(float).reshape(SIDE, 8, SIDE, 8, 3)
    # What needs no model: how far a patch's pixels are from the picture's mean colour.
    found = {"contrast of pixels": ((cells - image.mean((0, 1))) ** 2).mean((1, 3, 4))}
    frozen, plain = (vision_path(scope.vlm, inputs, rule) for rule in ("frozen", "gradient"))
    where = torch.from_numpy(inputs.is_image)
    for total in (True, False):
        effect = "total" if total else "direct"
        readers = target_readers(replacement, targets, total=total)
        edges = readers.edges(replacement.state.embeddings, replacement.state.injections)[0][where]
        found[f"soft tokens, {effect}"] = edges.numpy().reshape(4, 4)
        for baseline in ("grey", "mean"):
            found[f"patches, {effect}, {baseline}"] = frozen.maps(readers, ["x"], baseline)[0].tiles[0].values
            name = f"gradient, {effect}, {baseline}"
            found[name] = plain.maps(readers, ["x"], baseline)[0].tiles[0].values
    return int(targets.token_ids[0]), found


def collect(scope: Scope, pictures: int) -> list[Case]:
    """Cases of all questions."""
    cases = []
    for question, (kind, group, prompt) in QUESTIONS.items():
        for index in range(pictures):
            scene = make_scene("test", kind, index, seed=5)
            assert scene.image is not None
            token, maps = maps_of(scope, scene.image, prompt)
            if scope.vlm.tokenizer.decode([token]).strip() == str(scene.facts[group]):
                cases.append(Case(question, scene, prompt, token, object_mask(scene, group), maps))
    return cases


def pointing(cases: list[Case], name: str) -> tuple[float, float]:
    """Share of cases that point at the object, and the share of random cells that do."""
    hits, chance = [], []
    for case in cases:
        grid = case.maps[name]
        cells = covered(case.mask, grid_boxes(*grid.shape))
        hits.append(bool(cells[int(grid.argmax())]))
        chance.append(float(cells.mean()))
    return float(np.mean(hits)), float(np.mean(chance))


def deletion(scope: Scope, cases: list[Case], order: Callable[[Case, int], np.ndarray]) -> np.ndarray:
    """`[cases, len(DELETED)]`, the answer's probability after each number of deleted patches."""
    curves = []
    for number, case in enumerate(cases):
        image, ranked = case.scene.image, order(case, number)
        assert image is not None
        inputs = []
        for count in DELETED:
            painted, mean = image.copy(), image.mean((0, 1)).round().astype(np.uint8)
            for patch in ranked[:count]:
                row, column = divmod(int(patch), SIDE)
                painted[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = mean
            inputs.append(scope.inputs(case.prompt, [Image.fromarray(painted)]))
        batch = make_batch(scope.adapter, inputs)
        with torch.no_grad():
            logits = scope.adapter.forward(batch.tensors, use_cache=False).logits[:, -1]
        curves.append(logits.double().softmax(-1)[:, case.answer].numpy())
    return np.array(curves)


def ranking(name: str) -> Callable[[Case, int], np.ndarray]:
    """Patches of a map, largest first; a soft token's four patches share its value, in random order."""

    def order(case: Case, number: int) -> np.ndarray:
        grid = case.maps[name]
        values = np.kron(grid, np.ones((SIDE // grid.shape[0],) * 2)).ravel()
        shuffled = generator(7, "ties", number).permutation(values.size)
        return shuffled[np.argsort(-values[shuffled], kind="stable")]

    return order


def at_random(case: Case, number: int) -> np.ndarray:
    """All patches in random order."""
    return generator(8, "random", number).permutation(SIDE * SIDE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=40, help="scenes a question")
    parser.add_argument("--deleted", type=int, default=6, help="cases a question for the deletion curves")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/patches"))
    arguments = parser.parse_args()
    scope = load("orrery")
    cases = collect(scope, arguments.pictures)
    names = list(cases[0].maps)
    by_question = {q: [c for c in cases if c.question == q] for q in QUESTIONS}
    few = [case for found in by_question.values() for case in found[: arguments.deleted]]
    curves = {name: deletion(scope, few, ranking(name)) for name in names} | {"random": deletion(scope, few, at_random)}
    print(
        "| map | "
        + " | ".join(f"{q} (n = {len(by_question[q])})" for q in QUESTIONS)
        + f" | deletion (n = {len(few)}) |"
    )
    print("| --- |" + " --- |" * (len(QUESTIONS) + 1))
    results: dict[str, dict[str, float]] = {}
    for name in names:
        found = {question: pointing(group, name) for question, group in by_question.items()}
        cells = [f"{100 * hit:.0f} ({100 * chance:.0f})" for hit, chance in found.values()]
        print(f"| {name} | " + " | ".join(cells) + f" | {curves[name].mean():.3f} |")
        results[name] = {question: hit for question, (hit, _) in found.items()} | {"deletion": curves[name].mean()}
    print("| random |" + " |" * len(QUESTIONS) + f" {curves['random'].mean():.3f} |")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2))
    shown = ["patches, total, mean", "gradient, total, mean", "soft tokens, total", "contrast of pixels", "random"]
    drawn = []
    for name in shown:
        mean, spread = curves[name].mean(0), 1.96 * curves[name].std(0) / len(few) ** 0.5
        drawn.append(Curve(name, DELETED, tuple(mean), tuple(mean - spread), tuple(mean + spread)))
    dose_response(drawn, arguments.out / "deletion.png", "patches painted over (of 64)", "p(answer), %", log_x=True)


if __name__ == "__main__":
    main()
