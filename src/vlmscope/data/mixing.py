"""Several sources as one stream in which each has its share of the TOKENS, deterministic and resumable.

The next item comes from the source that is furthest behind: that with the least tokens so far, divided by its weight.
So at any time the shares differ from the weights by an item's length at most. When a source ends the others go on, in
their own proportion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from vlmscope.core.errors import UserError
from vlmscope.data.raw import RawSample
from vlmscope.data.shuffled import ShuffledSource

Item = TypeVar("Item")


class Encoder(Protocol[Item]):
    """How samples become items; it may hold something back (packing), which then is its state."""

    def add(self, sample: RawSample) -> None:
        """Take a sample in.

        Raises:
            UserError: it cannot be used; it is then counted and left out.
        """
        ...

    def pop(self) -> Item | None:
        """An item that is ready; None asks for another sample."""
        ...

    def rest(self) -> Item | None:
        """What is held back, when no sample comes any more."""
        ...

    def tokens(self, item: Item) -> int:
        """How many tokens an item has."""
        ...

    def state(self) -> Any:
        """JSON values; taken only when nothing is ready to be popped or after a pop."""
        ...

    def load(self, state: Any) -> None:
        """Go on from a state."""
        ...


class Lane(NamedTuple, Generic[Item]):
    """A source with its weight and its encoder."""

    weight: float
    samples: ShuffledSource
    encoder: Encoder[Item]


class Drawn(NamedTuple, Generic[Item]):
    """An item of the mix, whose it is and how long."""

    source: str
    item: Item
    tokens: int


class TokenMix(Generic[Item]):
    """Items of all lanes in proportion; an iterator that ends when all sources have ended."""

    def __init__(self, lanes: Mapping[str, Lane[Item]]) -> None:
        """Start at the beginning.

        Raises:
            UserError: there is no source, or a weight is not positive.
        """
        if not lanes:
            raise UserError("data.sources is empty: a mix needs at least one source")
        for name, lane in lanes.items():
            if not 0 < lane.weight < float("inf"):
                raise UserError(f"data.sources.{name}.weight={lane.weight}: a weight must be positive; correct it")
        self.lanes = dict(lanes)
        self.tokens = dict.fromkeys(self.lanes, 0)
        self.ended: list[str] = []

    def __iter__(self) -> Iterator[Drawn[Item]]:
        return self

    def __next__(self) -> Drawn[Item]:
        while len(self.ended) < len(self.lanes):
            alive = [name for name in self.lanes if name not in self.ended]
            name = min(alive, key=lambda one: self.tokens[one] / self.lanes[one].weight)
            item = _next_item(self.lanes[name])
            if item is None:
                self.ended.append(name)
                continue
            count = self.lanes[name].encoder.tokens(item)
            self.tokens[name] += count
            return Drawn(name, item, count)
        raise StopIteration

    def shares(self) -> dict[str, float]:
        """Each source's share of the tokens so far."""
        total = sum(self.tokens.values())
        return {name: count / total if total else 0.0 for name, count in self.tokens.items()}

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` goes on with the very next item."""
        lanes = {
            name: {"samples": one.samples.state(), "held": one.encoder.state()} for name, one in self.lanes.items()
        }
        return {"tokens": dict(self.tokens), "ended": list(self.ended), "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken, with the same sources and settings.

        Raises:
            UserError: the state is that of other sources.
        """
        if list(state["lanes"]) != list(self.lanes):
            raise UserError(
                f"the state is of {_names(state['lanes'])}, the sources are {_names(self.lanes)}; restore them"
            )
        self.tokens, self.ended = dict(state["tokens"]), list(state["ended"])
        for name, lane in self.lanes.items():
            lane.samples.load(state["lanes"][name]["samples"])
            lane.encoder.load(state["lanes"][name]["held"])


def _names(lanes: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(lanes)


def _next_item(lane: Lane[Item]) -> Item | None:
    while (item := lane.encoder.pop()) is None:
        sample = lane.samples.next()
        if sample is None:
            return lane.encoder.rest()
        try:
            lane.encoder.add(sample)
        except UserError as error:
            lane.samples.skip(error)
    return item
