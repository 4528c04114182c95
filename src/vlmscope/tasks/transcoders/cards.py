"""The card of a set that was just trained, from the run's settings and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.training.config import TranscoderTrainingConfig
    from vlmscope.transcoders.transcoder import TranscoderSet

_DATA, _SHARE = "data/", "/tokens_share"
# What a card's table leaves out: it stands elsewhere in the card, or says how a run is watched.
_SKIPPED = {"k", "activation", "skip", "cross_layer", "data", "checkpoint_every", "val_every", "log_every"}


def training_card(
    cfg: AppConfig, settings: TranscoderTrainingConfig, transcoders: TranscoderSet, metrics: Mapping[str, float]
) -> str:
    """The text of the set's README.md.

    The tokens of training (`train/tokens`) are divided by the shares of what was drawn (`data/<source>/tokens_share`);
    without shares they are all of the data that the configuration names.
    """
    from vlmscope.core.hub import is_hub_id
    from vlmscope.transcoders.hub import facts_of_set, render, with_metrics

    model = cfg.model
    hub = model.hub or (model.path if model.tiny is None and is_hub_id(model.path) else None)
    facts = with_metrics(facts_of_set(transcoders), metrics)
    total = metrics.get("train/tokens", 0.0)
    shares = {name[len(_DATA) : -len(_SHARE)]: share for name, share in metrics.items() if name.endswith(_SHARE)}
    data = {name: round(share * total) for name, share in (shares or {cfg.data.name: 1.0}).items()} if total else {}
    told = {name: value for name, value in asdict(settings).items() if name not in _SKIPPED}
    return render(
        replace(
            facts,
            base_model=hub or facts.base_model,
            base_revision=model.revision,
            license=cfg.task.license,
            data=data,
            settings={name: list(value) if isinstance(value, tuple) else value for name, value in told.items()},
        )
    )
