"""Patches and remainder sum to the edges of a picture's soft tokens, in float64, on every family with a tower."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from tests.maths.maths_cases import CASES, PROMPT, TOLERANCE, Case, case_of, dense
from torch import Tensor, nn

from vlmscope.attribution.adjoint import Readers, target_readers
from vlmscope.attribution.targets import choose_logits, feature_target
from vlmscope.attribution.vision import VisionPath, vision_path
from vlmscope.core.graph import NodeKind, PictureMap
from vlmscope.models import attention as frozen_vision
from vlmscope.models.base import exact_float64
from vlmscope.models.batching import entering
from vlmscope.models.boxes import tower_kind
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm
from vlmscope.replacement import PatchEmbedding

PICTURED = tuple(
    name
    for name, settings in CASES.items()
    if settings["images"] and (settings.get("family") or name in ("one_image", "two_images_skip"))
)
_PATHS: dict[str, VisionPath] = {}


TWO = tuple(name for name in PICTURED if CASES[name]["images"] == 2)


@pytest.fixture(params=TWO)
def two_pictured(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Iterator[Case]:
    with exact_float64():
        yield case_of(request.param, cases)


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


def test_readers_of_features_give_the_graphs_edges(pictured: Case) -> None:
    graph, state = pictured.graph, pictured.replacement.state
    for node in np.flatnonzero((graph.nodes.kind == NodeKind.FEATURE) & (graph.nodes.layer == 1))[::5]:
        target = feature_target(pictured.replacement, graph.nodes.feature_id(node), str(graph.nodes.position[node]))
        readers = target_readers(pictured.replacement, target, total=False)
        (row,) = readers.edges(state.embeddings, state.injections)
        sources, weights = graph.incoming(int(node))
        dense_row = np.zeros(len(graph.nodes))
        dense_row[sources] = weights
        assert np.abs(dense_row[: row.shape[0]] - row.numpy()).max() <= TOLERANCE * np.abs(weights).sum()


def test_total_readers_are_forward_substitution_in_the_graph(pictured: Case) -> None:
    """A token changes features by its edges, and they change what they write to: (I - J)^-1, by the graph alone."""
    graph, state = pictured.graph, pictured.replacement.state
    matrix, features = dense(graph), graph.nodes.of(NodeKind.FEATURE)
    ends, tokens = graph.nodes.of(NodeKind.LOGIT)[:3], graph.nodes.of(NodeKind.TOKEN)
    jacobian = matrix[:, features] / graph.nodes.activation[features]
    responses = np.linalg.solve(np.eye(len(features)) - jacobian[features], matrix[features][:, tokens])
    expected = matrix[ends][:, tokens] + jacobian[ends] @ responses
    found = logits_of(pictured, total=True).edges(state.embeddings, state.injections).numpy()
    scale = np.abs(matrix[ends]).sum(1, keepdims=True)
    assert np.abs(expected - matrix[ends][:, tokens]).max() > 1e-3 * scale.max()  # features do respond
    assert (np.abs(found - expected) <= TOLERANCE * np.maximum(scale, np.abs(expected))).all()


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


def test_each_picture_keeps_to_itself(two_pictured: Case) -> None:
    path, readers = path_of(two_pictured), logits_of(two_pictured, total=False)
    where = torch.from_numpy(two_pictured.inputs.image_index == 1)[:, None]
    for number in range(len(readers.embeddings)):
        only = Readers(readers.embeddings * where, readers.injections * where)
        first, second = path.maps(only, ["0", "1", "2"])[2 * number : 2 * number + 2]
        assert not any(tile.values.any() for tile in first.tiles) and first.edge == 0
        assert any(tile.values.any() for tile in second.tiles)
    # Nothing of the other picture's patches is in what is not this picture's.
    for found in maps_of(two_pictured):
        padded = abs(found.remainder["padding"])
        assert padded <= TOLERANCE * abs(found.from_patches) or "idefics" in two_pictured.vlm.name


@pytest.mark.parametrize("family", ["gemma3", *FAMILIES])
def test_patches_lie_where_they_should(family: str) -> None:
    """Painting the box of a patch changes that patch's embedding most among those of its tile."""
    vlm = tiny_vlm(family, 5)
    before = [tiny_image(3).resize((96, 72)), tiny_image(4).resize((48, 96))]
    plain = vision_path(vlm, vlm.prepare(PROMPT, before))
    rng = np.random.default_rng(2)
    for number, tile in enumerate(picture.tiles[-1] for picture in plain.pictures):
        seen = [at for at, box in enumerate(tile.boxes) if box.right > box.left and box.bottom > box.top]
        for at in rng.choice(seen, 3, replace=False):
            after = list(before)
            after[number] = before[number].copy()
            left, top, right, bottom = tile.boxes[at].pixels(*before[number].size)
            after[number].paste(
                tuple(int(255 - 255 * (v > 127)) for v in _mean(before[number])), (left, top, right, bottom)
            )
            moved = vision_path(vlm, vlm.prepare(PROMPT, after)).patches - plain.patches
            change = moved.detach().norm(dim=1)[torch.from_numpy(tile.patches)]
            assert int(change.argmax()) == at and change.max() > 1e-3, (family, number, at)


def _mean(picture: Image.Image) -> list[float]:
    return np.asarray(picture).reshape(-1, 3).mean(0).tolist()


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
    leaf = PatchEmbedding(module, values)
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
