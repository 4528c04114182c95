"""Random number streams that do not depend on the order in which they are used."""

import hashlib

import numpy as np


def derive(seed: int, *keys: str | int) -> int:
    """A 64-bit seed for the stream named by `keys` under `seed`, for libraries that take a plain integer.

    `1` and `"1"`, or `("ab", "c")` and `("a", "bc")`, name different streams.
    """
    digest = hashlib.sha256(str(int(seed)).encode())
    for key in keys:
        kind = b"s" if isinstance(key, str) else b"i"
        text = key.encode() if isinstance(key, str) else str(int(key)).encode()
        digest.update(kind + len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little")


_DRAWS = 1000  # of one control under one seed, at most


def control_draws(seed: int, count: int) -> range:
    """The numbers of `count` draws of a control under the root seed: 0, 1, 2 .. under seed 0, others under another."""
    return range(seed * _DRAWS, seed * _DRAWS + count)


def generator(seed: int, *keys: str | int) -> np.random.Generator:
    """An independent random generator for each path of keys, for example `generator(0, "train", "planets", 17)`.

    The same seed and keys give the same numbers on every machine and in every process, whatever else was drawn before.
    """
    return np.random.default_rng(derive(seed, *keys))
