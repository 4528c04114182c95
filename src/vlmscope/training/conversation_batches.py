"""Batches of conversations for transcoders: one forward each, but that those of the same shape are stacked.

A batch holds a fixed number of examples, about as many as `tokens_per_batch` tokens need on average, from an endless
shuffled order. So batch n follows from the seed and n alone, and every example is used once an epoch.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from vlmscope.core.conversation import Sample
from vlmscope.core.errors import UserError
from vlmscope.data.conversation import drawn
from vlmscope.models.conversations import by_shape, joined

Forward = dict[str, Tensor]
Encoder = Callable[[Sample], list[Forward]]  # such as vlmscope.models.conversations.encode with its model

PROBES = 16  # examples from which the average number of tokens is taken


def stacked(forwards: Sequence[Forward]) -> list[Forward]:
    """Forwards whose tensors all have the same shapes as one, along the first axis; groups in order of appearance.

    Pictures of different sizes, and prompts of different lengths, stay apart: padding would have to be told to every
    family in its own way.
    """
    return [joined([forwards[i] for i in group]) for group in by_shape(forwards)]


class ConversationBatches:
    """Batch number 0, 1, ... of the training data."""

    def __init__(self, samples: Sequence[Sample], encode: Encoder, tokens_per_batch: int, seed: int) -> None:
        """Read some examples to see how long they are.

        Args:
            samples: all training examples; indexing one opens its pictures.
            encode: the forwards of an example.
            tokens_per_batch: about how many tokens a batch has.
            seed: names the order.

        Raises:
            UserError: `tokens_per_batch` is not positive, or an example cannot be encoded.
        """
        if tokens_per_batch < 1:
            raise UserError(f"task.tokens_per_batch={tokens_per_batch}: it must be at least 1")
        self.samples, self.encode, self.seed = samples, encode, seed
        probes = range(min(PROBES, len(samples)))
        tokens = sum(one["input_ids"].numel() for n in probes for one in self._forwards(n))
        self.examples_per_batch = max(1, round(tokens_per_batch * len(probes) / max(tokens, 1)))

    def __call__(self, number: int) -> list[Forward]:
        """The forwards of one batch."""
        first = number * self.examples_per_batch
        return stacked(
            [one for place in range(first, first + self.examples_per_batch) for one in self._forwards(place)]
        )

    def _forwards(self, place: int) -> list[Forward]:
        return self.encode(self.samples[drawn(self.seed, place, len(self.samples))])


class ValidationBatches(Sequence[list[Forward]]):
    """One batch an example, made anew whenever they are gone through: pictures of all of them would fill the memory."""

    def __init__(self, samples: Sequence[Sample], encode: Encoder) -> None:
        self.samples, self.encode = samples, encode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        return self.encode(self.samples[index])

    def __iter__(self) -> Iterator[list[Forward]]:
        return (self.encode(sample) for sample in self.samples)
