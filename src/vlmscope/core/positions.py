"""Which positions of a prompt are meant: those of a role, or the soft tokens of a part of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox

ROLES = ("special", "image", "question", "last")  # of a prompt's positions
ANSWER = "answer"  # the role of an answer's positions, appended or generated


@dataclass(frozen=True)
class Places:
    """The positions of a prompt, as far as they can be chosen by.

    Attributes:
        roles: `[T]` strings.
        patch_boxes: T entries, None for text; empty where the prompts of a batch see pictures of different shapes.
    """

    roles: np.ndarray
    patch_boxes: Sequence[PatchBox | None] = ()


@dataclass(frozen=True)
class Positions:
    """Positions by role, or by a part of the picture: the union of both.

    Attributes:
        roles: of `ROLES`, or "answer".
        box: soft tokens whose own part of the picture overlaps this one, of every picture of the prompt.
    """

    roles: tuple[str, ...] = ()
    box: PatchBox | None = None

    def mask(self, places: Places) -> np.ndarray:
        """`[T]` bool.

        Raises:
            UserError: a box, where the places of soft tokens are not known.
        """
        found = np.isin(places.roles, self.roles)
        if self.box is None:
            return found
        if len(places.patch_boxes) != len(found):
            raise UserError(
                "positions.box: the pictures have different shapes, so the box has other soft tokens in each; "
                "give pictures of one shape, or positions.roles=[image]"
            )
        return found | np.array([one is not None and overlap(one, self.box) for one in places.patch_boxes], dtype=bool)

    @property
    def generated(self) -> bool:
        """Whether tokens that are generated after the prompt are among them."""
        return ANSWER in self.roles

    def __str__(self) -> str:
        parts = [*self.roles, *(["the box " + " ".join(f"{x:g}" for x in self.box)] if self.box else [])]
        return ", ".join(parts)


def overlap(first: PatchBox, second: PatchBox) -> bool:
    """Whether two parts of a picture have an area in common."""
    across = min(first.right, second.right) > max(first.left, second.left)
    return across and min(first.bottom, second.bottom) > max(first.top, second.top)
