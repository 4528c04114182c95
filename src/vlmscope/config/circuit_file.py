"""A circuit's declaration from a YAML file of the user's own, checked as an option of the group would be."""

from pathlib import Path

from omegaconf import OmegaConf

from vlmscope.circuits.spec_config import CircuitSpecConfig
from vlmscope.config.resolve import CONFIG_ERRORS, one_line
from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError


def declared(given: CircuitSpecConfig) -> CircuitSpecConfig:
    """What the group says, or the file that it names.

    Raises:
        UserError: the file is not there or not such a declaration, or both say something.
    """
    if given.path is None:
        return given
    if given.supernodes:
        raise UserError(f"circuit_spec.path={given.path} and circuit_spec.supernodes: give one of them")
    body = read_yaml(given.path)
    try:
        if not isinstance(body, dict):
            raise UserError(f"{given.path} is no declaration of a circuit; it begins with 'supernodes:'")
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CircuitSpecConfig), body))
    except CONFIG_ERRORS as error:
        raise UserError(f"{given.path}: {one_line(error)}") from error
    except UserError as error:
        raise UserError(str(error).replace("circuit_spec.", f"{Path(given.path).name}: ", 1)) from error
    assert isinstance(merged, CircuitSpecConfig), type(merged)
    return merged
