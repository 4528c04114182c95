"""The shape of the whole configuration: one dataclass a group, so that Hydra refuses a key that does not exist.

A component with settings of its own keeps its dataclass beside its code (`attribution`, `tracking`, each task);
the ones here are read by several tasks. Defaults are values that suit two CPU cores.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

from vlmscope.attribution.config import AttributionConfig, WhereConfig
from vlmscope.circuits.config import (
    CircuitConfig,
    CircuitSpecConfig,
    DiscoveryConfig,
    InterchangeConfig,
    InterventionConfig,
    MarkConfig,
    SettingConfig,
    TrialConfig,
)
from vlmscope.core.errors import UserError, check_choice
from vlmscope.core.results import Number, Rate
from vlmscope.data.config import DataConfig, PairsConfig, PromptSetConfig
from vlmscope.features.config import CrossModalConfig, StudyConfig
from vlmscope.tracking import TrackingConfig
from vlmscope.training.config import OptimConfig, TrainerConfig
from vlmscope.transcoders.config import ACTIVATIONS, FORMAT_NAMES


@dataclass
class ModelConfig:
    """Which vision-language model, and where and how it computes (docs/models.md).

    `path` is a local folder; `hub` says which model of the Hugging Face hub belongs there and is fetched at the commit
    `revision` when it is not there. A hub id may stand as `path` itself, with a `revision`. With an empty path,
    `family` names the family of a small random model, made in memory. `offload` says where weights rest that do not fit
    the device: "none", "cpu" or "disk".
    """

    name: str = MISSING
    path: str = MISSING
    hub: str | None = None
    revision: str | None = None
    family: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    offload: str = "none"

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, ("float32", "bfloat16", "float16", "float64"))
        check_choice("model.offload", self.offload, ("none", "cpu", "disk"))
        if self.family is None and not self.path:
            raise UserError("model.path is empty; give the folder of a model, as in model.path=/folder/of/the/model")
        if self.family is not None and self.path:
            raise UserError(f"model.family={self.family}, model.path={self.path}: these are two models; leave one out")
        if self.family is not None and self.offload != "none":
            raise UserError(f"model.offload={self.offload}: a tiny model is made in memory; leave it out")


@dataclass
class TranscoderSetConfig:
    """A trained transcoder set (docs/formats_transcoders.md).

    `path` is a folder, or a hub id with the commit `revision`. `format` "auto" takes what lies in the folder. `width`,
    `l0` and `affine` choose among the several sets of a folder of Gemma Scope, as in its folders' names.
    """

    path: str = MISSING
    format: str = "auto"
    revision: str | None = None
    width: str | None = None
    l0: str | None = None
    affine: bool | None = None

    def __post_init__(self) -> None:
        check_choice("transcoder.format", self.format, ("auto", *FORMAT_NAMES))


@dataclass
class RandomTranscodersConfig:
    """Random transcoders, sized for the model. `n_features` None takes four times the model's width."""

    seed: int = II("seed")
    n_features: int | None = None
    k: int = 8
    activation: str = "topk"
    skip: bool = False
    cross_layer: bool = False

    def __post_init__(self) -> None:
        check_choice("transcoder.activation", self.activation, ACTIVATIONS)


@dataclass
class HeadlineConfig:
    """Where one metric of an experiment must lie, both ends included, and what it means, in one line."""

    low: float = MISSING
    high: float = MISSING
    says: str = MISSING

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise UserError(
                f"headline: low={self.low:g} and high={self.high:g} leave no range; low must be at most high"
            )
        if not self.says.strip():
            raise UserError(
                f"headline: the range {self.low:g} to {self.high:g} does not say what it means; fill in says"
            )

    def holds(self, value: float | None) -> bool:
        """Whether a measured value lies in the range; one that is missing or not a number does not."""
        return value is not None and self.low <= value <= self.high


@dataclass
class AppConfig:
    """Everything that one run is told. Tasks receive it resolved, as real instances of these classes.

    `image` is a path or a list of paths on the command line and always a list of paths (or None) in a task; `prompt`
    holds the text of `prompt_file`, or the prompt of `prompts` that `prompt_name` names; `query` is what task=find
    looks for. `images` names the user's own picture sets, `association` sets of concepts (conf/cross_modal/).
    `task` and `transcoder` hold the dataclass (or mapping) of the chosen option; `circuit`, `circuit_spec`,
    `prompts` and `pairs` may be None.
    The metadata say what the types cannot (config/resolve.py): `verbatim`, a text that nobody parses, and `paths`.
    `analyses` names general analyses (docs/experiments.md) with their settings; `analysis` holds the settings of
    `experiments/<name>.py`. Their own classes check them.
    `limits` lower settings wherever a run has them (`debug=fast`): a dotted key, in which `*` is any key -> the most
    (of a list: entries), or null to leave the key out.
    An experiment with `reproduce` is run by task=reproduce, which holds the metrics named in `headline` against their
    ranges and shows them beside `paper`, what the paper reports, and `figure`, a file of its figures/.
    """

    task: Any = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transcoder: Any = MISSING
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    intervention: InterventionConfig = field(default_factory=InterventionConfig)
    interchange: InterchangeConfig = field(default_factory=InterchangeConfig)
    discovery: DiscoveryConfig = field(default_factory=DiscoveryConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    where: WhereConfig = field(default_factory=WhereConfig)
    trials: dict[str, TrialConfig] = field(default_factory=dict)
    settings: dict[str, SettingConfig] = field(default_factory=dict)
    report: dict[str, MarkConfig] = field(default_factory=dict)
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)
    circuit: CircuitConfig | None = None
    circuit_spec: CircuitSpecConfig | None = None
    association: dict[str, CrossModalConfig] = field(default_factory=dict)
    prompts: PromptSetConfig | None = None
    pairs: PairsConfig | None = None
    image: Any = field(default=None, metadata={"paths": True})
    prompt: str | None = field(default=None, metadata={"verbatim": True})
    prompt_file: str | None = None
    prompt_name: str | None = None
    query: str | None = field(default=None, metadata={"verbatim": True})
    images: dict[str, list[str]] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    name: str | None = None
    reproduce: bool = False
    paper: str | None = None
    figure: str | None = None
    headline: dict[str, HeadlineConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reproduce and not self.headline:
            raise UserError("reproduce=true needs numbers to check: give headline.<metric> its low, high and says")
        if self.reproduce and not (self.paper or "").strip():
            raise UserError("reproduce=true needs paper: what the paper reports, in a sentence, or: nothing comparable")


_SHARES = ("rate", "accuracy", "share", "frac")  # ends of names of shares of cases


def numbers_of(headline: Mapping[str, HeadlineConfig], metrics: Mapping[str, float | None]) -> tuple[Number, ...]:
    """The headline numbers of a run, each against its range; one that the run does not have is missing, and is out."""
    numbers = []
    for metric, wanted in headline.items():
        value, low, high, control = (
            metrics.get(_beside(metric, end)) for end in ("", "_ci_low", "_ci_high", "_control")
        )
        rate = None if value is None or low is None or high is None else Rate(value, low, high, 0, control)
        # Shown in per cent if value and range lie within 0 and 1, and its name or an interval says that it is a share.
        base = metric.removesuffix("_control")
        named = _beside(base, "_ci_low") in metrics or base.rpartition("/")[2].endswith(_SHARES)
        share = named and wanted.low >= 0 and wanted.high <= 1 and (value is None or 0 <= value <= 1)
        numbers.append(Number(metric, wanted.says, value, wanted.low, wanted.high, wanted.holds(value), share, rate))
    return tuple(numbers)


def _beside(metric: str, end: str) -> str:
    """The name of a number that belongs to a metric: `a/rate_ci_low`, but `layers/a_ci_low/layer_07`."""
    name, slash, layer = metric.rpartition("/")
    return f"{name}{end}/{layer}" if slash and re.fullmatch(r"layer_\d+", layer) else metric + end
