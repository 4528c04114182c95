"""Names of clusters of features: the words that their members' strongest examples have more often than other examples.

Legend: F features, C clusters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt

_WORD = re.compile(r"\w+")


def words_of(text: str) -> frozenset[str]:
    """The different words of a text, in small letters."""
    return frozenset(_WORD.findall(text.lower()))


def cluster_names(
    members: Mapping[int, Sequence[int]],
    items: Mapping[int, Sequence[int]],
    words: Mapping[int, frozenset[str]],
    labels: Mapping[int, str] | None = None,
    count: int = 3,
) -> dict[int, str]:
    """A name for each cluster.

    Args:
        members: cluster -> its features.
        items: feature -> the items of its strongest examples.
        words: item -> the different words of it, of all items, which are what is usual.
        labels: feature -> what it was called; a cluster with labels is named by its most frequent ones.
        count: words or labels of a name at most.

    Returns:
        Words joined by spaces (labels by "; "), those first whose share of the examples p stands highest above the
        usual one q, in its standard deviations (p - q) / sqrt(q (1 - q)); "" without an example or such a word.
    """
    usual = Counter(word for of in words.values() for word in of)
    names = {}
    for cluster, features in members.items():
        given = Counter(labels[feature] for feature in features if labels and feature in labels)
        if given:
            names[cluster] = "; ".join(label for label, _ in given.most_common(count))
            continue
        examples = [item for feature in features for item in items.get(feature, ())]
        seen = Counter(word for item in examples for word in words[item])
        excess = {word: _excess(n / len(examples), usual[word] / len(words)) for word, n in seen.items()}
        best = sorted((word for word in excess if excess[word] > 0), key=lambda word: (-excess[word], word))
        names[cluster] = " ".join(best[:count])
    return names


def _excess(share: float, usual: float) -> float:
    return (share - usual) / sqrt(usual * (1 - usual)) if usual < 1 else 0.0
