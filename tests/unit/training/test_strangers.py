"""Which inputs are called strange: those on which transcoders err far more than on the data of their training."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmscope.config.catalog import asset
from vlmscope.core.errors import UserError
from vlmscope.data.orrery.dataset import concept_scenes
from vlmscope.models.batching import LOSS_MASK
from vlmscope.models.loading import load_vlm
from vlmscope.scope import Scope
from vlmscope.training.evaluation import ErrorMeter, warn_if_strange, warn_if_unfit
from vlmscope.transcoders.config import USUAL_ERROR, UsualError, read_usual_error
from vlmscope.transcoders.formats import load_set, save_set
from vlmscope.transcoders.transcoder import random_set

QUESTION = "what planet is this ?"


def drawn(inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal([1.0, -3.0], [0.1, 2.0], (inputs, 2))


def test_the_file_comes_with_the_set_and_reads_back(tmp_path: Path) -> None:
    transcoders = random_set(2, 8, 16, 2)
    save_set(transcoders, tmp_path / "unknown")
    assert load_set(tmp_path / "unknown").usual_error is None and not (tmp_path / "unknown" / USUAL_ERROR).exists()
    transcoders.usual_error = UsualError.of([0, 1], {"image": drawn(60)})
    save_set(transcoders, tmp_path / "known")
    found = load_set(tmp_path / "known").usual_error
    assert found is not None and found.layers == (0, 1)
    errors = {"image": np.array([1.4, 5.0])}
    assert found.beyond(errors)["image"] == pytest.approx(transcoders.usual_error.beyond(errors)["image"], rel=1e-3)
    (tmp_path / "known" / USUAL_ERROR).write_text("role,layer\nimage,0\n")
    with pytest.raises(UserError, match="is damaged"):
        read_usual_error(tmp_path / "known")


def test_errors_are_those_of_the_prompt_by_role() -> None:
    """Soft tokens and words up to the first answer; of a text, which is all answer, every token; no padding."""
    forward = {
        "input_ids": torch.tensor([[1, 9, 9, 2, 3, 3], [1, 4, 4, 4, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        LOSS_MASK: torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0]], dtype=torch.bool),
    }
    squares = {0: torch.tensor([1.0, 4.0, 6.0, 3.0, 100.0, 100.0, 2.0, 4.0, 6.0, 8.0])}
    meter = ErrorMeter()
    meter.add(forward, 9, squares)
    assert np.exp(meter.errors["image"]).ravel().tolist() == pytest.approx([5.0])
    assert np.exp(meter.errors["text"]).ravel().tolist() == pytest.approx([2.0, 5.0])


@pytest.fixture(scope="module")
def scope() -> Scope:
    vlm = load_vlm(asset("orrery2"))
    return Scope(vlm, load_set(asset("orrery2_transcoders")).requires_grad_(False))


def checks() -> Image.Image:
    return Image.fromarray((np.indices((64, 64)).sum(0) // 8 % 2 * 255).astype(np.uint8)).convert("RGB")


def test_a_chessboard_is_strange_and_planets_are_not(scope: Scope, caplog: pytest.LogCaptureFixture) -> None:
    planets = [Image.fromarray(scene.image) for scene in concept_scenes("mars", "test", 12) if scene.image is not None]
    with caplog.at_level(logging.WARNING):
        warn_if_unfit(scope, QUESTION, planets[:1])
        assert not caplog.records
        warn_if_unfit(scope, QUESTION, [checks()])
        (record,) = caplog.records
        assert record.getMessage().startswith("this picture is unlike what the transcoders were trained on")
        caplog.clear()
        batch = scope.batch([scope.inputs(QUESTION, [picture]) for picture in [*planets, checks(), checks()]])
        assert 2 <= warn_if_strange(scope, [batch]) <= 3
        (record,) = caplog.records
        assert " of 14 pictures are unlike" in record.getMessage()
