"""How early the right word appears: the logit lens on the soft tokens and at the last position of Orrery's scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmscope.core.intervention import Curve
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.features.readouts import token_lens
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.models.batching import make_batch
from vlmscope.report.figures import dose_response
from vlmscope.tasks.steps.compare_maps import question_group
from vlmscope.tasks.steps.intervene import make_curve, rate_metrics

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench


def run(bench: Bench) -> None:
    """Leaves figures/lens.png, and metrics under lens/.

    `lens/<kind>/state_<n>/any_soft` is the share of scenes in which the right word is the most probable one at some
    soft token of state n (0 is before the first layer), `/last` at the last position; beside `any_soft` its control:
    another scene's word in its place.
    """
    where, vlm, seed = bench.cfg.where, bench.vlm, bench.cfg.seed
    curves: list[Curve] = []
    for kind, question in where.questions.items():
        group = question_group(question)
        scenes = [make_scene("test", kind, index, seed) for index in range(where.chosen_on)]
        if group is None or group not in scenes[0].facts:
            continue
        answers = [bench.token(str(scene.facts[group])) for scene in scenes]
        pictures = [Image.fromarray(scene.image) for scene in scenes if scene.image is not None]
        batch = make_batch(vlm.adapter, bench.inputs(pictures, question))
        positions = np.append(np.flatnonzero(batch.is_image), batch.length - 1)
        # The word of the next scene that has another one, so that a word said of every picture does not count.
        others = [next((b for b in answers[i:] + answers[:i] if b != a), a) for i, a in enumerate(answers)]
        right, wrong = (token_lens(vlm.adapter, batch, positions, words).rank == 0 for words in (answers, others))
        soft, control, last = right[..., :-1].any(2), wrong[..., :-1].any(2), right[..., -1]
        for state in range(soft.shape[1]):
            name = f"lens/{kind}/state_{state:02d}"
            rate = bootstrap_rate(soft[:, state], seed, float(control[:, state].mean()))
            bench.metrics |= rate_metrics(f"{name}/any_soft", rate)
            bench.metrics[f"{name}/last"] = float(last[:, state].mean())
        rates = [bootstrap_rate(column, seed) for column in soft.T]
        curves.append(make_curve(f"{kind}, some soft token", range(len(rates)), rates))
    if curves:
        path = bench.run_dir / "figures" / "lens.png"
        dose_response(curves, path, "state (0: before layer 0)", "right word on top (% of scenes)")
