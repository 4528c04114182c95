"""From a command line to the typed configuration: words taken as typed, errors in one line.

Hydra parses the right side of an override: commas make a sweep, parentheses a function, `=`, `#` and accents an error,
`1e3` a number. The schema says which keys hold words (`str`, `list[str]`); their values are quoted here before Hydra
parses them. What a user quoted for Hydra already stays as it is (docs/bring_your_own.md, "Paths and words").
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
from vlmscope.config.catalog import conf_dir
from vlmscope.config.schema import AppConfig, RandomTranscodersConfig, TranscoderSetConfig
from vlmscope.core.artifacts import read_text, read_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.records import check_characters
from vlmscope.training.config import TranscoderArchConfig

CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or all the names when none is near, or how to see them when there are many."""
    names = sorted(set(known))
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return (
        f"choose one of {', '.join(names)}" if 0 < len(names) <= 12 else "`python run.py task=list` shows the choices"
    )


def _one_line(text: object) -> str:
    lines = [line.strip() for line in str(text).splitlines()]
    return " ".join(line for line in lines if line and not re.match(r"(full_key|object_type|reference_type)[:=]", line))


def _chain(error: BaseException) -> Iterable[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _missing_option(error: MissingConfigException) -> str:
    wanted = error.missing_cfg_file or ""
    group, slash, name = wanted.rpartition("/")
    names = [option for option in error.options or () if not option.endswith("_schema")]
    if not slash:
        return f"no configuration {wanted!r}; run from a clone whose conf/ is complete"
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
    """The configuration file that an error was found in, when Hydra names one."""
    match = re.match(r"In '([^']+)':", str(error))
    return f"in conf/{match[1]}.yaml: " if match and match[1] != "config" else ""


def _missing_value(error: OmegaConfBaseException) -> str:
    key = error.full_key or str(error.key)
    return f"{key} has no value; give it on the command line as {key}=..."


def one_line(error: BaseException) -> str:
    """The message for the user about an error of composing the configuration."""
    chain = list(_chain(error))
    origin = _origin(error)
    for link in chain:
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
                return origin + _missing_value(link)
            case ConfigAttributeError() | ConfigKeyError() if link.key is not None:
                return origin + _unknown_key(link)
            case InterpolationResolutionError():
                key = f"{link.full_key}: " if link.full_key else ""
                return f"{origin}{key}{_one_line(link.msg or link)}; correct the interpolation"
            case OmegaConfBaseException():
                key = f"{link.full_key}: " if link.full_key else ""
                return f"{origin}{key}{_one_line(link.msg or link)}; give a value of that type"
            case _:
                continue
    return _one_line(error)


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


def _override_key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _prompt(app: AppConfig, overrides: Sequence[str]) -> str | None:
    """The text of `prompt`, `prompt_file` or `prompt_name`: what the command line says goes before what an experiment
    says; two of them at once are an error.
    """
    keys = ("prompt", "prompt_file", "prompt_name")
    given = [key for key in keys if key in {_override_key(override) for override in overrides}]
    if len(given) > 1:
        raise UserError(f"both {given[-1]}= and {given[0]}= were given; give one of them")
    spelt = given or [key for key in keys if getattr(app, key) is not None]
    if {"prompt", "prompt_file"} <= set(spelt):
        raise UserError("the experiment sets both prompt and prompt_file; remove one of them")
    if "prompt_file" in spelt and app.prompt_file is not None:
        return read_text(app.prompt_file).removesuffix("\n").removesuffix("\r")
    name = app.prompt_name
    if "prompt_name" not in spelt or name is None:
        return app.prompt
    if app.prompts is None:
        raise UserError(f"prompt_name={name} names a prompt of a set; choose one too, as in prompts=mars_earth")
    if name not in app.prompts.prompts:
        raise UserError(f"prompt_name={name}: no such prompt; {suggestion(name, app.prompts.prompts)}")
    chosen, pictures = app.prompts.prompts[name], len(app.image or [])
    if pictures != len(chosen.images):
        wanted = f"{len(chosen.images)}: {'; '.join(chosen.images)}" if chosen.images else "none"
        raise UserError(f"prompt_name={name}: image= gives {pictures} pictures, it needs {wanted}; make them equal")
    return chosen.prompt


def _image_list(image: Any) -> list[str] | None:
    if image is None or isinstance(image, str):
        return None if image is None else [image]
    if not isinstance(image, Sequence) or not all(isinstance(item, str) for item in image):
        raise UserError(f"image={image}: it must be a path or a list of paths, such as image=[a.png,b.png]")
    return list(image)


def _refuse_unknown_keys(node: Any, prefix: str = "") -> None:
    """`+key=value` slips past Hydra's own check, which `+` switches off."""
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
    """A group that has no options at all lets `group=name` through as a plain string."""
    for group in ("task", "transcoder", "study", "circuit", "circuit_spec", "prompts", "pairs"):
        if isinstance(cfg[group], str):
            raise UserError(f"no {group} named {cfg[group]!r}; `ls conf/{group}` shows the choices")


_TEXTS = ("prompt", "query", "task.donor_prompt", "task.second_prompt", "task.word") + tuple(
    f"attribution.{key}" for key in ("answer", "tokens", "difference")
)


def _refuse_no_characters(cfg: DictConfig) -> None:
    """A byte of the command line that is not UTF-8 may be a part of a file's name, but of no text."""
    for key in _TEXTS:
        found = OmegaConf.select(cfg, key)
        for text in found if isinstance(found, ListConfig) else [found]:
            check_characters(str(text or ""), f"{key}=")


def _limit(node: Any, path: Sequence[str], most: Any, given: Collection[str], prefix: str = "") -> None:
    """Lower the numbers at `path` below `node` to `most`, where it has such a key; `*` stands for every key.

    A list keeps its first `most` entries; `most` None leaves the key out; else the value is replaced. An empty list
    stays, and so does what the command line set, `given`.
    """
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for key in [str(name) for name in node] if path[0] == "*" else [path[0]]:
        if key not in node or prefix + key in given or (isinstance(node[key], ListConfig) and not len(node[key])):
            continue
        if len(path) > 1:
            _limit(node[key], path[1:], most, given, f"{prefix}{key}.")
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
        UserError: for a value that no dataclass accepts or a prompt file that cannot be read.
        omegaconf.errors.OmegaConfBaseException: for a missing mandatory value or a broken interpolation.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{key} has no value; give it on the command line as {key}=...")
    _refuse_unknown_choice(cfg)
    _refuse_unknown_keys(cfg)
    _refuse_no_characters(cfg)
    given = {key for key in map(_override_key, overrides) if "." in key}  # without a dot it chooses a group's option
    for key, most in cfg.limits.items():
        _limit(cfg, key.split("."), most, given)
    app = OmegaConf.to_object(cfg)
    assert isinstance(app, AppConfig), type(app)
    app.image = _image_list(app.image)
    app.prompt = _prompt(app, overrides)
    return app


def declared_circuit(given: CircuitSpecConfig) -> CircuitSpecConfig:
    """What the group says, or the file that it names.

    Raises:
        UserError: the file is not there or not such a declaration, or both say something.
    """
    if given.path is None:
        return given
    if given.supernodes:
        raise UserError(f"circuit_spec.path={given.path} and circuit_spec.supernodes: give one of them")
    body = read_yaml(given.path)
    try:
        if not isinstance(body, dict):
            raise UserError(f"{given.path} is no declaration of a circuit; it begins with 'supernodes:'")
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CircuitSpecConfig), body))
    except CONFIG_ERRORS as error:
        raise UserError(f"{given.path}: {one_line(error)}") from error
    except UserError as error:
        raise UserError(str(error).replace("circuit_spec.", f"{Path(given.path).name}: ", 1)) from error
    assert isinstance(merged, CircuitSpecConfig), type(merged)
    return merged
