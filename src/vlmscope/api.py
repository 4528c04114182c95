"""The public Python API, for notebooks: load a model with its transcoders, trace, steer, patch, study.

import vlmscope

scope = vlmscope.load()                                   # Orrery and its transcoders
scope = vlmscope.load("org/vlm", "me/set", revision=commit, transcoder_revision=commit)   # folders or hub ids
traced = vlmscope.trace(scope, "what planet is this ?", ["mars.png"])
both = vlmscope.compare(traced, "outputs/trace/earth", names=("mars", "earth"))
looks = vlmscope.where(scope, "what planet is this ?", ["mars.png"], ["L5/709"])   # maps over the picture
answer = vlmscope.steer(scope, "what planet is this ?", ["mars.png"], {"L6/512": 8.0})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from vlmscope.core.records import FeatureId
from vlmscope.scope import Picture, Scope, opened

if TYPE_CHECKING:
    from vlmscope.attention import WhereMaps
    from vlmscope.attribution.trace import Trace
    from vlmscope.core.graph import AggregateGraph, GraphComparison, PrunedGraph
    from vlmscope.core.results import FeatureExample
    from vlmscope.features.study_files import StudyFolder

Graph: TypeAlias = "Trace | PrunedGraph | str | Path"  # the last two: a run folder, or graph.safetensors


def load(
    model: str | Path | None = None,
    transcoders: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    offload: str = "none",
    revision: str | None = None,
    transcoder_revision: str | None = None,
    check: bool = True,
) -> Scope:
    """Load a model and a transcoder set, each a folder or a hub id; Orrery and its set by default.

    A hub id needs its commit, 40 hexadecimal digits, in `revision` or `transcoder_revision`. `device` is cpu, cuda,
    cuda:N or mps; `offload` says where the model's weights are kept: "none" (on the device), "cpu" or "disk". `check`
    runs the model on a few hundred tokens and warns of layers whose transcoders have an FVU above 1 there.

    Raises:
        UserError: a folder is not what it should be, a hub id has no pinned commit or cannot be fetched, or the
            transcoders do not fit the model.
    """
    from vlmscope.config.catalog import asset
    from vlmscope.models.loading import load_named
    from vlmscope.training.evaluation import check_hooks, warn_on_load
    from vlmscope.transcoders.hub import from_pretrained

    vlm = load_named(str(model or asset("orrery")), None, revision, dtype, device, offload)
    adapter = vlm.adapter
    place = transcoders or asset("orrery_transcoders")
    found = from_pretrained(place, transcoder_revision, n_layers=adapter.n_layers, d_model=adapter.d_model)
    found = found.to(device=adapter.device, dtype=adapter.dtype).requires_grad_(False)
    scope = Scope(vlm, found)
    check_hooks(scope)
    if check:
        warn_on_load(scope)
    return scope


def trace(scope: Scope, prompt: str, images: Sequence[Picture] = (), **settings: Any) -> Trace:
    """The attribution graph of a prompt, whole and pruned; `settings` are those of `AttributionConfig`."""
    from vlmscope.attribution.config import AttributionConfig
    from vlmscope.attribution.trace import trace as run

    return run(scope, scope.inputs(prompt, images), AttributionConfig(**settings))


def compare(
    first: Graph, second: Graph, names: Sequence[str] = ("first", "second"), match: str = "auto"
) -> GraphComparison:
    """What two graphs of one model share and what each has alone; docs/graphs.md says when nodes are the same.

    Raises:
        UserError: a file that is no graph, graphs of different models, or no such rule.
    """
    from vlmscope.attribution.compare import compare as run

    return run(_graph(first), _graph(second), names, match)


def aggregate(
    graphs: Sequence[Graph], names: Sequence[str] | None = None, match: str = "role", min_present: float = 0.0
) -> AggregateGraph:
    """The mean of many graphs of one model, and how often each node and edge is kept; files are read one at a time.

    Raises:
        UserError: no graphs, a file that is none, graphs of different models, or a setting that makes no sense.
    """
    from vlmscope.attribution.compare import aggregate as run

    return run([g if isinstance(g, str | Path) else _graph(g) for g in graphs], names, match, min_present)


def _graph(given: Graph) -> PrunedGraph:
    from vlmscope.attribution.compare import graph_file
    from vlmscope.attribution.export import load_graph
    from vlmscope.attribution.trace import Trace

    if isinstance(given, str | Path):
        return load_graph(graph_file(given))
    return given.pruned if isinstance(given, Trace) else given


def steer(
    scope: Scope,
    prompt: str,
    images: Sequence[Picture],
    features: Mapping[str, float],
    positions: Sequence[int] | None = None,
    max_new_tokens: int = 24,
) -> str:
    """The answer when features are set to given activations in the prompt and in every generated token.

    Args:
        scope: what `load` returned.
        prompt: the question.
        images: its pictures.
        features: "L<layer>/<index>" -> activation (0 ablates).
        positions: prompt positions to act on, and then not on generated tokens; everywhere when None.
        max_new_tokens: length limit of the answer.

    Raises:
        UserError: an id that cannot be read, or a feature or position that is not there.
    """
    from vlmscope.interventions.edits import steer_plan
    from vlmscope.interventions.run import generate_edited

    inputs = scope.inputs(prompt, images)
    values = {FeatureId.parse(text): value for text, value in features.items()}
    plan = steer_plan(scope, values, len(inputs), positions)
    return generate_edited(scope, inputs, plan, max_new_tokens)


def patch(
    scope: Scope,
    prompt: str,
    images: Sequence[Picture],
    donor_images: Sequence[Picture],
    features: Sequence[str],
    strength: float = 1.0,
    max_new_tokens: int = 24,
) -> str:
    """The answer when features get the activations that they have, position by position, on other pictures.

    Raises:
        UserError: as `steer`, or the two prompts do not align.
    """
    from vlmscope.interventions.edits import by_layer, donor_activations, patch_plan
    from vlmscope.interventions.run import generate_edited

    inputs, donor = scope.inputs(prompt, images), scope.inputs(prompt, donor_images)
    scope.batch([inputs, donor])  # refuses prompts that do not align
    chosen = by_layer(scope.transcoders, map(FeatureId.parse, features))
    carried = donor_activations(scope, scope.batch([donor]), chosen)
    plan = patch_plan(carried, inputs.roles, strength)
    return generate_edited(scope, inputs, plan, max_new_tokens)


def where(
    scope: Scope, prompt: str, images: Sequence[Picture], features: Sequence[str] = (), **settings: Any
) -> WhereMaps:
    """Where in the pictures features look: rollout, similarity, attribution to patches, own activation (docs/where.md).

    Args:
        scope: what `load` returned.
        prompt: the question.
        images: its pictures.
        features: such as `L6/512`; without any, the `top` (3) with most activation on the soft tokens.
        settings: those of `WhereConfig`, and `top`.

    Returns:
        `found.maps[FeatureId(6, 512)]["vision_path"][0].tiles[0].values`, and activations by position.

    Raises:
        UserError: the model or the prompt has no picture, or a feature is not active on it.
    """
    from vlmscope.attention import where_maps
    from vlmscope.attribution.config import AttributionConfig, WhereConfig
    from vlmscope.core.errors import UserError
    from vlmscope.features.readouts import image_features

    if not images:
        raise UserError("there is no picture to look at; give images=[path or PIL image]")
    top, inputs = settings.pop("top", 3), scope.inputs(prompt, images)
    chosen = [FeatureId.parse(feature) for feature in features]
    if not chosen:
        chosen = [one.feature for one in image_features(scope, scope.batch([inputs]), top)]
    if not chosen:
        raise UserError("no feature is active on the soft tokens of this prompt; choose other transcoders")
    return where_maps(scope, inputs, chosen, WhereConfig(**settings), AttributionConfig())


def study(
    scope: Scope, prompt: str, images: Sequence[Picture], features: Sequence[str], count: int = 6
) -> dict[str, tuple[FeatureExample, ...]]:
    """The pictures on which each feature is most active, with the activation of every soft token and word."""
    from vlmscope.data.images import png_bytes
    from vlmscope.features.study import CaptionedPrompt, top_examples
    from vlmscope.interventions.edits import by_layer

    names = [str(i) if not isinstance(i, Image.Image) else f"picture {n}" for n, i in enumerate(images)]
    items = [
        CaptionedPrompt(scope.vlm.prepare(prompt, [picture]), name, png_bytes(picture, 256))
        for picture, name in zip(map(opened, images), names, strict=True)  # one large picture at a time
    ]
    chosen = by_layer(scope.transcoders, map(FeatureId.parse, features))
    ids = [FeatureId(layer, index) for layer, found in chosen.items() for index in found.tolist()]
    found = top_examples(scope, ids, items, count)
    return {str(feature): examples for feature, examples in found.items()}


def study_data(scope: Scope, data: str | Path | Mapping[str, Any], folder: str | Path, **settings: Any) -> StudyFolder:
    """One pass over data for every feature of every layer, written to a study folder (docs/study.md); resumable.

    Args:
        scope: what `load` returned.
        data: a folder with `train.jsonl` (docs/bring_your_own.md), or sources by name, each a mapping with the keys of
            `data.sources` (docs/data.md).
        folder: of the study; a finished one is read, one that was begun is gone on with.
        settings: those of `StudyConfig`.

    Raises:
        UserError: the data are not there or mostly unusable, or the folder is of another study.
    """
    from vlmscope.data.config import SourceConfig
    from vlmscope.features.config import StudyConfig
    from vlmscope.features.study import study_alone

    config = StudyConfig(**settings)
    folder_source: dict[str, Any] = {"folder": {"kind": "folder", "path": str(data)}}
    split: dict[str, Any] = {} if config.split is None else {"split": config.split}
    named = data if isinstance(data, Mapping) else folder_source
    sources = {name: SourceConfig(**{**source, **split}) for name, source in named.items()}
    return study_alone(Path(folder), scope, sources, config)


def open_study(folder: str | Path) -> StudyFolder:
    """A finished study: `open_study(folder).feature(FeatureId(6, 512))`."""
    from vlmscope.features.study_files import StudyFolder

    return StudyFolder(folder)
