"""The smallest circuit that flips a question, and how much each layer's MLP matters at each position role."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from vlmscope.circuits.cases import concept_cases
from vlmscope.core.records import ROLES
from vlmscope.data.orrery.scenes import PLANETS
from vlmscope.interventions.effects import mean_ablated, mlp_outputs
from vlmscope.metrics.table import rates
from vlmscope.report.figures import layer_role_heatmap
from vlmscope.report.marks import write_rows
from vlmscope.tasks.bench import Bench

ENOUGH = 0.95  # of the pictures flipped


def analyse(bench: Bench) -> dict[str, float]:
    """`circuit/smallest/<question>/features` and `ablation/layer_00/<role>/accuracy_drop`; figures/ablation.png."""
    matrix = accuracy_drops(bench)
    rows = [
        {"layer": layer, "role": role, "accuracy_drop": float(matrix[layer, column])}
        for layer in range(len(matrix))
        for column, role in enumerate(ROLES)
    ]
    write_rows(bench.run_dir / "mlp_ablation.parquet", rows)
    layer_role_heatmap(
        matrix,
        list(range(len(matrix))),
        list(ROLES),
        bench.run_dir / "figures" / "ablation.png",
        "fall of accuracy under mean ablation",
    )
    drops = {f"ablation/layer_{row['layer']:02d}/{row['role']}/accuracy_drop": row["accuracy_drop"] for row in rows}
    return drops | smallest(pd.read_parquet(bench.run_dir / "trials.parquet"))


def smallest(table: pd.DataFrame) -> dict[str, float]:
    """The fewest features that flip `ENOUGH` of the pictures under a question, if any number does."""
    some: Any = table[table.setting == "features"]
    found = rates(some, ["question", "limit"])
    counts = found[found["value"] >= ENOUGH].groupby(level="question").edited.min()
    return {f"circuit/smallest/{question}/features": float(count) for question, count in counts.items()}


def accuracy_drops(bench: Bench) -> np.ndarray:
    """[layers, roles]: the fall of accuracy, mean over questions, when a layer's MLP output at a role is its mean."""
    means = role_output_means(bench)
    adapter, config = bench.scope.adapter, bench.circuit_config
    questions = concept_cases(bench.scope, config, bench.concept_pictures, bench.cfg.intervention.pictures, ["free"])
    drops = np.zeros((adapter.n_layers, len(ROLES)))
    for cases in questions:
        for layer in range(adapter.n_layers):
            for column, role in enumerate(ROLES):
                where = torch.from_numpy(cases.batch.roles == role)
                logits = mean_ablated(adapter, cases.batch, layer, where, means[layer, role])
                right = (logits.argmax(-1) == cases.answer).double().mean()
                drops[layer, column] += (1.0 - float(right)) / len(questions)
    return drops


def role_output_means(bench: Bench) -> dict[tuple[int, str], torch.Tensor]:
    """Mean MLP output [d] by (layer, role) over pictures of all planets, so that the mean says nothing of one."""
    sums: dict[tuple[int, str], torch.Tensor] = {}
    counts: dict[tuple[int, str], int] = {}
    images = [image for planet in PLANETS for image in bench.concept_pictures(planet, "train", 10)]
    for question in bench.circuit_config.questions.values():
        batch = bench.scope.batch(bench.inputs(images, question.prompt))
        for layer, out in mlp_outputs(bench.scope.adapter, batch).items():
            for role in ROLES:
                part = out[:, torch.from_numpy(batch.roles == role)].flatten(0, 1)
                sums[layer, role] = sums.get((layer, role), torch.zeros_like(part[0])) + part.sum(0)
                counts[layer, role] = counts.get((layer, role), 0) + len(part)
    return {key: total / counts[key] for key, total in sums.items()}
