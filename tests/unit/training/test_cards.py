"""The card of a trained set divides its tokens by the shares of the mix."""

from types import SimpleNamespace
from typing import Any

from vlmscope.tasks.train_transcoders import training_card
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.transcoders.hub import parts_of
from vlmscope.transcoders.transcoder import random_set


def test_tokens_are_divided_by_the_shares_of_what_was_drawn() -> None:
    model = SimpleNamespace(hub="org/vlm", path="models/vlm", tiny=None, revision="a" * 40)
    cfg: Any = SimpleNamespace(model=model, data=SimpleNamespace(name="mix"), task=SimpleNamespace(license="mit"))
    metrics = {"train/tokens": 1000.0, "data/web/tokens_share": 0.25, "data/chat/tokens_share": 0.75}
    head, body = parts_of(training_card(cfg, TranscoderTrainingConfig(), random_set(2, 6, 24, 4), metrics))
    assert head["vlmscope"]["data"] == {"web": 250, "chat": 750}
    assert (head["base_model"], head["license"]) == ("org/vlm", "mit")
    assert head["vlmscope"]["base_revision"] == "a" * 40 and "| chat | 750 | 75 % |" in body
    whole, _ = parts_of(training_card(cfg, TranscoderTrainingConfig(), random_set(2, 6, 24, 4), {"train/tokens": 9.0}))
    assert whole["vlmscope"]["data"] == {"mix": 9}
