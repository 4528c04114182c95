"""A run that was stopped and resumed ends with the same weights as one that was not."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlmscope.core.errors import UserError
from vlmscope.data.orrery.dataset import OrreryDataConfig, ScenePool, build
from vlmscope.data.orrery.scenes import KINDS, vocabulary
from vlmscope.models.orrery import OrreryConfig, build_orrery, build_processor
from vlmscope.training import orrery as orrery_training
from vlmscope.training.config import OrreryTrainingConfig, StageConfig
from vlmscope.training.orrery import StepBatches, VlmModule, _fit, train_orrery
from vlmscope.training.resume import load_checkpoint

SMALL = OrreryConfig(d_model=16, n_layers=2, d_mlp=16, head_dim=4, vision_width=8, vision_layers=1, vision_mlp=8)
BATCH = {"planets": 1, "digits": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    counts = dict.fromkeys(KINDS, 6)
    build(OrreryDataConfig(folder=str(folder), train=counts, val=counts, test=counts))
    return folder


def fit(data: Path, folder: Path, steps: int, resume: bool, total: int = 6) -> VlmModule:
    processor = build_processor(vocabulary(), 64, 16)
    stage = StageConfig(total, BATCH, warmup=2)
    module = VlmModule(stage, build_orrery(SMALL, len(processor.tokenizer), 0), processor.tokenizer)
    batches = StepBatches(
        ScenePool(data, "train"), StageConfig(steps, BATCH), lambda: module.steps_done, module.collate
    )
    config = OrreryTrainingConfig(checkpoint_every=2, val_every=100)
    _fit(module, batches, dict, config, folder, False, resume, {})
    return module


def test_resumed_equals_uninterrupted(data: Path, tmp_path: Path) -> None:
    whole = fit(data, tmp_path / "whole", 6, resume=False)
    fit(data, tmp_path / "cut", 3, resume=False)
    resumed = fit(data, tmp_path / "cut", 6, resume=True)
    assert resumed.steps_done == whole.steps_done == 6
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_ctrl_c_is_an_interrupt_and_keeps_what_was_learnt(data: Path, tmp_path: Path) -> None:
    processor = build_processor(vocabulary(), 64, 16)
    stage = StageConfig(6, BATCH, warmup=2)
    module = VlmModule(stage, build_orrery(SMALL, len(processor.tokenizer), 0), processor.tokenizer)

    def collate(scenes, step: int):
        if step == 3:
            raise KeyboardInterrupt
        return module.collate(scenes, step)

    batches = StepBatches(ScenePool(data, "train"), stage, lambda: module.steps_done, collate)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        _fit(
            module, batches, dict, OrreryTrainingConfig(checkpoint_every=100, val_every=100), tmp_path, False, False, {}
        )
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = fit(data, tmp_path, 6, resume=True)
    whole = fit(data, tmp_path / "whole", 6, resume=False)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_signal_in_the_middle_of_a_change_of_the_weights_keeps_the_checkpoint_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = torch.optim.AdamW.step, []

    def half(self: torch.optim.AdamW, closure):
        calls.append(closure())
        if len(calls) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise KeyboardInterrupt
        return right(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", half)
        fit(data, tmp_path / "cut", 6, resume=False)
    resumed = fit(data, tmp_path / "cut", 6, resume=True)
    whole = fit(data, tmp_path / "whole", 6, resume=False)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_corrupt_and_foreign_checkpoints_are_named(data: Path, tmp_path: Path) -> None:
    module = fit(data, tmp_path, 2, resume=False)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    with pytest.raises(UserError, match="does not fit"):
        load_checkpoint(path, module, None, {})
    path.write_bytes(whole)
    with pytest.raises(UserError, match="does not fit"):
        load_checkpoint(path, torch.nn.Linear(2, 2), None, {})


def test_other_data_or_settings_are_refused_by_name_and_a_new_start_forgets(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    counts = dict.fromkeys(KINDS, 6)
    build(OrreryDataConfig(folder=str(other), seed=1, train=counts, val=counts, test=counts))
    config = OrreryTrainingConfig(*(StageConfig(1, BATCH, warmup=1) for _ in range(3)), checkpoint_every=2, val_every=2)
    faster = replace(config, vlm=replace(config.vlm, lr=0.1))
    run = tmp_path / "run"
    train_orrery(data, SMALL, config, run, False, False, test_scenes=1)
    for given, settings, architecture, name in (
        (other, config, SMALL, r"\(data \w+ -> \w+\)"),
        (data, faster, SMALL, r"\(training.vlm.lr 0.001 -> 0.1\)"),
        (data, config, replace(SMALL, sliding_window=8), r"\(architecture.sliding_window 10 -> 8\)"),
    ):
        with pytest.raises(UserError, match=name):
            train_orrery(given, architecture, settings, run, False, True, test_scenes=1)
    free = replace(config, checkpoint_every=1, val_every=1)
    train_orrery(data, SMALL, free, run, False, True, test_scenes=1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    # A new start that is stopped in its first stage must not find the last stage of the run before when it resumes.
    monkeypatch.setattr(orrery_training, "tower_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_orrery(data, SMALL, faster, run, False, False, test_scenes=1)
    assert not list(run.glob("vlm/*")) + list(run.glob("polish/*"))


def test_all_stages_end_in_a_hugging_face_folder(data: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, Gemma3ForConditionalGeneration

    config = OrreryTrainingConfig(*(StageConfig(2, BATCH, warmup=1) for _ in range(3)), checkpoint_every=2, val_every=2)
    metrics, folder = train_orrery(data, SMALL, config, tmp_path, False, False, test_scenes=4)
    assert {"test/accuracy/name", "test/accuracy_shuffled/sum", "test/accuracy/text_planet"} <= set(metrics)
    assert sum(v for k, v in metrics.items() if k.startswith("test/six_fingers/")) == pytest.approx(1.0)
    model = Gemma3ForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(folder).image_seq_length == 16
