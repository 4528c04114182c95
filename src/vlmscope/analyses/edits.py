"""Shared by `task=steer` and `task=patch`: which features, and running, printing and writing down a plan's effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vlmscope.core.errors import UserError, check_choice, check_least
from vlmscope.core.records import FeatureId
from vlmscope.core.results import MODES

if TYPE_CHECKING:
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
SAYS = {"control": "random features, as many, of the same layers, changed as much",
        "random_direction": "random directions of the same norm"}  # fmt: skip


@dataclass
class EditConfig:
    """Keys of both tasks.

    `from_graph` takes features from a trace instead of naming them: its graph.safetensors or its run folder; the `top`
    most influential ones on its most probable answer. `circuit` takes those of a saved circuit (`/run/circuits/name`),
    or of some of its `supernodes`, at their positions. `mode` is free, frozen_attention, direct or all. `controls` says
    how often each control is drawn (0: none), `new_tokens` how long answers may be.
    """

    from_graph: str | None = None
    circuit: str | None = None
    supernodes: list[str] = field(default_factory=list)
    top: int = 20
    mode: str = "free"
    controls: int = 5
    new_tokens: int = 24

    def __post_init__(self) -> None:
        check_choice("task.mode", self.mode, (*MODES, "all"))
        check_least("task", self, top=1, controls=0, new_tokens=1)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes to run, the strongest last."""
        return MODES if self.mode == "all" else (self.mode,)


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
            "which features? name them, as in task.features=..., take them from a trace with "
            "task.from_graph=/run/graph.safetensors, or from a circuit with task.circuit=/run/circuits/name, not both"
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


def report_edit(
    name: str,
    scope: Scope,
    inputs: ModelInputs,
    do: Operation,
    task: EditConfig,
    run_dir: Path,
    seed: int = 0,
    donors: InputBatch | None = None,
    strength: float = 1.0,
) -> dict[str, float]:
    """Run an operation on one prompt in the chosen modes, print it, and write `<run_dir>/<name>.json`.

    Args:
        name: 'steer' or 'patch', the first part of the metrics' names.
        scope, inputs, do: the model with its transcoders, the prompt, and what is done to it.
        task: the options.
        run_dir: where the file is written.
        seed: of the controls.
        donors: the prompt that activations are carried from, where some are.
        strength: of the operation.

    Returns:
        `<name>/<mode>/kl`, `<name>/<mode>/top1_changed`, each with `_control` (matched features) and, in free mode,
        `_random_direction`; `<name>/features` and how many of them are active in the prompt or its
        donor, `<name>/features_active`.
    """
    from vlmscope.circuits.cases import bystanders
    from vlmscope.core.artifacts import write_json
    from vlmscope.interventions.controls import used_by_role
    from vlmscope.interventions.run import base_run, generate_edited, run_edited
    from vlmscope.interventions.trials import Setting, Trial, run_trials

    cases = bystanders(scope, "prompt", inputs.prompt, [inputs], ["prompt"])
    cases = replace(cases, base=base_run(scope, cases.batch, task.modes), donors=donors)
    plan = do.plan(scope, cases, strength)
    used = {layer: used_by_role(scope, cases, layer) for layer in plan}
    active = sum(int(used[layer][:, edit.features.tolist()].any(0).sum()) for layer, edit in plan.items())
    size = sum(len(edit.features) for edit in plan.values())
    metrics = {f"{name}/features": float(size), f"{name}/features_active": float(active)}
    print(f"{size} features in {len(plan)} layers, {active} of them active there")
    named = [str(FeatureId(layer, index)) for layer, edit in plan.items() for index in edit.features.tolist()]
    written: dict[str, Any] = {"prompt": inputs.prompt, "features": named, "modes": {}}
    settings = [Setting(mode, mode, strength=strength, matched=task.controls,
                        random_direction=task.controls * (mode == "free")) for mode in task.modes]  # fmt: skip
    table = run_trials(scope, [Trial(name, do, [cases], settings)], seed)
    for mode in task.modes:
        effects: dict[str, float] = {}
        of_mode: Any = table[table["mode"] == mode].groupby("control")[["kl", "changed"]].mean()
        for control, row in of_mode.iterrows():
            suffix = {"": "", "matched": "_control"}.get(control, f"_{control}")
            effects |= {f"{name}/{mode}/kl{suffix}": float(row.kl)}
            effects |= {f"{name}/{mode}/top1_changed{suffix}": float(row.changed)}
        logits = run_edited(scope, cases.batch, plan, mode, cases.base)
        tokens = top_tokens(scope.vlm.tokenizer, cases.base.logits[0], logits[0])
        print(*described(f"{name}/{mode}", effects, task.controls), *token_lines(tokens), sep="\n")
        metrics |= effects
        written["modes"][mode] = {"metrics": effects, "next_token": tokens}
    if "free" in task.modes:
        before, after = (generate_edited(scope, inputs, edits, task.new_tokens) for edits in (None, plan))
        print(f"answer before: {before}\nanswer after:  {after}")
        written["answer"] = {"before": before, "after": after}
    write_json(run_dir / f"{name}.json", written)
    return metrics


def described(root: str, effects: dict[str, float], draws: int) -> list[str]:
    """Lines on the effects of an edit and of its controls in one mode, from the metrics under `root`."""
    changed = "changes" if effects[f"{root}/top1_changed"] else "stays"
    mode = root.rpartition("/")[2]
    lines = [f"\n{mode}: KL {effects[f'{root}/kl']:.3g} nats, the most probable next token {changed}"]
    for suffix, words in SAYS.items():
        if f"{root}/kl_{suffix}" in effects:
            kl, moved = effects[f"{root}/kl_{suffix}"], effects[f"{root}/top1_changed_{suffix}"]
            lines.append(f"  {words} ({draws} draws): KL {kl:.3g} nats, changed {moved:.0%}")
    return lines


def top_tokens(tokenizer: Any, before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    """The `TOP` most probable next tokens of either run, logits [V] each, with both probabilities."""
    from vlmscope.models.base import token_strings

    p, q = before.double().softmax(-1), after.double().softmax(-1)
    ids = dict.fromkeys([*p.topk(min(TOP, len(p))).indices.tolist(), *q.topk(min(TOP, len(q))).indices.tolist()])
    named = zip(token_strings(tokenizer, ids), ids, strict=True)
    return [{"token": token, "before": float(p[i]), "after": float(q[i])} for token, i in named]


def token_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """`top_tokens` as a table."""
    lines = [f"  {'next token':<16} {'p before':>9} {'p after':>9}"]
    return lines + [f"  {row['token']!r:<16} {row['before']:>9.4f} {row['after']:>9.4f}" for row in rows]
