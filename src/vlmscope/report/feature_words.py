"""What is said of a feature in plain words: what its strongest examples share, where it fires, what it promotes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from vlmscope.core.study import ANSWER, IMAGE, KINDS, FeatureRecord, Place
from vlmscope.report.sections import percent

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_SPECIAL = re.compile(r"<[^<>\s]+>|\[(?:CLS|SEP|INST|/INST|PAD)\]")
_MOST = 3  # words in a guess
_SHARED = 0.5  # of the strongest examples must have a word for it to be told
_RARER = 0.25  # so much less often it must be in inputs at large
_PLACES = {
    "image": "on pictures",
    "text": "on words of the prompt and its template",
    "answer": "on words of answers and plain text",
}


def words_of(text: str) -> set[str]:
    """The words of a text, in lower case, each once."""
    return {word.lower() for word in _WORD.findall(text)}


def word_shares(captions: Iterable[str]) -> dict[str, float]:
    """The share of captions with each word."""
    counts: Counter[str] = Counter()
    total = 0
    for caption in captions:
        counts.update(words_of(caption))
        total += 1
    return {word: count / total for word, count in counts.items()}


def guess(examples: Sequence[tuple[str, Sequence[Place]]], usual: Mapping[str, float]) -> str:
    """What the strongest examples have in common.

    Args:
        examples: caption and places of each.
        usual: share of all inputs with a word (`word_shares`).

    Returns:
        Words such as `right before “mars”`, `at “planet”`, `on pictures of inputs that say “mars”`.
    """
    if not examples:
        return "never fires in this study"
    peaks = [_peak(places) for _, places in examples]
    if sum(place.kind == IMAGE for place, _ in peaks) * 2 > len(peaks):
        said = telling_words([caption for caption, _ in examples], usual)
        return f"on pictures where the text says {_quoted(said)}" if said else "on pictures of many kinds"
    after = _common(next_ for _, next_ in peaks if next_ is not None and next_.kind == ANSWER)
    at = _common(place for place, _ in peaks if place.kind != IMAGE)
    # The last token of the prompt is always the same, so what follows tells more.
    if after and all(place.kind != ANSWER for place, _ in peaks):
        return f"right before the answer {_quoted(after)}"
    if at:
        return f"at {_quoted(at)}"
    said = telling_words([caption for caption, _ in examples], usual)
    return f"at various words of inputs that say {_quoted(said)}" if said else "at various words"


def telling_words(captions: Sequence[str], usual: Mapping[str, float]) -> list[str]:
    """Words of most captions that few other inputs have, the most telling first."""
    gains = {word: share - usual.get(word, 0.0) for word, share in word_shares(captions).items() if share >= _SHARED}
    return sorted((word for word, gain in gains.items() if gain >= _RARER), key=lambda w: (-gains[w], w))[:_MOST]


def sentence(record: FeatureRecord, items: int) -> str:
    """Where a feature fires, how often, and what it promotes."""
    fired = record.positions_fired
    if not fired:
        return f"It never fires on the {items:,} inputs of this study."
    order = sorted((kind for kind in KINDS if record.fired[kind]), key=lambda kind: -record.fired[kind])
    share = record.fired[order[0]] / fired
    often = "only" if len(order) == 1 else "almost only" if share >= 0.95 else "mostly" if share >= 0.6 else "most"
    rest = "" if len(order) == 1 else f" ({percent(share)} of the time)"
    inputs = f"{record.items_fired:,} of {items:,} inputs"
    promotes = ""
    if record.top_logits:
        promotes = (
            f" Where it fires, it pushes the answer towards {_quoted([w for w, _ in record.top_logits[:_MOST]])}."
        )
    return f"It fires {often} {_PLACES[order[0]]}{rest}, in {inputs}.{promotes}"


def chance(count: int, total: int) -> str:
    """A share as `1 in 26`, or `9 of 10` when it is large."""
    if not count:
        return f"0 of {total:,}"
    if 2 * count > total:
        return "all" if count == total else f"{10 * count / total:.1f} of 10"
    return f"1 in {total / count:,.0f}"


def shown_token(token: str) -> str:
    """A token as a reader expects it: the spaces and line ends that tokenizers write as other signs are shown."""
    plain = token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\n")
    visible = plain.replace("\n", "⏎").replace("\t", "⇥")
    return visible.strip() or "␣"


def special(token: str) -> bool:
    """A sign of the template, such as `<end_of_turn>`, rather than a word."""
    return _SPECIAL.fullmatch(token) is not None


def _peak(places: Sequence[Place]) -> tuple[Place, Place | None]:
    """The place of the peak, and the one after it."""
    at = next(n for n, place in enumerate(places) if place.peak)
    return places[at], places[at + 1] if at + 1 < len(places) else None


def _common(places: Iterable[Place]) -> list[str]:
    """The fewest tokens, at most `_MOST`, that are most of these."""
    counts = Counter(shown_token(place.text) for place in places)
    total, found, kept = sum(counts.values()), 0, []
    for token, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST]:
        kept.append(token)
        found += count
        if found >= 0.6 * total:
            return kept
    return []


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(f"“{shown_token(token)}”" for token in tokens)
