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
from vlmscope.training import eyes
from vlmscope.training.config import EyesStageConfig, EyesTrainingConfig
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


def stage(steps: int, seed: int = 0) -> EyesStageConfig:
    return EyesStageConfig(steps, {"pictures": 3}, warmup=1, seed=seed)


def test_a_resumed_training_equals_an_uninterrupted_one(architecture: EyesConfig, tmp_path: Path) -> None:
    def train(steps: tuple[int, int], run: Path, resume: bool) -> None:
        config = EyesTrainingConfig(
            stage(steps[0]), stage(steps[1], 1), precision="32", checkpoint_every=1, val_every=9
        )
        train_eyes(architecture, config, run, False, resume)

    train((2, 2), tmp_path / "whole", resume=False)
    fit = eyes.fit_stage

    def stopped(module: EyesModule, *settings: Any) -> None:
        if module.config.seed == 1:  # the second stage
            raise KeyboardInterrupt
        fit(module, *settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eyes, "fit_stage", stopped)
        with pytest.raises(KeyboardInterrupt):
            train((2, 2), tmp_path / "parts", resume=False)
    train((2, 2), tmp_path / "parts", resume=True)
    whole, parts = (load_file(tmp_path / name / "model" / "eyes.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    train((2, 2), tmp_path / "other", resume=False)
    with pytest.raises(UserError, match="other settings"):
        train((3, 2), tmp_path / "other", resume=True)


@torch.no_grad()
def test_soft_tokens_that_are_a_name_are_nearest_to_it(vlm: VLM) -> None:
    module = EyesModule(stage(1), vlm, NAMES)
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
