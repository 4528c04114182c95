"""A layer's trainer as it is before its first step, for benchmarks of a step."""

from torch import Tensor

from vlmscope.training.layer_trainer import LayerTrainer
from vlmscope.transcoders.config import TranscoderConfig


def started(d_model: int, n_features: int, k: int, x: Tensor, y: Tensor) -> LayerTrainer:
    """Standardised and started from samples of inputs and targets [N, d], as `TranscoderModule` does."""
    trainer = LayerTrainer(TranscoderConfig(d_model, n_features, k)).to(x.device)
    trainer.standardise(x, y)
    standard_x, standard_y = trainer.standard.apply(x, y)
    trainer.start(standard_x, [standard_y], 0)
    return trainer
