"""A feature as JSON that the field's viewers read (Neuronpedia's, circuit-tracer's), and more for ours.

What they know: `index`, `transcoder_id`, `examples_quantiles` (each with `quantile_name` and `examples` of `tokens`,
`tokens_acts_list`, `train_token_ind`, `is_repeated_datapoint`), `top_logits`, `bottom_logits`, `act_min`, `act_max`,
`quantile_values`, `histogram`, `activation_frequency`. They know no pictures,
so each run of a picture's soft tokens is one token, `[picture]`, with its largest activation; patches are beside it.
The schema is in `schema/feature.schema.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmscope.core.study import KINDS, TOP, ExampleView, FeatureRecord, StudyInfo, bin_edges

SCHEMA_VERSION = 1


def feature_json(
    record: FeatureRecord, views: Sequence[ExampleView], info: StudyInfo, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON of a feature.

    Args:
        record: what the study knows of it.
        views: of its examples, in their order.
        info: of the study.
        extra: more for the key `vlmscope`, such as a label.
    """
    window, positions = int(str(info.settings["window"])), sum(info.positions.values())
    names = list(dict.fromkeys(view.example.group for view in views))
    counts, edges = record.histogram.sum(0), bin_edges()
    used = np.flatnonzero(counts)
    bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
    return {
        "index": record.feature.index,
        "layer": record.feature.layer,
        "transcoder_id": f"{info.transcoders.get('name')}/layer_{record.feature.layer}",
        "top_logits": [token for token, _ in record.top_logits],
        "bottom_logits": [token for token, _ in record.bottom_logits],
        "act_min": 0.0,
        "act_max": record.activation_max,
        "quantile_values": list(record.quantile_values),
        "histogram": counts[bins].tolist(),
        "activation_frequency": record.positions_fired / positions if positions else 0.0,
        "examples_quantiles": [
            _group(name, names, [v for v in views if v.example.group == name], window) for name in names
        ],
        "vlmscope": {
            "schema_version": SCHEMA_VERSION,
            "feature": str(record.feature),
            "cantor": record.feature.cantor,
            "model": info.model,
            "fired": dict(record.fired),
            "positions": dict(info.positions),
            "items_fired": record.items_fired,
            "items": info.items,
            "activation_sum": record.activation_sum,
            "histogram_edges": edges[bins.start : bins.stop + 1].tolist() if len(used) else [],
            "histogram_by_kind": {kind: record.histogram[row, bins].tolist() for row, kind in enumerate(KINDS)},
            "top_logit_values": [value for _, value in record.top_logits],
            "bottom_logit_values": [value for _, value in record.bottom_logits],
            **(extra or {}),
        },
    }


def quantile_name(name: str, quantiles: int) -> str:
    """A group in the words of the field's viewers: `Top activations`, `Subsample interval 0` (the strongest) ..."""
    return "Top activations" if name == TOP else f"Subsample interval {quantiles - int(name[1:])}"


def _group(name: str, names: Sequence[str], views: Sequence[ExampleView], window: int) -> dict[str, Any]:
    quantiles = max((int(other[1:]) for other in names if other != TOP), default=0)
    seen: set[tuple[str, int]] = set()
    examples = []
    for view in views:
        input_ = (view.item.digest, view.item.part)
        examples.append(_example(view, window, input_ in seen))
        seen.add(input_)
    return {"quantile_name": quantile_name(name, quantiles), "group": name, "examples": examples}


def _example(view: ExampleView, window: int, repeated: bool) -> dict[str, Any]:
    places = view.places(window)
    return {
        "tokens": [place.text for place in places],
        "tokens_acts_list": [place.activation for place in places],
        "train_token_ind": next(n for n, place in enumerate(places) if place.peak),
        "is_repeated_datapoint": repeated,
        "token_kinds": [KINDS[place.kind] for place in places],
        "activation": view.example.activation,
        "origin": view.item.origin,
        "caption": view.item.caption,
        "patches": [_patches(view, picture) for picture in range(view.item.n_pictures)],
    }


def _patches(view: ExampleView, picture: int) -> dict[str, Any]:
    """One picture: levels are 255ths of the example's activation, one a soft token; no rows where they are no grid."""
    rows, columns = view.item.grids[picture] if picture < len(view.item.grids) else (0, 0)
    return {
        "picture": picture,
        "rows": rows,
        "columns": columns,
        "levels": view.picture_levels(picture).tolist(),
        "boxes": [[round(edge, 6) for edge in box] for box in view.picture_boxes(picture)],
    }
