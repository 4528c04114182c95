"""Overrides that reach the configuration as they were typed, whatever Hydra's grammar makes of them.

Hydra parses the right side of an override: commas make a sweep, parentheses a function, `=`, `#` and accents an error,
`1e3` a number. The schema says which keys hold words (`str`, `list[str]`); their values are quoted here before Hydra
parses them. What a user quoted for Hydra already stays as it is (docs/bring_your_own.md, "Paths and words").
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

from vlmscope.config.paths import conf_dir
from vlmscope.config.schema import AppConfig, RandomTranscodersConfig, TranscoderArchConfig, TranscoderSetConfig

_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_ESCAPED = re.compile(r"\\[\\()\[\]{}:=, \t]")
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)


def quote(text: str, *, interpolate: bool = False) -> str:
    """`text` as a quoted Hydra value that parses and resolves to exactly `text`; `interpolate` keeps `${...}` live."""
    # In OmegaConf `\\${` is a literal `${`, and backslashes before it count in pairs; in Hydra's grammar the same holds
    # for backslashes before a quote or at the end. Other backslashes stand for themselves in both.
    if not interpolate:
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    text = re.sub(r'(\\*)"', lambda match: match[1] * 2 + r"\"", text)
    text = re.sub(r"\\+\Z", lambda match: match[0] * 2, text)
    return f'"{text}"'


@dataclass(frozen=True)
class _Kind:
    """What a key holds: one word, a list of words, or a text in which nothing is Hydra's, not even quotes or `${`.

    `new`: it is below a dict, so its name need not be in the configuration yet.
    """

    word: bool = False
    words: bool = False
    exact: bool = False
    new: bool = False


def _kind(schemas: Sequence[tuple[Any, Mapping[str, Any]]], new: bool) -> _Kind:
    """Of a key, from its types and the metadata of its fields; several tasks may share its name."""
    types = [inner for kind, _ in schemas for inner in ((*get_args(kind), kind) if _optional(kind) else (kind,))]
    metadata = [data for _, data in schemas]
    paths = any(data.get("paths") for data in metadata)
    word = paths or (str in types and not {int, float, bool}.intersection(types))
    words = paths or any(get_origin(kind) is list and get_args(kind) == (str,) for kind in types)
    return _Kind(word, words, any(data.get("verbatim") for data in metadata), new)


def _optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


@cache
def _roots(tasks: tuple[type, ...]) -> dict[str, tuple[Any, ...]]:
    """Where the composed configuration holds another class than its schema says."""
    transcoders = (TranscoderSetConfig, RandomTranscodersConfig, TranscoderArchConfig)
    return {"task": tasks, "transcoder": transcoders, "hydra": (HydraConf,)}


def _look_up(key: str, tasks: tuple[type, ...]) -> _Kind:
    """What the schema says about a dotted key; nothing where it does not know it."""
    first, *rest = key.split(".")
    roots = _roots(tasks)
    found: list[tuple[Any, Mapping[str, Any]]] = [(root, {}) for root in roots.get(first, (AppConfig,))]
    new = False
    for part in rest if first in roots else [first, *rest]:
        below: list[tuple[Any, Mapping[str, Any]]] = []
        for kind, _ in found:
            for inner in get_args(kind) if _optional(kind) else (kind,):
                if get_origin(inner) is dict:
                    new = True
                    below.append((get_args(inner)[1], {}))
                elif is_dataclass(inner):
                    metadata = {item.name: item.metadata for item in fields(inner)}
                    if part in metadata:
                        below.append((_hints(inner)[part], metadata[part]))
        found = below
    return _kind(found, new)


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _parsed(text: str) -> Any:
    """What Hydra reads in an unquoted value; None where it cannot, or sweeps."""
    try:
        override = _parser().parse_overrides([f"key={text}"])[0]
        return None if override.is_sweep_override() else override.value()
    except HydraException:
        return None


def _interpolates(text: str) -> bool:
    """Whether OmegaConf can read the `${...}` in it."""
    try:
        return "${" in text and parse(text) is not None
    except GrammarParseError:
        return False


def _word(text: str) -> str:
    """One word as Hydra must see it to read just that; unchanged where it does anyway or the user quoted it."""
    if os.path.lexists(text):
        return text if _parsed(text) == text and "${" not in text else quote(text)
    read = _parsed(text)
    quoted = re.fullmatch(_QUOTED, text, re.DOTALL) or _ESCAPED.search(text)
    return text if read == text or (quoted and isinstance(read, str)) else quote(text, interpolate=_interpolates(text))


def _pieces(text: str, *, lists: bool = False) -> list[str]:
    """`text` cut at its commas, not those inside quotes or, with `lists`, inside brackets."""
    whole = _QUOTED + (r"|\[[^\]]*\]+" if lists else "")
    pattern = re.compile(rf"\s*((?:{whole})(?=\s*(?:,|\Z))|[^,]*)\s*(,|\Z)", re.DOTALL)
    pieces, start = [], 0
    while True:
        match = pattern.match(text, start)
        assert match is not None
        pieces.append(match[1].strip())
        start = match.end()
        if not match[2]:
            return pieces


def _value(text: str, kind: _Kind, sweeps: bool) -> str:
    """The right side of an override whose key holds words."""
    if kind.word and os.path.lexists(text):
        return _word(text)
    if not text or text.lower() == "null" or text.startswith("{"):
        return text if not kind.word or not text.startswith("{") else _word(text)
    if sweeps and _SWEEP.fullmatch(text):
        return text
    pieces = _pieces(text, lists=kind.words) if sweeps else [text]
    if len(pieces) > 1:
        return ",".join(_value(piece, kind, sweeps=False) for piece in pieces)
    if kind.words and text.startswith("[") and text.endswith("]"):
        items = _pieces(text[1:-1])
        if not all(items):  # an empty list, or a comma that the user must quote
            return text
        words = [_word(item) for item in items]
        return text if words == items else f"[{','.join(words)}]"
    return _word(text) if kind.word else text


def _rewrite(argument: str, tasks: tuple[type, ...], sweeps: bool) -> str:
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if not equals or key.startswith(("-", "~")):
        return argument
    kind = _look_up(name, tasks)
    if kind.exact:
        return f"{name}={quote(value)}"
    if name == "task.features" and value.lstrip().startswith("{"):
        return f"++{name}={value}"  # new names in a dict need it
    if name.startswith("images."):
        # A new name in a dict needs `++`, and one picture is a list of one.
        whole = value.startswith("[") and value.endswith("]")
        return f"++{name}={_value(value, kind, sweeps) if whole else f'[{_word(value)}]'}"
    if not kind.word and not kind.words:
        return argument
    # A sweep cannot vary Hydra's own keys, such as hydra.sweep.dir.
    return f"{key if kind.new else name}={_value(value, kind, sweeps and not name.startswith('hydra.'))}"


def _sweeps(argv: Sequence[str]) -> bool:
    """Whether the command line may be a sweep: only then do commas outside quotes part the values of a key."""
    if {"-m", "--multirun"}.intersection(argv):
        return True
    chosen = [
        argument.lstrip("+").partition("=") for argument in argv if argument.startswith(("experiment=", "sweep="))
    ]
    # A folder of the user's own is left to Hydra, which refuses commas if it is no sweep after all.
    files = [conf_dir() / group / f"{option}.yaml" for group, _, option in chosen if option]
    multirun = [not file.is_file() or "MULTIRUN" in file.read_text(encoding="utf-8") for file in files]
    return any(multirun) or "hydra.mode=MULTIRUN" in argv


def quote_arguments(argv: Sequence[str], tasks: Mapping[str, type]) -> list[str]:
    """The command line, the values of keys that hold words safe for Hydra. `tasks`: the `Config` class of each task."""
    sweeps, configs = _sweeps(argv), tuple(tasks.values())
    return [_rewrite(argument, configs, sweeps) for argument in argv]
