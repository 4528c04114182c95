"""Interchange interventions on pairs of one's own from the command line, and mistakes in one line.

That each experiment runs, and what it finds, is in `tests/golden`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from vlmscope.app import main
from vlmscope.circuits.circuit import Circuit, load_circuit, save_circuit
from vlmscope.core.records import FeatureId
from vlmscope.core.results import CircuitFeature, Supernode
from vlmscope.data.images import png_bytes
from vlmscope.data.orrery.dataset import scene_pairs

SMALL = [
    "experiment=interchange",
    "interchange.least=2",
    "interchange.features=3",
    *(f"settings.{name}.{key}=1" for name in ("main", "cross") for key in ("matched", "random_direction")),
    *(f"~settings.{name}" for name in ("stays", "held", "no_last_layer", "no_last_position", "generated", "counts")),
    "~report",
    "tracking=none",
]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs of one's own: planets asked for their name."""
    folder = tmp_path_factory.mktemp("own")
    lines = []
    for pair in scene_pairs("planet", "val", 6, original="mars", counterfactual="jupiter"):
        for side, scene in (("a", pair.original), ("b", pair.counterfactual)):
            assert scene.image is not None
            (folder / f"{pair.key}_{side}.png").write_bytes(png_bytes(scene.image))
        other = {"image": f"{pair.key}_b.png", "answer": "jupiter"}
        line = {"prompt": "what planet is this ?", "image": f"{pair.key}_a.png", "answer": "mars"}
        lines.append(line | {"counterfactual": other})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def command(own: Path, run_dir: Path) -> list[str]:
    return [*SMALL, "pairs=file", f"pairs.path={own}", "pairs.train=3", f"hydra.run.dir={run_dir}"]


def test_own_pairs_are_chosen_on_tested_and_a_saved_circuit_is_taken_again(
    own: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert main(command(own, tmp_path / "first")) == 0
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert metrics["all/main"] == 1.0
    assert metrics["base/answer/pairs"] == 3.0
    # The donor's answer is what the training prompts of that answer have more of.
    assert metrics["all/main/difference_of_means"] == 1.0 and "all/main/complement" not in metrics
    trials = pd.read_parquet(tmp_path / "first" / "trials.parquet").query("operation == 'own' and control == ''")
    edited = trials.groupby("baseline").features.first()
    assert edited["without_writers"] + edited["only_writers"] == edited[""] == edited["unconfirmed"] == 3
    assert edited["complement"] == 8 * 2048 - 3 and edited["difference_of_means"] == 0
    lens, writers = (pd.read_parquet(tmp_path / "first" / f"{name}.parquet") for name in ("lens", "writers"))
    assert len(lens) == 2 * 9 and lens.read.iloc[8] == 1.0 and set(writers.word) == {"mars", "jupiter"}
    (folder,) = (tmp_path / "first" / "circuits").iterdir()
    saved = load_circuit(folder)
    assert len(saved.supernodes["answer"].features) == 3
    assert folder.name == "pairs" and saved.model == "orrery2" and saved.n_features is not None
    assert main([*command(own, tmp_path / "again"), f"interchange.circuit={folder}"]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    one, other = (pd.read_parquet(tmp_path / name / "trials.parquet") for name in ("first", "again"))
    assert again == metrics
    pd.testing.assert_frame_equal(one, other)
    first, taken = (json.loads((tmp_path / name / "pictures.json").read_text()) for name in ("first", "again"))
    # The run's own training pairs serve its baselines, whatever chose the circuit.
    assert taken["tested"] == first["tested"] and [*taken["chosen"].values()] == 2 * [*first["chosen"].values()]
    # The second and third pair chose the circuit in its own run, whatever this one is told.
    message = refusal(*command(own, tmp_path / "more"), f"interchange.circuit={folder}", "pairs.train=1")
    assert "has the same content as" in message and f"(features of {tmp_path / 'first'})" in message


def test_mistakes_are_one_line(own: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    feature = CircuitFeature(FeatureId(2, 999_999), "last", 1.0, 1.0)
    save_circuit(Circuit({"answer": Supernode("answer", (feature,))}, {}), tmp_path / "circuit")
    for more, words in {
        "interchange.least=4": "too few for an interval",
        "pairs.train=6": "takes them all",
        "pairs.change=planet": "one of them",
        f"interchange.circuit={tmp_path / 'circuit'}": "which the transcoders do not have",
        "settings.main.of=[all]": "settings.main.baselines: other_writers is defined of none of the setting's trials",
    }.items():
        assert words in refusal(*command(own, tmp_path / "run"), more)
