"""Sizes from shapes alone agree with what real models hold, and with what is published."""

import pytest
import torch

from vlmscope.activations.capture import capture_state
from vlmscope.config.catalog import asset
from vlmscope.core.errors import UserError
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import load_vlm
from vlmscope.models.placement import Needs
from vlmscope.models.sizes import (
    PUBLISHED,
    empty_model,
    find_config,
    forward_flops,
    n_patches,
    parameters_by_part,
    published_models,
    soft_tokens,
    state_elements,
)
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm

# Total parameters as the models' pages state them (safetensors metadata).
COUNTS = {
    "gemma-3-270m-it": 268_098_176,
    "gemma-3-1b-it": 999_885_952,
    "gemma-3-4b-it": 4_300_079_472,
    "gemma-3-12b-it": 12_187_325_040,
    "gemma-3-27b-it": 27_432_406_640,
    "medgemma-4b-it": 4_300_079_472,
}


def test_every_published_count_is_met() -> None:
    assert set(published_models()) == set(COUNTS)
    for name, count in COUNTS.items():
        adapter = adapter_for(empty_model(find_config(f"google/{name}")))
        assert parameters_by_part(adapter).total == Needs.of(adapter.model).n_parameters == count, name


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text", *sorted(FAMILIES)])
def test_parts_add_up_in_every_family(family: str) -> None:
    model = tiny_vlm(family).model
    parts = parameters_by_part(adapter_for(model))
    assert parts.total == sum(parameter.numel() for parameter in model.parameters())
    assert parts.decoder > 0 and parts.embeddings > 0
    assert (parts.vision > 0) == (family != "gemma3_text")
    assert (parts.head > 0) == (model.lm_head.weight is not model.get_input_embeddings().weight)
    empty = empty_model(model.config.to_dict())
    assert parameters_by_part(adapter_for(empty)) == parts


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text", "llava", "paligemma", "idefics3", "smolvlm", "internvl"])
def test_soft_tokens_are_those_of_a_picture(family: str) -> None:
    vlm = tiny_vlm(family)
    pictures = [] if family == "gemma3_text" else [tiny_image(0)]
    made = int(vlm.prepare("what is this ?", pictures).is_image.sum())
    of_one = soft_tokens(vlm.adapter)
    assert of_one is not None and made % max(of_one, 1) == 0 and (made > 0) == (of_one > 0)


def test_what_is_recorded_of_a_forward_is_counted_exactly() -> None:
    for vlm in (load_vlm(asset("orrery")), tiny_vlm("qwen2_5_vl"), tiny_vlm("qwen3_vl"), tiny_vlm("gemma4")):
        inputs = vlm.prepare("what is this planet ?", [tiny_image(1)])
        state = capture_state(vlm, inputs)
        held = {name: tensor.numel() for name, tensor in vars(state).items() if isinstance(tensor, torch.Tensor)}
        held["value_scales"] = sum(scale.numel() for scale in state.value_scales if scale is not None)
        assert state_elements(vlm.adapter, len(inputs)) == held


def test_operations_of_a_forward_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    vlm = load_vlm(asset("orrery"))
    inputs = vlm.prepare("what is this planet ?", [tiny_image(1)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vlm.model(**inputs.tensors)
    estimate = forward_flops(vlm.adapter, len(inputs), 1)
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_patches_are_those_of_the_tower() -> None:
    adapter = adapter_for(empty_model(find_config("google/gemma-3-4b-it")))
    assert (n_patches(adapter), soft_tokens(adapter)) == (64 * 64, 256)
    assert n_patches(adapter_for(empty_model(find_config("google/gemma-3-1b-it")))) == 0
    assert soft_tokens(tiny_vlm("qwen2_5_vl").adapter) is None


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(
        UserError, match="of org/other nothing is known here: .* known without it: google/gemma-3-12b-it"
    ):
        find_config("org/other")
    with pytest.raises(UserError, match="transformers refuses the config.json of this gemma3 model"):
        empty_model({"model_type": "gemma3", "text_config": {"hidden_size": "wide"}})


def test_the_facts_are_where_they_are_installed() -> None:
    assert PUBLISHED.is_dir() and PUBLISHED.parent.name == "models"
