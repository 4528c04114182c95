"""A set's card: what it shows, that the hub can read its front matter, and that conversion keeps what is known."""

from dataclasses import replace

import pytest
import yaml

from vlmscope.core.errors import UserError
from vlmscope.transcoders.hub import carried_over, facts_of_set, render, with_metrics
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
