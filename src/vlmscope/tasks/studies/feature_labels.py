"""What features are called, from the labelled study that `attribution.labels=` names: one place for every task."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.core.records import FeatureId
    from vlmscope.transcoders.transcoder import TranscoderSet


def look_for_labels(cfg: AppConfig) -> None:
    """Refuse a study that is not there, before anything heavy is imported.

    Raises:
        UserError: `attribution.labels` names no finished study.
    """
    from vlmscope.core.study import study_folder

    if cfg.attribution.labels is not None:
        study_folder(cfg.attribution.labels)


def feature_labels(cfg: AppConfig, model: str, transcoders: TranscoderSet | None = None) -> dict[FeatureId, str]:
    """Label with score by feature, those no better than chance left out; empty without `attribution.labels`.

    Args:
        cfg: the run's configuration.
        model: the model's name.
        transcoders: whose features these are; None where only graphs are at hand.

    Raises:
        UserError: it is a study of another model or of other transcoders, or has no labels.
    """
    if cfg.attribution.labels is None:
        return {}
    from vlmscope.features.labels.propose import labels_for

    widths = None
    if transcoders is not None:
        widths = transcoders.widths
    return labels_for(cfg.attribution.labels, model, widths).texts()
