"""Orrery's training: the loss of a stage, and a run that was stopped and resumed ends as one that was not."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.data.orrery.dataset import ScenePool, build
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import COMPOSED, KINDS, SPLITS, vocabulary
from vlmscope.models.orrery import OrreryConfig, build_orrery, build_processor, take_weights
from vlmscope.training.batches import pack
from vlmscope.training.config import OrreryTrainingConfig, StageConfig
from vlmscope.training.orrery import TowerModule, VlmModule, fit_stage, train_orrery
from vlmscope.training.resume import Checkpoints

SMALL = OrreryConfig(d_model=16, n_layers=2, d_mlp=16, head_dim=4, vision_width=8, vision_layers=1, vision_mlp=8)
BATCH = {"planets": 1, "digits": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    counts = dict.fromkeys(KINDS, 6)
    build(folder, dict.fromkeys(SPLITS, counts))
    return folder


def fit(data: Path, folder: Path, resume: bool = False, stop_at: int = 99) -> VlmModule:
    """Six steps of the second stage, with Ctrl-C before a step."""
    processor = build_processor(vocabulary(), 64, 16)
    stage = StageConfig(6, BATCH, warmup=2)
    module = VlmModule(stage, build_orrery(SMALL, len(processor.tokenizer), 0), processor.tokenizer)

    def collate(scenes: list, step: int):
        if step == stop_at:
            raise KeyboardInterrupt
        return VlmModule.collate(module, scenes, step)

    module.collate = collate  # pyright: ignore[reportAttributeAccessIssue]
    checkpoints = Checkpoints(folder, 2, stage.max_steps, {}, {})
    if resume:
        assert checkpoints.restore(module)
    fit_stage(module, ScenePool(data, "train"), [checkpoints], False)
    return module


def same(one: VlmModule, other: VlmModule) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_ctrl_c_is_an_interrupt_and_a_resumed_run_equals_an_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    whole = fit(data, tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(data, tmp_path / "cut", stop_at=3)
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = fit(data, tmp_path / "cut", resume=True)
    assert resumed.steps_done == whole.steps_done == 6 and same(whole, resumed)


def test_a_signal_in_the_middle_of_a_change_of_the_weights_waits_for_its_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = torch.optim.AdamW.step, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def signalled(self: torch.optim.AdamW, closure):
        calls.append(closure())
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return right(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", signalled)
        fit(data, tmp_path / "cut")
    signal.signal(signal.SIGINT, before)
    assert len(calls) == 4
    resumed = fit(data, tmp_path / "cut", resume=True)
    whole = fit(data, tmp_path / "whole")
    assert same(whole, resumed)


def test_other_data_or_settings_are_refused_by_name_and_a_new_start_forgets(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    counts = dict.fromkeys(KINDS, 6)
    build(other, dict.fromkeys(SPLITS, counts), seed=1)
    config = OrreryTrainingConfig(*(StageConfig(1, BATCH, warmup=1) for _ in range(3)), checkpoint_every=2, val_every=2)
    faster = replace(config, vlm=replace(config.vlm, lr=0.1))
    run = tmp_path / "run"
    train_orrery(data, KINDS, SMALL, config, run, False, False, test_scenes=1)
    for given, settings, architecture, name in (
        (other, config, SMALL, r"\(data \w+ -> \w+\)"),
        (data, faster, SMALL, r"\(training.vlm.lr 0.001 -> 0.1\)"),
        (data, config, replace(SMALL, sliding_window=8), r"\(architecture.sliding_window 10 -> 8\)"),
    ):
        with pytest.raises(UserError, match=name):
            train_orrery(given, KINDS, architecture, settings, run, False, True, test_scenes=1)
    free = replace(config, checkpoint_every=1, val_every=1)
    train_orrery(data, KINDS, SMALL, free, run, False, True, test_scenes=1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    # A new start that is stopped in its first stage must not find the last stage of the run before when it resumes.
    monkeypatch.setattr(TowerModule, "collate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_orrery(data, KINDS, SMALL, faster, run, False, False, test_scenes=1)
    assert not list(run.glob("vlm/*")) + list(run.glob("polish/*"))


def test_all_stages_end_in_a_hugging_face_folder(data: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, Gemma3ForConditionalGeneration

    config = OrreryTrainingConfig(*(StageConfig(2, BATCH, warmup=1) for _ in range(3)), checkpoint_every=2, val_every=2)
    metrics = train_orrery(data, KINDS, SMALL, config, tmp_path, False, False, test_scenes=4)
    folder = tmp_path / "model"
    assert {"test/accuracy/name", "test/accuracy_shuffled/sum", "test/accuracy/text_planet"} <= set(metrics)
    assert sum(v for k, v in metrics.items() if k.startswith("test/six_fingers/")) == pytest.approx(1.0)
    model = Gemma3ForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(folder).image_seq_length == 16


@torch.no_grad()
def test_early_exit_loss_is_that_of_shortened_models() -> None:
    """Each early term is the loss of the model without its last layers."""
    small = OrreryConfig(d_model=32, n_layers=4, d_mlp=48, head_dim=8, vision_width=32, vision_layers=1, vision_mlp=48)
    processor = build_processor(vocabulary(), small.image_size, small.soft_tokens)
    model = build_orrery(small, len(processor.tokenizer), 0).eval()
    scenes = [make_scene("train", kind, 2) for kind in ("planets", "digits", "text")]
    batch = pack(scenes, processor.tokenizer, small.soft_tokens, generator(0, "order"))

    def plain() -> torch.Tensor:
        states, labels = VlmModule(StageConfig(1, {}), model, processor.tokenizer).answer_states(batch)
        return F.cross_entropy(model.lm_head(states), labels)

    module = VlmModule(StageConfig(1, {}, exit_weight=0.3, exit_layers=2), model, processor.tokenizer)
    got = module.training_step(batch, 0)
    decoder, expected = model.model.language_model, plain()
    whole = decoder.layers
    try:
        for early in (1, 2):
            decoder.layers = whole[:-early]
            decoder.config.num_hidden_layers = len(decoder.layers)
            expected = expected + 0.3 * plain()
    finally:
        decoder.layers, decoder.config.num_hidden_layers = whole, len(whole)
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)
    assert got > 1.5 * plain()
    assert torch.equal(VlmModule(StageConfig(1, {}), model, processor.tokenizer).training_step(batch, 0), plain())


def test_the_first_layers_of_the_decoder_learn_with_the_tower_and_later_ones_do_not(data: Path) -> None:
    processor = build_processor(vocabulary(), 64, 16)
    model = build_orrery(SMALL, len(processor.tokenizer), 0)
    layers = model.model.language_model.layers
    before = [layer.mlp.up_proj.weight.clone() for layer in layers]
    stage = StageConfig(2, BATCH, warmup=1)
    module = TowerModule(stage, model, processor.tokenizer, KINDS, depth=1)
    fit_stage(module, ScenePool(data, "train"), [], False, "bf16-mixed")
    moved = [not torch.equal(old, layer.mlp.up_proj.weight) for old, layer in zip(before, layers, strict=True)]
    assert moved == [True, False] and model.config.text_config.num_hidden_layers == 2


def test_a_model_starts_from_the_parts_that_another_has(tmp_path: Path) -> None:
    known, more = (build_processor(vocabulary(kinds), 64, 16) for kinds in (KINDS, COMPOSED))
    given = build_orrery(SMALL, len(known.tokenizer), 1)
    given.save_pretrained(tmp_path)
    known.save_pretrained(tmp_path)
    model = build_orrery(replace(SMALL, n_layers=1, d_mlp=8), len(more.tokenizer), 2)
    mlp = model.model.language_model.layers[0].mlp.up_proj.weight.clone()
    take_weights(model, more.tokenizer, tmp_path)
    old, new = (m.model.language_model for m in (given, model))
    assert torch.equal(new.embed_tokens.weight[: len(known.tokenizer)], old.embed_tokens.weight)
    assert torch.equal(new.layers[0].self_attn.q_proj.weight, old.layers[0].self_attn.q_proj.weight)
    assert torch.equal(new.layers[0].mlp.up_proj.weight, mlp)  # of another size
