"""Studies of the workbench: their features as filtered rows, and one feature with its examples and neighbours.

Everything is read from a study's files (docs/study.md), without torch. Two features fire together by the share of
inputs on which both fire, of those on which either does (Jaccard). A study keeps, of each feature, the inputs of the
smallest hashes on which it fires, which are bottom-k sketches under one hash (Cohen and Kaplan 2007): on the inputs up
to the lower of two last hashes, both features' firings are known, and their shares are counted there.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from vlmscope.core.artifacts import read_yaml, shipped
from vlmscope.core.errors import UserError
from vlmscope.core.records import TOWER, FeatureId, layer_name
from vlmscope.core.study import (
    ANSWER,
    IMAGE,
    KINDS,
    LEVELS,
    MANIFEST,
    SHIPPED_STUDIES,
    TOP,
    ExampleView,
    FeatureRecord,
    Place,
    StudyExample,
    StudyInfo,
    bin_edges,
    item_hash,
)
from vlmscope.features.labels import Label, Labels
from vlmscope.features.study_files import EXAMPLE_TABLE, EXAMPLES, FEATURES, StudyFolder, layer_table, read_table
from vlmscope.report.page import percent
from vlmscope.report.pictures import data_uri, thumbnail
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
_CACHED = 4096  # items whose small pictures are kept; features share their strongest items
SORTS = ("score", "activation", "fires", "rare", "feature")

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_MOST = 3  # words in a guess
_SHARED = 0.5  # least share of the strongest examples that have a word of the guess
_RARER = 0.25  # by so much the word's share of all inputs must be lower
_PLACES = {
    "image": "on pictures",
    "text": "on words of the prompt and its template",
    "answer": "on words of answers and plain text",
}


def word_shares(captions: Iterable[str]) -> dict[str, float]:
    """The share of captions with each word, in lower case."""
    each = [{word.lower() for word in _WORD.findall(caption)} for caption in captions]
    counts = Counter(word for words in each for word in words)
    return {word: count / len(each) for word, count in counts.items()}


def guess(examples: Sequence[tuple[str, Sequence[Place]]], usual: Mapping[str, float]) -> str:
    """Guess, in words, what the strongest examples have in common.

    `examples` are caption and places of each, `usual` is the share of all inputs with a word. Such words are `right
    before “mars”`, `at “planet”`, `on pictures where the text says “mars”`.
    """
    if not examples:
        return "never fires in this study"
    peaks: list[Place] = []
    following: list[Place] = []
    for _, places in examples:
        peak = next(n for n, place in enumerate(places) if place.peak)
        peaks.append(places[peak])
        following += places[peak + 1 : peak + 2]
    # Words of most captions that few other inputs have, the most telling first.
    shares = word_shares(caption for caption, _ in examples)
    gains = {word: share - usual.get(word, 0.0) for word, share in shares.items() if share >= _SHARED}
    words = sorted((word for word, gain in gains.items() if gain >= _RARER), key=lambda word: (-gains[word], word))
    telling = _quoted(words[:_MOST])
    if sum(place.kind == IMAGE for place in peaks) * 2 > len(peaks):
        return f"on pictures where the text says {telling}" if telling else "on pictures of many kinds"
    after = _common(place for place in following if place.kind == ANSWER)
    # The last token of the prompt is always the same, so what follows tells more.
    if after and all(place.kind != ANSWER for place in peaks):
        return f"right before the answer {_quoted(after)}"
    if tokens := _common(place for place in peaks if place.kind != IMAGE):
        return f"at {_quoted(tokens)}"
    return f"at various words of inputs that say {telling}" if telling else "at various words"


def _common(places: Iterable[Place]) -> list[str]:
    """The fewest tokens, at most `_MOST`, that make up 60 % of these; none when it takes more."""
    counts = Counter(shown_token(place.text) for place in places)
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST]
    for size in range(1, len(ranked) + 1):
        if sum(count for _, count in ranked[:size]) >= 0.6 * counts.total():
            return [token for token, _ in ranked[:size]]
    return []


def _quoted(tokens: Iterable[str]) -> str:
    return ", ".join(f"“{shown_token(token)}”" for token in tokens)


def shown_token(token: str) -> str:
    """A token for a reader: tokenizers' own signs for spaces and line ends replaced by visible ones."""
    plain = token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\n")
    visible = plain.replace("\n", "⏎").replace("\t", "⇥")
    return visible.strip() or "␣"


def sentence(record: FeatureRecord, info: StudyInfo, shared: str) -> str:
    """Where a feature fires, how often, and what it promotes, in words, after what its examples share (or "")."""
    fired = record.positions_fired
    if not fired:
        return f"It never fires on the {info.items:,} inputs of this study."
    order = sorted((kind for kind in KINDS if record.fired[kind]), key=lambda kind: -record.fired[kind])
    share = record.fired[order[0]] / fired
    often = "only" if len(order) == 1 else "almost only" if share >= 0.95 else "mostly" if share >= 0.6 else "most"
    rest = "" if len(order) == 1 else f" ({percent(share)} of the time)"
    promotes = _quoted(word for word, _ in record.top_logits[:_MOST])
    parts = [
        f"Strongest {shared}." if shared else "",
        f"It fires {often} {_PLACES[order[0]]}{rest}, in {record.items_fired:,} of {info.items:,} inputs.",
        f"Where it fires, it pushes the answer towards {promotes}." if promotes else "",
    ]
    return " ".join(part for part in parts if part)


def token_row(view: ExampleView, near: int = 16) -> list[dict[str, Any]]:
    """The tokens around an example's peak; `level` is in 255ths of the peak."""
    scale = LEVELS / (view.example.activation or 1.0)
    return [
        {"text": place.text, "level": round(place.activation * scale), "kind": KINDS[place.kind], "peak": place.peak}
        for place in view.places(near)
    ]


def label_body(label: Label | None) -> dict[str, Any] | None:
    """A label that holds: written by hand, or better than chance."""
    if label is None or not label.text or (label.score is not None and not label.beats_chance):
        return None
    return {key: getattr(label, key) for key in ("text", "score", "low", "high", "source")}


def _once(views: Sequence[ExampleView]) -> list[tuple[ExampleView, int]]:
    """Each input once, in order of first appearance, with its number of views."""
    times: dict[tuple[str, int], list[ExampleView]] = {}
    for view in views:
        times.setdefault((view.item.digest, view.item.part), []).append(view)
    return [(same[0], len(same)) for same in times.values()]


class Panels:
    """What a study says about one feature after another, as the page's panel shows it; pictures are embedded."""

    def __init__(self, study: StudyFolder, labels: Mapping[FeatureId, Label], examples: int, samples: int) -> None:
        """`labels` are those to show. `examples` of the strongest inputs are, and `samples` of each weaker group."""
        self.study, self.labels, self.examples, self.samples = study, labels, examples, samples
        self.usual = word_shares(study.items[int(item)].caption for item in study.items.ids)
        self.missing = ""  # why pictures are not available, once one was not
        # A cache of this object, rather than of the class, which would keep all studies alive.
        self.thumbnails = lru_cache(_CACHED)(self._thumbnails)

    def _thumbnails(self, item: int) -> list[str]:
        try:
            return [data_uri(thumbnail(picture)) for picture in self.study.pictures(self.study.items[item])]
        except UserError as error:
            self.missing = self.missing or str(error)
            return []

    def pictures(self, view: ExampleView) -> list[dict[str, Any]]:
        """The pictures of an example with what the feature does on them; none where they are not available."""
        return [
            {
                "url": url,
                "boxes": [[round(float(edge), 4) for edge in box] for box in view.picture_boxes(number)],
                "levels": view.picture_levels(number).tolist(),
            }
            for number, url in enumerate(self.thumbnails(view.item.id))
        ]

    def panel(
        self, record: FeatureRecord, study: str = "", neighbours: Mapping[str, list[dict[str, Any]]] | None = None
    ) -> dict[str, Any]:
        """All about a feature of the study of this name."""
        info, label = self.study.info, self.labels.get(record.feature)
        grouped: dict[str, list[ExampleView]] = {TOP: []}
        for example in record.examples:
            grouped.setdefault(example.group, []).append(self.study.view(example))
        shared = guess([(view.item.caption, view.places()) for view, _ in _once(grouped[TOP])], self.usual)
        quarters = sorted((name for name in grouped if name != TOP), key=lambda name: -int(name[1:]))
        groups = [self._group(name, quarters, grouped[name]) for name in (TOP, *quarters) if grouped[name]]
        used = np.flatnonzero(record.histogram.sum(0))
        bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
        counts = {kind: record.histogram[row, bins].tolist() for row, kind in enumerate(KINDS)}
        return {
            "feature": str(record.feature),
            "study": study,
            "label": label_body(label),
            "guess": shared,
            # Without a label what the examples share is the title.
            "sentence": sentence(record, info, shared if label and groups else ""),
            "items": info.items,
            "items_fired": record.items_fired,
            "fired": dict(record.fired),
            "max": record.activation_max,
            "histogram": {"edges": bin_edges()[bins.start : bins.stop + 1].tolist() if len(used) else [], **counts},
            "top_logits": [list(pair) for pair in record.top_logits],
            "bottom_logits": [list(pair) for pair in record.bottom_logits],
            "groups": groups,
            "neighbours": dict(neighbours or {"decoder": [], "coactivation": []}),
            "missing": self.missing,
        }

    def _group(self, name: str, quarters: Sequence[str], views: Sequence[ExampleView]) -> dict[str, Any]:
        """Examples of one strength: `name` is "top" or "q1" (weakest) and so on; equal inputs are shown once."""
        title, shown = "Strongest examples", self.examples
        if name != TOP:
            place, shown = quarters.index(name), self.samples
            ends = {0: ", the stronger inputs", len(quarters) - 1: ", the weakest inputs"}
            title = f"Part {place + 1} of {len(quarters)}{ends.get(place, '')}"
        examples = [
            {
                "activation": view.example.activation,
                "origin": view.item.origin,
                "tokens": token_row(view),
                "pictures": self.pictures(view),
                "times": times,
            }
            for view, times in _once(views)[:shown]
        ]
        return {"name": name, "title": title, "examples": examples}


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


class OpenStudy:
    """One study in memory: counts and labels of all features; examples and pictures are read when asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.study = name, StudyFolder(folder)
        self.lock = threading.Lock()  # sources of pictures are no friends of several threads
        labels = Labels(self.study)
        self.labels = {key: label for key, label in labels.all().items() if label_body(label) is not None}
        fired = [f"fired_{kind}" for kind in KINDS]
        columns = ["feature", "items_fired", *fired, "activation_max", "top_tokens"]
        tables = {
            layer: pq.read_table(self.study.path / layer_table(FEATURES, layer), columns=columns).to_pandas()
            for layer in self.study.layers
        }
        counts = pd.concat([table.assign(layer=layer) for layer, table in tables.items()], ignore_index=True)
        ids = [FeatureId(int(layer), int(index)) for layer, index in zip(counts.layer, counts.feature, strict=True)]
        self.row_of = {feature: row for row, feature in enumerate(ids)}
        named = [self.labels.get(feature) for feature in ids]
        shares = counts[fired].div(counts[fired].sum(axis=1).clip(lower=1), axis=0)
        # A row per feature, as the page lists it, besides its layer.
        self.features: Any = pd.DataFrame(
            {
                "layer": counts.layer,
                "feature": [str(feature) for feature in ids],
                "label": [label.text if label else "" for label in named],
                "score": np.array([label.score if label else None for label in named], float),
                "fires": counts.items_fired / max(self.study.info.items, 1),
                **{f"share_{kind}": shares[f"fired_{kind}"] for kind in KINDS},
                "max": counts.activation_max.astype(float),
                "top_tokens": [list(words[:3]) for words in counts.top_tokens],
            }
        )
        tokens = self.features.top_tokens.str.join(" ")
        self.searched = (self.features.feature + " " + self.features.label + " " + tokens).str.lower()

    @cached_property
    def panels(self) -> Panels:
        """Makes features' panels; it reads all items' captions."""
        return Panels(self.study, self.labels, _EXAMPLES, _SAMPLES)

    def rows(self, query: Query) -> tuple[int, list[dict[str, Any]]]:
        """The number of features that fit, and those asked for."""
        if query.only:
            named = [FeatureId.parse(name) for name in query.only.split(",")[:_MOST_ROWS]]
            for feature in named:
                self.study.check(feature)
            return len(named), self.described([self.row_of[feature] for feature in named])
        table, words = self.features, query.words.lower().split()
        keep = pd.Series(True, table.index)
        if query.layer is not None:
            keep &= table.layer == query.layer
        if query.modality in KINDS:
            keep &= table[f"share_{query.modality}"] > 0.5
        if query.density_min is not None:
            keep &= table.fires >= query.density_min
        if query.density_max is not None:
            keep &= table.fires <= query.density_max
        if query.label in ("yes", "no"):
            keep &= (table.label != "") == (query.label == "yes")
        if query.score_min is not None:
            keep &= table.score.fillna(-1.0) >= query.score_min
        for word in words:
            keep &= self.searched.str.contains(word, regex=False)
        found = table[keep]
        keys = {
            "score": -found.score.fillna(-1.0),
            "activation": -found["max"],
            "fires": -found.fires,
            "rare": found.fires.where(found.fires > 0, np.inf),
            "feature": found.fires * 0,
        }
        # A label says more about a feature than the tokens that it promotes.
        unnamed = [bool(words) and not all(word in text for word in words) for text in found.label.str.lower()]
        order = np.lexsort([keys[query.sort], unnamed])  # stable; the last key is the primary one
        return len(found), self.described(found.index[order[query.offset : query.offset + query.limit]].tolist())

    def described(self, shown: list[int]) -> list[dict[str, Any]]:
        """Rows of the page, each with its strongest example."""
        best = self._strongest(shown)
        rows = []
        for row, body in zip(shown, self.features.drop(columns="layer").loc[shown].to_dict("records"), strict=True):
            score = None if np.isnan(body["score"]) else body["score"]
            rows.append({**body, "score": score, "thumbnail": None, "excerpt": [], **best.get(row, {})})
        return rows

    def _strongest(self, rows: list[int]) -> dict[int, dict[str, Any]]:
        """The thumbnail or, where the peak is in words, the words around it, of features by row."""
        out: dict[int, dict[str, Any]] = {}
        ids = [FeatureId.parse(self.features.feature[row]) for row in rows]
        for layer in {feature.layer for feature in ids}:
            wanted = {feature.index: row for feature, row in zip(ids, rows, strict=True) if feature.layer == layer}
            filters = [("feature", "in", list(wanted)), ("group", "=", TOP), ("rank", "=", 0)]
            for found in read_table(self.study.path / layer_table(EXAMPLES, layer), EXAMPLE_TABLE, filters).to_pylist():
                row = wanted[found.pop("feature")]
                found |= {"positions": np.array(found["positions"], np.uint16)}
                found |= {"levels": np.array(found["levels"], np.uint8)}
                view = self.study.view(StudyExample(**found))
                item, position = view.item, view.example.position
                if item.kinds[position] == IMAGE:
                    number = int(item.pictures[np.count_nonzero(item.kinds[:position] == IMAGE)])
                    with self.lock:
                        shown = self.panels.pictures(view)
                    out[row] = {"thumbnail": shown[number] if shown else None}
                else:
                    out[row] = {"excerpt": token_row(view, _EXCERPT)}
        return out

    def feature(self, feature: FeatureId) -> dict[str, Any]:
        """One feature with everything that is known of it."""
        self.study.check(feature)
        neighbours = {"decoder": self._alike(feature), "coactivation": self._together(feature)}
        with self.lock:
            return self.panels.panel(self.study.feature(feature), self.name, neighbours)

    def _neighbours(self, rows: np.ndarray, values: np.ndarray) -> list[dict[str, Any]]:
        """The `_NEIGHBOURS` rows of largest value above 0."""
        best = np.argsort(-values, kind="stable")[:_NEIGHBOURS]
        best = best[values[best] > 0]
        named = self.features.loc[rows[best], ["feature", "label"]].assign(value=values[best].astype(float))
        return named.to_dict("records")

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
        last = np.full(len(self.features), -1)
        np.maximum.at(last, row, at)
        drawn = np.bincount(row, minlength=len(self.features))
        fired = np.rint(self.features.fires.to_numpy() * self.study.info.items)
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
