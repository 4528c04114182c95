"""The tokens of each training step, drawn from a small pool of captured batches.

The model's forward costs more than a step of all transcoders, and tokens of one batch resemble each other. So the last
`pool_batches` captured batches are kept, a new one replaces the oldest every `steps_per_batch` steps, and a step draws
its tokens from all of them. The draw depends on the step alone: a resumed run captures the pool anew and goes on with
the same tokens. With both settings at 1 every step sees exactly its own batch.
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import IterableDataset

from vlmscope.core.seeds import generator
from vlmscope.training.transcoder_config import TranscoderTrainingConfig
from vlmscope.training.transcoder_data import LayerActivations


class ActivationStream(IterableDataset[LayerActivations]):
    """Activations of the steps from `first()` to the last."""

    def __init__(
        self,
        capture: Callable[[int], LayerActivations],
        config: TranscoderTrainingConfig,
        first: Callable[[], int],
    ) -> None:
        self.capture, self.config, self.first = capture, config, first

    def __iter__(self) -> Iterator[LayerActivations]:
        pool: dict[int, LayerActivations] = {}
        for step in range(self.first(), self.config.max_steps):
            newest = step // self.config.steps_per_batch
            wanted = range(max(0, newest - self.config.pool_batches + 1), newest + 1)
            pool = {n: pool[n] if n in pool else self.capture(n) for n in wanted}
            yield pool[newest] if self.config.pool_batches == 1 else self._draw(pool, newest, step)

    def _draw(self, pool: dict[int, LayerActivations], newest: int, step: int) -> LayerActivations:
        """As many tokens as the newest batch has, without repeats, from all batches of the pool."""
        sizes = [batch.joint_tokens for batch in pool.values()]
        rng = generator(self.config.seed, "activation_pool", step)
        chosen = torch.from_numpy(rng.choice(sum(sizes), pool[newest].joint_tokens, replace=False)).sort().values
        parts, offset = [], 0
        for batch, size in zip(pool.values(), sizes, strict=True):
            # Of the tokens drawn from all hosts, those that are here.
            first = offset + batch.first
            rows = chosen[(chosen >= first) & (chosen < first + batch.n_tokens)] - first
            parts.append((batch, rows.to(batch.is_image.device)))
            offset += size
        by_layer = {
            layer: (
                torch.cat([batch.by_layer[layer][0][rows] for batch, rows in parts]),
                torch.cat([batch.by_layer[layer][1][rows] for batch, rows in parts]),
            )
            for layer in pool[newest].by_layer
        }
        is_image = torch.cat([batch.is_image[rows] for batch, rows in parts])
        return LayerActivations(by_layer, is_image, joint=len(chosen))
