"""A feature's map over all soft tokens in one pass is the sum of its maps at each; nothing is lost."""

import numpy as np
import pytest
import torch

from vlmscope.attribution.adjoint import target_readers
from vlmscope.attribution.targets import feature_target
from vlmscope.attribution.vision import feature_at, feature_path_maps, vision_path
from vlmscope.core.records import FeatureId
from vlmscope.models.base import exact_float64
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.replacement import build_replacement
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


@pytest.mark.parametrize(("family", "effect"), [("gemma3", "total"), ("qwen3_vl", "direct"), ("llava", "total")])
def test_one_pass_is_the_sum_over_positions(family: str, effect: str) -> None:
    vlm = tiny_vlm(family, 5, dtype=torch.float64)
    adapter = vlm.adapter
    transcoders = random_set(adapter.n_layers, adapter.d_model, 30, 6, seed=6, dtype=torch.float64)
    inputs = vlm.prepare("what is this ?", [tiny_image(3).resize((48, 48)), tiny_image(4).resize((48, 48))])
    with exact_float64():
        replacement = build_replacement(Scope(vlm, transcoders.requires_grad_(False)), inputs)
        path, soft = vision_path(vlm, inputs), np.flatnonzero(inputs.is_image)
        layer = adapter.n_layers - 1
        found = replacement.features[layer]
        counts = np.bincount(found.index[torch.from_numpy(np.isin(found.position.numpy(), soft))].numpy())
        feature = FeatureId(layer, int(counts.argmax()))
        assert counts.max() > 1
        targets = feature_at(replacement, feature, soft)
        assert sorted(targets.positions) == sorted(set(targets.positions)) and np.isin(targets.positions, soft).all()
        summed = feature_path_maps(replacement, path, [feature], effect, "mean")[feature]
        wanted = [np.zeros_like(tile.values) for found in summed for tile in found.tiles]
        edges = [0.0, 0.0]
        for position in targets.positions:
            one = feature_target(replacement, feature, str(position))
            readers = target_readers(replacement, one, total=effect == "total")
            maps = path.maps(readers, ["x"], "mean")
            parts = [tile.values for single in maps for tile in single.tiles]
            wanted = [total + part for total, part in zip(wanted, parts, strict=True)]
            edges = [edge + single.edge for edge, single in zip(edges, maps, strict=True)]
    tiles = [tile.values for single in summed for tile in single.tiles]
    scale = max(float(np.abs(values).max()) for values in wanted)
    assert scale > 0
    assert all(np.abs(a - b).max() <= 1e-9 * scale for a, b in zip(tiles, wanted, strict=True))
    assert [single.edge for single in summed] == pytest.approx(edges, rel=1e-9)
    assert max(single.residual for single in summed) < 1e-9
