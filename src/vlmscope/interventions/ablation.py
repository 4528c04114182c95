"""Ablation of whole attention and MLP blocks: outputs replaced by their mean over a case set, or by another case's.

A block's output is that of the raw module, before the norm that some families put after it. Let `o_lt(c)` be the output
of a block of layer l at position t on case c in the unedited model. In one forward, all chosen blocks, layers and
positions are replaced together:
    mean       o_lt <- mean over cases of o_lt(c): what the block says of no case in particular;
    resample   o_lt <- o_lt(c') of another random case c': on the model's own distribution, but another answer.
With both blocks replaced by their means at every layer and position, the last position no longer depends on the case.
One block at a time understates what a model needs, since the layers stand in for each other.

Cases of equal length whose roles and soft tokens align are averaged position by position. Where the cases of a set do
not align, the mean is over all positions of a role, and another case is drawn from those that align with it.

Source: mean and resample ablation as in Chan et al. 2022 (causal scrubbing) and in Zhang and Nanda 2024 (2309.16042).
Legend: B cases, T positions, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmscope.activations import hooked
from vlmscope.core.records import ROLES, generator
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.batching import InputBatch, make_batch

BLOCKS = ("mlp", "attention")
METHODS = ("mean", "resample")
BUDGET = 1 << 29  # bytes of recorded outputs at once
CHUNK = 64  # cases of a forward, at most

Site = tuple[str, int]  # a block of `BLOCKS` and its layer


def block_module(adapter: Adapter, site: Site) -> nn.Module:
    """The module whose output [B, T, d] (or the first entry of it) is the block's."""
    block, layer = site
    return adapter.mlp(layer) if block == "mlp" else adapter.attention(layer)


def all_sites(adapter: Adapter, blocks: Iterable[str] = BLOCKS) -> list[Site]:
    """The blocks of every layer."""
    return [(block, layer) for block in blocks for layer in range(adapter.n_layers)]


@torch.no_grad()
def block_outputs(adapter: Adapter, batch: InputBatch, sites: Iterable[Site]) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits [B, V] at the last position and the blocks' outputs [B, T, d] of one unedited forward."""
    outputs: dict[Site, Tensor] = {}

    def keep(site: Site, _m: Any, _a: Any, out: Any) -> None:
        outputs[site] = out[0] if isinstance(out, tuple) else out

    with hooked({block_module(adapter, site): partial(keep, site) for site in sites}):
        logits = batch.next_logits(adapter)
    return logits, outputs


@contextmanager
def replacing_outputs(adapter: Adapter, values: Mapping[Site, Tensor], where: Tensor) -> Iterator[None]:
    """Replace outputs of blocks at positions `where` [T] bool by `values`: [d], [T, d] or [B, T, d]."""

    def replaced(value: Tensor, _m: Any, _a: Any, out: Any) -> Any:
        old = out[0] if isinstance(out, tuple) else out
        new = torch.where(where.to(old.device)[:, None], value.to(old), old)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    with hooked({block_module(adapter, site): partial(replaced, value) for site, value in values.items()}):
        yield


@torch.no_grad()
def ablated(adapter: Adapter, batch: InputBatch, values: Mapping[Site, Tensor], where: Tensor) -> Tensor:
    """Last-position logits [B, V] with the blocks' outputs replaced (see `replacing_outputs`)."""
    with replacing_outputs(adapter, values, where):
        return batch.next_logits(adapter)


@dataclass(frozen=True)
class Ablation:
    """What one forward replaces: blocks of some layers at the positions of a role."""

    blocks: tuple[str, ...]  # of `BLOCKS`
    method: str  # of `METHODS`
    layers: tuple[int, int]  # first and last, both included
    role: str | None = None  # of `ROLES`; None for every position

    @property
    def span(self) -> str:
        """The layers as settings write them, such as 0-3 or 5."""
        first, last = self.layers
        return f"{first}-{last}" if last > first else str(first)

    def sites(self) -> list[Site]:
        """The blocks that are replaced."""
        return [(block, layer) for block in self.blocks for layer in range(self.layers[0], self.layers[1] + 1)]

    def where(self, batch: InputBatch) -> Tensor:
        """[T] bool, the positions that are replaced."""
        return torch.from_numpy(np.ones(batch.length, bool) if self.role is None else batch.roles == self.role)


class Averages:
    """Mean outputs of blocks over the cases of a set: by position, which all must share, or by role."""

    def __init__(self, adapter: Adapter, batches: Sequence[InputBatch], sites: Sequence[Site], by_role: bool) -> None:
        """Run every case once; `log_probabilities` [n, V] at the last position are of all cases, in order."""
        assert by_role or len(batches) == 1, "cases that do not align have no common positions"
        sums: dict[tuple[Site, str], Tensor] = {}
        counts: dict[tuple[Site, str], int] = {}
        logs = []
        for batch in batches:
            for rows in chunks(adapter, batch, sites):
                part = batch.select(rows)
                found, outputs = block_outputs(adapter, part, sites)
                logs.append(log_probabilities(found))
                for site, narrow in outputs.items():
                    out = narrow if narrow.dtype == torch.float64 else narrow.float()  # many cases are summed
                    for role in ROLES if by_role else [""]:
                        values = out[:, torch.from_numpy(batch.roles == role)].flatten(0, 1) if by_role else out
                        key = (site, role)
                        sums[key] = sums[key] + values.sum(0) if key in sums else values.sum(0)
                        counts[key] = counts.get(key, 0) + len(values)
        self.log_probabilities = torch.cat(logs)
        self._by_role = by_role
        self._means = {key: total / max(counts[key], 1) for key, total in sums.items()}

    def values(self, batch: InputBatch, sites: Iterable[Site]) -> dict[Site, Tensor]:
        """[T, d] for each site, at the positions of a batch of the set."""
        if not self._by_role:
            return {site: self._means[site, ""] for site in sites}
        return {site: torch.stack([self.of_role(site, str(role)) for role in batch.roles]) for site in sites}

    def of_role(self, site: Site, role: str) -> Tensor:
        """[d], the mean over all positions of a role."""
        return self._means[site, role]


def chunks(adapter: Adapter, batch: InputBatch, sites: Collection[Site]) -> list[Tensor]:
    """Rows of a batch in parts whose recorded outputs stay below `BUDGET`."""
    each = len(sites) * batch.length * adapter.d_model * adapter.dtype.itemsize
    return list(torch.arange(batch.size).split(max(1, min(CHUNK, BUDGET // max(each, 1)))))


def donors(size: int, seed: int) -> np.ndarray:
    """[size] int64, for each case another one at random, each taken once; the case itself where it is alone."""
    order = generator(seed, "donors").permutation(size)
    rows = np.empty(size, np.int64)
    rows[order] = np.roll(order, 1)  # one cycle through all, so that none gets itself
    return rows


@dataclass(frozen=True)
class Outcome:
    """What the model says at the last position of n cases under an ablation; NaN and -1 where a case has no donor."""

    top: np.ndarray  # [n] int64, the most probable token
    kl: np.ndarray  # [n] float64, nats from the unedited distribution to the ablated one


def outcomes(
    adapter: Adapter, batches: Sequence[InputBatch], ablations: Sequence[Ablation], seed: int = 0
) -> tuple[Tensor, list[Outcome]]:
    """Unedited log-probabilities [n, V] at the last position of all cases, in order, and the outcome of each ablation.

    `batches` are the cases of one set, those that align in one batch. Memory of recorded outputs is bounded by
    `BUDGET`; donors are drawn from `seed`.
    """
    sites = list(dict.fromkeys(site for ablation in ablations for site in ablation.sites()))
    averages = Averages(adapter, batches, sites, by_role=len(batches) > 1)
    resampled = [site for ablation in ablations if ablation.method == "resample" for site in ablation.sites()]
    parts: list[list[Outcome]] = [[] for _ in ablations]
    start = 0
    for batch in batches:
        others = torch.from_numpy(donors(batch.size, seed))
        for rows in chunks(adapter, batch, sites):
            part = batch.select(rows)
            base = averages.log_probabilities[start : start + len(rows)]
            start += len(rows)
            drawn = block_outputs(adapter, batch.select(others[rows]), resampled)[1] if resampled else {}
            for ablation, done in zip(ablations, parts, strict=True):
                chosen = ablation.sites()
                if ablation.method == "resample" and batch.size == 1:
                    done.append(Outcome(np.full(len(rows), -1), np.full(len(rows), np.nan)))
                    continue
                mean = ablation.method == "mean"
                values = averages.values(part, chosen) if mean else {site: drawn[site] for site in chosen}
                logs = log_probabilities(ablated(adapter, part, values, ablation.where(part)))
                done.append(Outcome(logs.argmax(-1).numpy(force=True), divergence(base, logs)))
    joined = [Outcome(np.concatenate([o.top for o in done]), np.concatenate([o.kl for o in done])) for done in parts]
    return averages.log_probabilities, joined


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities [.., V] of logits, at least in float32."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def divergence(first: Tensor, second: Tensor) -> np.ndarray:
    """KL(first || second) of log-probabilities [.., V], in nats, float64."""
    # Rounding in float32 may leave a KL of nothing slightly below 0.
    return (first.exp() * (first - second)).sum(-1).clamp(min=0).double().numpy(force=True)


@dataclass(frozen=True)
class WithoutMlps:
    """What becomes of the answer to one prompt when every MLP says the mean of other pictures."""

    token: int  # the answer: the most probable token
    before: float  # its probability, unedited
    after: float  # the same with all MLPs averaged
    kept: bool  # whether it is still the most probable
    common: float  # the share of the other pictures that get this answer too, their MLPs averaged likewise

    @property
    def hardly_needed(self) -> bool:
        """Whether the answer stays, with half of its probability or more, and is not what the means say anyway."""
        return self.kept and 2 * self.after >= self.before and self.common <= 0.5


@torch.no_grad()
def without_mlps(adapter: Adapter, inputs: ModelInputs, others: Sequence[ModelInputs]) -> WithoutMlps:
    """Replace all MLP outputs by their means over `others`, K prompts of the same words, in one forward.

    Its 2K + 2 rows are the K others and the prompt unedited, then all of them with the means of the K first rows.
    """
    count = len(others)
    both = make_batch(adapter, [*others, inputs]).select([*range(count + 1)] * 2)

    def hook(_m: Any, _a: Any, out: Tensor) -> Tensor:
        mean = out[:count].mean(0, keepdim=True)
        return torch.cat([out[: count + 1], mean.expand(count + 1, -1, -1)])

    with hooked({adapter.mlp(layer): hook for layer in range(adapter.n_layers)}):
        logs = log_probabilities(adapter.next_logits(both.tensors))
    top = logs.argmax(-1)
    token, ablated_top = int(top[count]), top[count + 1 :]
    before, after = (float(logs[row, token].exp()) for row in (count, -1))
    common = float((ablated_top[:-1] == token).double().mean())
    return WithoutMlps(token, before, after, bool(ablated_top[-1] == token), common)
