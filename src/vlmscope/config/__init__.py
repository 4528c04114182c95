"""The configuration: dataclass schemas, their registration with Hydra, and all between a command line and them."""

from vlmscope.config.schema import AppConfig

__all__ = ["AppConfig"]
