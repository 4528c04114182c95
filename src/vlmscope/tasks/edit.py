"""Edits of features on one prompt: values of your choice, or those of another run."""

from __future__ import annotations

from vlmscope.analyses.edits import Fixed, chosen_features, report_edit, run_edit
from vlmscope.circuits.circuit import at_supernodes
from vlmscope.circuits.operations import Carry
from vlmscope.config import AppConfig
from vlmscope.config.wiring import load_model, load_scope, user_pictures
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.data.images import open_images
from vlmscope.interventions.edits import by_layer, steer_plan
from vlmscope.models.batching import make_batch
from vlmscope.tasks.settings import PatchSettings, RunContext, SteerSettings
from vlmscope.training.evaluation import warn_if_strange


def run_steer(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Set features to values of your choice on one prompt: next token and answer before and after, with controls.

    Steer `prompt=` on `image=` (none for text alone).
    """
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


def run_patch(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Carry features' activations from another picture's run into this one: next token and answer, with controls.

    Patch `prompt=` on `image=` with the activations of the donor run.
    """
    task: PatchSettings = cfg.task
    if cfg.prompt is None:
        raise UserError("no prompt: add 'prompt=what is this ?' (and image=path/to/picture.png)")
    if task.donor_image is None and task.donor_prompt is None:
        raise UserError("no donor: add task.donor_image=path/to/other.png or 'task.donor_prompt=...'")
    pictures = user_pictures(cfg)
    paths = [task.donor_image] if isinstance(task.donor_image, str) else task.donor_image
    donor_pictures = pictures if paths is None else open_images(paths)
    chosen = chosen_features(task.features, task)
    vlm = load_model(cfg)
    inputs = vlm.prepare(cfg.prompt, pictures)
    donor = vlm.prepare(cfg.prompt if task.donor_prompt is None else task.donor_prompt, donor_pictures)
    make_batch(vlm.adapter, [inputs, donor])  # refuses prompts that do not align
    scope = load_scope(cfg, vlm, context.overrides)
    warn_if_strange(scope, [donor.tensors], "the donor's")
    chosen.check_fits(scope)
    carry, donors = Carry(by_layer(scope.transcoders, chosen.features), nodes=chosen.nodes), scope.batch([donor])
    more = {"seed": cfg.seed, "donors": donors, "strength": task.strength}
    return report_edit(run_edit("patch", scope, inputs, carry, **more, **task.runs), context.run_dir)
