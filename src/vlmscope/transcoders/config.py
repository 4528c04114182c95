"""Settings of a transcoder and of a set, and the set's usual error: records without torch, for Hydra to register."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmscope.core.artifacts import write_text
from vlmscope.core.errors import UserError

FORMAT_NAMES = ("vlmscope", "paper", "circuit_tracer", "clt", "gemma_scope", "sparsify", "sae_lens")  # of sets on disk
# The sites of transcoders in a model, and the tensors that those of a site read and imitate (docs/glossary.md).
HOOKS = {"decoder": ("mlp_in", "mlp_out"), "tower": ("tower_mlp_in", "tower_mlp_out")}
ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu")  # the nonlinearities, in `vlmscope.transcoders.nonlinearities`


@dataclass(frozen=True)
class TranscoderConfig:
    """One layer's transcoder.

    `d_model` is the width of input and output, `n_features` the number of latents, `k` how many may be active at a
    token (the target of training if the activation does not fix the number). `bandwidth` is the width of JumpReLU's
    kernel, which only training uses. `writes` counts the layers that a feature writes to, its own included; more than
    one makes the transcoder cross-layer. The hooks name the tensors that it reads and imitates (`docs/glossary.md`).
    """

    d_model: int
    n_features: int
    k: int
    layer: int = 0
    activation: str = "topk"
    skip: bool = False
    input_hook: str = "mlp_in"
    output_hook: str = "mlp_out"
    bandwidth: float = 0.05
    writes: int = 1

    def __post_init__(self) -> None:
        if self.d_model < 1 or self.n_features < 1:
            raise UserError(
                f"transcoder of layer {self.layer}: d_model {self.d_model} and n_features {self.n_features} must be "
                "positive; correct the configuration"
            )
        if self.writes < 1:
            raise UserError(
                f"transcoder of layer {self.layer}: it writes to {self.writes} layers; it must write to one"
            )
        if not 1 <= self.k <= self.n_features:
            raise UserError(
                f"transcoder of layer {self.layer}: k = {self.k} must lie between 1 and n_features = "
                f"{self.n_features}; choose another k or width"
            )


@dataclass(frozen=True)
class TranscoderSetConfig:
    """What all transcoders of a set share. `n_model_layers` counts all layers of the model, trained or not."""

    n_model_layers: int
    k: int
    activation: str = "topk"
    model_name: str = ""
    input_hook: str = "mlp_in"
    output_hook: str = "mlp_out"

    @property
    def site(self) -> str:
        """The layers that the set belongs to, of `HOOKS`."""
        return "tower" if self.input_hook == HOOKS["tower"][0] else "decoder"


# How far a set's reconstructions usually are from the MLPs' outputs, and how unusual an input is by that measure. Of an
# input, of a role (`image`: its soft tokens; `text`: the other tokens of the prompt) and of a layer, let e = log of the
# mean over tokens of |y - y'|^2, y the MLP's output and y' its reconstruction. Over the validation inputs of the set's
# training, e has a mean and a standard deviation. The score of an input is the mean over the layers of its distances
# from these means, in standard deviations; `limit` is the score that `BEYOND` of the validation inputs exceed.

USUAL_ERROR = "usual_error.csv"  # in a set's folder: a line per role and layer
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
        """Write `USUAL_ERROR` into a set's folder; nothing where no role is known."""
        if not self.roles:
            return
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(_HEAD)
        for role, usual in self.roles.items():
            for layer, mean, std in zip(self.layers, usual.mean, usual.std, strict=True):
                table.writerow([role, layer, usual.inputs, f"{mean:.5g}", f"{std:.5g}", f"{usual.limit:.5g}"])
        write_text(folder / USUAL_ERROR, text.getvalue())


def read_usual_error(folder: Path) -> UsualError | None:
    """The file of a set's folder; None without one.

    Raises:
        UserError: it is damaged.
    """
    path = folder / USUAL_ERROR
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
