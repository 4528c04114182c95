"""Schema of the whole configuration: one dataclass per group, so that Hydra refuses unknown keys.

Components keep the dataclasses of their own settings next to their code (`attribution`, `tracking`, each task); several
tasks read those defined here. Defaults suit two CPU cores.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

from vlmscope.attribution.config import AttributionConfig, WhereConfig
from vlmscope.circuits import config as circuits
from vlmscope.core.errors import UserError, check_choice
from vlmscope.core.results import WIDEST, Number, Rate, toothless
from vlmscope.data.config import DataConfig, PairsConfig, PromptSetConfig
from vlmscope.features.config import CrossModalConfig, StudyConfig
from vlmscope.tracking import TrackingConfig
from vlmscope.training.config import OptimConfig, TrainerConfig
from vlmscope.transcoders.config import ACTIVATIONS, FORMAT_NAMES


@dataclass
class ModelConfig:
    """The vision-language model, its device and its dtype (docs/models.md).

    `path` is a local folder; if it is missing, the hub model `hub` is fetched at the commit `revision`. `path` may also
    be a hub id itself, with a `revision`. With an empty path, `family` is that of a small random model, made in memory.
    `offload` is where weights are kept that do not fit the device: "none", "cpu" or "disk".
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

    `path` is a folder, or a hub id with the commit `revision`; `tower` is the folder of a set of the model's vision
    tower, for attribution.tower=true. `format` "auto" detects the format. `width`, `l0` and `affine` select one of the
    several sets in a Gemma Scope folder, as in its folders' names. `stream` keeps encoders and decoders on disk, read
    when they are used; None does so where the set would not fit into memory. `n_features` of a
    layer and `k` are what task=plan counts with as long as the set is not here.
    """

    path: str = MISSING
    format: str = "auto"
    revision: str | None = None
    width: str | None = None
    l0: str | None = None
    affine: bool | None = None
    n_features: int | None = None
    k: int | None = None
    tower: str | None = None
    stream: bool | None = None

    def __post_init__(self) -> None:
        check_choice("transcoder.format", self.format, ("auto", *FORMAT_NAMES))


@dataclass
class RandomTranscodersConfig:
    """Random transcoders sized for the model; `n_features` None means four times the model's width."""

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
    """The range of one metric of an experiment, both ends included, and its meaning in one line.

    `why` a share or correlation has a range wider than `WIDEST`, which hardly anything misses.
    """

    low: float = MISSING
    high: float = MISSING
    says: str = MISSING
    why: str = ""

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise UserError(
                f"headline: low={self.low:g} and high={self.high:g} leave no range; low must be at most high"
            )
        if not self.says.strip():
            raise UserError(
                f"headline: the range {self.low:g} to {self.high:g} does not say what it means; fill in says"
            )
        if toothless(self.low, self.high) and not self.why.strip():
            raise UserError(
                f"headline: the range {self.low:g} to {self.high:g} is wider than {WIDEST:g}, so a broken build lies "
                "in it too; measure more cases, choose another number, or say in why it has to be"
            )

    def holds(self, value: float | None) -> bool:
        """Whether a measured value is in the range; None and NaN are not."""
        return value is not None and self.low <= value <= self.high


@dataclass
class AppConfig:
    """The whole configuration of a run. Tasks receive it resolved, as instances of these classes.

    `image` is a path or a list of paths on the command line, and a list of paths (or None) in a task. In a task,
    `prompt` holds the text of `prompt_file`, or of the prompt in `prompts` named by `prompt_name`. `query` is the text
    that task=find searches for. `images` names the user's picture sets (files or folders), `association` sets of
    concepts (conf/cross_modal/). `task` and `transcoder` hold the dataclass (or mapping) of the chosen option.
    Field metadata add what types cannot express (config/resolve.py): `verbatim` text, never parsed, and `paths`.
    `analyses` are general analyses (docs/experiments.md) with their settings; `analysis` holds the settings of
    `experiments/<name>.py`. Their own classes check them.
    `experiment_file` is the file of an experiment outside the clone (config/catalog.py).
    `limits` lower settings where a run has them (`debug=fast`): dotted key, with `*` for any key -> maximum (for a
    list, number of entries), or null to delete the key.
    task=reproduce runs experiments with `reproduce`, checks the metrics in `headline` against their ranges, and shows
    them next to `paper`, what the paper reports, and `figure`, a file in the run's figures/.
    """

    task: Any = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transcoder: Any = MISSING
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    intervention: circuits.InterventionConfig = field(default_factory=circuits.InterventionConfig)
    interchange: circuits.InterchangeConfig = field(default_factory=circuits.InterchangeConfig)
    discovery: circuits.DiscoveryConfig = field(default_factory=circuits.DiscoveryConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    where: WhereConfig = field(default_factory=WhereConfig)
    trials: dict[str, circuits.TrialConfig] = field(default_factory=dict)
    settings: dict[str, circuits.SettingConfig] = field(default_factory=dict)
    report: dict[str, circuits.MarkConfig] = field(default_factory=dict)
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)
    experiment_file: str | None = None
    circuit: circuits.CircuitConfig | None = None
    circuit_spec: circuits.CircuitSpecConfig | None = None
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


_SHARES = ("rate", "accuracy", "share", "frac")  # metrics with these name endings are shares of cases


def numbers_of(headline: Mapping[str, HeadlineConfig], metrics: Mapping[str, float | None]) -> tuple[Number, ...]:
    """The headline numbers of a run with their ranges; a metric that the run lacks is None and out of range."""
    numbers = []
    for metric, target in headline.items():
        value, low, high, control = (
            metrics.get(_with_suffix(metric, suffix)) for suffix in ("", "_ci_low", "_ci_high", "_control")
        )
        rate = None if value is None or low is None or high is None else Rate(value, low, high, 0, control)
        # Shown in per cent if value and range lie within 0 and 1, and its name or an interval marks it as a share.
        base = metric.removesuffix("_control")
        whole, _, last = base.rpartition("/")  # of a question or a baseline, the trial's interval says it
        named = any(_with_suffix(name, "_ci_low") in metrics for name in (base, whole)) or last.endswith(_SHARES)
        share = named and target.low >= 0 and target.high <= 1 and (value is None or 0 <= value <= 1)
        numbers.append(Number(metric, target.says, value, target.low, target.high, target.holds(value), share, rate))
    return tuple(numbers)


def _with_suffix(metric: str, suffix: str) -> str:
    """Name of a number that belongs to a metric: `a/rate_ci_low`, but `layers/a_ci_low/layer_07`."""
    name, slash, layer = metric.rpartition("/")
    return f"{name}{suffix}/{layer}" if slash and re.fullmatch(r"layer_\d+", layer) else metric + suffix
