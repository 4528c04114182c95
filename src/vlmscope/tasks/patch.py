"""Carry features' activations from another picture's run into this one: next token and answer, with controls."""

from vlmscope.analyses.edits import chosen_features, report_edit, run_edit
from vlmscope.circuits.operations import Carry
from vlmscope.config import AppConfig
from vlmscope.config.wiring import load_model, load_scope, user_pictures
from vlmscope.core.errors import UserError
from vlmscope.data.images import open_images
from vlmscope.interventions.edits import by_layer
from vlmscope.models.batching import make_batch
from vlmscope.tasks.settings import PatchSettings, RunContext
from vlmscope.training.evaluation import warn_if_strange


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Patch `prompt=` on `image=` with the activations of the donor run."""
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
