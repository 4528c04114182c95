"""Ways to choose the features of a supernode."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import trace
from vlmscope.circuits import selectors
from vlmscope.circuits.spec_config import ClusterConfig, InfluenceConfig, LabelConfig, SupernodeConfig
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, PatchBox, Places, Positions
from vlmscope.features.labels import Label, Labels
from vlmscope.features.readouts import RoleMeans, role_means
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

N = 40
A, B, C = FeatureId(0, 3), FeatureId(1, 5), FeatureId(2, 7)


@pytest.fixture(scope="module")
def bench():
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, N, 6, seed=6).requires_grad_(False)
    graph = trace(Scope(vlm, transcoders), vlm.prepare("what is this ?", [tiny_image(0)]), AttributionConfig()).graph
    return Scope(vlm, transcoders), graph


def ids(members: list) -> list[FeatureId]:
    return [member.feature for member in members]


def test_by_ids_keeps_the_order_and_each_once() -> None:
    found = selectors.by_ids(["L1/5", "L0/3", "L1/5"], {A: 0.25})
    assert ids(found) == [B, A]
    assert [member.influence for member in found] == [0.0, 0.25]


def labels(**texts: tuple[str, float, bool]) -> Labels:
    found = Labels.__new__(Labels)  # labels alone, without the study that they are of
    found.hand, found.automatic = (
        {},
        {
            FeatureId.parse(name.replace("_", "/")): Label(text, "auto", low=low, beats_chance=beats)
            for name, (text, low, beats) in texts.items()
        },
    )
    return found


def test_by_label_wants_all_words_and_ranks_by_influence_then_score() -> None:
    known = labels(
        L0_3=("red planets", 0.6, True),
        L1_5=("a red planet", 0.9, True),
        L2_7=("planet = red", 0.5, True),
        L2_8=("red shape", 0.9, True),
        L2_9=("red planet", 0.9, False),
    )
    config = LabelConfig("study", "red planet")
    found = selectors.by_label(config, known, SupernodeConfig(label=config), {C: 0.5})
    assert ids(found) == [C, B, A]
    late = SupernodeConfig(label=config, layers=[1, 2], count=1)
    assert ids(selectors.by_label(config, known, late, {})) == [B]
    with pytest.raises(UserError, match="no label of study has these words; did you mean planet"):
        config = LabelConfig("study", "plamet")
        selectors.by_label(config, known, SupernodeConfig(label=config), {})


@pytest.fixture
def clusters(tmp_path: Path) -> pa.Table:
    rows = [
        {"kind": "firing", "cluster": 0, "name": "red planet", "features": ["L0/3", "L1/5"]},
        {"kind": "firing", "cluster": 1, "name": "digits", "features": ["L2/7", "L2/8"]},
        {"kind": "firing", "cluster": 2, "name": "digits", "features": ["L2/9", "L2/10"]},
        {"kind": "direction", "cluster": 0, "name": "other", "features": ["L2/1", "L2/2"]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clusters.parquet")
    return selectors.read_clusters(tmp_path)


def test_by_cluster_by_number_and_by_name(clusters: pa.Table) -> None:
    for said in (0, "0", "red planet"):
        config = ClusterConfig("run", said)
        found, name = selectors.by_cluster(clusters, config, SupernodeConfig(cluster=config), {B: 0.5})
        assert (ids(found), name) == ([B, A], "red planet")
    config = ClusterConfig("run", 0, "direction")
    assert selectors.by_cluster(clusters, config, SupernodeConfig(cluster=config), {})[1] == "other"
    for said, error in ((9, "no such cluster"), ("red plant", "did you mean 'red planet'"), ("digits", "2 clusters")):
        config = ClusterConfig("run", said)
        with pytest.raises(UserError, match=error):
            selectors.by_cluster(clusters, config, SupernodeConfig(cluster=config), {})


def test_a_run_without_clusters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no clusters.parquet"):
        selectors.read_clusters(tmp_path)
    (tmp_path / "clusters.parquet").write_text("nothing")
    with pytest.raises(UserError, match="damaged"):
        selectors.read_clusters(tmp_path)


def means(transcoders, **at: tuple[str, int, int, float]) -> RoleMeans:
    """`name=(role, layer, index, mean)`, all else 0."""
    table = {r: {layer: torch.zeros(N) for layer in transcoders.layers} for r in ("image", "last")}
    for role, layer, index, value in at.values():
        table[role][layer][index] = value
    return RoleMeans(table, {}, 1)


def test_by_contrast_finds_what_was_planted_at_its_role(bench) -> None:
    transcoders = bench[0].transcoders
    of = means(transcoders, a=("image", 0, 3, 2.0), b=("last", 1, 5, 3.0), c=("last", 2, 7, 1.0))
    against = means(transcoders, c=("last", 2, 7, 1.5), d=("image", 0, 9, 4.0))
    node = SupernodeConfig(count=5)
    found = selectors.by_contrast(transcoders, of, against, node, {})
    assert set(ids(found)) == {A, B}
    assert {m.feature: (m.role, m.contrast) for m in found} == {A: ("image", 2.0), B: ("last", 3.0)}
    confirmed = selectors.by_contrast(transcoders, of, against, node, {A: 0.25}, True)
    assert ids(confirmed) == [A] and confirmed[0].influence == 0.25
    assert ids(selectors.by_contrast(transcoders, of, against, SupernodeConfig(layers=[1, 2]), {})) == [B]
    assert selectors.by_contrast(transcoders, of, of, node, {}) == []
    with pytest.raises(UserError, match="no position role in common"):
        selectors.by_contrast(transcoders, of, RoleMeans({}, {}, 1), node, {})


def test_means_at_a_box_are_those_of_its_soft_tokens(bench) -> None:
    scope, _ = bench
    batch = make_batch(scope.adapter, [scope.vlm.prepare("what is this ?", [tiny_image(i)]) for i in range(3)])
    box = Positions(("last",), PatchBox(0, 0, 0.5, 1))
    halves = [role_means(scope, [batch], where) for where in (None, box)]
    assert set(halves[1].by_role) == {"image", "last"}
    assert torch.equal(halves[0].by_role["last"][0], halves[1].by_role["last"][0])
    assert not torch.equal(halves[0].by_role["image"][0], halves[1].by_role["image"][0])
    with pytest.raises(UserError, match="no prompt has a position in answer"):
        role_means(scope, [batch], Positions(("answer",)))


def test_influence_adds_up_over_positions_and_answers(bench) -> None:
    *_, graph = bench
    whole = selectors.feature_influence(graph)
    assert sum(share for share, _ in whole.values()) == pytest.approx(1.0)
    parts = [selectors.feature_influence(graph, None, Positions((role,))) for role in set(graph.roles)]
    for feature, (share, role) in whole.items():
        split = {next(iter({r for _, r in [p[feature]]})): p[feature][0] for p in parts if feature in p}
        assert sum(split.values()) == pytest.approx(share)
        assert split[role] == max(split.values())
    left = Positions((), PatchBox(0, 0, 0.5, 1))
    there = left.mask(Places(graph.roles, graph.patch_boxes))
    found = selectors.feature_influence(graph, None, left)
    active = {graph.nodes.feature_id(n) for n in graph.nodes.of(1).tolist() if there[graph.nodes.position[n]]}
    assert set(found) == active
    other = selectors.feature_influence(graph, graph.logit_tokens[1])
    assert other != whole
    with pytest.raises(UserError, match="target 'nothing': the graph of 'what is this \\?' explains"):
        selectors.feature_influence(graph, "nothing")


def test_by_influence_takes_the_first_or_up_to_a_share(bench) -> None:
    *_, graph = bench
    shares = selectors.feature_influence(graph)
    best = sorted(shares, key=lambda f: -shares[f][0])
    top = selectors.by_influence([shares], SupernodeConfig(influence=InfluenceConfig(), count=4))
    assert ids(top) == best[:4]
    held = selectors.by_influence([shares], SupernodeConfig(influence=InfluenceConfig(share=0.5), count=1))
    sums = np.cumsum([member.influence for member in held])
    assert sums[-1] >= 0.5 - 1e-9 > sums[-2]
    everything = selectors.by_influence([shares], SupernodeConfig(influence=InfluenceConfig(share=1.0)))
    assert len(everything) == sum(share > 0 for share, _ in shares.values())
    # A second graph in which nothing counts halves every share.
    halved = selectors.by_influence([shares, {}], SupernodeConfig(influence=InfluenceConfig(), count=1))
    assert halved[0].influence == pytest.approx(top[0].influence / 2)


def test_graphs_of_others_are_refused(bench) -> None:
    scope, graph = bench
    widths = {layer: scope.transcoders[layer].config.n_features for layer in scope.transcoders.layers}
    selectors.check_graph(graph, "run", scope.vlm.name, widths)
    with pytest.raises(UserError, match="run is a graph of the model other"):
        selectors.check_graph(replace(graph, meta={**graph.meta, "model": "other"}), "run", scope.vlm.name, widths)
    with pytest.raises(UserError, match="which the transcoders do not have"):
        selectors.check_graph(graph, "run", scope.vlm.name, dict.fromkeys(widths, 3))
