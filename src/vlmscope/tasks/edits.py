"""What `task=steer` and `task=patch` share: which features, and running, printing and writing down what a plan does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.core.errors import UserError
from vlmscope.core.intervention import MODES
from vlmscope.core.records import FeatureId

if TYPE_CHECKING:
    from torch import Tensor

    from vlmscope.circuits.circuit import Circuit
    from vlmscope.core.graph import AttributionGraph
    from vlmscope.core.intervention import Change, Effect, Supernode
    from vlmscope.interventions.edits import Plan
    from vlmscope.models.base import ModelInputs
    from vlmscope.models.batching import InputBatch
    from vlmscope.scope import Scope
    from vlmscope.tasks.context import RunContext

TOP = 5  # next tokens that are shown


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
        from vlmscope.core.errors import check_choice

        check_choice("task.mode", self.mode, (*MODES, "all"))
        for key, least in (("top", 1), ("controls", 0), ("new_tokens", 1)):
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)}: it must be at least {least}")

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes to run, the strongest last."""
        return MODES if self.mode == "all" else (self.mode,)


@dataclass(frozen=True)
class Chosen:
    """Features to edit, and what they were taken from.

    Attributes:
        features: each once.
        source: the path of a graph or circuit; "" where features were named.
        graph: that they were taken from.
        circuit: that they were taken from.
        nodes: of the circuit; they may say at which positions they are meant.
    """

    features: list[FeatureId]
    source: str = ""
    graph: AttributionGraph | None = None
    circuit: Circuit | None = None
    nodes: tuple[Supernode, ...] = ()

    def check_fits(self, scope: Scope) -> None:
        """Refuse a graph or circuit of another model or set.

        Raises:
            UserError: it is of another one.
        """
        from vlmscope.circuits.selectors import check_graph

        widths = scope.transcoders.widths
        if self.circuit is not None:
            self.circuit.check_fits(scope.vlm.name, widths, self.source)
        if self.graph is not None:
            n_layers = scope.adapter.n_layers
            if self.graph.n_layers != n_layers:
                layers = f"{self.graph.n_layers} layers, this one has {n_layers}"
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


def report_edit(
    name: str,
    scope: Scope,
    inputs: ModelInputs,
    plan: Plan,
    matched_on: Sequence[InputBatch],
    task: EditConfig,
    context: RunContext,
    seed: int = 0,
) -> dict[str, float]:
    """Run a plan on one prompt in the chosen modes, print it, and write `<run_dir>/<name>.json`.

    Args:
        name: 'steer' or 'patch', the first part of the metrics' names.
        scope: the model and its transcoders.
        inputs: the prompt.
        plan: edits by layer.
        matched_on: the prompts on whose mean activations controls are matched.
        task: the options.
        context: of the run.
        seed: under which controls are drawn.

    Returns:
        `<name>/<mode>/kl`, `<name>/<mode>/top1_changed`, each with `_control` (matched features) and, in free mode,
        `_random_direction`; `<name>/features` and how many of them are active there, `<name>/features_active`.
    """
    from vlmscope.core.artifacts import write_json
    from vlmscope.interventions.effects import measure_effect
    from vlmscope.interventions.named import mean_activations
    from vlmscope.interventions.run import base_run, generate_edited

    batch = scope.batch([inputs])
    base = base_run(scope, batch, task.modes)
    means = mean_activations(scope, matched_on, sorted(plan))
    active = sum(int((means[layer][edit.features] > 0).sum()) for layer, edit in plan.items())
    size = sum(len(edit.features) for edit in plan.values())
    metrics = {f"{name}/features": float(size), f"{name}/features_active": float(active)}
    print(f"{size} features in {len(plan)} layers, {active} of them active there")
    written: dict[str, Any] = {"prompt": inputs.prompt, "features": _names(plan), "modes": {}}
    for mode in task.modes:
        effect, logits = measure_effect(scope, batch, base, plan, mode, means, task.controls, seed)
        found = effect_metrics(name, effect)
        rows = top_tokens(scope.vlm.tokenizer, base.logits[0], logits[0])
        print(_described(effect, task.controls), *_table(rows), sep="\n")
        metrics |= found
        written["modes"][mode] = {"metrics": found, "next_token": rows}
    if "free" in task.modes:
        before = generate_edited(scope, inputs, max_new_tokens=task.new_tokens)
        after = generate_edited(scope, inputs, plan, task.new_tokens)
        print(f"answer before: {before}\nanswer after:  {after}")
        written["answer"] = {"before": before, "after": after}
    write_json(context.run_dir / f"{name}.json", written)
    return metrics


def effect_metrics(name: str, effect: Effect) -> dict[str, float]:
    """An effect and its controls under their names."""
    parts = (("", effect.change), ("_control", effect.matched), ("_random_direction", effect.direction))
    return {
        f"{name}/{effect.mode}/{key}{suffix}": getattr(change, key)
        for suffix, change in parts
        if change is not None
        for key in ("kl", "top1_changed")
    }


def top_tokens(tokenizer: Any, before: Tensor, after: Tensor) -> list[dict[str, str | float]]:
    """The `TOP` most probable next tokens of either run, logits [V] each, with both probabilities."""
    from vlmscope.models.base import token_strings

    p, q = before.double().softmax(-1), after.double().softmax(-1)
    ids = dict.fromkeys([*p.topk(min(TOP, len(p))).indices.tolist(), *q.topk(min(TOP, len(q))).indices.tolist()])
    named = zip(token_strings(tokenizer, ids), ids, strict=True)
    return [{"token": token, "before": float(p[i]), "after": float(q[i])} for token, i in named]


def _names(plan: Plan) -> list[str]:
    return [str(FeatureId(layer, index)) for layer, edit in plan.items() for index in edit.features.tolist()]


def _described(effect: Effect, draws: int) -> str:
    def said(change: Change) -> str:
        return f"KL {change.kl:.3g} nats, changed {change.top1_changed:.0%}"

    changed = "changes" if effect.change.top1_changed else "stays"
    lines = [f"\n{effect.mode}: KL {effect.change.kl:.3g} nats, the most probable next token {changed}"]
    if effect.matched is not None:
        lines.append(
            f"  random features, as many, alike in layer and activation ({draws} draws): {said(effect.matched)}"
        )
    if effect.direction is not None:
        lines.append(f"  random directions of the same norm ({draws} draws): {said(effect.direction)}")
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, str | float]]) -> list[str]:
    lines = [f"  {'next token':<16} {'p before':>9} {'p after':>9}"]
    return lines + [f"  {row['token']!r:<16} {row['before']:>9.4f} {row['after']:>9.4f}" for row in rows]
