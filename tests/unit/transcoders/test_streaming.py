"""Streamed sets: the same functions as resident ones, bit for bit, from files that stay on disk."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from tests.processes import ROOT, Forked

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import trace
from vlmscope.config.wiring import must_stream
from vlmscope.core.errors import UserError
from vlmscope.features.readouts import layer_logits
from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.run import run_edited
from vlmscope.models import checkpoint
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders import streaming, transcoder
from vlmscope.transcoders.formats import ANY, load_set, save_set
from vlmscope.transcoders.streaming import StreamedRows
from vlmscope.transcoders.transcoder import random_set

D, F, K = 12, 50, 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Four blocks, the last one narrower than k."""
    for module in (streaming, transcoder):
        monkeypatch.setattr(module, "BLOCK", 16)


def _both(folder, format="vlmscope", stored="float32", dtype=torch.float32, **kwargs):
    save_set(random_set(3, D, F, K, skip=format != "clt", **kwargs), folder, stored, format)
    return load_set(folder, dtype=dtype, format=format), load_set(folder, dtype=dtype, format=format, stream=True)


@pytest.mark.parametrize(
    ("format", "activation", "crosses"),
    [
        *product(["vlmscope"], ["topk", "batchtopk", "jumprelu", "relu"], [False, True]),
        ("sae_lens", "jumprelu", False),  # the encoder is stored transposed
        ("clt", "relu", True),  # decoders have a file of their own
    ],
)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_streamed_equals_resident(tmp_path, format, activation, crosses, stored):
    resident, streamed = _both(tmp_path, format, stored, activation=activation, cross_layer=crosses)
    x = {layer: torch.randn(2, 7, D, generator=torch.Generator().manual_seed(layer)) for layer in resident.layers}
    codes, again = resident.encode(x), streamed.encode(x)
    for layer in resident.layers:
        mine, theirs = resident[layer], streamed[layer]
        assert isinstance(theirs.W_enc, StreamedRows) and isinstance(theirs.W_dec, StreamedRows)
        assert torch.equal(codes[layer].indices, again[layer].indices)
        assert torch.equal(codes[layer].values, again[layer].values)
        assert torch.equal(resident.decode(layer, codes, x[layer]), streamed.decode(layer, again, x[layer]))
        assert torch.equal(mine.write_norms(), theirs.write_norms())
        some = torch.tensor([3, 0, 41, 3])
        for ahead in range(mine.config.writes):
            assert torch.equal(mine.decoder(ahead)[some], theirs.decoder(ahead)[some])
        assert torch.equal(mine.W_enc[7], theirs.W_enc[7])
        assert torch.equal(mine.directions([None] * mine.config.writes), theirs.directions([None] * mine.config.writes))


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_blocks_choose_what_the_whole_product_chooses(activation):
    layer = random_set(1, D, F, K, activation=activation, dtype=torch.float64)[0]
    x = torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks, whole = layer.encode(x), layer(x).code
    torch.testing.assert_close(blocks.values, whole.values, rtol=1e-12, atol=0)
    assert torch.equal(blocks.indices[blocks.active], whole.indices[whole.active])


def test_gradients_and_conversions(tmp_path):
    resident, streamed = _both(tmp_path)
    for first, second in ((resident, streamed), (copy.deepcopy(resident).double(), copy.deepcopy(streamed).double())):
        slopes = []
        for one in (first[0], second[0]):
            x = torch.randn(4, D, dtype=one.b_dec.dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
            one.requires_grad_(False).decode(one.encode(x), x).square().sum().backward()
            slopes.append(x.grad)
        assert torch.equal(*slopes)


def test_a_streamed_set_is_written_whole(tmp_path):
    resident, streamed = _both(tmp_path / "a")
    save_set(streamed, tmp_path / "b")
    again = load_set(tmp_path / "b")
    assert all(torch.equal(again[layer].W_dec, resident[layer].W_dec) for layer in resident.layers)


def test_values_that_are_not_finite_are_refused_when_read(tmp_path):
    broken = random_set(1, D, F, K)
    broken[0].W_enc.data[20, 3] = float("nan")
    save_set(broken, tmp_path)
    loaded = load_set(tmp_path, stream=True)
    with pytest.raises(UserError, match="not finite"):
        loaded[0].encode(torch.ones(2, D))


def test_a_set_in_int8_is_not_streamed(tmp_path):
    save_set(random_set(1, D, F, K), tmp_path, "int8")
    with pytest.raises(UserError, match=r"is stored in int8, .* transcoder\.stream=false"):
        load_set(tmp_path, stream=True)


def test_graph_edit_and_lens_are_the_same_and_read_no_matrix_whole(tmp_path, monkeypatch):
    vlm = tiny_gemma3(d_model=D, layer_types=["full_attention"] * 3)
    scopes = [Scope(vlm, one.requires_grad_(False)) for one in _both(tmp_path)]
    inputs = scopes[0].inputs("what is this planet ?", tiny_image(0))
    sizes, whole = [], StreamedRows.whole
    monkeypatch.setattr(StreamedRows, "whole", lambda rows, *space: sizes.append(len(rows)) or whole(rows, *space))
    graphs = [trace(scope, inputs, AttributionConfig(max_nodes=60, update_every=20)).graph for scope in scopes]
    for name in ("indptr", "indices", "weights", "residual", "left_out_mass"):
        assert np.array_equal(*(getattr(graph, name) for graph in graphs)), name
    assert all(np.array_equal(*(getattr(graph.nodes, name) for graph in graphs)) for name in vars(graphs[0].nodes))
    batch = scopes[0].batch([inputs])
    where = torch.ones(batch.length, dtype=torch.bool)
    plan = {1: LayerEdit(torch.tensor([4, 40]), torch.zeros(2), torch.full((2,), 3.0), where)}
    assert torch.equal(*(run_edited(scope, batch, plan, "free") for scope in scopes))
    lenses = [layer_logits(scope, 2, 3) for scope in scopes]
    assert all(np.array_equal(*pair) for pair in zip(*lenses, strict=True))
    assert sizes and max(sizes) == 16


def test_a_set_is_streamed_where_it_would_not_fit(tmp_path, monkeypatch, capsys):
    _both(tmp_path)
    assert not must_stream(tmp_path, "auto", ANY)
    assert must_stream(tmp_path, "auto", ANY, stream=True)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 4 * 3 * 2 * F * D)  # without the biases
    assert must_stream(tmp_path, "auto", ANY)
    assert "read from disk" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"are free; leave transcoder\.stream=false away"):
        must_stream(tmp_path, "auto", ANY, stream=False)


_PASS = """
import sys, torch
sys.path.insert(0, "benchmarks")
from measured import measured
from vlmscope.transcoders.formats import load_set
x, peaks = torch.ones(8, 16), []
load_set(sys.argv[1], stream=True)[0].encode(x)
for stream in (True, False):
    with measured() as found:
        load_set(sys.argv[1], stream=stream)[0].encode(x)
    peaks.append(found["added_mb"])
print(*peaks)
"""


def test_memory_of_a_wide_set(tmp_path):
    save_set(random_set(1, 16, 262144, 8), tmp_path)
    process = Forked(_PASS, tmp_path, cwd=ROOT)
    said, error = process.communicate()
    assert process.returncode == 0, error
    streamed, resident = map(float, said.split())
    matrices = 2 * 262144 * 16 * 4 / 1e6
    assert resident > matrices
    assert streamed < matrices / 2
