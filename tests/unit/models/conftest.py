"""Tiny models of every family, and a saved one."""

from pathlib import Path

import pytest

from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_gemma3, tiny_vlm


@pytest.fixture(scope="session", params=["gemma3", "gemma3_text", *FAMILIES])
def vlm(request: pytest.FixtureRequest) -> VLM:
    return tiny_vlm(request.param, 5)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Gemma 3 in several shards, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("sharded")
    model = tiny_gemma3(3)
    model.model.save_pretrained(folder, max_shard_size="20KB")
    model.processor.save_pretrained(folder)
    return folder
