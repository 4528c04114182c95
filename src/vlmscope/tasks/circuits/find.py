"""From a declaration to a circuit: what each supernode needs is looked at before the model loads, then found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.circuits.circuit import Circuit
    from vlmscope.circuits.spec_config import CircuitSpecConfig, SupernodeConfig
    from vlmscope.config import AppConfig
    from vlmscope.core.graph import AttributionGraph
    from vlmscope.core.intervention import CircuitFeature
    from vlmscope.core.records import FeatureId, Positions
    from vlmscope.features.labels import Labels
    from vlmscope.features.readouts import RoleMeans
    from vlmscope.scope import Scope
    from vlmscope.tasks.circuits.inputs import Asked


@dataclass
class Material:
    """What supernodes are chosen from, read before any model: by supernode's key.

    Attributes:
        graphs: of the traces that are named.
        labels: of the studies.
        clusters: tables of clusters.
        contrasts: both sets of inputs.
    """

    graphs: dict[str, AttributionGraph] = field(default_factory=dict)
    labels: dict[str, Labels] = field(default_factory=dict)
    clusters: dict[str, Any] = field(default_factory=dict)
    contrasts: dict[str, tuple[list[Asked], list[Asked]]] = field(default_factory=dict)

    def inputs(self) -> list[Asked]:
        """The inputs of all contrasts."""
        return [one for sets in self.contrasts.values() for asked in sets for one in asked]


def gather(cfg: AppConfig, spec: CircuitSpecConfig, asked: Sequence[Asked]) -> Material:
    """Open all that the supernodes name.

    Raises:
        UserError: something is not there, or a supernode needs inputs that the run does not have.
    """
    from vlmscope.attribution.compare import graph_file
    from vlmscope.attribution.export import load_graph
    from vlmscope.circuits.selectors import read_clusters
    from vlmscope.features.labels import Labels
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.tasks.circuits.inputs import contrast_sets

    found = Material()
    prompts = list(dict.fromkeys(one.prompt for one in asked))
    for key, node in spec.supernodes.items():
        where = f"circuit_spec.supernodes.{key}"
        if node.influence is not None and node.influence.run is not None:
            found.graphs[key] = load_graph(graph_file(node.influence.run)).graph
        if node.label is not None:
            found.labels[key] = Labels(StudyFolder(node.label.study))
            if not found.labels[key].all():
                raise UserError(f"{where}: {node.label.study} has no labels; run task=label on it")
        if node.cluster is not None:
            found.clusters[key] = read_clusters(node.cluster.run)
        if node.contrast is not None:
            found.contrasts[key] = contrast_sets(cfg, f"{where}.contrast", node.contrast, prompts)
    return found


@dataclass
class Finder:
    """Finds the supernodes.

    Attributes:
        scope: the model and its transcoders.
        material: what was gathered.
        graphs: of the run's own inputs.
    """

    scope: Scope
    material: Material
    graphs: Sequence[AttributionGraph]

    def __post_init__(self) -> None:
        self.known = self._known()
        self.name, self.widths = self.scope.vlm.name, self.scope.transcoders.widths

    def _known(self, positions: Positions | None = None) -> dict[FeatureId, float]:
        """Influence of features in the run's own graphs, at these positions."""
        from vlmscope.circuits.selectors import feature_influence, mean_shares

        tables = [feature_influence(graph, None, positions) for graph in self.graphs]
        return mean_shares([{f: share for f, (share, _) in table.items()} for table in tables])

    def circuit(self, spec: CircuitSpecConfig) -> Circuit:
        """All supernodes, named.

        Raises:
            UserError: a supernode comes out empty, names what is not there, or two come out with one name.
        """
        from vlmscope.circuits.circuit import Circuit
        from vlmscope.circuits.spec_config import AUTO
        from vlmscope.core.intervention import Supernode

        nodes: dict[str, Supernode] = {}
        levels: dict[str, Any] = {}
        for key, node in spec.supernodes.items():
            members, chosen, auto, means = self._find(key, node)
            if not members:
                raise UserError(f"circuit_spec.supernodes.{key}: {chosen} finds no feature; {_advice(node)}")
            name = (auto or self._auto(key, members)) if node.name == AUTO else node.name or key
            if name in nodes:
                raise UserError(f"circuit_spec.supernodes.{key} comes out as {name!r} too; give it a name")
            nodes[name] = Supernode(name, tuple(members), node.where, chosen)
            if means is not None:
                levels[name] = _levels(members, means)
        circuit = Circuit(nodes, levels, (), self.name, self.widths)
        circuit.check_fits(self.name, self.widths, "circuit_spec")
        return circuit

    def _find(self, key: str, node: SupernodeConfig) -> tuple[list[CircuitFeature], str, str | None, RoleMeans | None]:
        """Members, how they were chosen, a name that comes with them, and means at which they are active."""
        from vlmscope.circuits import selectors

        if node.ids:
            return selectors.by_ids(node.ids, self.known), "ids", None, None
        if node.label is not None:
            from vlmscope.features.labels import check_same

            labels = self.material.labels[key]
            check_same(labels.study, self.name, self.widths)
            found = selectors.by_label(node.label, labels, node, self.known)
            return found, f"label {node.label.query!r}", " ".join(node.label.query.split()), None
        if node.cluster is not None:
            found, name = selectors.by_cluster(self.material.clusters[key], node.cluster, node, self.known)
            return found, f"cluster {node.cluster.cluster} by {node.cluster.kind}", name or None, None
        if node.influence is not None:
            return self._by_influence(key, node), _of_influence(node), None, None
        assert node.contrast is not None, "checked when the spec was read"
        means = [self._means(asked, node) for asked in self.material.contrasts[key]]
        known = self._known(node.where) if node.contrast.confirmed else None
        found = selectors.by_contrast(self.scope.transcoders, means[0], means[1], node, known)
        found = selectors.with_influence(found, self._known(node.where))
        return found, _of_contrast(node), None, means[0]

    def _by_influence(self, key: str, node: SupernodeConfig) -> list[CircuitFeature]:
        from vlmscope.circuits import selectors

        assert node.influence is not None
        given, target = self.material.graphs.get(key), node.influence.target
        if given is not None:
            selectors.check_graph(given, str(node.influence.run), self.name, self.widths)
            tables = [selectors.feature_influence(given, target, node.where)]
        else:
            tables = _of_own(self.graphs, target, node)
        return selectors.by_influence(tables, node)

    def _means(self, asked: Sequence[Asked], node: SupernodeConfig) -> RoleMeans:
        from vlmscope.features.readouts import role_means
        from vlmscope.tasks.circuits.inputs import batches_of, prepared

        batches = batches_of(self.scope.vlm, prepared(self.scope.vlm, asked))
        return role_means(self.scope, batches, node.where)

    def _auto(self, key: str, members: Sequence[CircuitFeature]) -> str:
        """A name from the labels of any study that the spec uses, else from the words that the features write."""
        from vlmscope.features.labels import short_label
        from vlmscope.features.readouts import top_and_bottom_logits
        from vlmscope.features.structure import cluster_names

        texts: dict[FeatureId, str] = {}
        for labels in self.material.labels.values():
            texts |= {feature: one.text for feature, one in labels.trusted().items()}
        said = {i: short_label(texts[m.feature]) for i, m in enumerate(members) if m.feature in texts}
        if not said:
            for i, member in enumerate(members):
                said[i] = short_label(top_and_bottom_logits(self.scope, member.feature, 1)[0][0][0].strip())
        return cluster_names({0: list(range(len(members)))}, {}, {}, said, 1)[0] or key


def _of_own(
    graphs: Sequence[AttributionGraph], target: str | None, node: SupernodeConfig
) -> list[Mapping[FeatureId, tuple[float, str]]]:
    """Influence in the run's own graphs; one that does not explain the target counts as none."""
    from vlmscope.circuits.selectors import feature_influence

    tables: list[Mapping[FeatureId, tuple[float, str]]] = []
    errors: list[UserError] = []
    for graph in graphs:
        try:
            tables.append(feature_influence(graph, target, node.where))
        except UserError as error:
            if target is None:
                raise
            tables.append({})
            errors.append(error)
    if errors and len(errors) == len(graphs):
        raise errors[0]
    return tables


def _of_influence(node: SupernodeConfig) -> str:
    assert node.influence is not None
    on = node.influence.target or "the most probable answer"
    return f"influence on {on} in {node.influence.run or 'the graphs of the inputs'}"


def _of_contrast(node: SupernodeConfig) -> str:
    contrast = node.contrast
    assert contrast is not None
    if contrast.pairs is not None:
        other = "counterfactual" if contrast.pairs == "original" else "original"
        return f"contrast of the pairs' {contrast.pairs}s with their {other}s"
    assert contrast.of is not None and contrast.against is not None

    def words(of: Any) -> str:
        what = of.concept or (f"{len(of.images)} images" if of.images else "text")
        return f"{what}{': ' + '; '.join(of.prompts) if of.prompts else ''}"

    return f"contrast of {words(contrast.of)} with {words(contrast.against)}"


def _advice(node: SupernodeConfig) -> str:
    if node.contrast is not None and node.contrast.confirmed:
        return "try confirmed: false, other layers or positions, or inputs that differ more"
    return (
        "try other layers or positions, or inputs that differ more"
        if node.contrast
        else "try other layers or positions"
    )


def _levels(members: Sequence[CircuitFeature], means: RoleMeans) -> dict[str, dict[int, Any]]:
    """Mean activations of the members by role, as `Circuit.levels` has them."""
    table: dict[int, list[int]] = {}
    for member in members:
        table.setdefault(member.feature.layer, []).append(member.feature.index)
    return {
        f"contrast:{role}": {layer: values[layer][table[layer]].cpu() for layer in sorted(table)}
        for role, values in means.by_role.items()
    }
