"""Training of eyes: resumed as uninterrupted, pictures that mean their name, flags that are not mirrored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.text_model import write_text_model

from vlmscope.core.errors import UserError
from vlmscope.data.icons import read_icons
from vlmscope.models.eyes import EyesConfig, joined_folder, write_untrained
from vlmscope.models.loading import VLM, load_vlm
from vlmscope.training.config import EyesTrainingConfig
from vlmscope.training.eyes import (
    EyesModule,
    PicturePool,
    Pictures,
    augmented,
    name_embeddings,
    train_eyes,
)

SIZES: dict[str, Any] = {"vision_width": 8, "vision_layers": 1, "vision_mlp": 8, "vision_heads": 2}
NAMES = ["ab", "bc", "abc"]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> EyesConfig:
    folder = tmp_path_factory.mktemp("text")
    write_text_model(folder)
    return EyesConfig(text=str(folder), **SIZES)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMSCOPE_CACHE", str(tmp_path_factory.getbasetemp() / "eyes_cache"))


@pytest.fixture
def vlm(architecture: EyesConfig, tmp_path: Path) -> VLM:
    write_untrained(architecture, tmp_path / "eyes", seed=0)
    return load_vlm(joined_folder(tmp_path / "eyes"))


def settings(steps: int) -> EyesTrainingConfig:
    return EyesTrainingConfig(
        max_steps=steps, batch={"pictures": 3}, warmup=1, precision="32", checkpoint_every=1, val_every=9
    )


def test_a_resumed_training_equals_an_uninterrupted_one(
    architecture: EyesConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(run: Path, resume: bool, steps: int = 3) -> dict[str, torch.Tensor]:
        train_eyes(architecture, settings(steps), run, False, resume)
        return load_file(run / "model" / "eyes.safetensors")

    whole = train(tmp_path / "whole", resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(EyesModule, "training_step", stopped_at(2, EyesModule.training_step))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", resume=False)
    parts = train(tmp_path / "parts", resume=True)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    with pytest.raises(UserError, match="other settings"):
        train(tmp_path / "parts", resume=True, steps=4)


def stopped_at(step: int, training_step: Any) -> Any:
    def stopped(module: EyesModule, batch: Any, batch_idx: int) -> Any:
        if module.steps_done == step:
            raise KeyboardInterrupt
        return training_step(module, batch, batch_idx)

    return stopped


def test_the_optimiser_has_every_parameter_once(vlm: VLM) -> None:
    module = EyesModule(settings(1), vlm, NAMES)
    learned = [p for group in module.optimizer.param_groups for p in group["params"]]
    assert len(learned) == len({id(p) for p in learned})
    assert {id(p) for p in learned} == {id(p) for p in module.parameters()}


@torch.no_grad()
def test_soft_tokens_that_are_a_name_are_nearest_to_it(vlm: VLM) -> None:
    module = EyesModule(settings(1), vlm, NAMES)
    names = name_embeddings(vlm.model, vlm.tokenizer, NAMES)
    apart = module.distances(names)
    torch.testing.assert_close(apart.diagonal(), torch.zeros(3), rtol=0, atol=1e-4)
    assert apart[~torch.eye(3, dtype=torch.bool)].min() > 0.1


def test_flags_are_not_mirrored_and_each_step_has_its_own_pictures() -> None:
    table = read_icons("train").groupby("kind").head(3)
    pool = PicturePool(Pictures.of(table, sorted(set(table.label))), 0.5)
    first, again, next_ = (pool.batch(0, step, {"pictures": 8}) for step in (0, 0, 1))
    assert torch.equal(first.rgba, again.rgba)
    assert not torch.equal(first.rgba, next_.rgba)
    pixels = augmented(first, seed=0)
    assert torch.equal(pixels, augmented(first, seed=0))
    assert pixels.shape == (8, 3, 64, 64)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    # Without changes of place or colour, a flag stays as it is, left to right; other pictures are sometimes mirrored.
    flags = pool.pictures.rows(pool.pictures.is_flag.nonzero()[:, 0])
    left = torch.zeros_like(flags.rgba)
    left[..., :32], left[:, 3] = 255, 255
    still = augmented(flags._replace(rgba=left), seed=1, strength=0.0)
    assert (still[..., :32].mean((1, 2, 3)) > still[..., 32:].mean((1, 2, 3))).all()
