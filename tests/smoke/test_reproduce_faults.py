"""The ranges of headline numbers have teeth: a broken build misses them, the shipped one does not.

Sums that follow the features of another digit, on fewer pairs than the range was made for; pairs of any answers count.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from vlmscope.analyses.bench import Bench
from vlmscope.analyses.declared import run_declared
from vlmscope.config import AppConfig
from vlmscope.config.catalog import conf_dir, register
from vlmscope.config.resolve import to_app_config
from vlmscope.config.schema import numbers_of
from vlmscope.core.results import Number
from vlmscope.interventions import trials
from vlmscope.tasks.settings import TASKS

SMALL = ["pairs.train=16", "pairs.test=24"]
LEFT_OUT = ("cross", "stays", "held", "no_last_layer", "no_last_position", "generated", "counts", "grid")
ALONE = [f"settings.main.{key}" for key in ("of=[all]", "matched=0", "random_direction=0", "baselines=[]")]
ALWAYS = [*ALONE, *(f"~settings.{name}" for name in LEFT_OUT), "~report", "~analyses", "interchange.answerable=false"]
STEERED = "all/main/sum"
Fault = Callable[[Bench], AbstractContextManager[None]]


def configured(overrides: list[str]) -> AppConfig:
    register(TASKS)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_app_config(
            compose("config", ["experiment=visual_arithmetic", "trainer.threads=1", *ALWAYS, *overrides])
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(configured(SMALL), tmp_path_factory.mktemp("run"))


@contextmanager
def shuffled_decoder_rows(bench: Bench) -> Iterator[None]:
    """Every feature writes another's vector."""
    kept = {layer: bench.transcoders[layer].W_dec.clone() for layer in bench.transcoders.layers}
    for layer, rows in kept.items():
        bench.transcoders[layer].W_dec.copy_(rows[torch.randperm(len(rows), generator=torch.manual_seed(0))])
    yield
    for layer, rows in kept.items():
        bench.transcoders[layer].W_dec.copy_(rows)


@contextmanager
def edits_that_are_not_applied(_: Bench) -> Iterator[None]:
    real = trials.run_edited
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trials, "run_edited", lambda scope, batch, _, *rest, **more: real(scope, batch, {}, *rest, **more)
        )
        yield


@contextmanager
def damaged_model(bench: Bench) -> Iterator[None]:
    """The pictures' way into the decoder, its columns in reverse order."""
    (weight,) = [w for name, w in bench.vlm.model.named_parameters() if name.endswith("mm_input_projection_weight")]
    kept = weight.data.clone()
    weight.data.copy_(kept.flip(-1))
    yield
    weight.data.copy_(kept)


def judged(bench: Bench, tmp_path: Path) -> dict[str, Number]:
    again = Bench(bench.cfg, tmp_path)
    again.vlm, again.scope = bench.vlm, bench.scope
    found = again.metrics | run_declared(again)
    return {number.metric: number for number in numbers_of(bench.cfg.headline, found)}


@pytest.mark.slow
def test_the_shipped_build_lies_in_its_ranges(tmp_path: Path) -> None:
    """On as many pairs as the ranges were made for."""
    assert judged(Bench(configured([]), tmp_path), tmp_path)[STEERED].holds


@pytest.mark.parametrize(
    "fault", [nullcontext, shuffled_decoder_rows, edits_that_are_not_applied, damaged_model], ids=lambda f: f.__name__
)
def test_a_fault_misses_a_range_by_more_than_few_pairs_explain(fault: Fault, bench: Bench, tmp_path: Path) -> None:
    """The build without a fault does not, so that a miss is the fault's doing (interval of 24 pairs: 20 points)."""
    with fault(bench):
        steered = judged(bench, tmp_path)[STEERED]
    least = bench.cfg.headline[STEERED].low - 0.2
    if fault is nullcontext:
        assert steered.value is not None and steered.value > least, steered.told
    else:
        assert not steered.holds and (steered.value is None or steered.value < least), steered.told
