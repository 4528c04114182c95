"""`task=steer`, `task=patch` and the Python API: which features, and what an edit of them does to a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vlmscope.circuits.config import EditConfig
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.results import html_table, text_table

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from vlmscope.circuits.circuit import Circuit
    from vlmscope.core.graph import AttributionGraph
    from vlmscope.core.results import Supernode
    from vlmscope.interventions.edits import Plan
    from vlmscope.interventions.trials import Cases, Features, Operation
    from vlmscope.models.base import ModelInputs
    from vlmscope.models.batching import InputBatch
    from vlmscope.scope import Scope

TOP = 5  # next tokens that are shown
SAYS = {"matched": "other features", "random_direction": "a random direction"}  # how controls are named


@dataclass(frozen=True)
class Chosen:
    """Features to edit, each once, and the graph or circuit at `source` that they were taken from, if any.

    `nodes` are those of the circuit; they may say at which positions they are meant.
    """

    features: list[FeatureId]
    source: str = ""
    graph: AttributionGraph | None = None
    circuit: Circuit | None = None
    nodes: tuple[Supernode, ...] = ()

    def check_fits(self, scope: Scope) -> None:
        """Refuse a graph or circuit of another model or set."""
        from vlmscope.circuits.selectors import check_graph

        widths = scope.transcoders.widths
        if self.circuit is not None:
            self.circuit.check_fits(scope.vlm.name, widths, self.source)
        if self.graph is not None:
            if self.graph.n_layers != scope.adapter.n_layers:
                layers = f"{self.graph.n_layers} layers, this one has {scope.adapter.n_layers}"
                raise UserError(f"{self.source} is of a model with {layers}; trace this model")
            check_graph(self.graph, self.source, scope.vlm.name, widths)


def chosen_features(named: Sequence[str], task: EditConfig) -> Chosen:
    """The features that the user named, a graph ranks, or a circuit has; no model is needed.

    Raises:
        UserError: none or several were given, an id cannot be read, or a file is not there or not what it should be.
    """
    from vlmscope.attribution.export import load_graph
    from vlmscope.attribution.influence import top_features
    from vlmscope.circuits.circuit import load_circuit

    if bool(named) + (task.from_graph is not None) + (task.circuit is not None) != 1:
        raise UserError(
            "which features? give exactly one of: task.features=..., task.from_graph=/run/graph.safetensors, "
            "task.circuit=/run/circuits/name"
        )
    if task.supernodes and task.circuit is None:
        raise UserError("task.supernodes= chooses among a circuit's; add task.circuit=/run/circuits/name")
    if task.circuit is not None:
        circuit = load_circuit(Path(task.circuit))
        nodes = tuple(circuit.node(name) for name in task.supernodes or circuit.supernodes)
        features = list(dict.fromkeys(m.feature for node in nodes for m in node.features))
        return Chosen(features, task.circuit, circuit=circuit, nodes=nodes)
    if task.from_graph is None:
        return Chosen([FeatureId.parse(text) for text in named])
    path = Path(task.from_graph)
    graph = load_graph(path / "graph.safetensors" if path.is_dir() else path).graph
    return Chosen(list(top_features(graph, task.top)), task.from_graph, graph)


@dataclass(frozen=True)
class Fixed:
    """The operation of a trial that has its plan already; other features write its changes as controls."""

    edits: Plan
    own_values: ClassVar[bool] = False

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> Plan:
        """The plan, whatever the cases and the strength."""
        return self.edits


class Said(NamedTuple):
    """What a model says to a prompt."""

    answer: str  # greedy, in mode free; else the most probable next token
    top: tuple[tuple[str, float], ...]  # the most probable next tokens with their probabilities


class Control(NamedTuple):
    """Draws of one control in one mode."""

    name: str  # matched or random_direction
    draws: int
    refused: int  # of them, since they move less than `trials.WEAK` of what the edit moves
    kl: float  # mean, of the next token from the unedited run, in nats
    changed: float  # share whose most probable next token is another than before
    says: tuple[tuple[str, int], ...]  # their most probable next tokens, with the number of draws


@dataclass(frozen=True, repr=False)
class EditResult:
    """What an edit of features does to one prompt, in one or several modes, next to its controls.

    Attributes:
        features: those edited.
        active: how many of them are active in the prompt or its donor.
        runs: a row per mode, control ("" for the edit itself) and draw: `says`, `kl`, `changed`, `moved`, `refused`.
        tokens: mode -> rows `token`, `before`, `after`, probabilities of the most probable next tokens of either run.
        answers: greedy, before and after, of mode free.
    """

    name: str
    prompt: str
    features: tuple[FeatureId, ...]
    active: int
    runs: pd.DataFrame
    tokens: Mapping[str, Sequence[Mapping[str, Any]]]
    answers: tuple[str, str] | None = None

    @property
    def mode(self) -> str:
        """The strongest mode, which `before`, `after` and `controls` are of."""
        return list(self.tokens)[-1]

    @property
    def before(self) -> Said:
        """Without the edit."""
        return self._said("before", 0)

    @property
    def after(self) -> Said:
        """Under the edit."""
        return self._said("after", 1)

    def _said(self, side: str, number: int) -> Said:
        rows = sorted(self.tokens[self.mode], key=lambda row: -row[side])
        top = tuple((row["token"], row[side]) for row in rows[:TOP])
        return Said(self.answers[number] if self.answers else top[0][0].strip(), top)

    @property
    def controls(self) -> tuple[Control, ...]:
        """As many features that are changed as much, and random directions of the same norm (mode free)."""
        return self.controls_in(self.mode)

    def controls_in(self, mode: str) -> tuple[Control, ...]:
        """The controls of one mode."""
        rows = self.runs[(self.runs["mode"] == mode) & (self.runs.control != "")]
        found = []
        for name, part in rows.groupby("control", sort=False):
            says = tuple((str(word), int(count)) for word, count in part.says.value_counts().items())
            means = float(part.kl.mean()), float(part.changed.mean())
            found.append(Control(str(name), len(part), int(part.refused.sum()), *means, says))
        return tuple(found)

    def to_frame(self) -> pd.DataFrame:
        """`runs`: the edit and every draw of its controls, a row each."""
        return self.runs.copy()

    def metrics(self) -> dict[str, float]:
        """`<name>/<mode>/kl`, `<name>/<mode>/top1_changed`, each with `_control` (matched features) and, in free mode,
        `_random_direction`; `<name>/features` and how many of them are active, `<name>/features_active`.
        """
        metrics = {
            f"{self.name}/features": float(len(self.features)),
            f"{self.name}/features_active": float(self.active),
        }
        for mode in self.tokens:
            metrics |= self.effects(mode)
        return metrics

    def effects(self, mode: str) -> dict[str, float]:
        """The metrics of one mode."""
        effects: dict[str, float] = {}
        of_mode: Any = self.runs[self.runs["mode"] == mode].groupby("control")[["kl", "changed"]].mean()
        for control, row in of_mode.iterrows():
            suffix = {"": "", "matched": "_control"}.get(control, f"_{control}")
            effects[f"{self.name}/{mode}/kl{suffix}"] = float(row.kl)
            effects[f"{self.name}/{mode}/top1_changed{suffix}"] = float(row.changed)
        return effects

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = [("", "before", "after"), ("answer", self.before.answer, self.after.answer)]
        shown = sorted(self.tokens[self.mode], key=lambda row: -max(row["before"], row["after"]))[:TOP]
        rows += [(f"p({row['token']!r})", f"{row['before']:.3f}", f"{row['after']:.3f}") for row in shown]
        for each in self.controls:
            words = ", ".join(f"{word.strip()} ({count})" for word, count in each.says[:3])
            weak = f"; {each.refused} refused, which hardly move" if each.refused else ""
            says = f"{words}; changed {each.changed:.0%}{weak}"
            rows.append((f"{each.draws} draws of {SAYS[each.name]}", "", says))
        return rows

    def _title(self) -> str:
        names = ", ".join(map(str, self.features[:6])) + ", ..." * (len(self.features) > 6)
        return f"{self.name} {names} in {self.prompt!r}"

    def __str__(self) -> str:
        return self.after.answer

    def __repr__(self) -> str:
        return f"{self._title()}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), self._title())


def run_edit(
    name: str,
    scope: Scope,
    inputs: ModelInputs,
    do: Operation,
    modes: Sequence[str] = ("free",),
    controls: int = 5,
    new_tokens: int = 24,
    seed: int = 0,
    donors: InputBatch | None = None,
    strength: float = 1.0,
) -> EditResult:
    """Run an operation on one prompt, next to its controls, each drawn `controls` times.

    `name`, 'steer' or 'patch', is the first part of the metrics' names; `modes` have the strongest last; `donors` is
    the prompt that activations are carried from, where some are.
    """
    from vlmscope.circuits.cases import bystanders
    from vlmscope.interventions.controls import used_by_role
    from vlmscope.interventions.run import base_run, generate_edited, run_edited
    from vlmscope.interventions.trials import Setting, Trial, run_trials
    from vlmscope.models.base import token_strings

    cases = bystanders(scope, "prompt", inputs.prompt, [inputs], ["prompt"])
    cases = replace(cases, base=base_run(scope, cases.batch, modes), donors=donors)
    plan = do.plan(scope, cases, strength)
    used = {layer: used_by_role(scope, cases, layer) for layer in plan}
    active = sum(int(used[layer][:, edit.features.tolist()].any(0).sum()) for layer, edit in plan.items())
    features = [FeatureId(layer, index) for layer, edit in plan.items() for index in edit.features.tolist()]
    settings = [Setting(mode, mode, strength=strength, matched=controls, random_direction=controls * (mode == "free"))
                for mode in modes]  # fmt: skip
    table = run_trials(scope, [Trial(name, do, [cases], settings)], seed)
    runs = table[["mode", "control", "draw", "kl", "changed", "moved"]].assign(refused=table.weak)
    runs.insert(3, "says", token_strings(scope.vlm.tokenizer, table.said))
    tokens = {}
    for mode in modes:
        logits = run_edited(scope, cases.batch, plan, mode, cases.base)
        tokens[mode] = top_tokens(scope.vlm.tokenizer, cases.base.logits[0], logits[0])
    answers = None
    if "free" in modes:
        before, after = (generate_edited(scope, inputs, edits, new_tokens) for edits in (None, plan))
        answers = before, after
    return EditResult(name, inputs.prompt, tuple(features), active, runs, tokens, answers)


def report_edit(result: EditResult, run_dir: Path) -> dict[str, float]:
    """Print the result of an edit, write `<run_dir>/<name>.json`, and return its metrics."""
    from vlmscope.core.artifacts import write_json

    name, layers = result.name, len({feature.layer for feature in result.features})
    print(f"features edited: {len(result.features)}, in layers: {layers}, active on this prompt: {result.active}")
    written: dict[str, Any] = {"prompt": result.prompt, "features": [*map(str, result.features)], "modes": {}}
    for mode, tokens in result.tokens.items():
        effects, controls = result.effects(mode), result.controls_in(mode)
        kl, changed = effects[f"{name}/{mode}/kl"], effects[f"{name}/{mode}/top1_changed"]
        print(f"\n{mode}: KL {kl:.3g} nats, the most probable next token {'changes' if changed else 'stays'}")
        for each in controls:
            print(f"  {SAYS[each.name]} ({each.draws} draws): KL {each.kl:.3g} nats, changed {each.changed:.0%}")
        print(f"  {'next token':<16} {'p before':>9} {'p after':>9}")
        for row in tokens:
            print(f"  {row['token']!r:<16} {row['before']:>9.4f} {row['after']:>9.4f}")
        more = [each._asdict() for each in controls]
        written["modes"][mode] = {"metrics": effects, "next_token": tokens, "controls": more}
    if result.answers is not None:
        before, after = result.answers
        print(f"answer before: {before}\nanswer after:  {after}")
        written["answer"] = {"before": before, "after": after}
    write_json(run_dir / f"{name}.json", written)
    return result.metrics()


def top_tokens(tokenizer: Any, before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    """The `TOP` most probable next tokens of either run, logits [V] each, with both probabilities."""
    from vlmscope.models.base import token_strings

    p, q = before.double().softmax(-1), after.double().softmax(-1)
    ids = dict.fromkeys([*p.topk(min(TOP, len(p))).indices.tolist(), *q.topk(min(TOP, len(q))).indices.tolist()])
    named = zip(token_strings(tokenizer, ids), ids, strict=True)
    return [{"token": token, "before": float(p[i]), "after": float(q[i])} for token, i in named]
