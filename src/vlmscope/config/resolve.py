"""From a command line to the typed configuration: words are taken as typed, errors are one line.

Hydra parses the right side of an override: commas make a sweep, parentheses a function call, `=`, `#` and accents an
error, `1e3` a number. For keys that the schema types as words (`str`, `list[str]`), values are therefore quoted before
Hydra parses them, unless the user quoted them already (docs/bring_your_own.md, "Paths and words").
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import Container, DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from omegaconf.grammar_parser import parse

from vlmscope.circuits.config import CircuitSpecConfig
from vlmscope.config.catalog import conf_dir, options, own_files
from vlmscope.config.schema import AppConfig, RandomTranscodersConfig, TranscoderSetConfig
from vlmscope.core.artifacts import read_text, read_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.launch import program
from vlmscope.core.records import check_characters
from vlmscope.training.config import TranscoderArchConfig

CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` if a name is close, else all the names, or for many names how to list them."""
    names = sorted(set(known))
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose one of {', '.join(names)}" if 0 < len(names) <= 12 else f"`{program()} task=list` shows the choices"


def _one_line(text: object) -> str:
    lines = [line.strip() for line in str(text).splitlines()]
    return " ".join(line for line in lines if line and not re.match(r"(full_key|object_type|reference_type)[:=]", line))


def _missing_option(error: MissingConfigException) -> str:
    path = error.missing_cfg_file or ""
    group, slash, name = path.rpartition("/")
    names = [option for option in error.options or () if not option.endswith("_schema")]
    if not slash:
        return f"no configuration {path!r}; install vlmscope again"
    if group == "hydra/launcher" and name.startswith("submitit"):
        return f"hydra/launcher={name} comes with an extra that is not installed; pip install 'vlmscope[slurm]'"
    if not names:
        return f"there is no {group}={name}: the group {group!r} has no options yet"
    return f"no {group} named {name!r}; {suggestion(name, names)}"


def _unknown_key(error: OmegaConfBaseException) -> str:
    parent = error.parent_node if isinstance(error.parent_node, Container) else None
    known = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
    key = str(error.key)
    where = str(error.full_key or key)
    prefix = where[: -len(key)].rstrip(".") if where.endswith(key) else ""
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"no key {where!r}; did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    place = f"{prefix} has" if prefix else "there are"
    return f"no key {where!r}; {place} {', '.join(sorted(known)) or 'no keys'}"


def _origin(error: BaseException) -> str:
    """The configuration file of an error as a prefix of its message; empty if Hydra names none."""
    match = re.match(r"In '([^']+)':", str(error))
    return f"in conf/{match[1]}.yaml: " if match and match[1] != "config" else ""


def one_line(error: BaseException) -> str:
    """One-line message for the user about an error in composing the configuration."""
    origin = _origin(error)
    link: BaseException | None = error
    while link is not None:
        match link:
            case MissingConfigException() if link.missing_cfg_file:
                return origin + _missing_option(link)
            case OverrideParseException():
                value = '["a, b",c]' if "=[" in link.override else '"a, b"'
                hint = f"quote its value, as in 'key={value}'" if "=" in link.override else "write it as key=value"
                return f"cannot read the override {link.override!r}; {hint}"
            case yaml.MarkedYAMLError():
                mark = link.problem_mark
                where = f"{mark.name} line {mark.line + 1}" if mark else "a configuration file"
                return f"{where} is not valid YAML: {link.problem}; correct it"
            case MissingMandatoryValue():
                key = link.full_key or str(link.key)
                return f"{origin}{key} has no value; give it on the command line as {key}=..."
            case ConfigAttributeError() | ConfigKeyError() if link.key is not None:
                return origin + _unknown_key(link)
            case InterpolationResolutionError():
                key = f"{link.full_key}: " if link.full_key else ""
                return f"{origin}{key}{_one_line(link.msg or link)}; correct the interpolation"
            case OmegaConfBaseException():
                key = f"{link.full_key}: " if link.full_key else ""
                said = _one_line(link.msg or link)
                for wrong, clear in _MERGES.items():
                    said = said.replace(wrong, clear)
                return f"{origin}{key}{said}; give a value of that type"
        link = link.__cause__ or link.__context__
    return _one_line(error)


_MERGES = {  # OmegaConf's words for a list in the place of a mapping, and the reverse
    "Cannot merge DictConfig with ListConfig": "a list where {key: value} is needed",
    "Cannot merge ListConfig with DictConfig": "{key: value} where a [list] is needed",
}
_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_ESCAPED = re.compile(r"\\[\\()\[\]{}:=, \t]")
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)


def quote(text: str, *, interpolate: bool = False) -> str:
    """`text` quoted so that Hydra parses and resolves it to exactly `text`; `interpolate` keeps `${...}` active."""
    # In OmegaConf `\\${` is a literal `${`, and backslashes before it count in pairs; in Hydra's grammar the same holds
    # for backslashes before a quote or at the end. Other backslashes stand for themselves in both.
    if not interpolate:
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    text = re.sub(r'(\\*)"', lambda match: match[1] * 2 + r"\"", text)
    text = re.sub(r"\\+\Z", lambda match: match[0] * 2, text)
    return f'"{text}"'


@dataclass(frozen=True)
class _Kind:
    """How the value of a key is read."""

    word: bool = False  # as a word
    words: bool = False  # as a list of words
    exact: bool = False  # as text without any Hydra syntax, not even quotes or `${`
    new: bool = False  # the key lies below a dict, so it may be absent from the configuration


def _kind(schemas: Sequence[tuple[Any, Mapping[str, Any]]], new: bool) -> _Kind:
    """Kind of a key from its types and field metadata, of which several tasks may have one each."""
    types = [inner for kind, _ in schemas for inner in ((*get_args(kind), kind) if _optional(kind) else (kind,))]
    metadata = [data for _, data in schemas]
    paths = any(data.get("paths") for data in metadata)
    word = paths or (str in types and not {int, float, bool}.intersection(types))
    words = paths or any(get_origin(kind) is list and get_args(kind) == (str,) for kind in types)
    return _Kind(word, words, any(data.get("verbatim") for data in metadata), new)


def _optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _look_up(key: str, tasks: tuple[type, ...]) -> _Kind:
    """Kind of a dotted key in the schema; the default kind for an unknown key."""
    first, *rest = key.split(".")
    # Classes below the keys whose class is chosen at composition, not fixed by `AppConfig`.
    transcoders = (TranscoderSetConfig, RandomTranscodersConfig, TranscoderArchConfig)
    roots = {"task": tasks, "transcoder": transcoders, "hydra": (HydraConf,)}
    schemas: list[tuple[Any, Mapping[str, Any]]] = [(root, {}) for root in roots.get(first, (AppConfig,))]
    new = False
    for part in rest if first in roots else [first, *rest]:
        below: list[tuple[Any, Mapping[str, Any]]] = []
        for kind, _ in schemas:
            for inner in get_args(kind) if _optional(kind) else (kind,):
                if get_origin(inner) is dict:
                    new = True
                    below.append((get_args(inner)[1], {}))
                elif is_dataclass(inner):
                    metadata = {item.name: item.metadata for item in fields(inner)}
                    if part in metadata:
                        below.append((_hints(inner)[part], metadata[part]))
        schemas = below
    return _kind(schemas, new)


@cache
def _hints(schema: Any) -> dict[str, Any]:
    return get_type_hints(schema)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _parsed(text: str) -> Any:
    """Hydra's value of an unquoted text; None if it cannot be parsed or makes a sweep."""
    try:
        override = _parser().parse_overrides([f"key={text}"])[0]
        return None if override.is_sweep_override() else override.value()
    except HydraException:
        return None


def _word(text: str) -> str:
    """One word, quoted if Hydra would otherwise change it and the user has not quoted it."""
    if os.path.lexists(text):  # a file's name is taken literally, quotes and `${` included
        return text if _parsed(text) == text and "${" not in text else quote(text)
    read = _parsed(text)
    quoted = re.fullmatch(_QUOTED, text, re.DOTALL) or _ESCAPED.search(text)
    if read == text or (quoted and isinstance(read, str)):
        return text
    try:
        interpolates = "${" in text and parse(text) is not None
    except GrammarParseError:
        interpolates = False
    return quote(text, interpolate=interpolates)


def _pieces(text: str, *, lists: bool = False) -> list[str]:
    """`text` split at commas, except those inside quotes or, with `lists`, inside brackets."""
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
    """The right side of an override whose key holds words, quoted as needed."""
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
    if name in ("task.features", "task.factors") and value.lstrip().startswith("{"):
        return f"++{name}={value}"  # Hydra requires `++` for new names in a dict
    if name.startswith("images."):
        # A new name in a dict needs `++`, and one picture is a list of one.
        whole = value.startswith("[") and value.endswith("]")
        return f"++{name}={_value(value, kind, sweeps) if whole else f'[{_word(value)}]'}"
    if not kind.word and not kind.words:
        return argument
    # A sweep cannot vary Hydra's own keys, such as hydra.sweep.dir.
    return f"{key if kind.new else name}={_value(value, kind, sweeps and not name.startswith('hydra.'))}"


def _sweeps(argv: Sequence[str]) -> bool:
    """Whether the command line may be a sweep: only then do commas outside quotes separate values of a key."""
    if {"-m", "--multirun"}.intersection(argv):
        return True
    chosen = [
        argument.lstrip("+").partition("=") for argument in argv if argument.startswith(("experiment=", "sweep="))
    ]
    # Options outside conf/ (--config-dir) are left to Hydra, which refuses commas if it is not a sweep.
    files = [
        file
        for group, _, option in chosen
        for file in own_files(f"{group}={option}") or [conf_dir() / group / f"{option}.yaml"]
        if option
    ]
    multirun = [not file.is_file() or "MULTIRUN" in file.read_text(encoding="utf-8") for file in files]
    return any(multirun) or "hydra.mode=MULTIRUN" in argv


def quote_arguments(argv: Sequence[str], tasks: Mapping[str, type]) -> list[str]:
    """The command line with words quoted for Hydra; `tasks` maps task names to `Config` classes."""
    sweeps, configs = _sweeps(argv), tuple(tasks.values())
    return [_rewrite(argument, configs, sweeps) for argument in argv]


def _override_key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _prompt(app: AppConfig, overrides: Sequence[str]) -> str | None:
    """The text of `prompt`, `prompt_file` or `prompt_name`; two at once raise `UserError`.

    The command line overrides the experiment.
    """
    keys = ("prompt", "prompt_file", "prompt_name")
    typed = [key for key in keys if key in {_override_key(override) for override in overrides}]
    if len(typed) > 1:
        raise UserError(f"both {typed[-1]}= and {typed[0]}= were given; give one of them")
    active = typed or [key for key in keys if getattr(app, key) is not None]
    if {"prompt", "prompt_file"} <= set(active):
        raise UserError("the experiment sets both prompt and prompt_file; remove one of them")
    if "prompt_file" in active and app.prompt_file is not None:
        return read_text(app.prompt_file).removesuffix("\n").removesuffix("\r")
    name = app.prompt_name
    if "prompt_name" not in active or name is None:
        return app.prompt
    if app.prompts is None:
        raise UserError(f"prompt_name={name} names a prompt of a set; choose one too, as in prompts=mars_earth")
    if name not in app.prompts.prompts:
        raise UserError(f"prompt_name={name}: no such prompt; {suggestion(name, app.prompts.prompts)}")
    chosen, pictures = app.prompts.prompts[name], len(app.image or [])
    if pictures != len(chosen.images):
        needs = f"{len(chosen.images)}: {'; '.join(chosen.images)}" if chosen.images else "none"
        raise UserError(f"prompt_name={name}: image= gives {pictures} pictures, it needs {needs}; make them equal")
    return chosen.prompt


def _refuse_unknown_keys(node: Any, prefix: str = "") -> None:
    """Raise `UserError` for keys outside the schema, which `+key=value` hides from Hydra's own check."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    schema = OmegaConf.get_type(node)
    known = [item.name for item in fields(schema)] if is_dataclass(schema) else None
    for key in map(str, node):
        if known is not None and key not in known:
            raise UserError(f"no key {prefix + key!r}; {suggestion(prefix + key, [prefix + name for name in known])}")
        if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            _refuse_unknown_keys(node[key], f"{prefix}{key}.")


def _refuse_unknown_choice(cfg: DictConfig) -> None:
    """Raise `UserError` for `group=name` of a group without options, which Hydra accepts as a plain string."""
    for group in ("task", "transcoder", "study", "circuit", "circuit_spec", "prompts", "pairs"):
        if isinstance(cfg[group], str):
            raise UserError(f"no {group} named {cfg[group]!r}; {suggestion(cfg[group], options(group))}")


_TEXTS = ("prompt", "query", "task.donor_prompt") + tuple(
    f"attribution.{key}" for key in ("answer", "tokens", "difference")
)


def _refuse_no_characters(cfg: DictConfig) -> None:
    """Raise `UserError` for texts with bytes that are not UTF-8; file names may contain them."""
    for key in _TEXTS:
        value = OmegaConf.select(cfg, key)
        for text in value if isinstance(value, ListConfig) else [value]:
            check_characters(str(text or ""), f"{key}=")


def _limit(node: Any, path: Sequence[str], most: Any, typed: Collection[str], prefix: str = "") -> None:
    """Lower numbers at `path` below `node` to `most`, if present; `*` stands for every key.

    A list keeps its first `most` entries; `most` None deletes the key; other values are replaced. Empty lists and the
    keys that the command line set, `typed`, stay unchanged.
    """
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for key in [str(name) for name in node] if path[0] == "*" else [path[0]]:
        if key not in node or prefix + key in typed or (isinstance(node[key], ListConfig) and not len(node[key])):
            continue
        if len(path) > 1:
            _limit(node[key], path[1:], most, typed, f"{prefix}{key}.")
        elif most is None:
            with open_dict(node):
                del node[key]
        elif isinstance(node[key], int | float):
            node[key] = min(node[key], most)
        elif isinstance(node[key], ListConfig) and isinstance(most, int):
            node[key] = node[key][:most]
        else:
            node[key] = most


def to_app_config(cfg: DictConfig, overrides: Sequence[str] = ()) -> AppConfig:
    """Resolve interpolations, apply `limits`, read `prompt_file`, make `image` a list, and build the dataclasses.

    Raises:
        UserError: a value is missing or refused by a dataclass, or a prompt file cannot be read.
        omegaconf.errors.OmegaConfBaseException: an interpolation is broken or a value has the wrong type.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{key} has no value; give it on the command line as {key}=...")
    _refuse_unknown_choice(cfg)
    _refuse_unknown_keys(cfg)
    _refuse_no_characters(cfg)
    typed = {key for key in map(_override_key, overrides) if "." in key}  # without a dot it chooses a group's option
    for key, most in cfg.limits.items():
        _limit(cfg, key.split("."), most, typed)
    app = OmegaConf.to_object(cfg)
    assert isinstance(app, AppConfig), type(app)
    if app.image is not None:
        images = [app.image] if isinstance(app.image, str) else app.image
        if not isinstance(images, Sequence) or not all(isinstance(item, str) for item in images):
            raise UserError(f"image={app.image}: it must be a path or a list of paths, such as image=[a.png,b.png]")
        app.image = list(images)
    if app.images:
        from vlmscope.data.inputs import pictures_of_folders

        app.images = pictures_of_folders(app.images)
    app.prompt = _prompt(app, overrides)
    return app


def declared_circuit(spec: CircuitSpecConfig) -> CircuitSpecConfig:
    """The declaration of a circuit in the configuration group, or in the file that it names.

    Raises:
        UserError: the file is missing or not a declaration, or both declare supernodes.
    """
    if spec.path is None:
        return spec
    if spec.supernodes:
        raise UserError(f"circuit_spec.path={spec.path} and circuit_spec.supernodes: give one of them")
    body = read_yaml(spec.path)
    try:
        if not isinstance(body, dict):
            raise UserError(f"{spec.path} does not declare a circuit; such a file begins with 'supernodes:'")
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CircuitSpecConfig), body))
    except CONFIG_ERRORS as error:
        raise UserError(f"{spec.path}: {one_line(error)}") from error
    except UserError as error:
        raise UserError(str(error).replace("circuit_spec.", f"{Path(spec.path).name}: ", 1)) from error
    assert isinstance(merged, CircuitSpecConfig), type(merged)
    return merged
