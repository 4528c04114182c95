"""task=convert on the command line: every pair of formats that can express the set, and refusals in one line."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vlmscope.app import main
from vlmscope.config.catalog import asset
from vlmscope.transcoders.formats import FORMATS, load_set, refusal, save_set
from vlmscope.transcoders.hub import parts_of
from vlmscope.transcoders.transcoder import Transcoder, TranscoderConfig, TranscoderSet, TranscoderSetConfig, random_set
from vlmscope.viewer.studies import decoder_rows


def convert(source: Path | str, to: str, out: Path, *more: str) -> int:
    return main(
        [
            "task=convert", "transcoder=path", f"transcoder.path={source}", f"task.to={to}", f"task.out={out}",
            "tracking=none", f"hydra.run.dir={out.parent / 'run'}", *more,
        ]
    )  # fmt: skip


def test_a_cross_layer_set_goes_to_circuit_tracers_layout_and_back(tmp_path: Path) -> None:
    found = random_set(3, 6, 24, 4, seed=5, activation="relu", cross_layer=True)
    save_set(found, tmp_path / "in")
    assert convert(tmp_path / "in", "clt", tmp_path / "there") == 0
    assert convert(tmp_path / "there", "vlmscope", tmp_path / "back") == 0
    again = load_set(tmp_path / "back", n_layers=3, d_model=6)
    for layer in range(3):
        assert torch.equal(
            torch.stack([*again[layer].W_later, again[layer].W_dec]),
            torch.stack([*found[layer].W_later, found[layer].W_dec]),
        )
    assert "writing to its own layer and later ones" in (tmp_path / "back" / "README.md").read_text()
    assert convert(tmp_path / "in", "sae_lens", tmp_path / "no") == 2


def a_set(activation: str, output_hook: str, skip: bool) -> TranscoderSet:
    base = random_set(2, 6, 24, 4, skip, 5, activation=activation)
    made = {}
    for layer in (0, 1):
        made[layer] = Transcoder(TranscoderConfig(6, 24, 4, layer, activation, skip, "mlp_in", output_hook))
        made[layer].load_state_dict(base[layer].state_dict())
    return TranscoderSet(made, TranscoderSetConfig(2, 4, activation, "google/gemma-3-1b", "mlp_in", output_hook))


SETS = [("topk", "mlp_out", True), ("relu", "mlp_out", False), ("jumprelu", "mlp_out_post", True)]


# The fast run reads and writes each format once, in a circle; that every pair works too is shown by the slow one.
@pytest.mark.parametrize("pairs", ["circle", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("activation", "hook", "skip"), SETS)
def test_every_pair_of_formats_computes_the_same(
    tmp_path: Path, activation: str, hook: str, skip: bool, pairs: str
) -> None:
    found = a_set(activation, hook, skip)
    able = [name for name in FORMATS if refusal(found, name) is None]
    assert (
        able
        == {
            "topk": ["vlmscope", "paper", "circuit_tracer", "sparsify"],
            "relu": ["vlmscope", "circuit_tracer", "sae_lens"],
            "jumprelu": ["vlmscope", "circuit_tracer", "sae_lens"],
        }[activation]
    )
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    for first in able:
        save_set(found, tmp_path / first, format=first)
    circle = zip(able, [*able[1:], able[0]], strict=True)
    for first, second in circle if pairs == "circle" else product(able, able):
        out = tmp_path / f"{first}-{second}"
        assert convert(tmp_path / first, second, out) == 0
        again = load_set(out, n_layers=2, d_model=6)
        assert again.config.output_hook == hook
        for layer in (0, 1):
            assert torch.equal(again[layer](x).reconstruction, found[layer](x).reconstruction)
        assert f"Format: {second}." in (out / "README.md").read_text()


def test_orrerys_set_goes_there_and_back_byte_for_byte_with_its_figures(tmp_path: Path) -> None:
    shipped = Path(asset("orrery_transcoders"))
    assert convert(shipped, "sparsify", tmp_path / "there") == 0
    assert convert(tmp_path / "there", "vlmscope", tmp_path / "back", "task.license=mit") == 0
    for path in sorted(shipped.iterdir()):
        if path.name != "README.md":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = (parts_of((folder / "README.md").read_text())[0] for folder in (shipped, tmp_path / "back"))
    assert after["vlmscope"]["figures"] == before["vlmscope"]["figures"] and after["license"] == "mit"
    record = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())
    assert record["dtype"] == "bfloat16"  # the smallest that holds every number


def test_a_set_is_converted_to_int8_and_refused_where_scales_have_no_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_set(random_set(2, 6, 24, 4), tmp_path / "in")
    assert convert(tmp_path / "in", "vlmscope", tmp_path / "out", "task.dtype=int8") == 0
    exact, stored = load_set(tmp_path / "in")[1].W_dec, load_set(tmp_path / "out")[1].W_dec
    assert ((exact - stored).abs() <= exact.abs().amax(1, keepdim=True) / 250).all()
    assert np.array_equal(decoder_rows(tmp_path / "out", 1), stored.detach().numpy())
    assert convert(tmp_path / "in", "paper", tmp_path / "paper", "task.dtype=int8") == 2
    assert "scales" in capsys.readouterr().err
    assert not (tmp_path / "paper").exists()


def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_set(random_set(2, 6, 24, 4, activation="batchtopk"), tmp_path / "in")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("x")
    for source, to, out, words in (
        ("in", "paper", "out", "cannot be written as paper: it has no place for batchtopk"),
        ("in", "sparsify", "out", "no place for batchtopk"),
        ("in", "vlmscope", "taken", "is there already"),
        ("in", "null", "out", "task.to has no value"),
        ("in", "papers", "out", "task.to=papers: no such choice"),
        ("taken", "paper", "out", "it has none of config.yaml"),
        ("nowhere", "paper", "out", "there is no such folder"),
        ("some-org/some-set", "paper", "out", "has no pinned revision"),
    ):
        path = source if "/" in source else tmp_path / source
        assert convert(path, to, tmp_path / out) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and words in errors[0], errors
    assert convert(tmp_path / "in", "sae_lens", tmp_path / "out", "transcoder.format=sparsfy") == 2
    assert "did you mean 'sparsify'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"in", "taken", "run"}
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
