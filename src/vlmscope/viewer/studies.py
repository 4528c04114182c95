"""Studies of the workbench: their features as filtered rows, and one feature with its examples and neighbours.

Everything is read from a study's files (docs/study.md), without torch. Two features fire together by the share of
inputs on which both fire, of those on which either does (Jaccard). A study keeps, of each feature, the inputs of the
smallest hashes on which it fires, which are bottom-k sketches under one hash (Cohen and Kaplan 2007): on the inputs up
to the lower of two last hashes, both features' firings are known, and their shares are counted there.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from vlmscope.core.artifacts import read_yaml, shipped
from vlmscope.core.errors import UserError
from vlmscope.core.records import TOWER, FeatureId, layer_name
from vlmscope.core.study import KINDS, LEVELS, MANIFEST, SHIPPED_STUDIES, TOP, StudyExample, bin_edges, item_hash
from vlmscope.features.labels import Label, Labels
from vlmscope.features.study_files import EXAMPLE_TABLE, EXAMPLES, FEATURES, StudyFolder, layer_table, read_table
from vlmscope.report.feature_page import FeaturePage, PageExample, PageMaker
from vlmscope.report.pictures import HeatPicture, data_uri
from vlmscope.viewer.runs import Runs
from vlmscope.viewer.safety import Refused, inside

if TYPE_CHECKING:
    from vlmscope.viewer.server import Query

_OPEN = 3  # studies that are kept in memory
_EXAMPLES, _SAMPLES = 12, 4  # shown of the strongest inputs, and of each weaker group
_NEIGHBOURS = 8
_LEAST_UNION = 10  # inputs on which two features' shares are compared
_DECODERS = 512 << 20  # bytes of decoders that are compared with one; else those of its own layer alone
_MOST_ROWS = 500
_HEADER = 100 << 20  # bytes of a safetensors header
_EXCERPT = 4  # tokens on either side of the peak
SORTS = ("score", "activation", "fires", "rare", "feature")


def token_row(example: PageExample, near: int | None = None) -> list[dict[str, Any]]:
    """The tokens around an example's peak; `level` is in 255ths of the peak."""
    peak = next(n for n, place in enumerate(example.places) if place.peak)
    places = example.places if near is None else example.places[max(0, peak - near) : peak + near + 1]
    scale = LEVELS / (example.activation or 1.0)
    return [
        {"text": place.text, "level": round(place.activation * scale), "kind": KINDS[place.kind], "peak": place.peak}
        for place in places
    ]


def picture_body(picture: HeatPicture) -> dict[str, Any] | None:
    """A picture with what a feature does on it; None where it is not available."""
    if picture.data is None:
        return None
    boxes = [[round(float(edge), 4) for edge in box] for box in picture.boxes]
    return {"url": data_uri(picture.data), "boxes": boxes, "levels": picture.levels.tolist()}


def decoder_rows(folder: Path, layer: int) -> np.ndarray:
    """`[F, d]` float32, the decoder of a layer. Read by hand: numpy, without torch, knows no bfloat16."""
    with (folder / f"layer_{layer}.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _HEADER:
            raise ValueError("not safetensors")
        heads = json.loads(file.read(size))

        def values(name: str) -> np.ndarray:
            entry = heads[name]
            start, end = entry["data_offsets"]
            file.seek(8 + size + start)
            data = file.read(end - start)
            if entry["dtype"] == "BF16":  # the upper half of a float32
                numbers = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                kinds = {"F32": "<f4", "F16": "<f2", "I8": "i1"}
                numbers = np.frombuffer(data, kinds[entry["dtype"]]).astype(np.float32)
            return numbers.reshape(entry["shape"])

        scaled = heads["W_dec"]["dtype"] == "I8"
        return values("W_dec") * (values("W_dec_scale")[:, None] if scaled else 1)


def label_body(label: Label | None) -> dict[str, Any] | None:
    """A label that holds: written by hand, or better than chance."""
    if label is None or not label.text or (label.score is not None and not label.beats_chance):
        return None
    return {key: getattr(label, key) for key in ("text", "score", "low", "high", "source")}


def feature_body(page: FeaturePage, study: str, neighbours: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """All about a feature, as the page's panel shows it; pictures are embedded."""
    record, edges = page.record, bin_edges()
    used = np.flatnonzero(record.histogram.sum(0))
    bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
    counts = {kind: record.histogram[row, bins].tolist() for row, kind in enumerate(KINDS)}
    return {
        "feature": str(record.feature),
        "study": study,
        "label": label_body(page.label),
        "guess": page.guess,
        "sentence": page.sentence(),
        "items": page.info.items,
        "items_fired": record.items_fired,
        "fired": dict(record.fired),
        "max": record.activation_max,
        "histogram": {"edges": edges[bins.start : bins.stop + 1].tolist() if len(used) else [], **counts},
        "top_logits": [list(pair) for pair in record.top_logits],
        "bottom_logits": [list(pair) for pair in record.bottom_logits],
        "groups": [
            {
                "name": group.name,
                "title": group.title,
                "examples": [
                    {
                        "activation": example.activation,
                        "origin": example.origin,
                        "tokens": token_row(example),
                        "pictures": [body for picture in example.pictures if (body := picture_body(picture))],
                        "times": example.times,
                    }
                    for example in group.examples
                ],
            }
            for group in page.groups
        ],
        "neighbours": neighbours,
        "missing": page.missing,
    }


class OpenStudy:
    """One study in memory: counts and labels of all features; examples and pictures are read when asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.study = name, StudyFolder(folder)
        self.lock = threading.Lock()  # sources of pictures are no friends of several threads
        labels = Labels(self.study)
        self.labels = {key: label for key, label in labels.all().items() if label_body(label) is not None}
        self.layer, self.index, counts, tokens = [], [], [], []
        for layer in self.study.layers:
            read = ["feature", "items_fired", *(f"fired_{kind}" for kind in KINDS), "activation_max", "top_tokens"]
            table = pq.read_table(self.study.path / layer_table(FEATURES, layer), columns=read)
            self.layer.append(np.full(len(table), layer))
            self.index.append(table["feature"].to_numpy())
            columns = [table[f"fired_{kind}"].to_numpy() for kind in KINDS]
            counts.append(np.stack([table["items_fired"].to_numpy(), *columns, table["activation_max"].to_numpy()], 1))
            tokens += [row[:3] for row in table["top_tokens"].to_pylist()]
        self.layer, self.index = np.concatenate(self.layer), np.concatenate(self.index)
        numbers = np.concatenate(counts).astype(np.float64)
        self.fires = numbers[:, 0] / max(self.study.info.items, 1)
        self.shares = numbers[:, 1:4] / np.maximum(numbers[:, 1:4].sum(1, keepdims=True), 1)
        self.most, self.tokens = numbers[:, 4], tokens
        ids = [FeatureId(int(layer), int(index)) for layer, index in zip(self.layer, self.index, strict=True)]
        self.texts = [label.text if (label := self.labels.get(feature)) else "" for feature in ids]
        scores = [label.score if (label := self.labels.get(feature)) else None for feature in ids]
        self.scores = np.array([np.nan if score is None else score for score in scores])
        named = zip(ids, self.texts, tokens, strict=True)
        self.searched = [f"{feature} {text} {' '.join(words)}".lower() for feature, text, words in named]
        self.row_of = {feature: row for row, feature in enumerate(ids)}

    @cached_property
    def maker(self) -> PageMaker:
        """Makes features' examples; it reads all items' captions."""
        return PageMaker(self.study, self.labels, _EXAMPLES, _SAMPLES)

    def rows(self, query: Query) -> tuple[int, list[dict[str, Any]]]:
        """The number of features that fit, and those asked for."""
        if query.only:
            named = [FeatureId.parse(name) for name in query.only.split(",")[:_MOST_ROWS]]
            for feature in named:
                self.study.check(feature)
            return len(named), self.described([self.row_of[feature] for feature in named])
        keep = np.ones(len(self.fires), bool)
        if query.layer is not None:
            keep &= self.layer == query.layer
        if query.modality in KINDS:
            keep &= self.shares[:, KINDS.index(query.modality)] > 0.5
        if query.density_min is not None:
            keep &= self.fires >= query.density_min
        if query.density_max is not None:
            keep &= self.fires <= query.density_max
        if query.label in ("yes", "no"):
            keep &= np.array([bool(text) for text in self.texts]) == (query.label == "yes")
        if query.score_min is not None:
            keep &= np.nan_to_num(self.scores, nan=-1.0) >= query.score_min
        found = np.flatnonzero(keep)
        words = query.words.lower().split()
        if words:
            found = np.array([row for row in found if all(word in self.searched[row] for word in words)], np.int64)
        keys = {
            "score": -np.nan_to_num(self.scores, nan=-1.0),
            "activation": -self.most,
            "fires": -self.fires,
            "rare": np.where(self.fires > 0, self.fires, np.inf),
            "feature": np.zeros(len(self.fires)),
        }
        order = found[np.argsort(keys[query.sort][found], kind="stable")]
        if words:  # a label says more about a feature than the tokens that it promotes
            labelled = [all(word in self.texts[row].lower() for word in words) for row in order]
            order = order[np.argsort(~np.array(labelled, bool), kind="stable")]
        shown = order[query.offset : query.offset + query.limit]
        return len(order), self.described(shown.tolist())

    def described(self, shown: list[int]) -> list[dict[str, Any]]:
        """Rows of the page, each with its strongest example."""
        best = self._strongest(shown)
        rows = []
        for row in shown:
            score = self.scores[row]
            body = {
                "feature": str(FeatureId(int(self.layer[row]), int(self.index[row]))),
                "label": self.texts[row],
                "score": None if np.isnan(score) else float(score),
                "fires": float(self.fires[row]),
                **{f"share_{kind}": float(self.shares[row, at]) for at, kind in enumerate(KINDS)},
                "max": float(self.most[row]),
                "top_tokens": self.tokens[row],
                "thumbnail": None,
                "excerpt": [],
            }
            rows.append(body | best.get(row, {}))
        return rows

    def _strongest(self, rows: list[int]) -> dict[int, dict[str, Any]]:
        """The thumbnail or, where the peak is in words, the words around it, of features by row."""
        out: dict[int, dict[str, Any]] = {}
        for layer in {int(self.layer[row]) for row in rows}:
            wanted = {int(self.index[row]): row for row in rows if self.layer[row] == layer}
            filters = [("feature", "in", list(wanted)), ("group", "=", TOP), ("rank", "=", 0)]
            for found in read_table(self.study.path / layer_table(EXAMPLES, layer), EXAMPLE_TABLE, filters).to_pylist():
                row = wanted[found.pop("feature")]
                found |= {"positions": np.array(found["positions"], np.uint16)}
                found |= {"levels": np.array(found["levels"], np.uint8)}
                with self.lock:
                    example = self.maker.example(self.study.view(StudyExample(**found)))
                at_peak = next((picture for picture in example.pictures if picture.peak), None)
                out[row] = {
                    "thumbnail": None if at_peak is None else picture_body(at_peak),
                    "excerpt": [] if at_peak is not None else token_row(example, _EXCERPT),
                }
        return out

    def feature(self, feature: FeatureId) -> dict[str, Any]:
        """One feature with everything that is known of it."""
        self.study.check(feature)
        neighbours = {"decoder": self._alike(feature), "coactivation": self._together(feature)}
        with self.lock:
            page = self.maker.page(self.study.feature(feature))
        return feature_body(page, self.name, neighbours)

    def _neighbours(self, rows: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
        """The `_NEIGHBOURS` rows of largest value above 0."""
        best = np.argsort(-values, kind="stable")[:_NEIGHBOURS]
        return [
            {
                "feature": str(FeatureId(int(self.layer[row]), int(self.index[row]))),
                "label": self.texts[row],
                "value": float(values[at]),
            }
            for at, row in zip(best.tolist(), rows[best].tolist(), strict=True)
            if values[at] > 0
        ]

    def _together(self, feature: FeatureId) -> list[dict[str, Any]]:
        """Features that fire on the same inputs, by an estimate of the Jaccard index of their inputs."""
        rows, ranks, limits = self._sketches
        own_row = self.row_of[feature]
        own = np.sort(ranks[rows == own_row])
        if not len(own):
            return []
        mine = np.zeros(self._n_ranks, bool)
        mine[own] = True
        limit = np.minimum(limits, limits[own_row])
        n = len(limits)
        both = np.bincount(rows[mine[ranks]], minlength=n)
        theirs = np.bincount(rows[ranks <= limits[own_row]], minlength=n)
        either = np.searchsorted(own, limit, side="right") + theirs - both
        share = np.where(either >= min(_LEAST_UNION, len(own)), both / np.maximum(either, 1), 0.0)
        share[own_row] = 0.0
        return self._neighbours(np.arange(n), share)

    @cached_property
    def _sketches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Feature (row) and item (rank of its hash) of each drawn example; up to which rank each feature is known."""
        order = np.argsort(item_hash(self.study.items.ids), kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        self._n_ranks = len(order)
        rows, ranks = [], []
        for layer in self.study.layers:
            features, items = self.study.example_items(layer, top=False)
            first = self.row_of[FeatureId(layer, 0)]
            rows.append(features + first)
            ranks.append(rank[np.searchsorted(self.study.items.ids, items)])
        row, at = np.concatenate(rows), np.concatenate(ranks)
        last = np.full(len(self.fires), -1)
        np.maximum.at(last, row, at)
        drawn = np.bincount(row, minlength=len(self.fires))
        fired = np.rint(self.fires * self.study.info.items)
        return row, at, np.where(drawn < fired, last, self._n_ranks)

    def _alike(self, feature: FeatureId) -> list[dict[str, Any]]:
        """Features whose decoder rows point the same way, by cosine; none where the transcoders are not at hand."""
        folder = self._transcoders()
        if folder is None:
            return []
        counts = self.study.info.n_features
        try:
            first = TOWER if feature.layer < 0 else 0
            decoder = decoder_rows(folder, feature.layer - first)
            if len(decoder) != counts[feature.layer]:
                return []
            own = np.array(decoder[feature.index])
            size = max(counts.values()) * own.nbytes * len(counts)
            rows, values = [], []
            for layer in self.study.layers if size <= _DECODERS else [feature.layer]:
                decoder = decoder_rows(folder, layer - first)
                norms = np.linalg.norm(decoder, axis=1) * np.linalg.norm(own)
                rows.append(self.row_of[FeatureId(layer, 0)] + np.arange(counts[layer]))
                values.append(decoder @ own / np.maximum(norms, 1e-20))
        except (OSError, ValueError, KeyError):  # of another format, such as cross-layer decoders
            return []
        at, value = np.concatenate(rows), np.concatenate(values)
        value[at == self.row_of[feature]] = 0.0
        return self._neighbours(at, value)

    def _transcoders(self) -> Path | None:
        """The folder of the transcoders that were studied: named by the run's configuration, or the shipped ones."""
        run = self.study.path.parent if self.study.path.name == "study" else self.study.path
        try:
            body = read_yaml(run / "config.yaml")
            folder = Path(body["transcoder"]["path"])
        except (UserError, KeyError, TypeError):
            folder = None
        if folder is not None and (folder / "layer_0.safetensors").is_file():
            return folder
        which = "orrery2_tower_transcoders" if self.study.layers[0] < 0 else "orrery2_transcoders"
        return shipped(f"assets/{which}") if self.study.info.model == "orrery2" else None


class Studies:
    """All studies of a workbench: those of its runs, and the one that comes with vlmscope."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self._open: OrderedDict[str, tuple[int, OpenStudy]] = OrderedDict()
        self._lock = threading.Lock()

    def listed(self) -> list[dict[str, Any]]:
        """All finished studies, those of runs first."""
        rows = []
        for name in [*(run.id for run in self.runs.all() if run.body["has"]["study"]), *SHIPPED_STUDIES]:
            try:
                study = StudyFolder(self.folder(name))
            except UserError:  # damaged, of another version, or not shipped
                continue
            labels = sorted(path.stem for path in (study.path / "labels").glob("*.*"))
            layers = [
                {"layer": layer, "name": layer_name(layer), "features": count}
                for layer, count in sorted(study.info.n_features.items())
            ]
            title = name.replace("shipped", "the study that comes with vlmscope").replace("_tower", ": vision tower")
            title = title if name in SHIPPED_STUDIES else name
            body = {"id": name, "name": title, "model": study.info.model, "items": study.info.items}
            rows.append({**body, "layers": layers, "labels": labels})
        return rows

    def folder(self, name: str) -> Path:
        """The folder of a study by its id."""
        kept = SHIPPED_STUDIES.get(name)
        folder = inside(self.runs.root, name) if kept is None else shipped(kept)
        if not any((place / MANIFEST).is_file() for place in (folder, folder / "study")):
            raise Refused(f"{name[:200]} is no study", 404)
        return folder

    def get(self, name: str) -> OpenStudy:
        """A study, opened again where its files have changed."""
        folder = self.folder(name)
        files = [*folder.glob(f"**/{MANIFEST}"), *folder.glob("**/labels/*")]
        changed = max(file.stat().st_mtime_ns for file in files)
        with self._lock:
            known = self._open.get(name)
            if known is None or known[0] != changed:
                known = changed, OpenStudy(name, folder)
            self._open[name] = known
            self._open.move_to_end(name)
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return known[1]

    def features(self, name: str, query: Query) -> dict[str, Any]:
        """A page of a study's features."""
        if query.sort not in SORTS or query.offset < 0 or not 0 < query.limit <= _MOST_ROWS:
            raise Refused(f"sort is one of {', '.join(SORTS)}; limit is 1 to {_MOST_ROWS}; offset is 0 or more")
        total, rows = self.get(name).rows(query)
        return {"total": total, "rows": rows}

    def feature(self, name: str, feature: str) -> dict[str, Any]:
        """One feature by its name, such as L3/1242."""
        return self.get(name).feature(FeatureId.parse(feature))
