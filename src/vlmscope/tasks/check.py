"""Do the identities of docs/maths.md hold on this model? A table of each, to what precision, and the time it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmscope.core.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.models.loading import VLM
    from vlmscope.scope import Scope
    from vlmscope.tasks.context import RunContext


@dataclass
class Config:
    """How much is looked at; what is more is sampled from `seed=`.

    `targets` features get a row of edges (total effects need all of them), `sources` features are changed one by one,
    `positions` are changed in the Hugging Face model, answers have `new_tokens`.
    """

    targets: int = 5000
    sources: int = 16
    positions: int = 6
    new_tokens: int = 6

    def __post_init__(self) -> None:
        for key in ("targets", "sources", "positions"):
            if getattr(self, key) < 1:
                raise UserError(f"task.{key}={getattr(self, key)}: it must be at least 1")
        if self.new_tokens < 2:
            raise UserError(f"task.new_tokens={self.new_tokens}: it must be at least 2, since the first needs no cache")


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Check the model on `prompt=` (it has a default) and `image=` (random pictures fill up)."""
    from tqdm import tqdm

    from vlmscope.conformance.subject import Limits
    from vlmscope.conformance.suite import CASES, PROMPT, failures, flat_metrics, render, run_cases
    from vlmscope.tasks.wiring import load_model, user_pictures

    pictures = user_pictures(cfg)
    vlm = load_model(cfg)
    scope, said = _scope(cfg, vlm, context.overrides)
    adapter, task = vlm.adapter, cfg.task
    limits = Limits(task.targets, task.sources, task.positions, new_tokens=task.new_tokens, seed=cfg.seed)
    cases = run_cases(scope, cfg.prompt or PROMPT, pictures, limits)
    reports = list(tqdm(cases, desc="check", total=len(CASES), unit="case"))
    print(f"{vlm.name}: {adapter.n_layers} layers of width {adapter.d_model}; transcoders: {said}; errors in float64\n")
    print(render(reports, "" if cfg.model.dtype == "float64" else cfg.model.dtype))
    metrics = flat_metrics(reports)
    broken = failures(reports)
    if broken:
        raise CheckFailed(f"{vlm.name} fails {'; '.join(broken)}; do not trust its graphs", metrics)
    return metrics


def _scope(cfg: AppConfig, vlm: VLM, overrides: tuple[str, ...]) -> tuple[Scope, str]:
    """The model with the named set; else with the shipped one for Orrery and a random one for any other model."""
    from vlmscope.config.schema import RandomTranscodersConfig
    from vlmscope.scope import Scope
    from vlmscope.tasks.wiring import is_orrery, load_scope, names_transcoders, random_transcoders

    if not names_transcoders(overrides) and not is_orrery(vlm):
        return Scope(vlm, random_transcoders(RandomTranscodersConfig(seed=cfg.seed), vlm)), "random"
    said = "random" if isinstance(cfg.transcoder, RandomTranscodersConfig) else cfg.transcoder.path
    return load_scope(cfg, vlm), said
