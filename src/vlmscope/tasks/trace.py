"""Attribution graph of one prompt and its pictures, or of many: graph.json, graph.safetensors and a picture of it.

Many rows (`task.rows=FILE`) get a folder each, `rows/<id>/`, that is complete or absent: what a single trace writes,
and `row.json`. `graphs.jsonl` has a line per finished row (id, folder, prompt, images, metrics). A killed run resumes
with `trainer.resume=true`; the index is then rewritten from the folders, so that a half-written line does no harm.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vlmscope.attribution import trace as tracing
from vlmscope.attribution.export import save_graph, source_words, write_graph_json
from vlmscope.attribution.influence import ranked_features, reaches_image
from vlmscope.attribution.targets import choose_logits
from vlmscope.attribution.workers import own_rank
from vlmscope.config import AppConfig, wiring
from vlmscope.core import artifacts
from vlmscope.core.errors import NoRoom, NotMainRank, UserError
from vlmscope.core.graph import NodeKind, PrunedGraph
from vlmscope.core.launch import place_of, program
from vlmscope.core.records import FeatureId
from vlmscope.core.results import printable, text_table
from vlmscope.data.images import for_figures, open_images
from vlmscope.data.inputs import PromptRow, other_pictures, read_rows
from vlmscope.interventions.ablation import without_mlps
from vlmscope.models.base import ModelInputs
from vlmscope.report.graph_figure import attribution_graph
from vlmscope.report.pictures import patch_maps
from vlmscope.scope import Scope
from vlmscope.tasks.settings import RunContext
from vlmscope.training.evaluation import warn_if_strange
from vlmscope.viewer.graphs import export_graph

_LOG = logging.getLogger(__name__)
_ROWS, _ROW = "rows", "row.json"
_MAPPED = 3  # targets in figures/patches.png
_TOLD, _ON_PICTURE = 8, 3  # features on the console
_HEADS = 5
_WITH_EXAMPLES = 40  # features with examples in graph.html, a tenth of a second each; task=export takes all
_RUNNERS_UP = 3  # words that the graph does not explain
_SUBJECT = ("model=", "model.", "transcoder=", "transcoder.")  # overrides that a command about the same graph needs


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Trace `prompt=` on `image=` (none for text alone), or every row of `task.rows=`."""
    if cfg.task.rows is not None:
        if place_of(os.environ) is not None:
            raise UserError("task.rows: several processes make one graph together, not rows; start it alone")
        return _trace_rows(cfg, context)
    if cfg.prompt is None:
        choice = f"prompt_name= one of {', '.join(cfg.prompts.prompts)}" if cfg.prompts else "'prompt=what is this ?'"
        raise UserError(f"no prompt: add {choice} (and image=path/to/picture.png)")
    pictures = wiring.user_pictures(cfg)
    if cfg.attribution.patches and not pictures:
        raise UserError("attribution.patches=true needs a picture; add image=path/to/picture.png")
    vlm = wiring.load_model(cfg)
    inputs = vlm.prepare(cfg.prompt, pictures)
    scope = wiring.load_scope(cfg, vlm, context.overrides)
    metrics = _trace_into(context.run_dir, cfg, scope, inputs, pictures)
    if cfg.task.page:
        export_graph(context.run_dir, wiring.label_folders(cfg), _WITH_EXAMPLES)
    print("\n".join(_next_steps(context.run_dir, cfg, context.overrides)))
    return metrics


def _trace_into(
    folder: Path,
    cfg: AppConfig,
    scope: Scope,
    inputs: ModelInputs,
    pictures: Sequence[Image.Image],
    name: str | None = None,
) -> dict[str, float]:
    """Trace a prompt, write its files into a folder and return metrics; `name` is the graph's, else the folder's."""
    labels = wiring.feature_labels(cfg, scope.vlm.name, scope)
    traced = tracing.trace(scope, inputs, cfg.attribution, folder)
    if own_rank()[0]:  # it has made its part of the rows
        raise NotMainRank
    traced = tracing.with_heads(scope, traced, cfg.attribution)
    graph, pruned, metrics, extra = traced.graph, traced.pruned, traced.metrics(), None
    save_graph(folder / "graph.safetensors", pruned)
    if cfg.attribution.patches and pictures:
        maps, effect = tracing.target_maps(scope.vlm, traced, cfg.attribution), cfg.attribution.patch_effect
        extra = {"patches": tracing.write_target_maps(folder / "patches.safetensors", maps, cfg.attribution)}
        if cfg.task.figure:
            shown = maps[: _MAPPED * len(pictures)]
            patch_maps(shown, for_figures(pictures), folder / "figures" / "patches.png", effect)
        answer = maps[: len(pictures)]  # the first target is the answer, with a map per picture
        whole = sum(abs(m.from_patches) + sum(map(abs, m.remainder.values())) for m in answer)
        metrics["graph/patch_residual"] = max(m.residual for m in maps)
        metrics["graph/patch_share"] = sum(m.from_patches for m in answer) / (whole or 1.0)
    named = (name or folder.name, scope.vlm.name, labels)
    size = write_graph_json(folder / "graph.json", pruned, *named, extra, pictures)
    metrics["graph/json_mb"] = size
    if cfg.task.figure:
        attribution_graph(pruned, folder / "figures" / "graph.png", for_figures(pictures), labels=labels)
    if cfg.task.rows is None:
        print("\n".join(_answer(traced, scope.vlm.tokenizer, labels)))
    if pictures:
        metrics["graph/answer_sees_image"] = float(reaches_image(pruned, int(graph.nodes.ends()[0])))
        if cfg.task.others and cfg.attribution.asked == "logits":
            metrics["graph/answer_without_mlps"] = _without_mlps(cfg, scope, inputs)
    return metrics


def _answer(traced: tracing.Trace, tokenizer: Any, labels: Mapping[FeatureId, str]) -> list[str]:
    """What the graph explains and how much of it, the features with most influence, and what is on the picture."""
    graph, pruned = traced.graph, traced.pruned
    logits = graph.nodes.kind[-1] == NodeKind.LOGIT
    lines = ["answer" if logits else "explains", *(f"  {printable(words)}" for words in traced.explained())]
    if traced.targets.what == "logits":  # more words than the graph explains
        likely = choose_logits(traced.replacement, 1.0, len(graph.logit_tokens) + _RUNNERS_UP)
        ranked = list(zip(likely.names(tokenizer), likely.probabilities.tolist(), strict=True))
        others = [f"{printable(word)} p = {p:.2g}" for word, p in ranked if word not in graph.logit_tokens]
        lines.append(f"  then {', '.join(others[:_RUNNERS_UP])}")
    rows = [("feature", "influence", "activation", "strongest at", "label")]
    for row in ranked_features(graph, _TOLD, labels):
        more = f" and {row.positions - 1} more" if row.positions > 1 else ""
        rows.append((str(row.feature), f"{row.share:.1%}", f"{row.activation:.3g}", row.place + more, row.label))
    if len(rows) > 1:
        table = text_table(rows if labels else [row[:-1] for row in rows])
        lines += ["features with most influence on it", *(f"  {line}" for line in table.splitlines())]
    lines += ["how much the graph explains", f"  {tracing.spread_in_words(tracing.spread([traced.metrics()]))}"]
    lines += _attention(pruned, labels)
    if graph.is_image.any():
        kept = graph.nodes.position[pruned.node_mask & (graph.nodes.kind == NodeKind.FEATURE)]
        seen = int(graph.is_image[kept].sum())
        lines.append(f"on the picture: {seen} of the {len(kept)} features that pruning kept")
        if not seen:
            lines.append(
                "  attribution.node_threshold=0.9 keeps more; attribution.patches=true maps the answer onto it"
            )
        nodes = graph.nodes.of(NodeKind.FEATURE)
        nodes = nodes[graph.is_image[graph.nodes.position[nodes]]]
        strongest: dict[FeatureId, int] = {}  # each feature where it has most influence
        for node in nodes[(-pruned.influence[nodes]).argsort(kind="stable")].tolist():
            strongest.setdefault(graph.nodes.feature_id(node), int(graph.nodes.position[node]))
        for feature, position in list(strongest.items())[:_ON_PICTURE]:
            lines.append(f"  strongest there: {feature} ({graph.place(position)})  {labels.get(feature, '')}".rstrip())
    return lines


def _attention(pruned: PrunedGraph, labels: Mapping[FeatureId, str]) -> list[str]:
    """The heads that carry most, and why they attend."""
    heads, graph = pruned.heads, pruned.graph
    if heads is None or not len(heads.edges):
        return []
    ranked = heads.ranked()
    shares = ", ".join(f"L{layer}H{head} {share:.1%}" for layer, head, share in ranked[:_HEADS])
    stays = 1.0 - sum(share for _, _, share in ranked)
    tower = " or in the vision tower" if graph.n_patches else ""
    lines = [f"attention: {stays:.0%} of what the kept edges carry stays at its position{tower}; heads {shares}"]
    if tower:
        lines.append("  heads are the decoder's; edges into features of the tower are not split")
    for one in heads.query_keys:
        query, key, term = one.pairs[0]
        names = " x ".join(source_words(graph, source, labels) for source in (query, key))
        places = f"from {graph.place(one.query)} to {graph.place(one.key)}"
        lines.append(
            f"  L{one.layer}H{one.head} looks {places}: score {one.score:+.2f}, pattern {one.probability:.2f}; "
            f"strongest pair {names} {term:+.2f}"
        )
    return lines


def _next_steps(folder: Path, cfg: AppConfig, overrides: Sequence[str]) -> list[str]:
    """The files to look at first, and commands that go on from this graph."""
    pictures = ",".join(cfg.image or ())
    subject = [f"image={pictures}" if len(cfg.image) == 1 else f"image=[{pictures}]"] if cfg.image else []
    subject += [f"prompt={cfg.prompt}", *(one for one in overrides if one.lstrip("+").startswith(_SUBJECT))]
    again = shlex.join(subject)
    files = ["graph.html"] if cfg.task.page else []
    files += ["figures/graph.png"] if cfg.task.figure else []
    files += ["figures/patches.png"] if cfg.task.figure and cfg.attribution.patches else []
    lines = [f"files: {', '.join([*files, 'graph.json (Neuronpedia), graph.safetensors'])} in the folder below"]
    if not cfg.task.page:
        page = shlex.join(["task=export", f"task.run={folder}"])
        lines.append(f"next: {program()} {page}  (graph.html: click through it, with examples of each feature)")
    lines.append(f"next: {program()} task=steer {again} {shlex.quote(f'task.from_graph={folder}')}")
    if cfg.image:
        lines.append(f"next: {program()} task=where {again}")
    if cfg.attribution.labels is None and wiring.labels_folder(cfg) is None:
        lines.append("names of features: task=study task.labels=true, then attribution.labels= (docs/labels.md)")
    return lines


def _without_mlps(cfg: AppConfig, scope: Scope, inputs: ModelInputs) -> float:
    """The answer's probability with every MLP's output averaged over other pictures; one line where it hardly falls."""
    others = [scope.vlm.prepare(inputs.prompt, images) for images in other_pictures(inputs.sizes, cfg.task.others)]
    found = without_mlps(scope.adapter, inputs, others)
    if found.hardly_needed and cfg.task.rows is None:
        answer = printable(scope.vlm.tokenizer.decode([found.token]).strip())
        print(
            f"  {answer!r} stays the answer (p = {found.after:.3f}) when the output of every MLP is its mean over "
            f"{len(others)} other pictures: features explain little of it (docs/anatomy.md)"
        )
    return found.after


def _trace_rows(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Trace the rows of `task.rows` that have no folder yet.

    Every row is checked before any is traced. Metrics are means over the rows that have them, medians and quartiles of
    scores (`spread`), and counts of rows.
    """
    if cfg.prompt is not None or cfg.image is not None:
        raise UserError("task.rows= brings its own prompts and pictures; leave out prompt= and image=")
    if cfg.task.page:
        raise UserError("task.page=true is for a single trace; task=export task.run=ROW makes the page of a row")
    run_dir, folder = context.run_dir, context.run_dir / _ROWS
    if folder.is_dir() and any(folder.iterdir()) and not cfg.trainer.resume:
        raise UserError(
            f"{folder} holds rows already; add trainer.resume=true to resume, or choose a new hydra.run.dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    rows, unreadable = read_rows(cfg.task.rows)
    skipped = _refuse(cfg, unreadable)
    origin = _origin(cfg, context.overrides)
    done = {row.id: record for row in rows if (record := _finished(folder / row.id, row, origin)) is not None}
    resumed = len(done)
    vlm = wiring.load_model(cfg)
    usable, refused = [], []
    for row in tqdm([row for row in rows if row.id not in done], desc="checking rows", unit="row", delay=2.0):
        try:
            _inputs(vlm, row)
            usable.append(row)
        except UserError as error:
            refused.append(f"{row.origin}: {error}")
    skipped += _refuse(cfg, refused)
    scope = wiring.load_scope(cfg, vlm, context.overrides)
    resume = f"trainer.resume=true with hydra.run.dir={run_dir}"
    with (run_dir / tracing.INDEX).open("w", encoding="utf-8") as index:
        index.writelines(map(index_line, done.values()))
        for row in tqdm(usable, desc="trace", unit="row", initial=resumed, total=resumed + len(usable)):
            index.flush()
            try:
                done[row.id] = _trace_row(cfg, scope, row, folder, origin)
            except NoRoom as error:  # a full disk is not the row's fault
                raise NoRoom(f"{error}; {resume} resumes") from error
            except UserError as error:
                if not cfg.task.skip_bad:
                    advice = f"task.skip_bad=true leaves such rows out, and {resume} resumes"
                    raise UserError(f"{row.origin}: {error}; {advice}") from error
                skipped += _refuse(cfg, [f"{row.origin}: {error}"])
                continue
            index.write(index_line(done[row.id]))
    records = [done[row.id] for row in rows if row.id in done]
    if not records:
        raise UserError(f"no row could be traced ({skipped} skipped); run.log in {run_dir} says why of each")
    artifacts.write_text(run_dir / tracing.INDEX, "".join(map(index_line, records)))  # in the order of the rows
    print(f"  {len(records)} rows traced ({resumed} of them before), {skipped} skipped")
    values: dict[str, list[float]] = defaultdict(list)  # not every row has every metric
    for record in records:
        for name, value in record["metrics"].items():
            values[name].append(value)
    counts = {"rows/traced": float(len(records)), "rows/resumed": float(resumed), "rows/skipped": float(skipped)}
    together = tracing.spread([record["metrics"] for record in records])
    print(f"  {tracing.spread_in_words(together)}")
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()} | together | counts


def _refuse(cfg: AppConfig, bad: Sequence[str]) -> int:
    """Raise a `UserError` for bad rows, or with `task.skip_bad` warn about each and return their number."""
    if bad and not cfg.task.skip_bad:
        more = f" (and {len(bad) - 1} more bad rows)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; correct the file, or leave such rows out with task.skip_bad=true")
    for row in bad:
        _LOG.warning("skipped %s", row)
    return len(bad)


def _origin(cfg: AppConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """All settings and files besides the row on which its graph depends, by name."""
    # The two settings left out change memory and time, not numbers.
    attribution = {k: v for k, v in asdict(cfg.attribution).items() if k not in ("batch_size", "memory_gb")}
    attribution["labels"] = [wiring.study_digest(str(folder)) for folder in wiring.label_folders(cfg)]
    task = {"task.figure": cfg.task.figure, "seed": cfg.seed}
    return artifacts.plain(
        wiring.model_origin(cfg)
        | wiring.transcoder_origin(cfg, overrides)
        | artifacts.flat("attribution", attribution)
        | task
    )


def _row_record(row: PromptRow) -> dict[str, Any]:
    """The part of row.json that identifies a row."""
    images = [str(image) for image in row.images]
    return {"id": row.id, "prompt": row.prompt, "images": images, "pictures": artifacts.files_digest(row.images)}


def _finished(folder: Path, row: PromptRow, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The row.json of a row that was traced before, or None.

    Raises:
        UserError: it was traced with other settings, another model, other transcoders or as another row.
    """
    if not folder.is_dir():
        return None
    record = artifacts.read_json(folder / _ROW)
    advice = "choose a new hydra.run.dir, or remove it"
    artifacts.refuse_other(f"{row.origin}: {folder}", record.get("origin"), origin, advice)
    if any(record.get(key) != value for key, value in _row_record(row).items()):
        raise UserError(f"{row.origin}: {folder} was traced with another prompt or other pictures; {advice}")
    return record


def _inputs(vlm: Any, row: PromptRow) -> tuple[ModelInputs, list[Image.Image]]:
    pictures = open_images(row.images)
    return vlm.prepare(row.prompt, pictures), pictures


def _trace_row(cfg: AppConfig, scope: Scope, row: PromptRow, folder: Path, origin: dict[str, Any]) -> dict[str, Any]:
    inputs, pictures = _inputs(scope.vlm, row)
    warn_if_strange(scope, [inputs.tensors], f"row {row.id}: its")
    with artifacts.atomic_folder(folder / row.id) as half:
        metrics = _trace_into(half, cfg, scope, inputs, pictures, row.id)
        record = {**_row_record(row), "folder": f"{_ROWS}/{row.id}", "metrics": metrics, "origin": origin}
        artifacts.write_json(half / _ROW, record)
    return record


def index_line(record: dict[str, Any]) -> str:
    """The line of `graphs.jsonl` for a row."""
    shown = {key: value for key, value in record.items() if key not in ("origin", "pictures")}
    return json.dumps(shown, ensure_ascii=False) + "\n"
