"""The anatomy of a behaviour: its table against numbers computed by hand, and what is told of it."""

import numpy as np
import pandas as pd
import pytest
import torch

from vlmscope.analyses.anatomy import (
    Side,
    ablations,
    answer_ids,
    case_set,
    measured,
    metrics_of,
)
from vlmscope.data.inputs import other_pictures
from vlmscope.interventions.ablation import all_sites, block_outputs, without_mlps
from vlmscope.models.base import exact_float64
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.report.anatomy import HEADLINES, measure_of, need, told, value
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPT = "what is this planet ?"


@pytest.fixture(scope="module", params=["gemma3", "gemma3_text", "qwen2_5_vl"])
def vlm(request: pytest.FixtureRequest):
    return tiny_vlm(request.param, 3, dtype=torch.float64)


def sides(vlm, count: int = 5) -> list[Side]:
    words = ("planet", "red", "blue", "one", "two")
    pictures = [(tiny_image(n),) if vlm.adapter.has_vision else () for n in range(count)]
    prompts = [PROMPT if images else f"what is the {words[n]} ?" for n, images in enumerate(pictures)]
    return [
        Side(prompt, images, words[n % 2 + 1]) for n, (prompt, images) in enumerate(zip(prompts, pictures, strict=True))
    ]


def test_the_table_is_what_hooks_and_counts_say(vlm) -> None:
    with exact_float64():
        cases = case_set(vlm, "q", sides(vlm))
        table = pd.DataFrame(measured(vlm, cases, ablations(vlm.adapter.n_layers, ["image", "last"], 2)))
        (batch,) = cases.batches
        base, outputs = block_outputs(vlm.adapter, batch, all_sites(vlm.adapter))
    logs = base.log_softmax(-1)
    top = logs.argmax(-1).tolist()
    right = [token in answer_ids(vlm.tokenizer, answer) for token, answer in zip(top, cases.answers, strict=True)]
    assert value(table, "q", "accuracy", blocks="none") == np.mean(right)
    assert value(table, "q", "accuracy", blocks="prior") == 3 / 5  # of red, blue, red, blue, red
    mean = logs.exp().mean(0).log()
    expected = (logs.exp() * (logs - mean)).sum(-1).mean()
    assert value(table, "q", "kl", blocks="prior") == pytest.approx(float(expected), abs=1e-12)
    # Nothing varies any more: any constant is at least as far as the best one, the mean.
    assert value(table, "q", "kl", blocks="both") >= value(table, "q", "kl", blocks="prior") - 1e-12
    handles = []
    for layer in range(vlm.adapter.n_layers):
        new = outputs["mlp", layer].mean(0)
        handles.append(vlm.adapter.mlp(layer).register_forward_hook(lambda _m, _a, out, new=new: new.expand_as(out)))
    with exact_float64(), torch.no_grad():
        ablated = vlm.adapter.next_logits(batch.tensors).log_softmax(-1)
    for handle in handles:
        handle.remove()
    kl = (logs.exp() * (logs - ablated)).sum(-1).mean()
    assert value(table, "q", "kl", blocks="mlp") == pytest.approx(float(kl), abs=1e-10)
    assert set(table.layers) == {"all", "0-1", "2-3" if vlm.adapter.n_layers == 4 else "2"}
    assert set(table[table.method == "resample"].layers) == {"all"}


def row(question: str, measure: str, number: float, blocks: str, method: str = "", **where: str) -> dict:
    place = {"layers": "all", "positions": "all"} | where
    what = {"question": question, "cases": 50, "blocks": blocks, "method": method, "measure": measure, **place}
    return what | {"value": number, "ci_low": None, "ci_high": None}


@pytest.fixture
def made() -> pd.DataFrame:
    rows = []
    for question, base, without, prior in (("a", 0.9, 0.5, 0.1), ("b", 0.9, 0.95, 0.2), ("c", 0.95, 0.9, 0.9)):
        rows += [row(question, "accuracy", base, "none"), row(question, "accuracy", prior, "prior")]
        rows += [row(question, "accuracy", without, "mlp", "mean"), row(question, "kl", 0.3, "mlp", "mean")]
        rows += [row(question, "accuracy", base, "mlp", "mean", positions="image"), row(question, "kl", 2.0, "prior")]
    return pd.DataFrame(rows)


def test_need_is_what_is_lost_of_what_goes_beyond_the_prior(made: pd.DataFrame) -> None:
    assert need(made, "a") == pytest.approx(0.5)
    assert need(made, "b") == 0.0  # nothing is lost
    assert need(made, "c") is None  # nothing to lose
    kl = made[made.measure == "kl"]
    assert need(kl, "a") == pytest.approx(0.15) and measure_of(kl) == "kl"
    metrics = metrics_of(made)
    assert metrics["anatomy/need_of_mlp_share"] == pytest.approx(0.25)
    assert metrics["anatomy/a/without_mlp_image/accuracy"] == 0.9
    assert set(HEADLINES) == {"without_mlp", "without_mlp_image", "without_mlp_last"}
    numbers = {"without_mlp": 0.5, "without_mlp_image": 0.9, "as_it_is": 0.9, "prior": 0.1}
    assert told(numbers, "accuracy") == (
        "all MLPs averaged: accuracy 0.50 everywhere, 0.90 at soft tokens (as it is 0.90, most frequent answer 0.10)"
    )


def test_without_mlps_is_the_mean_of_the_other_pictures() -> None:
    """In one forward, against two forwards with hooks."""
    with exact_float64():
        vlm = tiny_vlm("gemma3", 3, dtype=torch.float64)
        pictures = other_pictures([(30, 20)], 3)
        assert [images[0].size for images in pictures] == [(30, 20)] * 3
        others = [vlm.prepare(PROMPT, images) for images in pictures]
        own = vlm.prepare(PROMPT, [tiny_image(1).resize((30, 20))])
        found = without_mlps(vlm.adapter, own, others)
        scope = Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 8, 2, seed=1, dtype=torch.float64))
        _, outputs = block_outputs(vlm.adapter, scope.batch(others), all_sites(vlm.adapter, ["mlp"]))
        base = scope.forward(scope.batch([own])).softmax(-1)[0]
        handles = []
        for layer in range(vlm.adapter.n_layers):
            new = outputs["mlp", layer].mean(0)
            handles.append(
                vlm.adapter.mlp(layer).register_forward_hook(lambda _m, _a, out, new=new: new.expand_as(out))
            )
        after = scope.forward(scope.batch([own])).softmax(-1)[0]
        for handle in handles:
            handle.remove()
    assert found.token == int(base.argmax()) and found.kept == (int(after.argmax()) == found.token)
    assert found.before == pytest.approx(float(base.max()), abs=1e-12)
    assert found.after == pytest.approx(float(after[found.token]), abs=1e-12)
