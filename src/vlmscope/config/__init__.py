"""The configuration: dataclass schemas, their registration with Hydra, and the way from a command line to them."""

from vlmscope.config.schema import AppConfig

__all__ = ["AppConfig"]
