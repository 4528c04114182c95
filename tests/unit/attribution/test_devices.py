"""One graph by several devices, and by several processes: the same to the last bit of float64."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from tests.processes import all_codes, command_line

from vlmscope.app import main
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import trace
from vlmscope.core.artifacts import load_tensors
from vlmscope.core.errors import UserError
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

CONFIG = AttributionConfig(dtype="float64", max_nodes=60, update_every=20, batch_size=7)
TRACE = ["task=trace", "model=tiny", "model.dtype=float64", "attribution.dtype=float64", "attribution.batch_size=7",
         "attribution.heads=0", "task.figure=false", "tracking=none", "trainer.threads=1",
         "prompt=the red planet"]  # fmt: skip


@pytest.mark.parametrize("choice", ["influence", "total_effect"])
def test_several_devices_make_the_same_graph(choice: str) -> None:
    vlm = tiny_gemma3(3)
    scope = Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 20, 4, seed=1).requires_grad_(False))
    inputs = scope.inputs("what is this ?", [tiny_image(0)])
    one, three = (
        trace(scope, inputs, AttributionConfig(**{**vars(CONFIG), "choice": choice, "devices": devices})).graph
        for devices in ([], ["cpu", "cpu", "cpu"])
    )
    assert one.n_edges > 1000
    for name in ("indptr", "indices", "weights", "residual", "left_out_mass"):
        np.testing.assert_array_equal(getattr(three, name), getattr(one, name), name)
    for device, words in (("cuda:7", "cuda:7"), ("gpu", "unknown device 'gpu'")):
        with pytest.raises(UserError, match=words):
            trace(scope, inputs, AttributionConfig(devices=["cpu", device]))


def test_two_processes_make_the_same_graph(tmp_path: Path) -> None:
    assert main([*TRACE, f"hydra.run.dir={tmp_path / 'one'}"]) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        command_line(*TRACE, f"hydra.run.dir={tmp_path / 'two'}", env={**os.environ, **launch, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert all_codes(processes) == [0, 0], [process.said() for process in processes]
    assert processes[1].said()[0] == ""
    one, two = (load_tensors(tmp_path / name / "graph.safetensors")[0] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(two[name], one[name], name)
