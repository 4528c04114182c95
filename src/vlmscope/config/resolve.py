"""From Hydra's composed configuration to the typed one that tasks receive."""

from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from vlmscope.config.errors import suggestion
from vlmscope.config.schema import AppConfig
from vlmscope.core.artifacts import read_text
from vlmscope.core.conversation import check_characters
from vlmscope.core.errors import UserError


def _override_key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _prompt_text(prompt: str | None, prompt_file: str | None, overrides: Sequence[str]) -> str | None:
    """The prompt: what the command line says goes before what an experiment says; both kinds at once are an error."""
    if prompt_file is None:
        return prompt
    given = {_override_key(override) for override in overrides}
    if {"prompt", "prompt_file"} <= given:
        raise UserError("both prompt= and prompt_file= were given; give one of them")
    if "prompt" in given:
        return prompt
    if "prompt_file" not in given and prompt is not None:
        raise UserError("the experiment sets both prompt and prompt_file; remove one of them")
    return read_text(prompt_file).removesuffix("\n").removesuffix("\r")


def _named_prompt(app: AppConfig, name: str, overrides: Sequence[str]) -> str | None:
    """The prompt of that name in the chosen set, given as many pictures as it needs.

    As for `prompt_file`, the command line goes before what an experiment says.
    """
    given = {_override_key(override) for override in overrides}
    spelt = given & {"prompt", "prompt_file"}
    if spelt and "prompt_name" not in given:
        return app.prompt
    if spelt:
        raise UserError(f"both prompt_name= and {min(spelt)}= were given; give one of them")
    if app.prompts is None:
        raise UserError(f"prompt_name={name} names a prompt of a set; choose one too, as in prompts=mars_earth")
    if name not in app.prompts.prompts:
        raise UserError(f"prompt_name={name}: no such prompt; {suggestion(name, app.prompts.prompts)}")
    found, pictures = app.prompts.prompts[name], len(app.image or [])
    if pictures != len(found.images):
        wanted = f"{len(found.images)}: {'; '.join(found.images)}" if found.images else "none"
        raise UserError(f"prompt_name={name}: image= gives {pictures} pictures, it needs {wanted}; make them equal")
    return found.prompt


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

    A list keeps its first `most` entries; `most` None leaves the key out; else the value is replaced. What the command
    line set, `given`, stays.
    """
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    for key in [str(name) for name in node] if path[0] == "*" else [path[0]]:
        if key not in node or prefix + key in given:
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
    app.prompt = _prompt_text(app.prompt, app.prompt_file, overrides)
    app.image = _image_list(app.image)
    if app.prompt_name is not None:
        app.prompt = _named_prompt(app, app.prompt_name, overrides)
    return app
