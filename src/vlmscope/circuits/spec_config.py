"""The circuit language: how supernodes are chosen. Plain records, free of torch, so that Hydra can register them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmscope.core.errors import UserError
from vlmscope.core.records import ANSWER, ROLES, FeatureId, PatchBox, Positions

SELECTORS = ("ids", "label", "contrast", "influence", "cluster")
AUTO = "auto"  # a supernode that is to be named after its features
SOFT, TEXT, OTHER, ERRORS, BIASES = "soft tokens", "question", "other features", "errors", "biases"
SURROUNDINGS = (SOFT, TEXT, OTHER, ERRORS, BIASES)  # what edges of a circuit may come from besides supernodes
ANSWER_PREFIX = "answer: "
_NAME = re.compile(r"[\w-][\w. -]{0,59}")
_FOLDER = re.compile(r"[\w-][\w.-]{0,59}", re.ASCII)


@dataclass
class InputSetConfig:
    """Prompts with pictures: every prompt is asked of every picture.

    Attributes:
        concept: pictures of a planet of Orrery's.
        images: files of one's own instead.
        prompts: what is asked; the run's `prompt=` or the spec's `inputs.prompts` when empty.
        pictures: how many of the concept.
    """

    concept: str | None = None
    images: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    pictures: int = 20


@dataclass
class ContrastConfig:
    """Features that are more active on one set of inputs than on another.

    Attributes:
        of: where they are active.
        against: where they are less so.
        pairs: instead of both, the side of `pairs=` where they are active: original or counterfactual.
        confirmed: keep only features with influence on the answer in a graph of the run's own inputs.
    """

    of: InputSetConfig | None = None
    against: InputSetConfig | None = None
    pairs: str | None = None
    confirmed: bool = False


@dataclass
class LabelConfig:
    """Features of a study whose label has all words of `query`."""

    study: str
    query: str


@dataclass
class InfluenceConfig:
    """Features with the most influence in an attribution graph.

    Attributes:
        run: run folder of a task=trace; the graphs of the run's own inputs when None.
        target: the answer that counts, as the graph names it; the most probable one when None.
        share: as many features as hold this share of the influence of all features at the supernode's positions and
            of its layers, instead of `count`.
    """

    run: str | None = None
    target: str | None = None
    share: float | None = None


@dataclass
class ClusterConfig:
    """Members of a cluster.

    Attributes:
        run: run folder of a task=structure.
        cluster: its number, or its name.
        kind: "firing" or "direction".
    """

    run: str
    cluster: Any
    kind: str = "firing"


@dataclass
class PositionsConfig:
    """Where in a prompt a supernode is meant: the union of positions by role and of a part of the picture.

    Attributes:
        roles: special, image, question, last or answer.
        box: left, top, right, bottom as fractions of the picture: the soft tokens whose own part overlaps it.
    """

    roles: list[str] = field(default_factory=list)
    box: list[float] = field(default_factory=list)


@dataclass
class SupernodeConfig:
    """A supernode: exactly one of the five ways to choose its features.

    Attributes:
        ids: features by id, such as L5/709.
        label, contrast, influence, cluster: ways to choose them.
        name: the supernode's name instead of its key; "auto" takes it from labels, the cluster, or the words that
            its features write.
        count: at most so many features (but `ids`, and `influence` with a `share`).
        layers: the first and the last layer that features may be of.
        positions: where in a prompt; everywhere when None. Contrast and influence are then measured there.
    """

    ids: list[str] = field(default_factory=list)
    label: LabelConfig | None = None
    contrast: ContrastConfig | None = None
    influence: InfluenceConfig | None = None
    cluster: ClusterConfig | None = None
    name: str | None = None
    count: int = 12
    layers: list[int] = field(default_factory=list)
    positions: PositionsConfig | None = None

    @property
    def selectors(self) -> list[str]:
        """Those that are given."""
        return [name for name in SELECTORS if getattr(self, name)]

    @property
    def where(self) -> Positions | None:
        """The positions as a record."""
        if self.positions is None:
            return None
        box = PatchBox(*self.positions.box) if self.positions.box else None
        return Positions(tuple(self.positions.roles), box)

    def layer_range(self, layers: Sequence[int]) -> list[int]:
        """Of these layers, those that features may be of."""
        return [i for i in layers if not self.layers or self.layers[0] <= i <= self.layers[1]]


@dataclass
class CircuitSpecConfig:
    """A circuit, declared (docs/circuits.md).

    Attributes:
        name: of the folder under `circuits/`.
        path: a YAML file of one's own with these keys, instead of an option of the group.
        inputs: what is traced when the run has no `prompt=`, `image=` or `task.rows=`.
        supernodes: by name.
    """

    name: str = "circuit"
    path: str | None = None
    inputs: InputSetConfig | None = None
    supernodes: dict[str, SupernodeConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _FOLDER.fullmatch(self.name):
            raise UserError(f"circuit_spec.name={self.name}: it names a folder; use letters, digits, - and _")
        if self.inputs is not None:
            check_inputs("circuit_spec.inputs", self.inputs)
        names = [node.name or key for key, node in self.supernodes.items() if node.name != AUTO]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"circuit_spec: two supernodes are called {twice[0]!r}; give each a name of its own")
        for key, node in self.supernodes.items():
            _check_name(key, node.name)
            _check_node(f"circuit_spec.supernodes.{key}", node)


def _check_name(key: str, name: str | None) -> None:
    used = name if name and name != AUTO else key
    if used in SURROUNDINGS or used.startswith(ANSWER_PREFIX) or not _NAME.fullmatch(used):
        raise UserError(
            f"circuit_spec.supernodes: {used!r} cannot be a supernode's name; use letters, digits, spaces, - and _, "
            f"and none of {', '.join(SURROUNDINGS)}"
        )


def _check_node(where: str, node: SupernodeConfig) -> None:
    given = node.selectors
    if len(given) != 1:
        what = f"{' and '.join(given)} are given" if given else "nothing chooses its features"
        raise UserError(f"{where}: {what}; give exactly one of {', '.join(SELECTORS)}")
    if node.count < 1:
        raise UserError(f"{where}.count={node.count}: it must be at least 1")
    if node.layers and (len(node.layers) != 2 or node.layers[0] > node.layers[1] or node.layers[0] < 0):
        raise UserError(f"{where}.layers={list(node.layers)}: give the first and the last layer, as in [2,5]")
    for text in node.ids:
        try:
            FeatureId.parse(text)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if node.positions is not None:
        _check_positions(f"{where}.positions", node.positions)
    if node.contrast is not None:
        _check_contrast(f"{where}.contrast", node.contrast)
    share = None if node.influence is None else node.influence.share
    if share is not None and not 0 < share <= 1:
        raise UserError(f"{where}.influence.share={share}: it is a share; choose a number above 0 and at most 1")
    if node.cluster is not None and node.cluster.kind not in ("firing", "direction"):
        raise UserError(f"{where}.cluster.kind={node.cluster.kind}: choose firing or direction")
    if node.label is not None and not node.label.query.strip():
        raise UserError(f"{where}.label.query is empty; give words of a label, as in query: red planet")


def _check_positions(where: str, positions: PositionsConfig) -> None:
    known = (*ROLES, ANSWER)
    for role in positions.roles:
        if role not in known:
            raise UserError(f"{where}.roles: no role {role!r}; choose from {', '.join(known)}")
    box = positions.box
    if not box and not positions.roles:
        raise UserError(f"{where} is empty; give roles, a box, or leave it out")
    if not box:
        return
    if len(box) != 4 or not all(0 <= x <= 1 for x in box) or box[0] >= box[2] or box[1] >= box[3]:
        raise UserError(
            f"{where}.box={list(box)}: give left, top, right and bottom as fractions 0 to 1 of the picture, such as "
            "[0.25,0.25,0.75,0.75]"
        )
    if "image" in positions.roles:
        raise UserError(f"{where}: the role image takes every soft token, so the box says nothing; leave one out")


def _check_contrast(where: str, contrast: ContrastConfig) -> None:
    if contrast.pairs is not None:
        if contrast.of is not None or contrast.against is not None:
            raise UserError(f"{where}: pairs brings both sets of inputs; leave out of and against")
        if contrast.pairs not in ("original", "counterfactual"):
            raise UserError(f"{where}.pairs={contrast.pairs}: choose original or counterfactual, the side of pairs=")
        return
    if contrast.of is None or contrast.against is None:
        raise UserError(f"{where}: a contrast needs two sets of inputs; give of and against, or pairs")
    check_inputs(f"{where}.of", contrast.of)
    check_inputs(f"{where}.against", contrast.against)
    if contrast.of == contrast.against:
        raise UserError(f"{where}: of and against are the same inputs, so nothing differs; change one")


def check_inputs(where: str, inputs: InputSetConfig) -> None:
    """Refuse a set of inputs that says two things or none.

    Raises:
        UserError: it does.
    """
    if inputs.concept is not None and inputs.images:
        raise UserError(f"{where}: give a concept or images, not both")
    if inputs.concept is None and not inputs.images and not inputs.prompts:
        raise UserError(f"{where}: it names no inputs; give a concept, images, or prompts for text alone")
    if inputs.pictures < 1:
        raise UserError(f"{where}.pictures={inputs.pictures}: it must be at least 1")
