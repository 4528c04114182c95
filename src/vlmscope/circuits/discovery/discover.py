"""From pairs to the smallest circuit of a question: rankings on training pairs, curves on test pairs, and its checks.

A run of a circuit is the original's run in which every embedding, feature and error outside the circuit has the value
of the counterfactual's run (`search.py`). Faithfulness f is 0 for the counterfactual's run and 1 for the original's, a
ratio of means over pairs.

Legend: N nodes, B pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vlmscope.attribution.config import AttributionConfig
from vlmscope.circuits.cases import subject_of_pairs
from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.config import SURROUNDINGS, DiscoveryConfig, MarkConfig
from vlmscope.circuits.discovery.edges import EdgeCircuits, discover_edges
from vlmscope.circuits.discovery.nodes import (
    GraphScores,
    Kind,
    Nodes,
    activation_change,
    changing_nodes,
    eap_ig,
    graph_scores,
    measure,
    order_of,
)
from vlmscope.circuits.discovery.search import (
    Runner,
    greedy_order,
    matched_circuit,
    prune_members,
    random_order,
    smallest,
)
from vlmscope.circuits.pairs import PairSubject
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, Positions, control_draws, generator
from vlmscope.core.results import CircuitFeature, Curve, Rate, Supernode
from vlmscope.data.inputs import Pair
from vlmscope.features.readouts import top_and_bottom_logits
from vlmscope.metrics.prediction import (
    FaithfulnessCurve,
    faithfulness,
    faithfulness_curve,
    jaccard,
    mean_jaccard,
    sizes,
    spearman,
)
from vlmscope.report.figures import dose_response, label, layer_role_heatmap
from vlmscope.report.marks import Folder, sections_of, write_rows
from vlmscope.report.page import Section, Text
from vlmscope.scope import Scope

NAMED = 6  # supernodes of one answer each
ROLE_NAMES = {"special": "special tokens", "image": "picture", "question": "question words", "last": "last position"}
WRITES = "discovery, writes "  # how a discovered supernode of one answer was chosen, before the answer


@dataclass(frozen=True)
class SmallestCircuit:
    """The smallest circuit, chosen on training pairs.

    The `control` of a rate is that of matched random circuits; None where the circuit has more than half of the
    features.
    """

    by: str  # the ranking that it was cut from
    members: np.ndarray  # node numbers, best first
    cut: int  # how many first nodes of the ranking reached the wanted share, before members were pruned
    train: Rate  # its f on the training pairs, free
    test: dict[str, Rate]  # by mode: its f on test pairs
    ablated: dict[str, Rate]  # by mode: f of the whole model without the circuit's features
    losses: dict[int, float]  # by member, of those tried: loss of f on training pairs when it alone is dropped
    groups: dict[tuple[int, str], float]  # by layer (-1: embeddings) and role: loss of f on test pairs without it


@dataclass(frozen=True)
class Stability:
    """How often the same features are chosen: mean overlaps |A and B| / |A or B| of choices."""

    jaccard: dict[str, float]  # by method: between the choices of bootstrap resamples of the pairs
    other_pairs: float  # between training and test pairs (EAP-IG)
    chance: float  # between random choices of as many features
    frequency: np.ndarray  # [N], share of resamples in which EAP-IG chooses a node


@dataclass(frozen=True)
class Discovery:
    """Everything about one question."""

    question: str
    nodes: Nodes  # the candidates
    scores: dict[str, np.ndarray]  # by method: [N]; of `greedy`, minus the rank
    curves: dict[str, dict[str, FaithfulnessCurve]]  # by mode and method: f over the share of nodes, on test pairs
    circuit: SmallestCircuit
    stability: Stability
    correlation: float  # Spearman's between |EAP-IG| and influence in graphs, over nodes in which either is not 0
    edges: EdgeCircuits | None  # None if they were left out
    change: np.ndarray  # [N], a feature's activation, original minus counterfactual, summed over its role; else 0
    train_rows: list[int]  # numbers of the training pairs that chose, those answered rightly
    test_pairs: int  # how many judged

    @property
    def n_features(self) -> int:
        """How many members of the circuit are features."""
        return int(self.nodes.is_feature[self.circuit.members].sum())

    @property
    def all_curves(self) -> dict[str, dict[str, FaithfulnessCurve]]:
        """The curves, with those of circuits of edges as the mode "edges"."""
        return self.curves if self.edges is None else {**self.curves, "edges": self.edges.curves}

    def features(self) -> tuple[CircuitFeature, ...]:
        """The circuit's features, best first: `contrast` is the change of activation from counterfactual to original,
        `influence` the EAP-IG score in logits.
        """
        nodes, score = self.nodes, self.scores["eap_ig"]
        return tuple(
            CircuitFeature(nodes.feature(row), nodes.roles[nodes.role[row]], float(self.change[row]), float(score[row]))
            for row in self.circuit.members.tolist()
            if nodes.kind[row] == Kind.FEATURE
        )

    def to_circuit(self, model: str = "", n_features: Mapping[int, int] | None = None) -> Circuit:
        """One supernode per position role, `<question>_<role>`, which acts at that role alone."""
        groups: dict[str, list[CircuitFeature]] = {}
        for member in self.features():
            groups.setdefault(member.role, []).append(member)
        chosen = f"discovery, cut from {self.circuit.by}"
        nodes = [
            Supernode(f"{self.question}_{role}", tuple(members), Positions((role,)), chosen)
            for role, members in groups.items()
        ]
        return Circuit({node.name: node for node in nodes}, {}, model=model, n_features=n_features)


PairsByQuestion = Mapping[str, Sequence[Pair]]


def moving_questions(train: PairsByQuestion, test: PairsByQuestion, question: str | None = None) -> list[str]:
    """The questions of pairs whose answer differs within pairs, or `question` alone.

    Raises:
        UserError: there is none, or `question` is not one of them.
    """
    moving = [name for name in train if name in test and train[name][0].moves]
    if question is not None and question not in moving:
        known = f"choose from {', '.join(moving)}" if moving else "no question of these pairs has two answers"
        raise UserError(f"discovery.question={question}: {known}")
    if not moving:
        raise UserError("no question has answers that differ within a pair, so there is no contrast to find a circuit")
    return moving if question is None else [question]


def discover_question(
    scope: Scope,
    question: str,
    train: PairsByQuestion,
    test: PairsByQuestion,
    settings: DiscoveryConfig,
    graphs: AttributionConfig,
    least: int,
) -> Discovery:
    """The circuit of a question by those of its pairs that are answered rightly on both sides, at least `least` of
    each split.
    """
    chosen, judged = (
        subject_of_pairs(scope, question, p[question], least, modes=settings.modes) for p in (train, test)
    )
    return discover(scope, chosen, judged, settings, graphs)


def discover(
    scope: Scope,
    train: PairSubject,
    test: PairSubject,
    settings: DiscoveryConfig,
    graphs: AttributionConfig | None = None,
) -> Discovery:
    """Find the smallest circuit of a question that keeps `settings.keep` of the logit difference: `train` pairs choose,
    other pairs of the same question and wording judge.

    Raises:
        UserError: the sides do not differ, or not in the answer; train and test do not align.
    """
    if not (train.moves and test.moves):
        raise UserError(
            f"question {train.question!r}: the contrast is empty, as both sides of a pair have the same answer; choose "
            "pairs whose answers differ"
        )
    if train.batch.roles.tolist() != test.batch.roles.tolist():
        raise UserError(
            f"question {train.question!r}: training and test prompts differ in length or wording; use the same"
        )
    sides = measure(scope, train)
    if sides.clean.gaps.mean() <= sides.corrupt.gaps.mean():
        raise UserError(
            f"question {train.question!r}: the logit difference of the answers does not fall from original to "
            "counterfactual, so there is nothing to keep; give pairs that the model answers"
        )
    nodes = changing_nodes(sides, scope.transcoders)
    choosing = Runner(scope, sides, nodes)
    judging = Runner(scope, measure(scope, test), nodes)
    effects = eap_ig(scope, sides, nodes, settings.steps)
    traced = graph_scores(scope, train, nodes, settings.graphs, graphs or AttributionConfig())
    change = activation_change(scope.transcoders, sides, nodes)
    scores, orders = _rankings(choosing, effects, traced, change, settings)
    circuit = _smallest_circuit(choosing, judging, orders, change, settings)
    seen = (effects.mean(0) != 0) | (traced.nodes.mean(0) != 0)
    return Discovery(
        train.question,
        nodes,
        scores,
        {mode: _curves(judging, orders, mode, settings) for mode in settings.modes},
        circuit,
        _stability(judging, effects, traced, circuit, settings),
        spearman(np.abs(effects.mean(0))[seen], traced.nodes.mean(0)[seen]),
        discover_edges(choosing, judging, effects, traced, settings) if settings.edge_pairs else None,
        _feature_change(choosing),
        train.rows.tolist(),
        test.size,
    )


def _rankings(
    runner: Runner, effects: np.ndarray, traced: GraphScores, change: np.ndarray, settings: DiscoveryConfig
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores [N] and orders [N] by method; EAP-IG's are always there, as edges and stability need them."""
    scores = {"eap_ig": effects.mean(0), "graph": traced.nodes.mean(0), "activation": change}
    orders = {name: order_of(values) for name, values in scores.items()}
    # A graph leaves most nodes without a score: these follow in the order of their change.
    orders["graph"] = np.lexsort((-change, -scores["graph"]))
    if "greedy" in settings.methods:
        orders["greedy"] = greedy_order(runner)
        scores["greedy"] = np.empty(len(runner.nodes))
        scores["greedy"][orders["greedy"]] = -np.arange(len(runner.nodes), dtype=float)
    orders["random"] = random_order(runner.nodes, orders["eap_ig"], settings.seed)
    names = {*settings.methods, "eap_ig"}
    orders = {name: order for name, order in orders.items() if name in names}
    return {name: values for name, values in scores.items() if name in names}, orders


def _curves(
    runner: Runner, orders: dict[str, np.ndarray], mode: str, settings: DiscoveryConfig
) -> dict[str, FaithfulnessCurve]:
    """f on test pairs at MIB's sizes by method; the last size is the whole model."""
    clean, corrupt = runner.ends(mode)
    counts = sizes(len(runner.nodes))
    curves = {}
    for name in settings.methods:
        # The whole model also has what training pairs never had.
        m = [runner.run(runner.kept(orders[name][:count]), mode) for count in counts[:-1]] + [clean]
        curves[name] = faithfulness_curve(np.stack(m), clean, corrupt, counts, settings.seed)
    return curves


def _smallest_circuit(
    choosing: Runner, judging: Runner, orders: dict[str, np.ndarray], change: np.ndarray, settings: DiscoveryConfig
) -> SmallestCircuit:
    """Cut the best ranking where it reaches the wanted share, prune members, and judge the rest on test pairs."""
    cuts = {name: smallest(choosing, orders[name], settings.keep) for name in orders if name != "random"}
    by = min(cuts, key=lambda name: cuts[name])
    ranked, nodes = orders[by][: cuts[by]], choosing.nodes
    members, losses = prune_members(choosing, ranked, settings.keep, settings.minimality, settings.threshold)
    # A circuit with more than half of the features has no others like it.
    draws = settings.draws if 2 * nodes.is_feature[members].sum() <= nodes.is_feature.sum() else 0
    alike = [matched_circuit(nodes, members, change, draw) for draw in control_draws(settings.seed, draws)]
    test: dict[str, Rate] = {}
    ablated: dict[str, Rate] = {}
    for mode in settings.modes:
        ends = judging.ends(mode)
        kept = [judging.kept(rows) for rows in (members, *alike)]
        without = [judging.without(rows[nodes.is_feature[rows]]) for rows in (members, *alike)]
        for rates, circuits in ((test, kept), (ablated, without)):
            rate, *controls = (faithfulness(judging.run(each, mode), *ends, settings.seed) for each in circuits)
            control = float(np.mean([each.value for each in controls])) if controls else None
            rates[mode] = replace(rate, control=control)
    share, groups = judging.share(members), {}
    for layer, role in sorted({(int(nodes.layer[row]), int(nodes.role[row])) for row in members.tolist()}):
        group = (nodes.layer[members] == layer) & (nodes.role[members] == role)
        groups[layer, nodes.roles[role]] = share - judging.share(members[~group])
    train = faithfulness(choosing.run(choosing.kept(members)), *choosing.ends(), settings.seed)
    return SmallestCircuit(by, members, cuts[by], train, test, ablated, losses, groups)


def _stability(
    judging: Runner, effects: np.ndarray, traced: GraphScores, circuit: SmallestCircuit, settings: DiscoveryConfig
) -> Stability:
    """Features chosen again from resampled pairs, as many as the circuit has."""
    nodes = judging.nodes
    rows = np.flatnonzero(nodes.is_feature)
    count = max(1, int(nodes.is_feature[circuit.members].sum()))

    def top(scores: np.ndarray) -> list[int]:
        return rows[order_of(scores[rows])[:count]].tolist()

    def resampled(table: np.ndarray, name: str) -> list[list[int]]:
        rng = generator(settings.seed, "stability", name)
        draws = rng.integers(0, len(table), (settings.resamples, len(table)))
        return [top(table[draw].mean(0)) for draw in draws]

    choices = resampled(effects, "eap_ig")
    # Two graphs, of both sides, belong to one pair.
    by_pair = traced.nodes.reshape(-1, 2, len(nodes)).mean(1)
    other = eap_ig(judging.scope, judging.sides, nodes, settings.steps).mean(0)
    rng = generator(settings.seed, "stability", "chance")
    random = [rng.choice(rows, count, replace=False).tolist() for _ in range(settings.resamples)]
    return Stability(
        {"eap_ig": mean_jaccard(choices), "graph": mean_jaccard(resampled(by_pair, "graph"))},
        jaccard(top(effects.mean(0)), top(other)),
        mean_jaccard(random),
        np.bincount(np.concatenate(choices), minlength=len(nodes)) / settings.resamples,
    )


def _feature_change(runner: Runner) -> np.ndarray:
    """[N], mean change of activation of features, summed over the positions of their role."""
    sides, transcoders = runner.sides, runner.scope.transcoders
    zeros = sides.clean.entering.new_zeros(len(sides.roles))

    def tables() -> Iterator[tuple[int, Tensor, Tensor]]:
        for layer in transcoders.layers:
            change = sides.changes(transcoders, layer).mean(0)
            yield layer, zeros, change.new_zeros(len(zeros), change.shape[1]).index_add_(0, sides.role_of, change)

    return runner.nodes.read(zeros, tables())


def named_circuit(scope: Scope, discovery: Discovery, answers: Sequence[str]) -> Circuit:
    """The circuit with its supernodes named after position roles and, at the last position, answers of the pairs."""
    words = {
        member.feature: top_and_bottom_logits(scope, member.feature, 1)[0][0][0].strip()
        for member in discovery.features()
        if member.role == "last"
    }
    return by_answer(discovery.to_circuit(scope.vlm.name, scope.transcoders.widths), answers, words)


def by_answer(circuit: Circuit, answers: Sequence[str], words: Mapping[FeatureId, str]) -> Circuit:
    """A supernode per position role and, of the features at the last position, one for each answer that they write.

    The `NAMED` answers whose features have the most influence get one; features that write no such answer (`words` has
    what each writes) stay with their role.
    """
    nodes: list[Supernode] = []
    for node in circuit.supernodes.values():
        assert node.positions is not None, "discovery's supernodes have one"
        (role,) = node.positions.roles
        groups: dict[str, list[CircuitFeature]] = {}
        for member in node.features if role == "last" else ():
            if (word := words.get(member.feature, "")) in answers:
                groups.setdefault(word, []).append(member)
        order = sorted(groups, key=lambda word: -sum(abs(m.influence) for m in groups[word]))[:NAMED]
        taken = {member.feature for word in order for member in groups[word]}
        rest = tuple(member for member in node.features if member.feature not in taken)
        if rest:
            nodes.append(replace(node, name=ROLE_NAMES.get(role, role), features=rest))
        for word in order:
            name = f"writes {word}" if word in (*SURROUNDINGS, *ROLE_NAMES.values()) else word
            nodes.append(replace(node, name=name, features=tuple(groups[word]), chosen=f"{WRITES}{word}"))
    return replace(circuit, supernodes={node.name: node for node in nodes})


NAMES = {
    "graph": "attribution graphs",
    "eap_ig": "EAP-IG",
    "greedy": "elimination",
    "activation": "activation change",
    "random": "random features",
}
SHOWN = 20  # members in members.parquet; all are in discovery.json
MARKS = {
    "curves": MarkConfig("picture", "Faithfulness over circuit size", says="On test pairs.", file="faithfulness_*"),
    "areas": MarkConfig(
        "table",
        "Areas under and beside the curves",
        says="CMD: area between the curve and 1, 0 is best. Edges are those of the frozen local replacement model.",
        file="areas.parquet",
    ),
    "members": MarkConfig("table", "First members", says="EAP-IG is in logits.", file="members.parquet"),
    "groups": MarkConfig("picture", "Where the circuit is", says="Layer -1 enters the model.", file="groups_*"),
    "edges": MarkConfig("picture", "Circuits of edges", file="edges_*"),
}
READING = (
    "A run of a circuit is the original's run in which every embedding, feature and error outside the circuit has the "
    "value of the counterfactual's run. Features inside are as this run makes them. Faithfulness is 0 for the "
    "counterfactual's run, 1 for the original's, a ratio of means over pairs.",
    "The random ranking shuffles features and leaves embeddings and errors in their places, so it starts with what the "
    "picture's embeddings carry without any feature.",
    "Rankings are by absolute score: a circuit also has what works against the answer, until members are pruned. "
    "Members are features at a position role; another counterfactual has another circuit. All members are in "
    "discovery.json.",
)


def write_discoveries(discoveries: Sequence[Discovery], folder: Path, figures: bool = True) -> dict[str, float]:
    """Write discovery.json, areas.parquet, members.parquet and figures/ into a run folder; metrics of all questions."""
    write_json(folder / "discovery.json", {discovery.question: _body(discovery) for discovery in discoveries})
    for name, rows in (("areas", _area_rows), ("members", _member_rows)):
        write_rows(folder / f"{name}.parquet", [row for discovery in discoveries for row in rows(discovery)])
    for discovery in discoveries if figures else ():
        _draw(discovery, folder / "figures")
    return {key: value for discovery in discoveries for key, value in _metrics(discovery).items()}


def _metrics(discovery: Discovery) -> dict[str, float]:
    """`discovery/<question>/...`: sizes, `<mode>/<method>/cpr` and `cmd`, faithfulness and its control, stability."""
    circuit, stability, edges = discovery.circuit, discovery.stability, discovery.edges
    metrics = {
        "candidates": float(len(discovery.nodes)),
        "members": float(len(circuit.members)),
        "features": float(discovery.n_features),
        "members_before_pruning": float(circuit.cut),
        "stability/other_pairs": stability.other_pairs,
        "stability/chance": stability.chance,
        "rank_correlation_nodes": discovery.correlation,
    }
    metrics |= {f"stability/{method}": value for method, value in stability.jaccard.items()}
    rates = {"train_faithfulness": circuit.train}
    for mode, rate in circuit.test.items():
        rates |= {f"{mode}/faithfulness": rate, f"{mode}/without_circuit": circuit.ablated[mode]}
    for mode, curves in discovery.all_curves.items():
        for method, curve in curves.items():
            rates |= {f"{mode}/{method}/cpr": curve.cpr, f"{mode}/{method}/cmd": curve.cmd}
    if edges is not None:
        rates["edges/faithfulness"] = edges.smallest_test
        metrics |= {"edges/candidates": float(len(edges.source)), "edges/members": float(edges.smallest)}
        metrics |= {"edges/rank_correlation": edges.correlation, "edges/rest": edges.rest}
    for name, rate in rates.items():
        metrics |= rate.metrics(name)
    return {f"discovery/{discovery.question}/{name}": value for name, value in metrics.items()}


def _body(discovery: Discovery) -> dict[str, Any]:
    """A discovery as plain data: curves, members with scores and losses, the edges of the smallest circuit of edges."""
    name, edges = discovery.nodes.name, discovery.edges
    curves = {
        mode: {method: [vars(rate) for rate in curve.rates] for method, curve in by_method.items()}
        for mode, by_method in discovery.all_curves.items()
    }
    of_edges = curves.pop("edges", None)
    members = [
        {
            "node": name(row),
            "scores": {method: float(scores[row]) for method, scores in discovery.scores.items()},
            "loss": discovery.circuit.losses.get(row),
            "chosen_in": float(discovery.stability.frequency[row]),
        }
        for row in discovery.circuit.members.tolist()
    ]
    groups = [{"layer": layer, "role": role, "loss": loss} for (layer, role), loss in discovery.circuit.groups.items()]
    body: dict[str, Any] = {
        "pairs": {"train": len(discovery.train_rows), "test": discovery.test_pairs},
        "by": discovery.circuit.by,
        "curves": curves,
        "shares": list(next(iter(next(iter(discovery.curves.values())).values())).shares),
        "members": members,
        "groups": groups,
    }
    if edges is not None:
        order = np.abs(edges.score).argsort()[::-1][: edges.smallest]
        columns = (column[order].tolist() for column in (edges.source, edges.target, edges.score, edges.influence))
        body["edges"] = {
            "curves": of_edges,
            "members": [
                {"source": name(source), "target": name(target), "score": score, "influence": flow}
                for source, target, score, flow in zip(*columns, strict=True)
            ],
        }
    return body


def _area_rows(discovery: Discovery) -> list[dict[str, Any]]:
    """CPR (area under the curve) and CMD (area between the curve and 1, 0 is best) by mode and ranking."""

    def interval(rate: Rate) -> str:
        return f"{rate.value:.3f} ({rate.ci_low:.3f} to {rate.ci_high:.3f})"

    return [
        {"question": discovery.question, "mode": label(mode), "ranked by": NAMES[method]}
        | {"CPR": interval(curve.cpr), "CMD": interval(curve.cmd)}
        for mode, curves in discovery.all_curves.items()
        for method, curve in curves.items()
    ]


def _member_rows(discovery: Discovery) -> list[dict[str, Any]]:
    """The first members: scores (EAP-IG in logits), loss when dropped where measured, and how often chosen again."""
    return [
        {
            "question": discovery.question,
            "node": discovery.nodes.name(row),
            **{name: float(discovery.scores[name][row]) for name in ("eap_ig", "graph") if name in discovery.scores},
            "loss when dropped": discovery.circuit.losses.get(row),
            "chosen on resampled pairs": float(discovery.stability.frequency[row]),
        }
        for row in discovery.circuit.members[:SHOWN].tolist()
    ]


def _draw(discovery: Discovery, folder: Path) -> None:
    """Faithfulness over size by mode and of edges, and the loss by layer and role: where the circuit is."""
    question, groups = discovery.question, discovery.circuit.groups
    for mode, curves in discovery.all_curves.items():
        what, name = ("edges", "edges") if mode == "edges" else ("nodes", "faithfulness")
        lines = []
        for method, curve in curves.items():
            points = dict(zip(curve.counts, curve.rates, strict=True))  # small sets have equal sizes at several shares
            lines.append(Curve.of(NAMES[method], list(points), list(points.values())))
        path = folder / (f"{name}_{question}.png" if mode == "edges" else f"{name}_{question}_{mode}.png")
        dose_response(lines, path, f"{what} kept (number)", "faithfulness (%)", log_x=True)
    layers, present = sorted({layer for layer, _ in groups}), {role for _, role in groups}
    roles = [role for role in discovery.nodes.roles if role in present]
    matrix = np.full((len(layers), len(roles)), np.nan)
    for (layer, role), loss in groups.items():
        matrix[layers.index(layer), roles.index(role)] = round(loss, 4) + 0.0
    layer_role_heatmap(matrix, layers, roles, folder / f"groups_{question}.png", "loss of faithfulness when dropped")


def summary(discovery: Discovery) -> str:
    """The result in a sentence or two."""

    def control(rate: Rate) -> str:
        return "too few to draw" if rate.control is None else f"{rate.control:.0%}"

    circuit, features, edges = discovery.circuit, discovery.n_features, discovery.edges
    mode, rate = next(iter(circuit.test.items()))
    without, test = circuit.ablated[mode], edges and edges.smallest_test
    text = (
        f"{discovery.question}: {features} features (of {int(discovery.nodes.is_feature.sum()):,} that change) and "
        f"{len(circuit.members) - features} other nodes keep {rate.value:.0%} ({rate.ci_low:.0%} to "
        f"{rate.ci_high:.0%}) of the logit difference on test pairs (matched features: {control(rate)}); without these "
        f"features {without.value:.0%} is left (without matched ones: {control(without)})."
    )
    if edges is not None and test is not None:
        text += (
            f" Of {len(edges.source):,} edges {edges.smallest:,} keep {test.value:.0%} ({test.ci_low:.0%} to "
            f"{test.ci_high:.0%}); changes of patterns, norms and supports are {edges.rest:.0%} of the difference."
        )
    return text


def sections(folder: Path) -> list[Section]:
    """Sections of a page: curves, areas, members, groups and edges from the run folder, and how to read them."""
    marks = {key: mark for key, mark in MARKS.items() if key != "edges" or [*folder.glob("figures/edges_*")]}
    return [*sections_of(Folder(folder), marks), Text("How to read this", READING)]
