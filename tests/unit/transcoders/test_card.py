"""A set's card: what it shows, that the hub can read its front matter, and that conversion keeps what is known."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from vlmscope.config.catalog import asset
from vlmscope.core.errors import UserError
from vlmscope.tasks.train_transcoders import training_card
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.transcoders.hub import carried_over, facts_of_set, parts_of, render, with_metrics
from vlmscope.transcoders.transcoder import random_set

METRICS = {
    "layers/fvu/layer_00": 0.1234, "layers/fvu/layer_01": 0.25, "layers/l0/layer_00": 3.96, "layers/l0/layer_01": 4.0,
    "layers/dead_frac/layer_00": 0.055, "layers/dead_frac/layer_01": 0.0, "val/ce": 0.5, "val/ce_delta": 0.0625,
    "perf/tokens_per_s": 9.0,
}  # fmt: skip


def facts():
    found = with_metrics(facts_of_set(random_set(2, 6, 2048, 4, model_name="some/vlm")), METRICS)
    data = {"captions": 3000, "text": 1000}
    return replace(found, license="gemma", base_revision="0" * 40, data=data, settings={"lr": 0.002, "betas": [0.9]})


def test_the_card_shows_what_is_known() -> None:
    head, body = parts_of(render(facts()))
    assert (head["base_model"], head["license"], head["library_name"]) == ("some/vlm", "gemma", "vlmscope")
    assert "transcoder" in head["tags"]
    for line in (
        "# Transcoders of some/vlm",
        "| layer | features | FVU | L0 | dead |",
        "| 0 | 2,048 | 0.123 | 4.0 | 5.5 % |",
        "| mean |  | 0.187 | 4.0 | 2.8 % |",
        "Cross-entropy on answer tokens: 0.500 nats; with all layers spliced in: +0.062 nats.",
        "| captions | 3,000 | 75 % |",
        "| lr | `0.002` |",
    ):
        assert line in body.splitlines(), line
    for words in ("topk transcoder (k = 4, 2,048 features)", "`mlp_in` to `mlp_out`", f"revision `{'0' * 40}`"):
        assert words in body


def test_conversion_keeps_figures_data_and_licence_and_tells_the_new_format() -> None:
    own = facts_of_set(random_set(2, 6, 2048, 4, activation="relu"), "sae_lens")
    again = carried_over(replace(own, base_model=""), render(facts()))
    assert again == replace(facts(), format="sae_lens", activation="relu")
    assert render(carried_over(replace(own, base_model=""), render(again))) == render(again)


def test_a_strangers_card_is_quoted_with_its_licence_and_stays_quoted() -> None:
    theirs = "---\nlicense: cc-by-4.0\nbase_model: google/gemma-3-4b-it\n---\n# Gemma Scope\nText.\n"
    own = replace(facts_of_set(random_set(2, 6, 24, 4)), base_model="")
    first = carried_over(own, theirs)
    assert (first.license, first.base_model) == ("cc-by-4.0", "google/gemma-3-4b-it")
    assert first.note == "## The card of the source\n\n### Gemma Scope\nText."
    second = carried_over(own, render(first))
    assert render(second) == render(first)
    assert carried_over(own, None) == own and carried_over(own, "Just text.").note.endswith("Just text.")
    with pytest.raises(UserError, match="front matter"):
        carried_over(own, "---\na: [\n---\nText\n")


@pytest.mark.parametrize(
    "vlmscope", [{"figures": "x"}, {"data": [1]}, {"data": {"a": "b"}}, {"ce_delta": "x"}, {"settings": 3}]
)
def test_a_strangers_facts_that_do_not_fit_are_one_line(vlmscope: dict) -> None:
    own = facts_of_set(random_set(2, 6, 24, 4))
    with pytest.raises(UserError, match="front matter of the set's README.md is an incomplete card"):
        carried_over(own, f"---\n{yaml.safe_dump({'vlmscope': vlmscope})}---\nText\n")


@pytest.mark.parametrize(("name", "delta"), [("orrery_transcoders", 0.009), ("orrery2_transcoders", 0.005)])
def test_the_shipped_cards_front_matter_says_what_its_table_says(name: str, delta: float) -> None:
    head, body = parts_of((Path(asset(name)) / "README.md").read_text())
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in body.splitlines() if line.startswith("| ")}
    figures = head["vlmscope"]["figures"]
    assert [f"{figures[i]['fvu']:.3f}" for i in range(8)] == [cell.strip() for cell in rows["FVU"][:8]]
    assert [f"{100 * figures[i]['dead_frac']:.1f} %" for i in range(8)] == [cell.strip() for cell in rows["dead"][:8]]
    assert yaml.safe_dump(head["vlmscope"]) and head["vlmscope"]["ce_delta"] == delta
    assert f"+ {delta}" in " ".join(body.split())


def test_tokens_are_divided_by_the_shares_of_what_was_drawn() -> None:
    model = SimpleNamespace(hub="org/vlm", path="models/vlm", tiny=None, revision="a" * 40)
    cfg: Any = SimpleNamespace(model=model, data=SimpleNamespace(name="mix"), task=SimpleNamespace(license="mit"))
    metrics = {"train/tokens": 1000.0, "data/web/tokens_share": 0.25, "data/chat/tokens_share": 0.75}
    head, body = parts_of(training_card(cfg, TranscoderTrainingConfig(), random_set(2, 6, 24, 4), metrics))
    assert head["vlmscope"]["data"] == {"web": 250, "chat": 750}
    assert (head["base_model"], head["license"]) == ("org/vlm", "mit")
    assert head["vlmscope"]["base_revision"] == "a" * 40 and "| chat | 750 | 75 % |" in body
    whole, _ = parts_of(training_card(cfg, TranscoderTrainingConfig(), random_set(2, 6, 24, 4), {"train/tokens": 9.0}))
    assert whole["vlmscope"]["data"] == {"mix": 9}
