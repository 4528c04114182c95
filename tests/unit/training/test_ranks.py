"""Training over several processes (gloo) gives the weights of one; a batch is divided among them row by row."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.processes import Forked, all_codes
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.training.batches import Forward
from vlmscope.training.ranks import Layout, share

WORKER = """
import json, sys, torch
import torch.distributed as dist
from tests.unit.training.helpers import CONFIG, interrupted_at, settings
from vlmscope.core.errors import NotMainRank
from vlmscope.models.tiny import tiny_gemma3
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.formats import save_set

rank, world, init, out, run, steps, changes = sys.argv[1:8]
torch.set_num_threads(1)
if int(world) > 1:
    dist.init_process_group("gloo", init_method=init, rank=int(rank), world_size=int(world))
config = settings(CONFIG, pool_batches=2, **json.loads(changes))
try:
    trained, _ = train_transcoders(tiny_gemma3(0), interrupted_at(int(steps), RuntimeError), [], config, run)
    save_set(trained, out)
except NotMainRank:
    pass
"""


def run_ranks(folder: Path, world: int, run: Path | None = None, steps: int = 99, **changes: Any) -> list[int]:
    """Train with `world` processes into `folder`/set, until batch `steps`; their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    init = (folder / "rendezvous").as_uri()
    arguments = (world, init, folder / "set", run or folder / "run", steps, json.dumps(changes))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return all_codes([Forked(WORKER, rank, *arguments, env=env) for rank in range(world)])


def distance(a: Path, b: Path) -> float:
    """The largest difference between two sets' weights."""
    files = sorted(file.name for file in (a / "set").glob("*.safetensors"))
    assert files and files == sorted(file.name for file in (b / "set").glob("*.safetensors"))
    pairs = [(load_file(a / "set" / name), load_file(b / "set" / name)) for name in files]
    assert all(ours.keys() == theirs.keys() for ours, theirs in pairs)
    return max(float((ours[key].float() - theirs[key].float()).abs().max()) for ours, theirs in pairs for key in ours)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert run_ranks(folder, 1) == [0]
    return folder


@pytest.mark.parametrize(("world", "micro"), [pytest.param(2, None, marks=pytest.mark.slow), (3, None), (2, 20)])
def test_several_processes_give_the_weights_of_one(alone: Path, tmp_path: Path, world: int, micro: int | None) -> None:
    assert run_ranks(tmp_path, world, micro_tokens=micro) == [0] * world
    assert distance(alone, tmp_path) < 1e-5


@pytest.mark.slow
def test_another_number_of_processes_goes_on(alone: Path, tmp_path: Path) -> None:
    assert all(run_ranks(tmp_path / "two", 2, tmp_path / "run", steps=4))
    assert run_ranks(tmp_path / "one", 1, tmp_path / "run", resume=True) == [0]
    assert distance(alone, tmp_path / "one") < 1e-5


def test_layers_are_divided_evenly_and_each_once() -> None:
    layout = Layout(34, 8)
    counts = [len(layout.layers(rank)) for rank in range(8)]
    assert counts == [5, 5, 4, 4, 4, 4, 4, 4]
    assert [layer for rank in range(8) for layer in layout.layers(rank)] == list(range(34))
    assert layout.owner(33) == 7
    with pytest.raises(UserError, match="start 4 or fewer"):
        Layout(4, 5)


# -- a batch divided among processes

SOFT = 8


def forward(pictures: list[int], seed: int = 0, each: int = 4) -> dict[str, Tensor]:
    """A row for each number of pictures, `each` soft tokens a picture; every row and picture has values of its own."""
    rng = np.random.default_rng(seed)
    width = each * max(pictures) + 3
    ids = torch.from_numpy(rng.integers(10, 90, (len(pictures), width)))
    for row, count in enumerate(pictures):
        ids[row, : each * count] = SOFT
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if sum(pictures):
        found["pixel_values"] = torch.from_numpy(rng.standard_normal((sum(pictures), 3, 2, 2)))
    return found


def rows(batch: list[Forward]) -> list[tuple[list[int], list[float]]]:
    """Each row's tokens and its pictures' values."""
    found = []
    for one in batch:
        pixels, begin = one.get("pixel_values"), 0
        for ids in one["input_ids"]:
            count = int((ids == SOFT).sum()) // 4
            mine = [] if pixels is None else pixels[begin : begin + count].flatten().tolist()
            found.append((ids.tolist(), mine))
            begin += count
        assert pixels is None or begin == len(pixels), "a picture without its row"
    return found


BATCHES = {
    "one forward": [forward([1, 1, 1, 1, 1])],
    "texts": [forward([0, 0, 0])],
    "rows with none, one and two pictures": [forward([0, 2, 1, 0, 1])],
    "several forwards": [forward([1, 1], 1), forward([0, 0, 0], 2), forward([2], 3)],
}


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("name", BATCHES)
def test_the_parts_are_the_batch(name: str, parts: int) -> None:
    batch: list[Forward] = list(BATCHES[name])
    divided = [share(batch, part, parts, SOFT) for part in range(parts)]
    assert [row for part in divided for row in rows(part)] == rows(batch)
    sizes = [len(rows(part)) for part in divided]
    assert max(sizes) - min(sizes) <= 1


def whole(batch: list[Forward], soft: int | None, parts: int = 3) -> bool:
    """Whether exactly one part has the single forward, untouched, and the others nothing."""
    divided = [share(batch, part, parts, soft) for part in range(parts)]
    return sorted(map(len, divided)) == [0] * (parts - 1) + [1] and any(
        part and part[0] is batch[0] for part in divided
    )


def test_what_cannot_be_parted_stays_whole() -> None:
    assert whole([{**forward([1, 1, 1]), "image_grid_thw": torch.ones(3, 3)}], SOFT)  # not a row of tokens each
    assert whole([forward([1, 1, 1])], None)  # no soft tokens that say whose a picture is
    odd = forward([1, 1, 1])
    odd["input_ids"][0, 0] = 9  # rows with pictures of different lengths
    assert whole([odd], SOFT)
    none: dict[str, Tensor] = {**forward([0, 0, 0]), "pixel_values": torch.zeros(2, 3, 2, 2)}
    assert whole([none], SOFT)  # pictures, and no row that takes them
    assert not whole([forward([1, 1, 1])], SOFT)
