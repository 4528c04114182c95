"""Settings of a feature study: a plain record, free of torch, so that Hydra can register it."""

from dataclasses import dataclass

from vlmscope.core.errors import UserError

MOST_TOKENS = 65_535  # positions are stored in two bytes


@dataclass
class StudyConfig:
    """How much of a data set is studied and what is kept (docs/study.md).

    Attributes:
        path: a finished study (its run folder) that is read instead of making one, by what needs a study.
        split: of the data; null takes that of each source (of Orrery's scenes, validation).
        limit: rows in all; null for all there are.
        top: strongest items a feature.
        samples: items a feature that are drawn at random; 0 for none.
        quantiles: groups into which these are cut by activation.
        window: text tokens on both sides of the peak whose activations are kept.
        logits: tokens that a feature raises, and lowers, most; 0 leaves them out.
        max_tokens: what is longer is cut off.
        batch_size: rows read and sorted by shape together.
        forward_tokens: tokens of one forward at most.
        max_skipped: rows that cannot be used (missing or damaged pictures, no text) before the study gives up.
        checkpoint_every: batches between two states from which a killed study goes on.
    """

    path: str | None = None
    split: str | None = None
    limit: int | None = 20_000
    top: int = 20
    samples: int = 20
    quantiles: int = 4
    window: int = 32
    logits: int = 10
    max_tokens: int = 1024
    batch_size: int = 256
    forward_tokens: int = 8192
    max_skipped: int = 100
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        least = {"samples": 0, "window": 0, "logits": 0, "max_skipped": 0, "max_tokens": 2}
        for key in ("top", "samples", "quantiles", "window", "logits", "max_tokens", "batch_size", "forward_tokens",
                    "max_skipped", "checkpoint_every"):  # fmt: skip
            if getattr(self, key) < least.get(key, 1):
                raise UserError(f"study.{key}={getattr(self, key)}: it must be at least {least.get(key, 1)}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"study.limit={self.limit}: it must be at least 1, or null for all")
        if self.max_tokens > MOST_TOKENS:
            raise UserError(f"study.max_tokens={self.max_tokens}: at most {MOST_TOKENS}")
