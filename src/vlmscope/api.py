"""The public Python API, for notebooks: load a model with its transcoders, trace, steer, patch, study.

import vlmscope

scope = vlmscope.load("orrery2")                          # the shipped model and its transcoders, also without a name
scope = vlmscope.load("org/vlm", "me/set", revision=commit, transcoder_revision=commit)   # folders or hub ids
traced = vlmscope.trace(scope, "what planet is this ?", "mars.png")
traced.top_features(5)                                    # rows: feature, label, influence, place, ...
traced.to_frame(), traced.to_networkx()                   # the kept nodes as a pandas frame, the graph for networkx
traced.plot(), traced.show()                              # a picture of the graph; its page, to click through
traced.save("outputs/my_trace")                           # the files of task=trace
both = vlmscope.compare(traced, "outputs/trace/earth", names=("mars", "earth"))
changed = vlmscope.steer(scope, "what planet is this ?", "mars.png", {"L3/1242": 0.0})
changed.before, changed.after, changed.controls           # answers and next tokens, next to what chance would do
vlmscope.where(scope, "what planet is this ?", "mars.png", ["L3/1242"]).plot()       # maps over the picture
vlmscope.study(scope, "what planet is this ?", pictures, ["L3/1242"]).plot()         # where the feature fires most
below = vlmscope.load("orrery2", tower="orrery2_tower")   # graphs from the patches on, with features such as T0/1380

Pictures are paths, PIL images or uint8 arrays, one or a list of them. All results show themselves in a notebook.
"""

from __future__ import annotations

import builtins
import inspect
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import pandas as pd
from PIL import Image

from vlmscope.analyses.edits import EditResult, Fixed, run_edit
from vlmscope.attention import WhereMaps, where_maps
from vlmscope.attribution.compare import compare as compare_graphs
from vlmscope.attribution.compare import graph_file
from vlmscope.attribution.config import AttributionConfig, WhereConfig
from vlmscope.attribution.export import load_graph, node_id, save_graph, write_graph_json
from vlmscope.attribution.influence import RankedFeature, ranked_features
from vlmscope.attribution.trace import Trace, target_maps, with_heads, write_target_maps
from vlmscope.attribution.trace import trace as trace_prompt
from vlmscope.circuits.config import modes_of
from vlmscope.circuits.operations import Carry
from vlmscope.config.catalog import option, options
from vlmscope.config.resolve import suggestion
from vlmscope.config.wiring import must_stream
from vlmscope.core.errors import UserError, check_choice
from vlmscope.core.graph import GraphComparison, NodeKind, PictureMap, PrunedGraph
from vlmscope.core.records import FeatureId
from vlmscope.core.results import MODES, FeatureExample, Shown
from vlmscope.data.config import SourceConfig
from vlmscope.data.images import for_figures, png_bytes
from vlmscope.features.config import StudyConfig
from vlmscope.features.labels import scope_labels
from vlmscope.features.readouts import image_features
from vlmscope.features.shipped import shipped_study
from vlmscope.features.study import CaptionedPrompt, study_alone, top_examples
from vlmscope.features.study_files import StudyFolder
from vlmscope.interventions.edits import by_layer, steer_plan
from vlmscope.models.base import stack_of
from vlmscope.models.loading import load_named
from vlmscope.report.graph_figure import attribution_graph
from vlmscope.report.pictures import FeatureRow, feature_maps, feature_sheet
from vlmscope.scope import Pictures, Scope, opened, picture_list
from vlmscope.training.evaluation import check_hooks, warn_if_strange, warn_on_load
from vlmscope.transcoders.formats import Choice, load_set, open_set
from vlmscope.transcoders.hub import set_folder
from vlmscope.transcoders.transcoder import TranscoderSet
from vlmscope.viewer.graphs import export_graph

if TYPE_CHECKING:
    import networkx as nx

Graph: TypeAlias = Trace | PrunedGraph | str | Path  # a path is a run folder or a graph.safetensors
Feature: TypeAlias = str | FeatureId  # "L3/1242"
_WITH_EXAMPLES = 12  # features with examples in the page that `show` makes; each takes a tenth of a second
T = TypeVar("T")
Call = TypeVar("Call", bound=Callable[..., Any])


def _takes(config: type, *more: inspect.Parameter) -> Callable[[Call], Call]:
    """Show the fields of `config`, for which `**settings` stands, in help() and in completion."""

    def shown(function: Call) -> Call:
        signature = inspect.signature(function)
        plain = [item for item in signature.parameters.values() if item.kind != inspect.Parameter.VAR_KEYWORD]
        settings = [
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=_default(item), annotation=item.type)
            for item in fields(config)
        ]
        function.__signature__ = signature.replace(parameters=[*plain, *more, *settings])  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return shown


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _settings(config: type[T], given: Mapping[str, Any]) -> T:
    """An instance of `config`; a name that it does not have is refused as on the command line."""
    known = [item.name for item in fields(config)]  # pyright: ignore[reportArgumentType]
    for name in given:
        if name not in known:
            raise UserError(f"no setting {name!r}; {suggestion(name, known)} (help() shows all)")
    return config(**given)


def _feature(name: Feature) -> FeatureId:
    return name if isinstance(name, FeatureId) else FeatureId.parse(name)


def _picture(draw: Callable[[Path], object], path: str | Path | None) -> Image.Image:
    """What `draw` writes to a PNG file, as a picture; the file stays if `path` is given."""
    with TemporaryDirectory() as folder:
        file = Path(path or Path(folder) / "figure.png")
        draw(file)
        with Image.open(file) as picture:
            return picture.copy()


def _named(group: str, name: str | Path | None) -> dict[str, Any]:
    """The keys of an option of a group, or `path` for a folder or hub id.

    Raises:
        UserError: it is none of these.
    """
    text = str(name or "orrery2")
    found = option(group, text)
    if not found and "/" not in text and not Path(text).exists():
        raise UserError(f"no {group} {text!r}; {suggestion(text, options(group))} A folder or a hub id does as well")
    return found or {"path": text}


def load(
    model: str | Path | None = None,
    transcoders: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    offload: str = "none",
    revision: str | None = None,
    transcoder_revision: str | None = None,
    check: bool = True,
    tower: str | Path | None = None,
    stream: bool | None = None,
) -> Scope:
    """Load a model and a transcoder set, each a folder, a hub id or a name of `task=list`; by default Orrery 2's.

    `tower` is a set of the vision tower, such as "orrery2_tower": then graphs begin at the patches.
    A hub id needs its commit, 40 hexadecimal digits, in `revision` or `transcoder_revision`. `device` is cpu, cuda,
    cuda:N or mps; `offload` places the weights: "none" (on the device), "cpu" or "disk". `check` warns of layers whose
    transcoders have an FVU above 1 on a few hundred tokens. `stream` leaves these on disk (None: if they do not fit).

    Raises:
        UserError: a folder is no model or set, a hub id is not pinned or cannot be fetched, or the set does not fit.
    """
    named = _named("model", model)
    vlm = load_named(named["path"], named.get("hub"), revision or named.get("revision"), dtype, device, offload)
    if transcoders is None and option("transcoder", str(model)):  # orrery: those of its name
        transcoders = model
    adapter = vlm.adapter

    def read(name: str | Path | None, revision: str | None) -> tuple[TranscoderSet, Path | None]:
        """A set that fits the model, and its labelled study."""
        chosen = _named("transcoder", name)
        choice = Choice(*(chosen.get(key) for key in ("width", "l0", "affine")))
        folder = set_folder(chosen["path"], revision or chosen.get("revision"), choice=choice)
        stack = stack_of(adapter, open_set(folder, choice=choice).config.site)
        leave = must_stream(folder, "auto", choice, str(adapter.device), adapter.dtype.itemsize, stream)
        loaded = load_set(folder, stack.n_layers, stack.d_model, choice=choice, stream=leave).requires_grad_(False)
        return loaded.to(adapter.device, adapter.dtype), shipped_study(vlm.path or "", folder, choice=choice)

    below = (None, None) if tower is None else read(tower, None)
    scope = Scope(vlm, *read(transcoders, transcoder_revision), *below)
    check_hooks(scope)
    if check:
        warn_on_load(scope)
    return scope


@dataclass(frozen=True, repr=False)
class _Frame:
    """A page within the output of a notebook's cell."""

    page: Path

    def _repr_html_(self) -> str:
        text = escape(self.page.read_text(encoding="utf-8"))  # whole: a notebook's server does not serve other folders
        return f'<iframe srcdoc="{text}" style="width: 100%; height: 800px; border: 0"></iframe>'


@dataclass(frozen=True, repr=False)
class TraceResult(Trace):
    """A traced prompt with its pictures, and what shows and saves it."""

    labels: Mapping[FeatureId, str] = field(default_factory=dict)  # of the study in the setting `labels`
    pictures: tuple[Image.Image, ...] = ()
    maps: tuple[PictureMap, ...] = ()  # with the setting `patches`: each target over each picture
    settings: AttributionConfig = field(default_factory=AttributionConfig)

    def top_features(self, count: int = 10) -> list[RankedFeature]:
        """The features with most influence on the most probable answer: id, label, influence, position, place."""
        return ranked_features(self.graph, count, self.labels)

    def to_frame(self) -> pd.DataFrame:
        """The nodes that pruning kept, a row each, those with most influence first."""
        graph, nodes, rows = self.graph, self.graph.nodes, []
        for node in self.pruned.node_mask.nonzero()[0].tolist():
            kind, position = NodeKind(int(nodes.kind[node])), int(nodes.position[node])
            feature = nodes.feature_id(node) if kind == NodeKind.FEATURE else None
            rows.append(
                {
                    "id": node_id(graph, node),
                    "kind": kind.name.lower(),
                    "layer": int(nodes.layer[node]),
                    "position": position,
                    "place": graph.place(position) if position >= 0 else "",
                    "feature": "" if feature is None else str(feature),
                    "label": "" if feature is None else self.labels.get(feature, ""),
                    "activation": float(nodes.activation[node]),
                    "influence": float(self.pruned.influence[node]),
                }
            )
        return pd.DataFrame(rows).sort_values("influence", ascending=False, kind="stable", ignore_index=True)

    def plot(self, path: str | Path | None = None) -> Image.Image:
        """A picture of the pruned graph, which a notebook shows; written to `path` (.png) too if given."""
        shown = for_figures(self.pictures)
        return _picture(lambda file: attribution_graph(self.pruned, file, shown, labels=self.labels), path)

    def show(self) -> None:
        """Show the graph's page, to click through: below a notebook's cell, else in the browser.

        The page is `graph.html` of a temporary folder, which is printed; `save` keeps the graph.
        """
        page, _ = export_graph(self.save(mkdtemp(prefix="vlmscope-")), most=_WITH_EXAMPLES)
        print(page)
        display = getattr(builtins, "display", None)  # IPython adds it
        if display is None:
            webbrowser.open(page.as_uri())
        else:
            display(_Frame(page))

    def to_networkx(self) -> nx.DiGraph:
        """The pruned graph: nodes with the columns of `to_frame`, edges with their `weight`, from source to target."""
        import networkx as nx

        graph, network = self.graph, nx.DiGraph(prompt=self.graph.prompt)
        for row in self.to_frame().to_dict("records"):
            network.add_node(row.pop("id"), **row)
        kept = self.pruned.edge_mask.nonzero()[0]
        ends = zip(
            graph.indices[kept].tolist(), graph.targets_of(kept).tolist(), graph.weights[kept].tolist(), strict=True
        )
        network.add_weighted_edges_from((node_id(graph, s), node_id(graph, t), weight) for s, t, weight in ends)
        return network

    def save(self, folder: str | Path) -> Path:
        """Write graph.json, graph.safetensors, figures/graph.png and, if there are maps, patches.safetensors."""
        folder = Path(folder)
        save_graph(folder / "graph.safetensors", self.pruned)
        extra = None
        if self.maps:
            extra = {"patches": write_target_maps(folder / "patches.safetensors", self.maps, self.settings)}
        model = str(self.graph.meta["model"])
        write_graph_json(
            folder / "graph.json", self.pruned, folder.resolve().name, model, self.labels, extra, self.pictures
        )
        self.plot(folder / "figures" / "graph.png")
        return folder

    def _rows(self) -> list[tuple[str, str, str]]:
        names = [(f"{row.feature} {row.label}".strip(), f"{row.share:.1%}", row.place) for row in self.top_features(5)]
        return super()._rows() + [("feature", "share of influence", "strongest at"), *names]


@_takes(AttributionConfig)
def trace(scope: Scope, prompt: str, images: Pictures = (), **settings: Any) -> TraceResult:
    """The attribution graph of a prompt, whole and pruned.

    `settings` are those of `attribution=` (docs/attribution.md). `labels` names features, from the folder of a labelled
    study, by default the one that is shipped with model and transcoders ("none": no labels); `patches=True` follows the
    answer to the parts of each picture.

    Raises:
        UserError: a setting that does not exist, or that does not fit the model or the prompt.
    """
    config = _settings(AttributionConfig, settings)
    pictures = tuple(map(opened, picture_list(images)))
    if config.patches and not pictures:
        raise UserError("patches=True needs a picture; give images=[path or PIL image]")
    labels = scope_labels(scope, config.labels, config.tower_labels)
    inputs = scope.inputs(prompt, pictures)
    warn_if_strange(scope, [inputs.tensors])
    traced = with_heads(scope, trace_prompt(scope, inputs, config), config)
    maps = tuple(target_maps(scope.vlm, traced, config)) if config.patches else ()
    return TraceResult(**vars(traced), labels=labels, pictures=pictures, maps=maps, settings=config)


def compare(
    first: Graph, second: Graph, names: Sequence[str] = ("first", "second"), match: str = "auto"
) -> GraphComparison:
    """Compare two graphs of one model; `match` is the rule by which nodes are the same (docs/graphs.md).

    Raises:
        UserError: a file that is no graph, graphs of different models, or an unknown rule.
    """
    return compare_graphs(_graph(first), _graph(second), names, match)


def _graph(graph: Graph) -> PrunedGraph:
    if isinstance(graph, str | Path):
        return load_graph(graph_file(graph))
    return graph.pruned if isinstance(graph, Trace) else graph


def steer(
    scope: Scope,
    prompt: str,
    images: Pictures,
    features: Mapping[Feature, float],
    positions: Sequence[int] | None = None,
    *,
    mode: str = "free",
    controls: int = 5,
    max_new_tokens: int = 24,
    seed: int = 0,
) -> EditResult:
    """What features do that are set to fixed activations, "L<layer>/<index>" -> activation (0 ablates).

    They are set in the prompt and in every generated token; with `positions` only at these positions of the prompt.
    `mode` is free (nothing else frozen), frozen_attention, direct or all; each of `controls` draws of every control
    takes one forward more.

    Returns:
        A result that prints as the answer, with `.before`, `.after`, `.controls` and `.to_frame()`.

    Raises:
        UserError: an id that cannot be read, or a feature, position or mode that does not exist.
    """
    runs = _runs(mode, controls, max_new_tokens, seed)
    inputs = scope.inputs(prompt, images)
    warn_if_strange(scope, [inputs.tensors])
    if not features:
        raise UserError('no features; give some with their values, such as {"L3/1242": 0.0}')
    plan = steer_plan(scope, {_feature(name): value for name, value in features.items()}, len(inputs), positions)
    return run_edit("steer", scope, inputs, Fixed(plan), **runs)


def patch(
    scope: Scope,
    prompt: str,
    images: Pictures,
    donor_images: Pictures,
    features: Sequence[Feature],
    strength: float = 1.0,
    *,
    mode: str = "free",
    controls: int = 5,
    max_new_tokens: int = 24,
    seed: int = 0,
    donor_prompt: str | None = None,
) -> EditResult:
    """What features do that get their activations on other pictures (and with another prompt), position by position.

    Returns:
        As `steer`.

    Raises:
        UserError: as `steer`, or the two prompts do not align.
    """
    runs = _runs(mode, controls, max_new_tokens, seed)
    donor_prompt = prompt if donor_prompt is None else donor_prompt
    inputs, donor = scope.inputs(prompt, images), scope.inputs(donor_prompt, donor_images)
    scope.batch([inputs, donor])  # refuses prompts that do not align
    warn_if_strange(scope, [inputs.tensors])
    warn_if_strange(scope, [donor.tensors], "the donor's")
    if not features:
        raise UserError('no features; give some, such as ["L3/1242"]')
    carry = Carry(by_layer(scope.transcoders, map(_feature, features)))
    return run_edit("patch", scope, inputs, carry, **runs, donors=scope.batch([donor]), strength=strength)


def _runs(mode: str, controls: int, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """Arguments of `run_edit`, checked."""
    check_choice("mode", mode, (*MODES, "all"))
    for name, value, least in (("controls", controls, 0), ("max_new_tokens", max_new_tokens, 1)):
        if value < least:
            raise UserError(f"{name}={value}: it must be at least {least}")
    return {"modes": modes_of(mode), "controls": controls, "new_tokens": max_new_tokens, "seed": seed}


@dataclass(frozen=True, repr=False)
class WhereResult(Shown, WhereMaps):
    """Maps of features over the pictures of one prompt, and what draws them."""

    pictures: tuple[Image.Image, ...] = ()

    def plot(self, path: str | Path | None = None) -> Image.Image:
        """A row per feature and picture, each map as heat over the picture; written to `path` (.png) too if given."""
        named, shown = {str(feature): maps for feature, maps in self.maps.items()}, for_figures(self.pictures)
        return _picture(lambda file: feature_maps(named, shown, file), path)

    def to_frame(self) -> pd.DataFrame:
        """A row per feature, picture, kind of map and patch: its box, as fractions of the picture, and its value."""
        rows = [
            {"feature": str(feature), "picture": number, "kind": kind, **box._asdict(), "value": float(value)}
            for feature, kinds in self.maps.items()
            for kind, records in kinds.items()
            for number, record in enumerate(records)
            for tile in record.tiles
            for box, value in zip(tile.boxes, tile.values.ravel(), strict=True)
        ]
        return pd.DataFrame(rows)

    def _rows(self) -> list[tuple[str, ...]]:
        frame = self.to_frame()
        rows = [("feature", "map", "strongest in picture", "from the left", "from the top")]
        groups: Any = frame.groupby(["feature", "kind"], sort=False)
        for (feature, kind), part in groups:
            best = part.loc[part.value.idxmax()]
            across, down = (f"{(best[a] + best[b]) / 2:.0%}" for a, b in (("left", "right"), ("top", "bottom")))
            rows.append((str(feature), str(kind), str(best.picture + 1), across, down))
        return rows

    def _title(self) -> str:
        return "Where features look"


@_takes(WhereConfig, inspect.Parameter("top", inspect.Parameter.KEYWORD_ONLY, default=3, annotation="int"))
def where(
    scope: Scope, prompt: str, images: Pictures, features: Sequence[Feature] = (), **settings: Any
) -> WhereResult:
    """Maps of features over the pictures: rollout, similarity, attribution to patches, activation (docs/where.md).

    `features` are ids such as `L6/512`; without any, the `top` (3) with most activation on the soft tokens. `settings`
    are those of `WhereConfig`, and `top`.

    Returns:
        Maps that `.plot()` draws, with `.to_frame()`; `.maps[FeatureId(6, 512)]["vision_path"][0]` is one.

    Raises:
        UserError: the model or the prompt has no picture, or a feature is not active on it.
    """
    pictures = tuple(map(opened, picture_list(images)))
    if not pictures:
        raise UserError("there is no picture to look at; give images=[path or PIL image]")
    top, inputs = settings.pop("top", 3), scope.inputs(prompt, pictures)
    warn_if_strange(scope, [inputs.tensors])
    config = _settings(WhereConfig, settings)
    chosen = [*map(_feature, features)] or [one.feature for one in image_features(scope, scope.batch([inputs]), top)]
    if not chosen:
        raise UserError("no feature is active on the soft tokens of this prompt; choose other transcoders")
    found = where_maps(scope, inputs, chosen, config, AttributionConfig())
    return WhereResult(**vars(found), pictures=pictures)


class StudyResult(Shown, dict[str, tuple[FeatureExample, ...]]):
    """Feature -> the examples on which it is most active, strongest first; a notebook shows them as a table."""

    labels: Mapping[str, str]  # by feature, as far as known

    def __init__(self, found: Mapping[str, tuple[FeatureExample, ...]], labels: Mapping[str, str]) -> None:
        super().__init__(found)
        self.labels = labels

    def plot(self, path: str | Path | None = None, columns: int = 6) -> Image.Image:
        """A row per feature: its pictures with where it fires; written to `path` (.png) too if given."""
        rows = [FeatureRow(name, self.labels.get(name, ""), found) for name, found in self.items()]
        return _picture(lambda file: feature_sheet(rows, file, columns=columns), path)

    def to_frame(self) -> pd.DataFrame:
        """A row per feature and example: its rank, activation and caption."""
        rows = [
            {"feature": name, "rank": rank, "activation": example.activation, "caption": example.caption}
            for name, found in self.items()
            for rank, example in enumerate(found)
        ]
        return pd.DataFrame(rows, columns=["feature", "rank", "activation", "caption"])

    def _rows(self) -> list[tuple[str, ...]]:
        shown = [(name, ", ".join(f"{e.caption} ({e.activation:.2f})" for e in found)) for name, found in self.items()]
        return [("feature", "most active on"), *shown]

    def _title(self) -> str:
        return "Examples"


def study(scope: Scope, prompt: str, images: Pictures, features: Sequence[Feature], count: int = 6) -> StudyResult:
    """The pictures on which each feature is most active, with the activation of every soft token and word.

    `.plot()` draws them as heat over each picture. For all features and much data: `study_data`.
    """
    given = picture_list(images)
    names = [str(image) if isinstance(image, str | Path) else f"picture {n}" for n, image in enumerate(given)]
    items = [
        CaptionedPrompt(scope.vlm.prepare(prompt, [picture]), name, png_bytes(picture, 256))
        for picture, name in zip(map(opened, given), names, strict=True)  # one large picture at a time
    ]
    warn_if_strange(scope, [item.inputs.tensors for item in items])
    found = {str(key): shown for key, shown in top_examples(scope, [*map(_feature, features)], items, count).items()}
    return StudyResult(found, {str(feature): label for feature, label in scope_labels(scope).items()})


@_takes(StudyConfig)
def study_data(scope: Scope, data: str | Path | Mapping[str, Any], folder: str | Path, **settings: Any) -> StudyFolder:
    """Study every feature of every layer in one pass over data, written to a folder (docs/study.md).

    `data` is a folder with `train.jsonl` (docs/bring_your_own.md), or sources by name, each a mapping with the keys of
    `data.sources` (docs/data.md); `settings` are those of `StudyConfig`. A finished study is read, an unfinished one
    resumed.

    Raises:
        UserError: the data are missing or mostly unusable, or the folder belongs to another study.
    """
    config = _settings(StudyConfig, settings)
    folder_source: dict[str, Any] = {"folder": {"kind": "folder", "path": str(data)}}
    split: dict[str, Any] = {} if config.split is None else {"split": config.split}
    named = data if isinstance(data, Mapping) else folder_source
    sources = {name: SourceConfig(**{**source, **split}) for name, source in named.items()}
    return study_alone(Path(folder), scope, sources, config)


def open_study(folder: str | Path) -> StudyFolder:
    """A finished study: `open_study(folder).feature(FeatureId(6, 512))`."""
    return StudyFolder(folder)
