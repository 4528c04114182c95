"""task=circuit with pairs=: the circuit is discovered, its features become named supernodes, and it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlmscope.circuits.spec_config import ANSWER_PREFIX, SURROUNDINGS
from vlmscope.core.errors import UserError
from vlmscope.tasks.circuits.inputs import Asked

if TYPE_CHECKING:
    from vlmscope.attribution.config import AttributionConfig
    from vlmscope.circuits.circuit import Circuit
    from vlmscope.circuits.discovery.result import Discovery
    from vlmscope.config import AppConfig
    from vlmscope.core.graph import PrunedGraph
    from vlmscope.core.intervention import CircuitFeature, Supernode
    from vlmscope.core.records import FeatureId
    from vlmscope.data.pairs import Pair
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.tasks.bench import Bench
    from vlmscope.tasks.circuits.page import Origin
    from vlmscope.tasks.registry import RunContext

NAMED = 6  # supernodes of one answer each
ROLE_NAMES = {
    "special": "special tokens",
    "image": "picture",
    "question": "question words",
    "last": "last position",
}
RIGHT = "right - other"  # the end of graphs whose pairs have different answers


@dataclass(frozen=True)
class Search:
    """What is searched in, read before any model.

    Attributes:
        question: whose circuit is found.
        others: the questions that could be asked for instead.
        train: the question's pairs that choose.
        test: those that judge.
    """

    question: str
    others: tuple[str, ...]
    train: list[Pair]
    test: list[Pair]


def draw_found(
    cfg: AppConfig, context: RunContext, asked: Sequence[Asked], study: StudyFolder | None
) -> dict[str, float]:
    """Discover the circuit of one question, name its supernodes, trace and draw it.

    Raises:
        UserError: the pairs have no contrast, or the model does not answer them.
    """
    from vlmscope.tasks.bench import Bench
    from vlmscope.tasks.circuits.discovery import circuit_of, circuit_subject, discovered, write_found
    from vlmscope.tasks.circuits.finish import finished, traced
    from vlmscope.tasks.circuits.page import Scene

    check_target(cfg, bool(asked))
    bench = Bench(cfg, context.run_dir, overrides=context.overrides)
    search = searched(bench)
    choose, judge = (circuit_subject(bench, search.question, pairs) for pairs in (search.train, search.test))
    found = discovered(bench, choose, judge)
    bench.metrics |= write_found(bench, {search.question: found})
    answers = list(dict.fromkeys(side.answer for pair in search.train for side in (pair.original, pair.counterfactual)))
    circuit = by_answer(circuit_of(bench, found), answers, words_of(bench, found))
    if asked:
        graphs = traced(cfg, context, bench.scope, asked)
    else:
        pairs = spread_answers([search.train[row] for row in choose.pairs.rows.tolist()], cfg.task.traces)
        asked = [Asked(pair.original.prompt, pair.original.images, pair.original.answer) for pair in pairs]
        graphs = differences(bench, context, asked, pairs)
    sides = [side for pair in search.train for side in (pair.original, pair.counterfactual)]
    others = [Asked(side.prompt, side.images, side.answer) for side in sides]
    scene = Scene(bench.scope, asked, graphs, others)
    origin = origin_of(bench, found, search, graphs) if cfg.task.figure else None
    return bench.metrics | finished(cfg, context, circuit, search.question, scene, study, origin)


def check_target(cfg: AppConfig, own: bool) -> None:
    """Look at the settings of graphs before long work; `own`: of an input of one's own, which may explain anything.

    Raises:
        UserError: a setting makes no sense, or graphs of the pairs are to explain something else than their answers.
    """
    if not own and (cfg.attribution.asked != "logits" or cfg.attribution.token_ids):
        key = "token_ids" if cfg.attribution.asked == "logits" else cfg.attribution.asked
        raise UserError(
            f"attribution.{key}: the graphs of pairs= explain the difference of the pair's two answers; leave it out, "
            "or give prompt= (and image=) to trace an input of your own"
        )
    cfg.attribution.check()


def searched(bench: Bench) -> Search:
    """The pairs of the question that is asked for, or of the first whose answers differ.

    Raises:
        UserError: there is none, or the pairs cannot be read.
    """
    from vlmscope.tasks.circuits.discovery import questions

    train, test = (bench.pairs(split) for split in ("train", "test"))
    question, *others = questions(bench, train, test)
    if others:
        print(f"the circuit of the question {question}; discovery.question= takes {' or '.join(others)}")
    return Search(question, tuple(others), train[question], test[question])


def words_of(bench: Bench, found: Discovery) -> dict[FeatureId, str]:
    """The word that each feature at the last position writes most."""
    from vlmscope.features.readouts import top_and_bottom_logits

    words = {}
    for member in found.features():
        if member.role == "last" and member.feature not in words:
            top, _ = top_and_bottom_logits(bench.scope, member.feature, 1)
            words[member.feature] = top[0][0].strip()
    return words


def by_answer(circuit: Circuit, answers: Sequence[str], words: Mapping[FeatureId, str]) -> Circuit:
    """A supernode a position role, and of the features at the last position one for each answer that they write.

    Args:
        circuit: of discovery, a supernode a role.
        answers: of the pairs; the `NAMED` whose features have the most influence get a supernode of their own.
        words: what features write; those that write no such answer stay with their role.
    """
    from vlmscope.tasks.circuits.page import WRITES

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


def spread_answers(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """At most so many pairs, whose originals have as many different answers as can be; earlier ones first."""
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int]] = []
    for number, pair in enumerate(pairs):
        answer = pair.original.answer
        ranked.append((seen.get(answer, 0), number))
        seen[answer] = seen.get(answer, 0) + 1
    return [pairs[number] for _, number in sorted(ranked)[:count]]


def as_difference(cfg: AppConfig, right: str, other: str) -> AttributionConfig:
    """Settings of a graph of the right answer's logit minus the other answer's, which is what discovery keeps."""
    return replace(cfg.attribution, difference=[right, other])


def differences(bench: Bench, context: RunContext, asked: Sequence[Asked], pairs: Sequence[Pair]) -> list[PrunedGraph]:
    """The originals' graphs, each of its own two answers, under one name for the end of all of them."""
    from vlmscope.tasks.circuits.finish import traced

    settings = [
        as_difference(bench.cfg, *(f"id:{bench.token(side.answer)}" for side in (pair.original, pair.counterfactual)))
        for pair in pairs
    ]
    graphs = traced(bench.cfg, context, bench.scope, asked, settings)
    ends = {word for one in graphs for word in one.graph.logit_tokens}
    end = ANSWER_PREFIX + (ends.pop() if len(ends) == 1 else RIGHT)
    return [replace(one, graph=replace(one.graph, logit_tokens=[end])) for one in graphs]


def origin_of(bench: Bench, found: Discovery, search: Search, graphs: Sequence[PrunedGraph]) -> Origin:
    """What the page says of the discovery; draws its figures."""
    from vlmscope.report.style import label
    from vlmscope.tasks.circuits.discovery_page import detail_sections, headline, reading, summary
    from vlmscope.tasks.circuits.page import Origin

    intro = (
        "Features at the last position that write an answer of the pairs most are named by it; the others, and those "
        "elsewhere, by where they are."
    )
    if graphs[0].graph.logit_tokens == [ANSWER_PREFIX + RIGHT]:
        intro += f" {RIGHT}: the logit of the original's answer minus that of its counterfactual's."
    if search.others:
        intro += f" Other questions of these pairs: discovery.question={' or '.join(search.others)}."
    details = detail_sections(found, bench.run_dir / "figures")
    pairs = bench.cfg.pairs
    what = "own pairs" if pairs is None or pairs.change is None else f"pairs of {label(pairs.change)}"
    title = f"Circuit found by {what}: the question {search.question}"
    return Origin(title, summary(found), (headline(found),), (*details, reading()), intro)
