"""Training over several processes (gloo) gives the weights of one; checkpoints go on with any number of them."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.processes import Forked, all_codes

from vlmscope.core.errors import UserError
from vlmscope.training.ranks import Layout

_WORKER = """
import os, sys, dataclasses, numpy as np, torch
import torch.distributed as dist
from vlmscope.core.errors import NotMainRank
from vlmscope.core.records import generator
from vlmscope.models.tiny import tiny_gemma3
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.formats import save_set

rank, world, per_host, init, out, run, steps, resume = sys.argv[1:9]
torch.set_num_threads(1)
if int(world) > 1:
    dist.init_process_group("gloo", init_method=init, rank=int(rank), world_size=int(world))

def batch(step):
    rng = generator(7, "batch", step)
    b, t = 6, 14
    ids = rng.integers(9, 20, (b, t))
    ids[:, 3], ids[:, 4:8], ids[:, 8] = 6, 8, 7
    mask = np.ones((b, t), dtype=np.int64)
    ids[:3, :2], mask[:3, :2] = 0, 0
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
            "token_type_ids": torch.from_numpy((ids == 8).astype(np.int64)),
            "pixel_values": torch.from_numpy(rng.standard_normal((b, 3, 16, 16)).astype(np.float32))}

def interrupted(step):
    if step == int(steps):
        raise RuntimeError("stopped here")
    return batch(step)

config = TranscoderTrainingConfig(expansion_factor=4, k=8, max_steps=6, warmup=2, init_batches=2, val_every=0,
    dead_after_tokens=150, aux_k=8, checkpoint_every=3, log_every=2, lr=3e-3, pool_batches=2, steps_per_batch=1,
    matryoshka=(0.25,), precision=os.environ.get("PRECISION", "32"),
    max_norm_ratio=float(os.environ.get("MAX_NORM_RATIO", 0)) or None,
    micro_tokens=int(os.environ.get("MICRO_TOKENS", 0)) or None)
try:
    found, _ = train_transcoders(tiny_gemma3(0), interrupted, [], config, run, resume=resume == "1",
                                 per_host=int(per_host))
    save_set(found, out)
except NotMainRank:
    pass
"""


def _train(
    folder: Path,
    world: int,
    per_host: int,
    run: Path,
    steps: int = 99,
    resume: bool = False,
    micro: int = 0,
    **environment: str,
) -> list[int]:
    """Train with `world` processes into `folder`/set; their exit codes. `environment` holds further settings."""
    folder.mkdir(parents=True, exist_ok=True)
    init = (folder / "rendezvous").as_uri()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MICRO_TOKENS": str(micro), **environment}
    arguments = (world, per_host, init, folder / "set", run, steps, int(resume))
    return all_codes([Forked(_WORKER, rank, *arguments, env=env) for rank in range(world)])


def _distance(a: Path, b: Path) -> float:
    """The largest difference between two sets' weights."""
    files = sorted(file.name for file in (a / "set").glob("*.safetensors"))
    assert files and files == sorted(file.name for file in (b / "set").glob("*.safetensors"))
    pairs = [(load_file(a / "set" / name), load_file(b / "set" / name)) for name in files]
    assert all(ours.keys() == theirs.keys() for ours, theirs in pairs)
    return max(float((ours[key].float() - theirs[key].float()).abs().max()) for ours, theirs in pairs for key in ours)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert _train(folder, 1, 1, folder / "run") == [0]
    return folder


@pytest.mark.parametrize(
    ("world", "per_host"),
    [pytest.param(2, 2, marks=pytest.mark.slow), (3, 3), (2, 1), pytest.param(4, 2, marks=pytest.mark.slow)],
)
def test_several_processes_give_the_weights_of_one(alone: Path, tmp_path: Path, world: int, per_host: int) -> None:
    assert _train(tmp_path, world, per_host, tmp_path / "run") == [0] * world
    assert _distance(alone, tmp_path) < 1e-5


def test_hosts_may_have_different_numbers_of_micro_batches(alone: Path, tmp_path: Path) -> None:
    # 78 tokens: hosts of 36 (two rows of padding each) and 42 in micro-batches of 20.
    assert _train(tmp_path, 2, 1, tmp_path / "run", micro=20) == [0, 0]
    assert _distance(alone, tmp_path) < 1e-5


def test_mixed_precision_gives_the_weights_of_one_process(tmp_path: Path, alone: Path) -> None:
    assert _train(tmp_path / "one", 1, 1, tmp_path / "one" / "run", PRECISION="bf16-mixed") == [0]
    assert _train(tmp_path / "two", 2, 2, tmp_path / "two" / "run", PRECISION="bf16-mixed") == [0, 0]
    assert _distance(tmp_path / "one", tmp_path / "two") < 1e-5
    assert _distance(tmp_path / "one", alone) > 0  # the setting reached the processes


@pytest.mark.parametrize(
    ("per_host", "micro"), [(2, 0), *(pytest.param(1, micro, marks=pytest.mark.slow) for micro in (0, 20))]
)
def test_processes_leave_out_the_same_tokens_for_their_norm(
    filtered: Path, tmp_path: Path, per_host: int, micro: int
) -> None:
    run = tmp_path / "run"
    assert _train(tmp_path, 2, per_host, run, micro=micro, MAX_NORM_RATIO=RATIO) == [0, 0]
    ours, theirs = (_filters(folder) for folder in (run, filtered / "run"))
    for (limits, left), (their_limits, their_left) in zip(ours, theirs, strict=True):
        # Tokens left out and tokens seen, over all processes and steps.
        assert left.tolist() == their_left.tolist() and 0 < left[0] < 0.5 * left[1]
        torch.testing.assert_close(limits, their_limits, rtol=1e-6, atol=0)
    assert _distance(filtered, tmp_path) < 1e-5


RATIO = "1.7"


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> Path:
    folder = tmp_path_factory.mktemp("filtered")
    assert _train(folder, 1, 1, folder / "run", MAX_NORM_RATIO=RATIO) == [0]
    assert _distance(folder, alone) > 1e-3  # what is left out matters
    return folder


def _filters(run: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer the norms' limits, and how many tokens were left out of how many."""
    states = [load_file(file) for file in sorted((run / "transcoder_checkpoint").rglob("layer_*.safetensors"))]
    assert len(states) == 4
    return [(state["module.norm_limits"], state["module.left_out"]) for state in states]


@pytest.mark.slow
def test_another_number_of_processes_goes_on(alone: Path, tmp_path: Path) -> None:
    assert all(_train(tmp_path / "two", 2, 2, tmp_path / "run", steps=4))
    assert _train(tmp_path / "one", 1, 1, tmp_path / "run", resume=True) == [0]
    assert _distance(alone, tmp_path / "one") < 1e-5


def test_layers_are_divided_evenly_and_each_once() -> None:
    layout = Layout(34, 16, 8)
    counts = [len(layout.layers(rank)) for rank in range(8)]
    assert counts == [5, 5, 4, 4, 4, 4, 4, 4]
    assert [layer for rank in range(8, 16) for layer in layout.layers(rank)] == list(range(34))
    assert layout.peers(9) == [1, 9] and layout.owner(33) == 7 and layout.owner(33, 1) == 15
    with pytest.raises(UserError, match="start 4 or fewer"):
        Layout(4, 5, 5)
    with pytest.raises(UserError, match="equally many"):
        Layout(4, 3, 2)
