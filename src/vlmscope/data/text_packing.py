"""Documents joined end to end and cut into sequences of one length, as the paper does with text (arXiv 2602.20330).

Each document's tokens are followed by the end-of-sequence token; the join is cut every `length` tokens. A sequence is
one piece for the model: positions run through, and documents in it see each other, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class TokenPacker:
    """Takes documents, gives sequences; its state is the tokens left over."""

    def __init__(self, eos: int, length: int, bos: int | None = None) -> None:
        """Start empty.

        Args:
            eos: what follows each document.
            length: tokens of a sequence.
            bos: what begins each sequence, for models that expect it; None for nothing.
        """
        if length < 2:
            raise ValueError(f"a sequence of {length} tokens predicts nothing: it needs at least 2")
        self.eos, self.length, self.head = eos, length, [] if bos is None else [bos]
        self.left: list[int] = []

    def add(self, document: Sequence[int]) -> None:
        """Append a document."""
        self.left += [*document, self.eos]

    def pop(self) -> list[int] | None:
        """A full sequence, if there is one."""
        body = self.length - len(self.head)
        if len(self.left) < body:
            return None
        sequence, self.left = self.head + self.left[:body], self.left[body:]
        return sequence

    def rest(self) -> list[int] | None:
        """What is left at the end of the data, shorter than a full sequence; None when it is nothing."""
        sequence, self.left = self.head + self.left, []
        return sequence if len(sequence) > max(1, len(self.head)) else None


def packed(documents: Iterable[Sequence[int]], packer: TokenPacker) -> Iterator[list[int]]:
    """All sequences of all documents; no token is lost."""
    for document in documents:
        packer.add(document)
        while (sequence := packer.pop()) is not None:
            yield sequence
    if (sequence := packer.rest()) is not None:
        yield sequence
