"""What most processes of the tests import: a server imports it once and forks them (tests/processes.py)."""

import transformers.models.gemma3.modeling_gemma3  # noqa: F401

import vlmscope.models.tiny
import vlmscope.training.transcoder_training
import vlmscope.transcoders.formats  # noqa: F401
from vlmscope.tasks.settings import summaries

summaries.cache_clear()  # a test may add a task
