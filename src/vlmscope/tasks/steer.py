"""Set features to values of your choice on one prompt: next token and answer before and after, with controls."""

from vlmscope.analyses.edits import Fixed, chosen_features, report_edit, run_edit
from vlmscope.circuits.circuit import at_supernodes
from vlmscope.config import AppConfig
from vlmscope.config.wiring import load_model, load_scope, user_pictures
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.interventions.edits import steer_plan
from vlmscope.tasks.settings import RunContext, SteerSettings


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Steer `prompt=` on `image=` (none for text alone)."""
    if cfg.prompt is None:
        raise UserError("no prompt: add 'prompt=what is this ?' (and image=path/to/picture.png)")
    task: SteerSettings = cfg.task
    values_given = {FeatureId.parse(text): value for text, value in task.features.items()}
    factors = {FeatureId.parse(text): factor for text, factor in task.factors.items()}
    if both := values_given.keys() & factors.keys():
        raise UserError(f"{min(both)} is in task.features and in task.factors; give it one of the two")
    pictures = user_pictures(cfg)
    chosen = chosen_features([*task.features, *task.factors], task)
    vlm = load_model(cfg)
    values = {one: values_given.get(one, task.value) for one in chosen.features if one not in factors}
    inputs = vlm.prepare(cfg.prompt, pictures)
    scope = load_scope(cfg, vlm, context.overrides)
    chosen.check_fits(scope)
    plan = steer_plan(scope, values, len(inputs), task.positions, factors)
    plan = at_supernodes(plan, chosen.nodes, scope.batch([inputs]).places)
    result = run_edit("steer", scope, inputs, Fixed(plan), seed=cfg.seed, **task.runs)
    return report_edit(result, context.run_dir)
