"""One tiny Gemma 3, and one thread: sums then never depend on the machine."""

from collections.abc import Iterator

import pytest
import torch

from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_gemma3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def gemma() -> VLM:
    return tiny_gemma3(0)
