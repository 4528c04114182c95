"""Feature studies: what `task=study` costs beyond a plain forward pass over the same data.

`python -m benchmarks.study [--blocks 5] [--warm 8] [--threads 1]`. Orrery, float32, its own scenes from the training
shards (`outputs/data/orrery`), batches of 256 rows sorted by shape, the same inputs for all sides, which take turns
block by block:

plain       samples to forwards, forwards (one position of logits)
codes       the same, and every layer's sparse code: no study of all features can do with less
study       the same, with everything that a study keeps of all features
study 1000  of 1,000 features (the same number of each layer)

The first `--warm` batches are studied but not counted, since at the beginning nearly everything is kept. Samples are
made twice, by the plain way and by the study's, which also finds where soft tokens lie and notes where rows come from.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import vlmscope
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import NumberedRow, NumberedRows, open_source
from vlmscope.data.orrery.scenes import KINDS
from vlmscope.data.samples import WHOLE
from vlmscope.features.config import StudyConfig
from vlmscope.features.study import InputMaker, StudyInput, StudyPart, StudyPass, finish, study_parts
from vlmscope.models.batching import encode

BATCHES = 2  # a block


class CodesAlone(StudyPass):
    """A pass that makes codes and looks at nothing."""

    def settle(self) -> None:
        """Encode what waits."""
        for layer, found in self.waiting.items():
            if found:
                self.scope.transcoders[layer].encode(torch.cat(found))
            self.waiting[layer] = []
        self.forwards = []


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="outputs/data/orrery")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    scope, config = vlmscope.load("orrery", check=False), StudyConfig()
    vlm, sets = scope.vlm, scope.transcoders
    sources = {kind: SourceConfig("shards", arguments.data, split="train", stream=kind) for kind in KINDS}
    opened = {name: (one.weight, open_source(name, one)) for name, one in sources.items()}
    rows = NumberedRows(opened, config.batch_size, WHOLE)
    settings = (config.top, config.samples, config.window)
    few = {layer: torch.arange(1000 // len(sets.layers)) for layer in sets.layers}
    passes = {
        "plain": StudyPass(scope, *settings, {}),
        "codes": CodesAlone(scope, *settings),
        "study": StudyPass(scope, *settings),
        "study 1000": StudyPass(scope, *settings, few),
    }
    make = InputMaker(vlm, config.max_tokens, config.max_skipped)
    batches, records = iter(rows), []
    for _ in range(arguments.warm):
        inputs = make(next(batches))
        records += [one.record for one in inputs]
        for name in ("study", "study 1000"):
            passes[name].add(inputs, config.forward_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in (*passes, "samples", "samples of a study")}

    def encoded(block: Sequence[Sequence[NumberedRow]]) -> None:
        for batch in block:
            for row in batch:
                encode(vlm, row.read().opened(), config.max_tokens)

    for _ in range(arguments.blocks):
        block = [next(batches) for _ in range(BATCHES)]
        seconds["samples"].append(timed(lambda block=block: encoded(block)))
        made: list[list[StudyInput]] = []
        seconds["samples of a study"].append(timed(lambda block=block, made=made: made.extend(map(make, block))))
        records += [one.record for inputs in made for one in inputs]
        for name, one in passes.items():
            seconds[name].append(
                timed(lambda one=one, made=made: [one.add(inputs, config.forward_tokens) for inputs in made])
            )
    found = {name: statistics.median(values) / BATCHES for name, values in seconds.items()}
    plain = found["samples"] + found["plain"]
    result: dict[str, float] = {f"seconds a batch: {name}": value for name, value in found.items()}
    for name in ("codes", "study", "study 1000"):
        load = found["samples"] if name == "codes" else found["samples of a study"]
        result[f"ratio: {name}"] = (load + found[name]) / plain
        result[f"ratio without samples: {name}"] = found[name] / found["plain"]
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study"
        part = StudyPart(study, WHOLE, {})
        more = {"finished": True, "skipped": {}, "rows": rows.state(), "bad_shards": 0}
        result["seconds of a checkpoint"] = timed(lambda: part.save(passes["study"], records, make.geometries, more))
        data = {"sources": {}, "max_bad_shards": 0}
        ready = study_parts(study, 1, {})
        result["seconds of the files"] = timed(lambda: finish(study, scope, ready, config, data))
        size = sum(path.stat().st_size for path in study.rglob("*") if path.is_file())
    pictures = sum(record["n_pictures"] for record in records)
    result |= {"rows": len(records), "pictures": pictures, "bytes": size, "bytes a picture": size / pictures}
    result["spread of plain"] = max(seconds["plain"]) / min(seconds["plain"])
    for name, value in result.items():
        print(f"{name:32} {value:12.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
