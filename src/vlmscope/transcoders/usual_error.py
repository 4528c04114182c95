"""How far a set's reconstructions usually are from the MLPs' outputs, and how unusual an input is by that measure.

Of an input, of a role (`image`: its soft tokens; `text`: the other tokens of the prompt) and of a layer, let
e = log of the mean over tokens of |y - y'|^2, y the MLP's output and y' its reconstruction. Over the validation inputs
of the set's training, e has a mean and a standard deviation. The score of an input is the mean over the layers of its
distances from these means, in standard deviations. `limit` is the score that `BEYOND` of the validation inputs exceed.

The file `usual_error.csv` of a set's folder has a line per role and layer.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmscope.core.artifacts import write_text
from vlmscope.core.errors import UserError

FILE = "usual_error.csv"
ROLES = ("image", "text")
BEYOND = 0.005  # share of validation inputs above the limit of a role
FEWEST = 50  # inputs of a role, below which no limit is known
_HEAD = ("role", "layer", "inputs", "mean", "std", "limit")


@dataclass(frozen=True)
class RoleError:
    """The usual error of a role: of each layer its mean and standard deviation over `inputs`, and the score's limit."""

    inputs: int
    mean: np.ndarray  # [L] float64
    std: np.ndarray  # [L]
    limit: float

    def score(self, errors: np.ndarray) -> np.ndarray:
        """`[..]` scores of errors `[.., L]`."""
        return ((errors - self.mean) / self.std).mean(-1)


@dataclass(frozen=True)
class UsualError:
    """The usual errors by role, of layers in order."""

    layers: tuple[int, ...]
    roles: Mapping[str, RoleError]

    @classmethod
    def of(cls, layers: Sequence[int], errors: Mapping[str, np.ndarray]) -> UsualError:
        """From the errors [inputs, L] of each role; roles of fewer than `FEWEST` inputs are left out."""
        roles = {}
        for role, values in errors.items():
            if len(values) < FEWEST:
                continue
            mean, std = values.mean(0), np.maximum(values.std(0), 1e-6)
            scores = np.sort(((values - mean) / std).mean(1))
            # Of n + 1 equal draws the new one is among the largest k with chance k / (n + 1): at most `BEYOND`.
            roles[role] = RoleError(len(values), mean, std, float(scores[-1 - int(BEYOND * (len(values) + 1))]))
        return cls(tuple(layers), roles)

    def beyond(self, errors: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
        """Score and limit of the roles whose errors [L] of an input lie beyond the limit."""
        scores = {role: float(self.roles[role].score(values)) for role, values in errors.items() if role in self.roles}
        limits = {role: self.roles[role].limit for role in scores}
        return {role: (score, limits[role]) for role, score in scores.items() if score > limits[role]}

    def write(self, folder: Path) -> None:
        """Write `FILE` into a set's folder; nothing where no role is known."""
        if not self.roles:
            return
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(_HEAD)
        for role, usual in self.roles.items():
            for layer, mean, std in zip(self.layers, usual.mean, usual.std, strict=True):
                table.writerow([role, layer, usual.inputs, f"{mean:.5g}", f"{std:.5g}", f"{usual.limit:.5g}"])
        write_text(folder / FILE, text.getvalue())


def read_usual_error(folder: Path) -> UsualError | None:
    """The file of a set's folder; None without one.

    Raises:
        UserError: it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        layers = tuple(dict.fromkeys(int(row["layer"]) for row in rows))
        roles = {}
        for role in dict.fromkeys(row["role"] for row in rows):
            own = [row for row in rows if row["role"] == role]
            if tuple(int(row["layer"]) for row in own) != layers:
                raise ValueError(role)
            mean, std = (np.array([float(row[name]) for row in own]) for name in ("mean", "std"))
            roles[role] = RoleError(int(own[0]["inputs"]), mean, std, float(own[0]["limit"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove it, and task=evaluate task.save=true writes it again") from error
    return UsualError(layers, roles)
