"""The settings of every task, and what the program needs to know of a task before it imports it; free of torch."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from vlmscope import tasks
from vlmscope.circuits.config import EditConfig
from vlmscope.config import AppConfig
from vlmscope.config.wiring import look_for_labels, study_sources
from vlmscope.core.errors import UserError, check_choice, check_least
from vlmscope.core.launch import import_quickly
from vlmscope.core.study import study_folder
from vlmscope.data.orrery.scenes import COUNTS
from vlmscope.models.eyes import EyesConfig
from vlmscope.models.orrery import OrreryConfig
from vlmscope.tracking import TrackedRun
from vlmscope.training.config import BatchConfig, EyesTrainingConfig, OrreryTrainingConfig, RecipeConfig
from vlmscope.transcoders.config import FORMAT_NAMES

# Groups of settings that only some tasks read; all others (model, trainer, tracking, ...) are for every task.
OPTIONAL = (
    "data", "optim", "attribution", "intervention", "interchange", "discovery", "study", "where", "trials", "settings",
    "association", "circuit", "circuit_spec", "pairs", "images", "query", "analyses", "analysis", "report", "headline",
    "paper", "figure",
)  # fmt: skip


SUBJECTS = {"intervention": "circuit", "interchange": "pairs", "discovery": "pairs"}  # groups that say nothing alone
# Settings on which no result depends: where a run is recorded, and how it is shown and judged.
_SHOWN = ("tracking", "report", "headline", "paper", "figure", "name", "reproduce", "prompt_file", "prompt_name")
_SHOWN += ("experiment_file",)
_FREE = {"trainer": {"checkpoint_every", "log_every", "val_every", "threads", "resume", "rank_timeout"}}
_WHOLE = ("task", "model", "transcoder", "optim", "trainer")  # of these, defaults are parameters too
_NOTHING = (None, {}, [], "")


@dataclass(frozen=True)
class RunContext:
    """One run: its folder (it exists), where it is tracked, and the overrides that the user typed.

    `job` names the run by its settings within a sweep, "" outside of one.
    """

    run_dir: Path
    tracked: TrackedRun
    overrides: tuple[str, ...] = ()
    job: str = ""


class Settings:
    """`recorded` is False for a task that only prints: it gets no configuration file, metrics or tracked run.

    `ranks` is True for one that several processes can run together (docs/scaling.md), `resumes` for one that always
    resumes in its folder. `memory` names the settings to lower when memory runs out, `uses` the groups of `OPTIONAL`
    that it reads. `module` is the file of several tasks, in which a task is the function `run_<task>`; any other has a
    file of its own, in which it is `run`.
    """

    module: ClassVar[str] = ""
    uses: ClassVar[tuple[str, ...]] = ()
    memory: ClassVar[str] = ""
    recorded: ClassVar[bool] = True
    ranks: ClassVar[bool] = False
    resumes: ClassVar[bool] = False

    def look(self, app: AppConfig) -> None:
        """Refuse files that are missing, before the task and torch with it are imported, which takes seconds."""
        if "attribution" in self.uses:
            look_for_labels(app)
        if "study" in self.uses and app.study.path is not None:
            study_folder(app.study.path)


def run_task(app: AppConfig, context: RunContext) -> dict[str, float]:
    """Import the task, which may take seconds, and run it; returns flat metrics."""
    app.task.look(app)
    name = f"{tasks.__name__}.{app.task.module or app.task.name}"
    import_quickly(name)
    return getattr(sys.modules[name], f"run_{app.task.name}" if app.task.module else "run")(app, context)


def check_used(task: Settings, name: str, overrides: Sequence[str]) -> None:
    """Refuse settings that would change nothing, as in `task=trace study.limit=5`."""
    for override in overrides:
        group = override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
        if group in OPTIONAL and group not in task.uses:
            raise UserError(f"{override}: task={name} does not use {group}; leave it out")


def used_settings(app: AppConfig) -> dict[str, Any]:
    """The settings that this run can use, for config.yaml and MLflow."""
    unused = {key for key in OPTIONAL if key not in app.task.uses or getattr(app, key) in (None, {}, [])}
    unused |= {key for key, subject in SUBJECTS.items() if subject in unused} | {"limits"}  # which were applied
    return {key: value for key, value in asdict(app).items() if key not in unused}


def run_parameters(app: AppConfig) -> dict[str, Any]:
    """The settings that decide this run's result, for MLflow, where runs are compared; config.yaml has all.

    A setting without a value is left out, and so is the default of a group that only tunes the task.
    """
    unused = {*_SHOWN, *(() if "optim" in app.task.uses else ("trainer",))}
    kept = {}
    for key in used_settings(app).keys() - unused:
        value = _chosen(getattr(app, key), key in _WHOLE)
        if key in _FREE:
            value = {name: item for name, item in value.items() if name not in _FREE[key]}
        if value not in _NOTHING:
            kept[key] = value
    return kept


def _chosen(value: Any, whole: bool) -> Any:
    """Settings as plain mappings without empty values; and, unless `whole`, without those that equal their default."""
    if is_dataclass(value):
        value = {
            item.name: getattr(value, item.name)
            for item in fields(value)
            if whole or getattr(value, item.name) != _default(item)
        }
    if not isinstance(value, Mapping):
        return value
    inner = {key: _chosen(item, whole) for key, item in value.items()}
    return {key: item for key, item in inner.items() if item not in _NOTHING}


def _default(item: Any) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default


@cache
def summaries() -> dict[str, str]:
    """Name and one-line description of every task, read from the source without importing it."""
    lines: dict[str, str] = {}
    for name, task in TASKS.items():
        file = f"{task.module or name}.py"
        path = next(path for folder in tasks.__path__ if (path := Path(folder) / file).is_file())
        tree: Any = ast.parse(path.read_text(encoding="utf-8"))
        if task.module:
            tree = next(node for node in tree.body if getattr(node, "name", "") == f"run_{name}")
        lines[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return lines


@dataclass
class AnatomySettings(Settings):
    """`rows` is a CSV or JSONL file of the user's cases (docs/anatomy.md); without it Orrery's questions are asked.

    At most `cases` of each question; `parts` equal ranges of layers; `graphs` of each question, 0 for none.
    """

    uses: ClassVar = ("attribution",)
    memory: ClassVar = "task.cases"
    rows: str | None = None
    cases: int = 64
    parts: int = 2
    graphs: int = 2

    def __post_init__(self) -> None:
        check_least("task", self, cases=2, parts=1, graphs=0)


@dataclass
class BuildDataSettings(Settings):
    """Contents of `data.path`.

    With data=orrery or orrery2: scenes of each kind of `data.scenes` in each split. A mix is written in `parts` parts a
    source, by `workers` processes (None: one a core, four at most).
    """

    uses: ClassVar = ("data",)
    memory: ClassVar = "task.shard_size or task.workers"
    train: dict[str, int] = field(default_factory=lambda: dict(COUNTS["train"]))
    val: dict[str, int] = field(default_factory=lambda: dict(COUNTS["val"]))
    test: dict[str, int] = field(default_factory=lambda: dict(COUNTS["test"]))
    shard_size: int = 1000
    parts: int = 4
    workers: int | None = None


@dataclass
class CheckSettings(Settings):
    """Sizes of the checks; larger sets are sampled with `seed=`.

    `targets` features get a row of edges (total effects need all of them), `sources` features are changed one by one,
    `positions` are changed in the Hugging Face model, answers have `new_tokens`. Whether answers need MLPs is asked of
    `cases` of one question (docs/anatomy.md; 0: not asked).
    """

    targets: int = 5000
    sources: int = 16
    positions: int = 6
    new_tokens: int = 6
    cases: int = 32

    def __post_init__(self) -> None:
        # The first generated token does not test the cache, so there are at least two.
        check_least("task", self, targets=1, sources=1, positions=1, new_tokens=2, cases=0)


@dataclass
class CircuitSettings(Settings):
    """Traced are `prompt=` on `image=`, every row of `rows` (a CSV or JSONL file), or the spec's own inputs.

    `load` draws a saved circuit (`/run/circuits/name`) instead of finding one; with inputs its edges are theirs.
    Without `load` and without supernodes in a circuit_spec, `pairs=` finds the circuit (`discovery`), and `traces` of
    its training pairs' originals are traced where no input is given.
    Edges go to the `answers` most probable answers; those of at least `min_share` of a target's input are drawn.
    Pictures of features come from the study `study.path=`; without one from the inputs and, for Orrery, its scenes.
    """

    uses: ClassVar = (
        "attribution", "circuit", "circuit_spec", "data", "discovery", "images", "interchange", "intervention",
        "pairs", "study",
    )  # fmt: skip
    memory: ClassVar = "attribution.max_nodes, attribution.batch_size, attribution.memory_gb or task.traces"
    load: str | None = None
    rows: str | None = None
    answers: int = 1
    traces: int = 8
    min_share: float = 0.005
    figure: bool = True

    def __post_init__(self) -> None:
        check_least("task", self, answers=1, traces=1)
        if not 0 <= self.min_share < 1:
            raise UserError(f"task.min_share={self.min_share}: it is a share; choose a number from 0 to below 1")


@dataclass
class CompareSettings(Settings):
    """`first` and `second` are the run folders, or files graph.safetensors, of two traces (docs/graphs.md).

    `names` are the two graphs' names, by default those of their folders; `match` says when nodes are the same: auto,
    position, from_end, role or feature.
    """

    uses: ClassVar = ("attribution",)
    first: str | None = None
    second: str | None = None
    names: list[str] = field(default_factory=list)
    match: str = "auto"
    figure: bool = True


@dataclass
class ConvertSettings(Settings):
    """`to` is the new format, `out` the folder to create for it.

    `dtype` is the stored one; "auto" takes the smallest that holds every number exactly. `license` goes into the card;
    None keeps that of the source's card.
    """

    to: str | None = None
    out: str | None = None
    dtype: str = "auto"
    license: str | None = None

    def __post_init__(self) -> None:
        if self.to is not None:
            check_choice("task.to", self.to, FORMAT_NAMES)
        check_choice("task.dtype", self.dtype, ("auto", "float32", "bfloat16", "float64", "int8"))


@dataclass
class EvaluateSettings(Settings):
    """Validation data as in training: `val_scenes` of each kind of data=orrery; else at most `val_examples` examples,
    each cut at `max_tokens`. `save` writes the usual reconstruction error into the set's folder, by which strange
    pictures and prompts are told (docs/strangers.md): training does so itself.
    """

    uses: ClassVar = ("data",)
    memory: ClassVar = "task.max_tokens or task.val_examples"
    val_scenes: int = BatchConfig.val_scenes
    val_examples: int = BatchConfig.val_examples
    max_tokens: int = BatchConfig.max_tokens
    save: bool = False

    def __post_init__(self) -> None:
        check_least("task", self, val_scenes=1, val_examples=1, max_tokens=1)


@dataclass
class ExperimentSettings(Settings):
    """`study`: an analysis reads a study of all features, that of `study.path` or one made first.

    The experiment itself is in `trials`, `settings`, `analyses`, `analysis` and `report`.
    """

    uses: ClassVar = (
        "data", "attribution", "intervention", "interchange", "discovery", "study", "where", "trials", "settings",
        "association", "circuit", "pairs", "images", "analyses", "analysis", "report", "headline", "paper", "figure",
    )  # fmt: skip
    study: bool = False

    def reads_shards(self, cfg: AppConfig) -> bool:
        """Whether the run goes through the data's shards."""
        return self.study and cfg.study.path is None and cfg.study.published is None

    def look(self, app: AppConfig) -> None:
        """The data's shards too, where an analysis reads them."""
        super().look(app)
        if self.reads_shards(app):
            study_sources(app)


@dataclass
class ExportSettings(Settings):
    """`run` is a folder with a graph.json; graph.html is written next to it.

    `study` is the run of a study that tells what features stand for, `tower_study` of those of the vision tower; by
    default those that come with vlmscope.
    """

    module: ClassVar = "pages"
    recorded: ClassVar = False
    run: str | None = None
    study: str | None = None
    tower_study: str | None = None


@dataclass
class FindSettings(Settings):
    """Settings of a search in `study.path=`, the run folder of a task=study.

    `query` searches labels and the inputs that fire features. With `image=` (and `prompt=`, by default the study's most
    frequent question about a picture), features that are active there and rare elsewhere come first. `hand` is a YAML
    file of labels that replaces the study's own; `count` features are shown with `examples` thumbnails each.
    """

    uses: ClassVar = ("data", "query", "study")
    hand: str | None = None
    count: int = 10
    examples: int = 6
    figure: bool = True

    def __post_init__(self) -> None:
        check_least("task", self, count=1, examples=1)


@dataclass
class LabelSettings(Settings):
    """`study.path=` names the study, the run folder of a task=study; labels are the file `auto` in its `labels/`.

    `shuffled` features per layer are also labelled with shuffled activations, which shows the scores of chance; `kind`
    is the fact whose values alone are scored next to each label (a study without it has no such score).
    """

    uses: ClassVar = ("data", "study")
    shuffled: int = 256
    kind: str = "scene"

    def __post_init__(self) -> None:
        check_least("task", self, shuffled=0)


@dataclass
class ListSettings(Settings):
    """This task has no settings."""

    recorded: ClassVar = False


@dataclass
class PatchSettings(EditConfig, Settings):
    """`features` are those to carry: 'task.features=[L1/7,L2/30]'.

    The donor run has `donor_image` (a path, or a list of as many as in `image=`) and `donor_prompt`, by default the
    recipient's. Both prompts must have the same length. `strength` multiplies the donor's activations.
    """

    module: ClassVar = "edit"
    features: list[str] = field(default_factory=list)
    donor_image: Any = field(default=None, metadata={"paths": True})
    donor_prompt: str | None = field(default=None, metadata={"verbatim": True})
    strength: float = 1.0


@dataclass
class PlanSettings(Settings):
    """The prompt is `tokens` long: by default `images` pictures' soft tokens and `text_tokens` of text.

    Times are those of `device`, one of `MACHINES`.
    """

    uses: ClassVar = ("attribution",)
    tokens: int | None = None
    images: int = 1
    text_tokens: int = 64
    device: str = "h100"

    def __post_init__(self) -> None:
        check_least("task", self, tokens=1, images=0, text_tokens=1)


@dataclass
class ReportSettings(Settings):
    """`run` is the folder of a run of `task=experiment`; its report is written there."""

    module: ClassVar = "pages"
    recorded: ClassVar = False
    run: str | None = None


@dataclass
class ReproduceSettings(Settings):
    """`only` names experiments that say `reproduce: true` (empty: all of them).

    `seeds` repeats each with these seeds and writes the ranges of its numbers; the root key `seed`, that of a run
    without them, is left out of the ranges and held against them if it is one of these.
    """

    resumes: ClassVar = True
    uses: ClassVar = OPTIONAL
    only: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


@dataclass
class ServeSettings(Settings):
    """Serves the run folders below `root` at `host`, by default to this computer alone.

    Another host, such as 0.0.0.0, asks for a random token, which the printed address holds. `port` null takes 8600,
    or a free one where that is in use.
    """

    recorded: ClassVar = False
    root: str = "outputs"
    host: str = "127.0.0.1"
    port: int | None = None

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port < 65536:
            raise UserError(f"task.port={self.port}: choose a port from 0 (any free one) to 65535")


@dataclass
class SteerSettings(EditConfig, Settings):
    """`features` maps names to activations: 'task.features={L1/7: 8.0, L2/30: 0}' (0 switches off).

    `factors` maps names to numbers by which their own activations are multiplied, wherever they are: {L3/1242: 2}.
    Features of `from_graph` or `circuit` are all set to `value`. `positions` are prompt positions to edit; without them
    the edit applies everywhere, generated tokens included, except for supernodes with positions of their own.
    """

    module: ClassVar = "edit"
    features: dict[str, float] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    value: float = 0.0
    positions: list[int] | None = None


@dataclass
class StructureSettings(Settings):
    """`study.path` names the study (docs/structure.md), by default the one shipped with model and transcoders.

    The model runs again over the first `items` rows of the study's data. Two directions count as one from the cosine
    `twin` on. `seed` shuffles pictures.
    """

    uses: ClassVar = ("data", "study")
    memory: ClassVar = "study.forward_tokens or study.batch_size"
    items: int = 1000
    twin: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        check_least("task", self, items=1)
        if not 0 < self.twin < 1:
            raise UserError(f"task.twin={self.twin}: choose a number between 0 and 1")


@dataclass
class StudySettings(Settings):
    """What is kept is in `study=`, the data in `data=`. The files are in `study/` of the run folder.

    `labels` names the features too, as task=label does. `keep` writes a small copy of the study, labels included, to
    `small/` of the run folder: with so many of the strongest and of the drawn examples of each feature.
    """

    uses: ClassVar = ("data", "study")
    ranks: ClassVar = True
    memory: ClassVar = "study.forward_tokens (which a resumed study may change), study.batch_size or study.top"
    labels: bool = False
    keep: int | None = None

    def __post_init__(self) -> None:
        check_least("task", self, keep=1)

    def look(self, app: AppConfig) -> None:
        """The data, where the study is made of them."""
        if app.study.path is None and app.study.published is None:
            study_sources(app)


@dataclass
class TraceSettings(Settings):
    """Settings of the graph and its targets are in `attribution=` (docs/attribution.md).

    `figure` draws the pruned graph too. One more forward with `others` pictures tells whether the answer needs MLPs
    (docs/anatomy.md; 0: not asked). `page` writes graph.html too: the graph to click through, with examples of the 40
    most influential features, in one file. `rows` is a CSV or JSONL file of many prompts with their pictures
    (docs/graphs.md); with `skip_bad` rows that cannot be traced are left out and counted.
    """

    uses: ClassVar = ("attribution",)
    ranks: ClassVar = True  # several processes can make a graph together
    memory: ClassVar = "attribution.max_nodes, attribution.batch_size or attribution.memory_gb"
    figure: bool = True
    page: bool = False
    others: int = 8
    rows: str | None = None
    skip_bad: bool = False


@dataclass
class TrainEyesSettings(Settings):
    """Sizes, text model and stages; the pictures are those of `assets/eyes_pictures`."""

    module: ClassVar = "train"
    memory: ClassVar = "task.training.tower.batch"
    architecture: EyesConfig = field(default_factory=EyesConfig)
    training: EyesTrainingConfig = field(default_factory=EyesTrainingConfig)


@dataclass
class TrainOrrerySettings(Settings):
    """Sizes and stages. `max_steps`, when set, shortens each stage (for a try). The data are Orrery's scenes."""

    module: ClassVar = "train"
    uses: ClassVar = ("data",)
    memory: ClassVar = "task.training.vlm.batch"
    architecture: OrreryConfig = field(default_factory=OrreryConfig)
    training: OrreryTrainingConfig = field(default_factory=OrreryTrainingConfig)
    max_steps: int | None = None
    test_scenes: int | None = None


@dataclass
class TrainTranscodersSettings(RecipeConfig, BatchConfig, Settings):
    """Batches (`BatchConfig`) and the recipe (`RecipeConfig`). Sizes: transcoder=arch, optim, trainer.

    `license` goes into the set's card: an identifier of the hub, such as apache-2.0.
    """

    module: ClassVar = "train"
    uses: ClassVar = ("data", "optim")
    ranks: ClassVar = True
    memory: ClassVar = (
        "task.micro_tokens (which a resumed training may change), task.tokens_per_batch or transcoder.expansion_factor"
    )
    license: str = "unknown"

    def __post_init__(self) -> None:
        RecipeConfig.__post_init__(self)
        BatchConfig.__post_init__(self)


@dataclass
class WhereSettings(Settings):
    """`features` are ids such as [L5/123,L6/7], by default the `top` strongest ones on the soft tokens.

    `figure` draws the maps over the picture. With `curves` each map is tested by deletion and insertion on this picture
    (docs/where.md).
    """

    uses: ClassVar = ("attribution", "where")
    features: list[str] = field(default_factory=list)
    top: int = 3
    figure: bool = True
    curves: bool = False


def _task_name(settings: type) -> str:
    """`train_eyes` of `TrainEyesSettings`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", settings.__name__.removesuffix("Settings")).lower()


TASKS: dict[str, type[Settings]] = {_task_name(settings): settings for settings in Settings.__subclasses__()}
