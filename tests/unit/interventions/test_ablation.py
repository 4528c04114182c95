"""Joint ablation of whole blocks: it does what it says, on several families in float64."""

import numpy as np
import pytest
import torch

from vlmscope.interventions.ablation import (
    BLOCKS,
    Ablation,
    Averages,
    ablated,
    all_sites,
    block_outputs,
    donors,
    outcomes,
)
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_image

TEXTS = ("what is this planet ?", "what is the planet ?", "what is the other ?", "red is the other ?")


@pytest.fixture
def cases(bench):
    """(adapter, batch) of cases of equal length that differ in their picture, or in their words."""
    scope, _, _ = bench
    if scope.adapter.has_vision:
        inputs = [scope.vlm.prepare(TEXTS[0], [tiny_image(i)]) for i in range(4)]
    else:
        inputs = [scope.vlm.prepare(text, []) for text in TEXTS]
    return scope.adapter, make_batch(scope.adapter, inputs)


def everything(adapter, blocks=BLOCKS, method="mean", role=None) -> Ablation:
    return Ablation(tuple(blocks), method, (0, adapter.n_layers - 1), role)


def test_replacing_nothing_changes_nothing(cases) -> None:
    adapter, batch = cases
    base, own = block_outputs(adapter, batch, all_sites(adapter))
    nowhere = torch.zeros(batch.length, dtype=torch.bool)
    noise = {site: torch.randn_like(out) for site, out in own.items()}
    for values, where in ((own, ~nowhere), (noise, nowhere), ({}, ~nowhere)):
        assert torch.allclose(ablated(adapter, batch, values, where), base, rtol=0, atol=1e-10)
    assert (ablated(adapter, batch, noise, ~nowhere) - base).abs().max() > 1e-3


def test_without_all_blocks_the_answer_does_not_depend_on_the_case(cases) -> None:
    adapter, batch = cases
    base, outputs = block_outputs(adapter, batch, all_sites(adapter))
    assert (base[0] - base[1]).abs().max() > 1e-3
    means = {site: out.mean(0) for site, out in outputs.items()}
    logits = ablated(adapter, batch, means, torch.ones(batch.length, dtype=torch.bool))
    assert torch.allclose(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-10)
    _, (outcome,) = outcomes(adapter, [batch], [everything(adapter)])
    assert len(set(outcome.top.tolist())) == 1 and (outcome.kl > 1e-12).all()


@pytest.mark.parametrize("method", ["mean", "resample"])
@pytest.mark.parametrize("role", [None, "image", "question", "last"])
def test_outcomes_are_those_of_hooks_written_by_hand(cases, method: str, role: str | None) -> None:
    adapter, batch = cases
    base, outputs = block_outputs(adapter, batch, all_sites(adapter))
    where = np.ones(batch.length, bool) if role is None else batch.roles == role
    others = donors(batch.size, seed=3)
    for blocks in (["mlp"], ["attention"], ["mlp", "attention"]):
        handles = []
        for block, layer in all_sites(adapter, blocks):
            recorded = outputs[block, layer]
            new = recorded.mean(0, keepdim=True).expand_as(recorded) if method == "mean" else recorded[others]

            def hook(_module, _args, out, new=new):
                old = out[0] if isinstance(out, tuple) else out
                changed = old.clone()
                changed[:, where] = new[:, where]
                return (changed, *out[1:]) if isinstance(out, tuple) else changed

            module = adapter.mlp(layer) if block == "mlp" else adapter.attention(layer)
            handles.append(module.register_forward_hook(hook))
        with torch.no_grad():
            logs = adapter.next_logits(batch.tensors).log_softmax(-1)
        for handle in handles:
            handle.remove()
        kl = torch.nn.functional.kl_div(logs, base.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        unedited, (outcome,) = outcomes(adapter, [batch], [everything(adapter, blocks, method, role)], seed=3)
        assert torch.allclose(unedited, base.log_softmax(-1), rtol=0, atol=1e-12)
        assert np.allclose(outcome.kl, kl.numpy(), rtol=0, atol=1e-10)
        assert np.array_equal(outcome.top, logs.argmax(-1).numpy())


def test_layers_are_ablated_one_range_at_a_time(cases) -> None:
    adapter, batch = cases
    last = adapter.n_layers - 1
    parts = [Ablation(("mlp",), "mean", span) for span in ((0, 0), (1, last), (0, last))]
    _, (first, rest, both) = outcomes(adapter, [batch], parts)
    _, outputs = block_outputs(adapter, batch, [("mlp", 0)])
    alone = ablated(adapter, batch, {("mlp", 0): outputs["mlp", 0].mean(0)}, torch.ones(batch.length) > 0)
    assert np.array_equal(first.top, alone.argmax(-1).numpy())
    assert not np.allclose(rest.kl, both.kl, rtol=0, atol=1e-9)


def test_chunks_do_not_change_the_outcome(cases, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batch = cases
    ablations = [everything(adapter, BLOCKS, method) for method in ("mean", "resample")]
    whole = outcomes(adapter, [batch], ablations)[1]
    monkeypatch.setattr("vlmscope.interventions.ablation.BUDGET", 1)
    for one, other in zip(whole, outcomes(adapter, [batch], ablations)[1], strict=True):
        assert np.allclose(one.kl, other.kl, rtol=0, atol=1e-10)


def test_cases_of_several_lengths_are_averaged_by_role(cases, bench) -> None:
    adapter, batch = cases
    scope, _, _ = bench
    pictures = [tiny_image(0)] if adapter.has_vision else []
    longer = make_batch(adapter, [scope.vlm.prepare("what is this planet and the other one ?", pictures)])
    averages = Averages(adapter, [batch, longer], [("mlp", 1)], by_role=True)
    outputs = [block_outputs(adapter, part, [("mlp", 1)])[1]["mlp", 1] for part in (batch, longer)]
    for role in set(batch.roles):
        values = [out[:, part.roles == role].flatten(0, 1) for out, part in zip(outputs, (batch, longer), strict=True)]
        expected = torch.cat(values).mean(0)
        found = averages.values(longer, [("mlp", 1)])["mlp", 1][longer.roles == role]
        assert torch.allclose(found, expected.expand_as(found), rtol=0, atol=1e-12)
    _, (mean, resample) = outcomes(
        adapter, [batch, longer], [everything(adapter), everything(adapter, BLOCKS, "resample")]
    )
    assert np.isfinite(mean.kl).all() and len(mean.kl) == 5
    assert np.isnan(resample.kl[4]) and resample.top[4] == -1  # no case aligns with it


@pytest.mark.parametrize("size", [2, 3, 17])
def test_no_case_is_its_own_donor(size: int) -> None:
    rows = donors(size, 0)
    assert sorted(rows) == list(range(size)) and (rows != np.arange(size)).all()
