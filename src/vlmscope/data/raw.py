"""A sample as it is stored and passed on: pictures as the bytes of their files, and what is said about them.

No pixel is decoded until a model asks for it, so streams are shuffled, hashed and written without looking inside.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmscope.core.conversation import Conversation, Document, Exchange, Sample, check_characters
from vlmscope.core.errors import UserError
from vlmscope.data.images import decode_image, picture_format

MAX_FILE_BYTES = 2**30  # as `bad_files.MAX_ROW_BYTES`
DIGEST_BYTES = 16  # of SHA-256: among 10^9 samples two differ in it but for a chance of 10^-21


@dataclass(frozen=True)
class RawSample:
    """A conversation about pictures, or plain text.

    Attributes:
        images: files (JPEG, PNG, WebP ...) in order.
        exchanges: what is said; empty for plain text.
        text: plain text; empty for a conversation.
        origin: where it came from, for messages.
        facts: what is known of it, by name; no model sees them and no shard keeps them.
    """

    images: tuple[bytes, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    text: str = ""
    origin: str = ""
    facts: Mapping[str, str | int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Refuse words that neither a shard nor a model can take.

        Raises:
            UserError: with the origin and the place.
        """
        for text in (self.text, *(said for turn in self.exchanges for said in turn)):
            check_characters(text, f"{self.origin}: {text[:30]!r}")

    def opened(self) -> Sample:
        """The record that a model reads.

        Raises:
            UserError: a picture is damaged; the message names the sample.
        """
        if not self.exchanges:
            return Document(self.text, self.origin)
        pictures = tuple(
            decode_image(data, f"{self.origin}: picture {number}") for number, data in enumerate(self.images, start=1)
        )
        return Conversation(pictures, self.exchanges, self.origin)

    def digest(self) -> bytes:
        """`DIGEST_BYTES` of the SHA-256 of pictures and words: equal for equal samples, wherever they come from."""
        total = hashlib.sha256()
        for image in self.images:
            total.update(hashlib.sha256(image).digest())
        total.update(json.dumps([self.text, self.exchanges], ensure_ascii=True).encode())
        return total.digest()[:DIGEST_BYTES]

    def nbytes(self) -> int:
        """About how many bytes it takes in a shard."""
        words = self.text if not self.exchanges else "".join(part for turn in self.exchanges for part in turn)
        return sum(map(_in_tar, map(len, self.images))) + _in_tar(len(words.encode()) + 100)

    def to_shard(self, key: str) -> dict[str, Any]:
        """A WebDataset sample: `<key>.json` with the words, `<key>.<n>.<format>` for each picture, as it was."""
        body: dict[str, Any] = {"origin": self.origin}
        if self.exchanges:
            body["texts"] = [{"user": turn.user, "assistant": turn.assistant} for turn in self.exchanges]
        else:
            body["text"] = self.text
        names = [f"{n}.{picture_format(data, f'{self.origin}: picture {n + 1}')}" for n, data in enumerate(self.images)]
        body["images"] = names
        sample: dict[str, Any] = {"__key__": key, "json": json.dumps(body, ensure_ascii=False).encode()}
        return sample | dict(zip(names, self.images, strict=True))

    @classmethod
    def from_shard(cls, sample: Mapping[str, Any]) -> RawSample:
        """The inverse of `to_shard`.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        body = json.loads(sample["json"])
        turns = tuple(Exchange(turn["user"], turn["assistant"]) for turn in body.get("texts", ()))
        return cls(tuple(sample[name] for name in body["images"]), turns, body.get("text", ""), body["origin"])


def held_out(sample: RawSample, share: float) -> bool:
    """Whether a sample is kept for validation: decided by its digest, so equal samples fall on the same side."""
    return int.from_bytes(sample.digest()[:6], "big") < share * 2**48


def _in_tar(size: int) -> int:
    """A file's bytes in a tar: a header of 512, and the content rounded up to 512."""
    return 512 + -(-size // 512) * 512


def file_bytes(path: Path, origin: str) -> bytes:
    """The content of a picture's file.

    Raises:
        UserError: there is none, it is a folder, a device or a pipe, or larger than `MAX_FILE_BYTES`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{origin}: cannot read {path}: it is no file; give the path of a picture")
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(f"{origin}: {path} has {status.st_size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{origin}: cannot read {path}: {reason}; correct the path") from error


def words(value: Any, what: str) -> str:
    """A text that says something.

    Raises:
        UserError: it is missing, empty or no text.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} is missing or empty")
    return value
