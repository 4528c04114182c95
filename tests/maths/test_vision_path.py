"""Patches and remainder sum to the edges of a picture's soft tokens, in float64, on every family with a tower."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tests.maths.maths_cases import CASES, TOLERANCE, Case, case_of
from torch import Tensor, nn

from vlmscope.attribution.readers import Readers, feature_readers, target_readers
from vlmscope.attribution.targets import choose_logits, feature_target
from vlmscope.attribution.vision import VisionPath, _PatchEmbedding, vision_path
from vlmscope.core.graph import NodeKind
from vlmscope.core.ids import FeatureId
from vlmscope.core.patches import PictureMap
from vlmscope.models import frozen_vision
from vlmscope.models.batching import entering
from vlmscope.models.precision import exact_float64
from vlmscope.models.towers import tower_kind

PICTURED = tuple(
    name
    for name, settings in CASES.items()
    if settings["images"] and (settings.get("family") or name in ("one_image", "two_images_skip"))
)
_PATHS: dict[str, VisionPath] = {}


@pytest.fixture(params=PICTURED)
def pictured(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Iterator[Case]:
    with exact_float64():
        yield case_of(request.param, cases)


def logits_of(case: Case, *, total: bool) -> Readers:
    return target_readers(case.replacement, choose_logits(case.replacement, 1.0, 3), total=total)


def path_of(case: Case) -> VisionPath:
    key = str(id(case))
    if key not in _PATHS:
        _PATHS[key] = vision_path(case.vlm, case.inputs)
    return _PATHS[key]


def maps_of(case: Case, *, total: bool = False, baseline: str = "grey") -> list[PictureMap]:
    return path_of(case).maps(logits_of(case, total=total), ["0", "1", "2"], baseline)


def test_readers_give_the_graphs_edges(pictured: Case) -> None:
    graph, state = pictured.graph, pictured.replacement.state
    nodes = graph.nodes.of(NodeKind.LOGIT)[:3]
    edges = logits_of(pictured, total=False).edges(state.embeddings, state.injections)
    for node, row in zip(nodes, edges, strict=True):
        sources, weights = graph.incoming(int(node))
        dense = np.zeros(len(graph.nodes))
        dense[sources] = weights
        assert np.abs(dense[: row.shape[0]] - row.numpy()).max() <= TOLERANCE * np.abs(weights).sum()


def test_feature_readers_give_the_graphs_edges(pictured: Case) -> None:
    graph, state = pictured.graph, pictured.replacement.state
    nodes = np.flatnonzero((graph.nodes.kind == NodeKind.FEATURE) & (graph.nodes.layer == 1))
    readers = feature_readers(pictured.replacement, 1, torch.arange(len(nodes)), total=False)
    edges = readers.edges(state.embeddings, state.injections)
    for node, row in zip(nodes, edges, strict=True):
        sources, weights = graph.incoming(int(node))
        dense = np.zeros(len(graph.nodes))
        dense[sources] = weights
        assert np.abs(dense[: row.shape[0]] - row.numpy()).max() <= TOLERANCE * np.abs(weights).sum()


@pytest.mark.parametrize("baseline", ["grey", "mean"])
@pytest.mark.parametrize("total", [False, True])
def test_patches_and_remainder_sum_to_the_edge(pictured: Case, total: bool, baseline: str) -> None:
    for found in maps_of(pictured, total=total, baseline=baseline):
        assert found.residual <= TOLERANCE, found
        assert abs(found.from_patches) > 1e-9 and max(map(abs, found.remainder.values())) > 1e-9  # Gemma 4 has no bias


def test_the_edge_is_the_graphs(pictured: Case) -> None:
    state, inputs = pictured.replacement.state, pictured.inputs
    edges = logits_of(pictured, total=False).edges(state.embeddings, state.injections).numpy()
    for found in maps_of(pictured):
        mine = edges[int(found.target), inputs.image_index == found.picture]
        assert abs(mine.sum() - found.edge) <= TOLERANCE * np.abs(edges[int(found.target)]).sum()


def test_the_frozen_tower_writes_what_the_tower_writes(pictured: Case) -> None:
    state = pictured.replacement.state
    written = path_of(pictured).written
    assert (written.embeddings[0] - state.embeddings).abs().max() <= 1e-9 * state.embeddings.abs().max()
    if written.injections is not None:
        assert (written.injections[0] - state.injections).abs().max() <= 1e-9 * state.injections.abs().max()


def test_each_picture_keeps_to_itself(pictured: Case) -> None:
    if len(pictured.inputs.sizes) < 2:
        pytest.skip("one picture")
    path, readers = path_of(pictured), logits_of(pictured, total=False)
    where = torch.from_numpy(pictured.inputs.image_index == 1)[:, None]
    for number in range(len(readers.embeddings)):
        only = Readers(readers.embeddings * where, readers.injections * where)
        first, second = path.maps(only, ["0", "1", "2"])[2 * number : 2 * number + 2]
        assert not any(tile.values.any() for tile in first.tiles) and first.edge == 0
        assert any(tile.values.any() for tile in second.tiles)
    # Nothing of the other picture's patches is in what is not this picture's.
    for found in maps_of(pictured):
        padded = abs(found.remainder["padding"])
        assert padded <= TOLERANCE * abs(found.from_patches) or "idefics" in pictured.vlm.name


def test_patches_lie_where_they_should(pictured: Case) -> None:
    """Changing one patch of the frozen tower by delta moves the target by the patch's share."""
    path, readers = path_of(pictured), logits_of(pictured, total=False)
    found = path.maps(readers, ["0", "1", "2"])[0]
    tile, picture = path.pictures[0].tiles[-1], found.tiles[-1]
    embedded = int(tile.patches[len(tile.patches) // 2])
    edge = (readers.embeddings[0] * path.written.embeddings[0]).sum()
    if path.written.injections is not None:
        edge = edge + (readers.injections[0] * path.written.injections[0]).sum()
    (gradient,) = torch.autograd.grad(edge, path.patches, retain_graph=True)
    expected = float((gradient[embedded] * path.patches[embedded]).sum())
    assert abs(picture.values.ravel()[len(tile.patches) // 2] - expected) <= 1e-9 * max(abs(expected), 1e-6)


def test_the_gradient_is_that_of_finite_differences(pictured: Case) -> None:
    path = vision_path(pictured.vlm, pictured.inputs, "gradient")
    readers = logits_of(pictured, total=False)
    direction = torch.randn(path.patches.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def read(written: object) -> Tensor:
        total = (readers.embeddings[0] * written.embeddings[0]).sum()  # pyright: ignore
        if written.injections is not None:  # pyright: ignore
            total = total + (readers.injections[0] * written.injections[0]).sum()  # pyright: ignore
        return total

    (gradient,) = torch.autograd.grad(read(path.written), path.patches, retain_graph=True)
    step = 1e-5
    moved = []
    for sign in (1, -1):
        with moved_patches(pictured, path.patches.detach() + sign * step * direction), torch.no_grad():
            moved.append(float(read(entering(pictured.vlm.adapter, [pictured.inputs]))))
    slope = (moved[0] - moved[1]) / (2 * step)
    expected = float((gradient * direction).sum())
    assert abs(slope - expected) <= 1e-6 * float((gradient * direction).abs().sum())


@contextmanager
def moved_patches(case: Case, values: Tensor) -> Iterator[None]:
    tower = case.vlm.adapter.vision_tower()
    module = tower.get_submodule(tower_kind(tower).patches)
    leaf = _PatchEmbedding(module)
    leaf.values = values
    handle = module.register_forward_hook(leaf)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("fault", ["position", "norms", "units", "patterns"])
def test_faults_break_the_sum(fault: str, monkeypatch: pytest.MonkeyPatch, cases: dict[str, Case]) -> None:
    """Dropping a constant or leaving a part unfrozen must show."""
    with exact_float64():
        case = case_of("one_image", cases)
        readers = logits_of(case, total=False)
        if fault == "position":
            path = path_of(case)
            found = path.maps(readers, ["0", "1", "2"])
            broken = [PictureMap(m.target, m.picture, m.tiles, m.edge, m.remainder | {"position": 0.0}) for m in found]
        else:
            if fault == "norms":
                plain = nn.functional.layer_norm
                monkeypatch.setattr(
                    frozen_vision.FrozenVision, "_layer_norm", lambda _self, *args, **kwargs: plain(*args, **kwargs)
                )
            else:
                monkeypatch.setattr(frozen_vision, "_UNITS" if fault == "units" else "_WHOLE", set())
            broken = vision_path(case.vlm, case.inputs).maps(readers, ["0", "1", "2"])
        assert max(m.residual for m in broken) > 1e4 * TOLERANCE


def test_readers_of_a_feature_are_those_of_its_target(pictured: Case) -> None:
    replacement = pictured.replacement
    found = replacement.features[1]
    position, index = int(found.position[-1]), int(found.index[-1])
    target = feature_target(replacement, FeatureId(1, index), str(position))
    which = torch.tensor([len(found) - 1])
    for total in (False, True):
        one = target_readers(replacement, target, total=total)
        other = feature_readers(replacement, 1, which, total=total)
        assert (one.embeddings - other.embeddings).abs().max() <= TOLERANCE * other.embeddings.abs().max()
