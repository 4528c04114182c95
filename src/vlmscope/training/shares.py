"""A batch divided among processes: whole rows, in their order.

Rows of a forward can be parted when every tensor but the pictures has the shape [B, T, ..] of the tokens, and every
picture takes the same number of tokens, so that it is known whose it is. Otherwise the forward stays whole.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vlmscope.training.transcoder_data import Batch, Forward, forwards

_PICTURES = "pixel_values"


def share(batch: Batch, part: int, parts: int, soft_token: int | None) -> list[Forward]:
    """Part number `part` of `parts`: consecutive rows; together the parts are the batch. It may be empty."""
    given = forwards(batch)
    pictures = [_pictures(one, soft_token) for one in given]
    units = [(n, row) for n, counts in enumerate(pictures) for row in range(1 if counts is None else len(counts))]
    cuts = np.linspace(0, len(units), parts + 1).round().astype(int)
    mine = units[cuts[part] : cuts[part + 1]]
    found = []
    for n in sorted({n for n, _ in mine}):
        rows = [row for m, row in mine if m == n]
        counts = pictures[n]
        found.append(given[n] if counts is None else _take(given[n], rows, counts))
    return found


def _pictures(one: Forward, soft_token: int | None) -> Sequence[int] | None:
    """How many pictures each row has; None when the rows cannot be parted."""
    ids: Tensor = one["input_ids"]
    if any(tensor.shape[:2] != ids.shape for name, tensor in one.items() if name != _PICTURES):
        return None
    if _PICTURES not in one:
        return [0] * len(ids)
    if soft_token is None:
        return None
    tokens, number = (ids == soft_token).sum(1), len(one[_PICTURES])
    each = int(tokens.sum()) // number if number else 0
    if not each or each * number != int(tokens.sum()) or bool((tokens % each).any()):
        return None
    return (tokens // each).tolist()


def _take(one: Forward, rows: Sequence[int], pictures: Sequence[int]) -> Forward:
    """Consecutive rows and their pictures."""
    first, last = rows[0], rows[-1] + 1
    part = {name: tensor[first:last] for name, tensor in one.items() if name != _PICTURES}
    begin, end = sum(pictures[:first]), sum(pictures[:last])
    if end > begin:
        part[_PICTURES] = one[_PICTURES][begin:end]
    return part
