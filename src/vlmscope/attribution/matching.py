"""When nodes of two graphs of one model are the same node.

| kind | same when |
| --- | --- |
| feature | same layer and index, and same place |
| token | same token id, and same place |
| soft token | same picture and same box in it, wherever it stands in the prompt |
| error | same layer and same place |
| bias, left out | same layer |
| logit | same token id and string, and same place in graphs that explain several positions |
| other target | a feature: same layer and index; else same name |

The place is, by `match`: `position` the position; `from_end` the position counted from the end of the prompt; `role`
the position's role (image, question, special, last), so that the nodes of a role become one; `feature` nothing, so
that those at all positions become one. `auto` is `position` for prompts of the same length whose soft tokens stand at
the same positions, else `role`. A node made of several has the sum of their influence, an edge the sum of the weights.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.graph import ENDS, AttributionGraph, NodeKind
from vlmscope.core.merged import MatchedNodes

MATCHES = ("position", "from_end", "role", "feature")
_ANYWHERE = "any position"
_ORDER = {kind: at for at, kind in enumerate((0, 3, 1, 2, 5, 4, 6))}  # of the node table of one graph


class NodeKey(NamedTuple):
    """What makes a node the same; `place` is a position, a role, or None for a node that stands nowhere.

    `token` is a feature's index or a token's id, `image` and `box` are of a soft token, `label` of an end.
    """

    layer: int
    kind: int
    place: int | str | None
    token: int
    image: int
    box: tuple[float, ...]
    label: str


def choose_match(match: str, graphs: Sequence[AttributionGraph]) -> str:
    """`match`, or what `auto` stands for with these graphs.

    Raises:
        UserError: no such rule.
    """
    if match not in ("auto", *MATCHES):
        raise UserError(f"match={match}: no such rule; choose one of auto, {', '.join(MATCHES)}")
    if match != "auto":
        return match
    first = graphs[0].is_image
    same = all(len(g.is_image) == len(first) and (g.is_image == first).all() for g in graphs)
    return "position" if same else "role"


def check_same_model(graphs: Sequence[AttributionGraph], names: Sequence[str]) -> None:
    """Refuse graphs of different models: their features have nothing in common.

    Raises:
        UserError: which two graphs, and of which models.
    """
    first = _model(graphs[0])
    for graph, name in zip(graphs, names, strict=True):
        if _model(graph) != first:
            raise UserError(
                f"{names[0]} is a graph of {_words(graphs[0])}, {name} of {_words(graph)}: "
                "features of two models are not the same; give graphs of one"
            )


def _model(graph: AttributionGraph) -> tuple[str, int]:
    return str(graph.meta.get("model", "")), graph.n_layers


def _words(graph: AttributionGraph) -> str:
    return f"{graph.meta.get('model') or 'a model without a name'} ({graph.n_layers} layers)"


def node_keys(graph: AttributionGraph, match: str) -> list[NodeKey]:
    """The key of every node, in order."""
    nodes, places = graph.nodes, _places(graph, match)
    ends = nodes.ends()
    names = {int(node): text for node, text in zip(ends, graph.logit_tokens, strict=True)}
    spread = len(np.unique(nodes.position[ends])) > 1
    columns = (nodes.kind.tolist(), nodes.layer.tolist(), nodes.position.tolist(), nodes.index.tolist())
    return [
        _key(graph, places, NodeKind(kind), layer, position, index, names.get(node, ""), spread)
        for node, (kind, layer, position, index) in enumerate(zip(*columns, strict=True))
    ]


def _key(
    graph: AttributionGraph,
    places: list[int | str],
    kind: NodeKind,
    layer: int,
    position: int,
    index: int,
    name: str,
    spread: bool,
) -> NodeKey:
    place = places[position] if position >= 0 else None
    match kind:
        case NodeKind.TOKEN:
            box = graph.patch_boxes[position]
            if box is not None:
                # A soft token's place only says where it is drawn: equal cells match wherever the picture stands.
                rounded = tuple(round(float(edge), 6) for edge in box)
                return NodeKey(layer, kind, None, -1, int(graph.image_index[position]), rounded, "")
            return NodeKey(layer, kind, place, index, -1, (), "")
        case NodeKind.FEATURE:
            return NodeKey(layer, kind, place, index, -1, (), "")
        case NodeKind.ERROR:
            return NodeKey(layer, kind, place, -1, -1, (), "")
        case NodeKind.LOGIT:
            return NodeKey(layer, kind, place if spread else None, index, -1, (), name)
        case NodeKind.TARGET:
            # The name of a feature that is explained says where it fires; that may differ between prompts.
            return NodeKey(layer, kind, None, index, -1, (), name if index < 0 else "")
        case _:
            return NodeKey(layer, kind, None, -1, -1, (), "")


def _places(graph: AttributionGraph, match: str) -> list[int | str]:
    count = len(graph.tokens)
    match match:
        case "position":
            return list(range(count))
        case "from_end":
            return list(range(-count, 0))
        case "role":
            return [str(role) for role in graph.roles]
        case _:
            return [_ANYWHERE] * count


class Columns:
    """The places of several graphs in order, with what stands there; soft tokens and logits stand where first seen."""

    def __init__(self, match: str) -> None:
        self.match = match
        self.texts: dict[int | str, list[str]] = {}
        self.image: dict[int | str, bool] = {}
        self.soft: dict[tuple[int, tuple[float, ...]], int | str] = {}
        self.ends: dict[tuple[int, str], int | str] = {}
        self.names: dict[int, str] = {}  # of features that are explained, by index
        self.words: dict[int, str] = {}  # token id -> string

    def add(self, graph: AttributionGraph) -> None:
        """Take in the places of a graph."""
        places = _places(graph, self.match)
        for position, place in enumerate(places):
            box = graph.patch_boxes[position]
            text = graph.tokens[position] if box is None else soft_name(graph, position)
            seen = self.texts.setdefault(place, [])
            if text not in seen and isinstance(place, int):
                seen.append(text)
            self.image[place] = self.image.get(place, True) and bool(graph.is_image[position])
            if box is not None:
                where = int(graph.image_index[position]), tuple(round(float(edge), 6) for edge in box)
                self.soft.setdefault(where, place)
        nodes = graph.nodes
        for node, text in zip(nodes.ends(), graph.logit_tokens, strict=True):
            index, named = int(nodes.index[node]), nodes.kind[node] == NodeKind.LOGIT or nodes.index[node] < 0
            self.ends.setdefault((index, text if named else ""), places[int(nodes.position[node])])
            if not named:
                self.names.setdefault(index, text)
        for node in nodes.of(NodeKind.TOKEN):
            self.words.setdefault(int(nodes.index[node]), graph.tokens[int(nodes.position[node])])

    def order(self) -> list[int | str]:
        """The places from left to right: positions by number, roles as first met."""
        return sorted(self.texts) if self.match in ("position", "from_end") else list(self.texts)  # type: ignore[type-var]

    def labels(self) -> list[str]:
        """What is written at each place: the tokens of the graphs, or the role."""
        return [" | ".join(self.texts[place]) if isinstance(place, int) else place for place in self.order()]

    def is_image(self) -> np.ndarray:
        """`[C]` bool, places where only soft tokens stand."""
        return np.array([self.image[place] for place in self.order()], dtype=bool)

    def place(self, key: NodeKey) -> int | str | None:
        """Where a node is drawn."""
        if key.kind in ENDS and key.place is None:
            return self.ends[key.token, key.label]
        return self.soft[key.image, key.box] if key.image >= 0 else key.place

    def table(self, keys: Iterable[NodeKey]) -> tuple[MatchedNodes, np.ndarray]:
        """The node table of some keys, sources before targets, and the order: row i is the `order[i]`-th key."""
        number: dict[int | str | None, int] = {place: at for at, place in enumerate(self.order())} | {None: -1}
        given = list(keys)
        at = [number[self.place(key)] for key in given]
        rank = [
            (key.layer, _ORDER[key.kind], at[i], key.token, key.image, _row_major(key.box), key.label)
            for i, key in enumerate(given)
        ]
        order = np.array(sorted(range(len(given)), key=rank.__getitem__), dtype=np.int64)
        chosen = [given[i] for i in order]
        nodes = MatchedNodes(
            kind=np.array([key.kind for key in chosen], np.int8),
            layer=np.array([key.layer for key in chosen], np.int16),
            position=np.array([at[i] for i in order], np.int32),
            index=np.array([key.token for key in chosen], np.int64),
            image=np.array([key.image for key in chosen], np.int64),
            box=np.array([key.box or (np.nan,) * 4 for key in chosen], np.float64).reshape(-1, 4),
            label=[self._label(key) for key in chosen],
        )
        return nodes, order

    def _label(self, key: NodeKey) -> str:
        match NodeKind(key.kind):
            case NodeKind.TOKEN if key.image >= 0:
                left, top, right, bottom = key.box
                return f"picture {key.image + 1} at {(left + right) / 2:.0%}, {(top + bottom) / 2:.0%}"
            case NodeKind.TOKEN:
                return f'"{self.words[key.token]}"'
            case NodeKind.FEATURE:
                return f"feature {key.token} of layer {key.layer}"
            case NodeKind.ERROR:
                return f"error L{key.layer}"
            case NodeKind.BIAS:
                return f"bias L{key.layer}"
            case NodeKind.LEFT_OUT:
                return f"left out L{key.layer}"
            case _:
                return key.label or self.names[key.token]


def _row_major(box: tuple[float, ...]) -> tuple[float, ...]:
    return (box[1], box[0]) if box else ()


def soft_name(graph: AttributionGraph, position: int) -> str:
    """`1: 2,3` for the soft token of picture 1 in row 2 and column 3, all from 1."""
    picture, box = int(graph.image_index[position]), graph.patch_boxes[position]
    assert box is not None, f"position {position} is no soft token"
    boxes = [b for b, at in zip(graph.patch_boxes, graph.image_index, strict=True) if b is not None and at == picture]
    row = sorted({b.top for b in boxes}).index(box.top) + 1
    column = sorted({b.left for b in boxes}).index(box.left) + 1
    return f"{picture + 1}: {row},{column}"
