"""Nonlinearities by name: each chooses which features may be active and maps their pre-activations to activations."""

from collections.abc import Callable

from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import TranscoderConfig
from vlmscope.transcoders.nonlinearities.base import Nonlinearity
from vlmscope.transcoders.nonlinearities.batch_topk import BatchTopK
from vlmscope.transcoders.nonlinearities.jump_relu import JumpReLU
from vlmscope.transcoders.nonlinearities.relu import ReLU
from vlmscope.transcoders.nonlinearities.topk import TopK

NONLINEARITIES: dict[str, Callable[[TranscoderConfig], Nonlinearity]] = {
    "batchtopk": lambda config: BatchTopK(config.k, config.n_features),
    "jumprelu": lambda config: JumpReLU(config.n_features, config.bandwidth),
    "relu": lambda _config: ReLU(),
    "topk": lambda config: TopK(config.k),
}


def activation_has_threshold(name: str) -> bool:
    """Whether the nonlinearity of this name stores thresholds."""
    return name in ("batchtopk", "jumprelu")


def build_nonlinearity(config: TranscoderConfig) -> Nonlinearity:
    """The nonlinearity named by `config.activation`.

    Raises:
        UserError: for a name that is not registered.
    """
    try:
        return NONLINEARITIES[config.activation](config)
    except KeyError:
        known = ", ".join(sorted(NONLINEARITIES))
        raise UserError(f"unknown activation {config.activation!r} of a transcoder; choose one of: {known}") from None
