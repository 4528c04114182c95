"""What may go wrong while transcoders are trained: one layer's numbers, a full disk, a kill, an old checkpoint."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import Forked
from tests.unit.training.test_transcoder_training import CONFIG, _batch, _one_thread, _state, vlm  # noqa: F401

from vlmscope.core.errors import UserError
from vlmscope.models.base import Adapter
from vlmscope.models.loading import VLM
from vlmscope.training.batches import Batch, LayerActivations
from vlmscope.training.layer_trainer import LayerTrainer
from vlmscope.training.ranks import Ranks
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.transcoder import TranscoderSet


def trained(
    vlm: VLM,  # noqa: F811
    folder: Path,
    resume: bool = False,
    steps: int = 6,
    activation: str = "topk",
) -> tuple[TranscoderSet, dict[str, float]]:
    config = dataclasses.replace(CONFIG, max_steps=steps, activation=activation)
    return train_transcoders(vlm, _batch, [], config, folder, resume=resume)


def layers_equal(ours: TranscoderSet, theirs: TranscoderSet) -> list[bool]:
    pairs = [(ours[layer].state_dict(), theirs[layer].state_dict()) for layer in ours.layers]
    return [all(torch.equal(one[name], other[name]) for name in one) for one, other in pairs]


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_a_layer_with_bad_numbers_stops_alone_with_its_last_good_weights(
    vlm: VLM,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    activation: str,
) -> None:
    whole, _ = trained(vlm, tmp_path / "whole", activation=activation)
    right, calls = LayerTrainer.loss, {"layer 2": 0}

    def poisoned(self, x, y, *rest):
        if self.transcoder.config.layer == 2:
            calls["layer 2"] += 1
            if calls["layer 2"] == 4:
                x = x * float("nan")
        return right(self, x, y, *rest)

    monkeypatch.setattr(LayerTrainer, "loss", poisoned)
    found, metrics = trained(vlm, tmp_path / "hit", activation=activation)
    assert layers_equal(found, whole) == [True, True, False, True]
    assert metrics["train/stopped_layers"] == 1 and calls["layer 2"] == 4  # never asked again
    assert "layer 2 stopped before step 4 (loss nan" in caplog.text
    assert "1 layers stopped early" in caplog.text
    assert all(bool(tensor.isfinite().all()) for tensor in found[2].state_dict().values())
    state = json.loads((tmp_path / "hit" / "transcoder_checkpoint" / "step_00000006" / "complete.json").read_text())
    assert state["steps_done"] == 6
    # A finished run that is resumed still knows.
    assert trained(vlm, tmp_path / "hit", resume=True, activation=activation)[1]["train/stopped_layers"] == 1


def test_a_layer_whose_loss_explodes_stops_alone(
    vlm: VLM,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From batch 10 on the targets of layer 1 are garbage, as large as it takes, but finite."""
    steps = 14
    whole, _ = trained(vlm, tmp_path / "whole", steps=steps)

    def until_ten(number: int) -> dict[str, torch.Tensor]:
        if number == 11:  # Lightning fetches one step ahead
            raise KeyboardInterrupt
        return _batch(number)

    with pytest.raises(KeyboardInterrupt):
        train_transcoders(vlm, until_ten, [], dataclasses.replace(CONFIG, max_steps=steps), tmp_path / "short")
    (before,) = (tmp_path / "short" / "transcoder_checkpoint").glob("*/layer_01.safetensors")
    right = Ranks.collect
    numbers: list[int] = []

    def collected(self: Ranks, adapter: Adapter, batch: Batch) -> LayerActivations:
        found = right(self, adapter, batch)
        numbers.append(len(numbers) - CONFIG.init_batches)  # after those of the starting point: 0, 1, ..
        if numbers[-1] < 10:
            return found
        x, y = found.by_layer[1]
        return dataclasses.replace(found, by_layer={**found.by_layer, 1: (x * 1e6, y)})

    monkeypatch.setattr(Ranks, "collect", collected)
    found, metrics = trained(vlm, tmp_path / "hit", steps=steps)
    assert layers_equal(found, whole) == [True, False, True, True]
    (after,) = (tmp_path / "hit" / "transcoder_checkpoint").glob("*/layer_01.safetensors")
    # The weights, moments included, are those before the first garbage.
    assert before.parent.name == "step_00000010"
    ours, theirs = load_file(after), load_file(before)
    for name in theirs.keys() - {"module.stopped"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    assert int(ours["module.stopped"]) == 10
    assert metrics["train/stopped_layers"] == 1
    assert "layer 1 stopped before step 11 (loss " in caplog.text and "times the running median" in caplog.text


def test_a_full_disk_is_found_before_training(
    vlm: VLM,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"1e-06 GB free, and checkpoints and set take 0\.000\d+ GB; make room"):
        trained(vlm, tmp_path / "run")


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(vlm: VLM, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "transcoder_checkpoint"
    folder.mkdir()
    (folder / "state.safetensors").write_bytes(b"old")
    with pytest.raises(UserError, match="of an earlier version"):
        trained(vlm, tmp_path, resume=True)


def test_a_torn_checkpoint_is_never_taken_for_whole(vlm: VLM, tmp_path: Path) -> None:  # noqa: F811
    whole, _ = trained(vlm, tmp_path)
    torn = tmp_path / "transcoder_checkpoint" / "step_00000009"
    torn.mkdir()
    (torn / "layer_00.safetensors").write_bytes(b"half of it")
    again, _ = trained(vlm, tmp_path, resume=True)
    assert all(layers_equal(whole, again))


_PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.unit.training.test_robustness import trained
from vlmscope.models.tiny import tiny_gemma3
trained(tiny_gemma3(0), Path(sys.argv[1]), resume=sys.argv[2] == "resume", steps=40)
"""


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(vlm: VLM, tmp_path: Path) -> None:  # noqa: F811
    process = Forked(_PROGRAM, tmp_path / "parts", "anew")
    markers = tmp_path / "parts" / "transcoder_checkpoint"
    deadline = time.monotonic() + 120
    while not list(markers.glob("step_*/complete.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (markers / "step_00000040").exists()
    assert Forked(_PROGRAM, tmp_path / "parts", "resume").wait() == 0
    trained(vlm, tmp_path / "whole", steps=40)
    assert _state(tmp_path / "parts") == _state(tmp_path / "whole")
