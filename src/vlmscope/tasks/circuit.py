"""A circuit, declared or found by pairs=: its supernodes, the edges between them, and a diagram (docs/circuits.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.circuits.spec_config import CircuitSpecConfig
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

USES = (
    "attribution",
    "circuit",
    "circuit_spec",
    "data",
    "discovery",
    "images",
    "interchange",
    "intervention",
    "pairs",
    "study",
)
MEMORY = "attribution.max_nodes, attribution.batch_size, attribution.memory_gb or task.traces"


@dataclass
class Config:
    """What is traced is `prompt=` on `image=`, every row of `rows` (a CSV or JSONL file), or the spec's own inputs.

    `load` draws a saved circuit (`/run/circuits/name`) instead of finding one; with inputs its edges are theirs.
    Without `load` and without supernodes in a circuit_spec, `pairs=` finds the circuit (`discovery`), and `traces` of
    its training pairs' originals are traced where no input is given.
    Edges go to the `answers` most probable answers; those of at least `min_share` of what a target takes in are drawn.
    `study.path=` names a study from which pictures of features are taken; without one they come from the inputs and,
    for Orrery, from its scenes.
    """

    load: str | None = None
    rows: str | None = None
    answers: int = 1
    traces: int = 8
    min_share: float = 0.005
    figure: bool = True

    def __post_init__(self) -> None:
        if self.answers < 1:
            raise UserError(f"task.answers={self.answers}: it must be at least 1")
        if self.traces < 1:
            raise UserError(f"task.traces={self.traces}: it must be at least 1")
        if not 0 <= self.min_share < 1:
            raise UserError(f"task.min_share={self.min_share}: it is a share; choose a number from 0 to below 1")


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write circuits/<name>/, graph.safetensors, circuit.json, figures/circuit.png and report.html.

    A circuit that is found also leaves discovery.json and its figures.
    """
    from pathlib import Path

    from vlmscope.config.resolve import declared_circuit
    from vlmscope.tasks.circuits.inputs import traced_inputs
    from vlmscope.tasks.label import look_for_labels

    look_for_labels(cfg)
    spec = None if cfg.circuit_spec is None else declared_circuit(cfg.circuit_spec)
    check_source(cfg, spec)
    asked = traced_inputs(cfg, spec)

    # These import torch: what can be told without it has been.
    from vlmscope.circuits.circuit import load_circuit
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.tasks.circuits.discover import draw_found
    from vlmscope.tasks.circuits.find import Finder, gather
    from vlmscope.tasks.circuits.finish import finished, traced
    from vlmscope.tasks.circuits.page import Scene
    from vlmscope.tasks.wiring import load_model, load_scope

    folder = None if cfg.task.load is None else Path(cfg.task.load)
    loaded = None if folder is None else load_circuit(folder)
    found = loaded is None and (spec is None or not spec.supernodes)
    if not found and not asked and (loaded is None or not loaded.edges):
        raise UserError("nothing to trace: add prompt= (and image=), task.rows=FILE, or inputs in the circuit_spec")
    material = None if found or spec is None or loaded is not None else gather(cfg, spec, asked)
    contrasts = [] if spec is None else [node.contrast for node in spec.supernodes.values() if node.contrast]
    if cfg.pairs is not None and not found and not any(one.pairs for one in contrasts):
        print("pairs= finds circuits; this one is declared or loaded, so they are not used")
    study = None if cfg.study.path is None else StudyFolder(cfg.study.path)
    if found:
        return draw_found(cfg, context, asked, study)
    vlm = load_model(cfg)
    scope = load_scope(cfg, vlm, context.overrides)
    if loaded is not None:
        loaded.check_fits(vlm.name, scope.transcoders.widths, str(folder))
    graphs = traced(cfg, context, scope, asked)
    if loaded is None or folder is None:
        assert spec is not None and material is not None
        circuit = Finder(scope, material, [one.graph for one in graphs]).circuit(spec)
        name = spec.name
    else:
        circuit, name = loaded, folder.name
    scene = Scene(scope, asked, graphs, [] if material is None else material.inputs())
    return finished(cfg, context, circuit, name, scene, study)


def check_source(cfg: AppConfig, spec: CircuitSpecConfig | None) -> None:
    """Refuse a run that names no circuit, several, or pairs that cannot find one; quick, without a model.

    Raises:
        UserError: it does.
    """
    from vlmscope.data.pairs import check_choosing

    if cfg.task.load is not None:
        if spec is not None and spec.supernodes:
            raise UserError("task.load= brings a circuit and circuit_spec= declares one; leave one of them out")
        return
    if spec is None and cfg.pairs is None:
        raise UserError(
            "no circuit: find one with pairs=planet, declare one with circuit_spec=red_mars or circuit_spec=file "
            "circuit_spec.path=my.yaml, or load one with task.load=/run/circuits/name"
        )
    if spec is not None and not spec.supernodes and cfg.pairs is None:
        raise UserError(
            "the circuit_spec has no supernodes; docs/circuits.md shows how to declare them; pairs=planet finds some"
        )
    if cfg.pairs is not None and (spec is None or not spec.supernodes):
        check_choosing(cfg.pairs)
