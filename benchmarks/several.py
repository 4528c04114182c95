"""Transcoders of Orrery's layers for a few steps by several processes (torchrun) and by one: the same set?"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def several(device: str, count: int) -> tuple[float, list[float]]:
    """Largest difference of the two sets' weights, and seconds of one process and of `count`, starts included."""
    settings = f"task=train_transcoders transcoder=arch transcoder.expansion_factor=2 model.device={device}"
    batch = "task.batch={planets:4,digits:4,shapes:2,hands:2,text:2} task.val_scenes=2 trainer.max_steps=6"
    with tempfile.TemporaryDirectory() as folder:
        times, sets = [], []
        for number in (1, count):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"] * (number > 1)
            place = ["tracking=none", f"hydra.run.dir={folder}/{number}"]
            command = [sys.executable, *launcher, "run.py", *settings.split(), *batch.split(), *place]
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
            began = time.perf_counter()
            try:
                said = process.communicate()[0]
            finally:  # ends torchrun's children too when the time is up
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            times.append(time.perf_counter() - began)
            if process.returncode:
                raise RuntimeError((said.strip().splitlines() or ["no output"])[-1])
            sets.append(sorted(Path(folder, str(number), "transcoders").rglob("*.safetensors")))
        one, other = ([load_file(path) for path in paths] for paths in sets)
        gaps = [
            float((tensor.float() - there[name].float()).abs().max())
            for here, there in zip(one, other, strict=True)
            for name, tensor in here.items()
        ]
    return max(gaps), times
