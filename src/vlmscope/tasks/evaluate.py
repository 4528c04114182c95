"""How well do transcoders imitate the model's MLPs on validation data? FVU by layer and kind of token, L0, loss."""

from __future__ import annotations

from functools import partial

from vlmscope.config import AppConfig
from vlmscope.config.wiring import chosen_set, load_model, load_scope, model_origin
from vlmscope.report.figures import fvu_by_layer
from vlmscope.tasks.settings import RunContext
from vlmscope.training.captures import batches_for
from vlmscope.training.config import BatchConfig
from vlmscope.training.evaluation import ErrorMeter, evaluate_transcoders
from vlmscope.transcoders.hub import facts_of_set, figures_of, with_metrics


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Evaluate the set of `transcoder=` on the validation part of `data=`."""
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
