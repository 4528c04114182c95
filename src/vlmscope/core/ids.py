"""Typed identifiers; they become strings only at export and on the command line."""

import re
from typing import NamedTuple

from vlmscope.core.errors import UserError

_FEATURE = re.compile(r"L(\d+)/(\d+)", re.ASCII)


class FeatureId(NamedTuple):
    """One latent of one layer's transcoder. Sorts by layer, then index; prints as `L3/512`."""

    layer: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # a feature id is never searched with tuple.index

    def __str__(self) -> str:
        return f"L{self.layer}/{self.index}"

    @property
    def cantor(self) -> int:
        """The one number that the field's viewers know a feature by: (l + i)(l + i + 1) / 2 + i."""
        return (self.layer + self.index) * (self.layer + self.index + 1) // 2 + self.index

    @classmethod
    def parse(cls, text: str) -> "FeatureId":
        """Read `L3/512` (spaces around it are allowed).

        Raises:
            UserError: when the text is not of that form.
        """
        match = _FEATURE.fullmatch(text.strip())
        if match is None:
            raise UserError(f"not a feature id: {text!r}; write it as L<layer>/<index>, for example L3/512")
        return cls(int(match[1]), int(match[2]))


def parse(text: str) -> FeatureId:
    """The same as `FeatureId.parse`."""
    return FeatureId.parse(text)
