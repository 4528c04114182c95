"""The norms whose scales are frozen."""

from collections.abc import Iterator

from torch import nn

from vlmscope.models.base import Adapter


def all_norms(adapter: Adapter) -> Iterator[nn.Module]:
    """Every norm on the way of the stream: four a layer or fewer, those of values, and the final one.

    Norms of queries and keys are inside the frozen attention patterns.
    """
    for layer in range(adapter.n_layers):
        yield from (norm for norm in (*adapter.norms(layer), adapter.value_norm(layer)) if norm is not None)
    yield adapter.final_norm()
