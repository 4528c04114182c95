"""Hydra's and OmegaConf's errors as one line that says what is wrong, where, and the nearest name that exists."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import Container, DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

CONFIG_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)


RENAMED = {"task.study": "study.path"}  # keys that once were called otherwise


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
    if where in RENAMED:
        return f"{where}= is called {RENAMED[where]}= for every task; write that"
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
