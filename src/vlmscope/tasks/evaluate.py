"""How well do transcoders imitate the model's MLPs on validation data? FVU by layer and kind of token, L0, loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vlmscope.core.errors import check_least
from vlmscope.training.config import BatchConfig

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

USES = ("data",)
MEMORY = "task.max_tokens or task.val_examples"


@dataclass
class Config:
    """Validation data as in training: `val_scenes` of each kind of data=orrery; else at most `val_examples` examples,
    each cut at `max_tokens`. `save` writes the usual reconstruction error into the set's folder, by which strange
    pictures and prompts are told (docs/strangers.md): training does so itself.
    """

    val_scenes: int = BatchConfig.val_scenes
    val_examples: int = BatchConfig.val_examples
    max_tokens: int = BatchConfig.max_tokens
    save: bool = False

    def __post_init__(self) -> None:
        check_least("task", self, val_scenes=1, val_examples=1, max_tokens=1)


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Evaluate the set of `transcoder=` on the validation part of `data=`."""
    from vlmscope.config.wiring import chosen_set, load_model, load_scope, model_origin
    from vlmscope.report.figures import fvu_by_layer
    from vlmscope.training.captures import batches_for
    from vlmscope.training.evaluation import ErrorMeter, evaluate_transcoders
    from vlmscope.transcoders.hub import facts_of_set, figures_of, with_metrics

    task, states = cfg.task, context.run_dir / "data_states.json"
    batches = BatchConfig(val_scenes=task.val_scenes, val_examples=task.val_examples, max_tokens=task.max_tokens)
    model, origin = partial(load_model, cfg), partial(model_origin, cfg)
    vlm, source = batches_for(cfg.data, batches, cfg.seed, model, states, origin, resume=False)
    scope = load_scope(cfg, vlm, context.overrides)
    meter = ErrorMeter()
    metrics = evaluate_transcoders(scope, source.val, meter)
    if task.save:
        meter.usual().write(chosen_set(cfg)[0])
    fvu_by_layer(metrics, context.run_dir / "figures" / "fvu_by_layer.png")
    print("\n".join(figures_of(with_metrics(facts_of_set(scope.transcoders), metrics))))
    return metrics
