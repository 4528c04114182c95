"""A model's architecture without its weights: from a folder, the hub's cache, or the facts kept here of published ones.

`published/NAME.json` holds the numbers of `google/NAME`'s `config.json` in transformers' present spelling, written down
for `task=plan` and the tests, so that both work without a network. The models' parameter counts, as published, agree:
`tests/unit/models/test_published_sizes.py`.
"""

from pathlib import Path
from typing import Any

import torch

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.models.checkpoint import read_config
from vlmscope.models.families import check_supported
from vlmscope.models.hub import cached_folder, is_commit, is_hub_id
from vlmscope.models.loading import CLASSES

PUBLISHED = Path(__file__).with_name("published")


def published_models() -> list[str]:
    """Names of the models whose architecture is kept here."""
    return sorted(path.stem for path in PUBLISHED.glob("*.json"))


def find_config(path: str, hub: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model that need not be there; nothing is fetched.

    Args:
        path: a folder, or a hub id.
        hub: the hub id that belongs at `path`, if any.
        revision: the commit at which the hub's cache is looked into.

    Raises:
        UserError: when the architecture is known neither from a folder nor from here.
    """
    if Path(path).is_dir():
        return read_config(Path(path))
    repo = hub or (path if is_hub_id(path) else None)
    if repo is not None and revision is not None and is_commit(revision):
        folder = cached_folder(repo, revision)
        if (folder / "config.json").is_file():
            return read_config(folder)
    name = (repo or "").removeprefix("google/")
    if name in published_models():
        return read_json(PUBLISHED / f"{name}.json")
    known = ", ".join(f"google/{each}" for each in published_models())
    raise UserError(
        f"no folder {path}, and of {repo or path} nothing is known here: its config.json alone, in a folder that "
        f"model.path= names, is enough; known without it: {known}"
    )


def empty_model(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """The Hugging Face model of a `config.json` on the `meta` device: shapes, no memory.

    Raises:
        UserError: when the type is not supported, or transformers does not accept the numbers.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type = str(config.get("model_type"))
    check_supported(model_type, "config.json")
    model_class: Any = getattr(transformers, CLASSES[model_type].model)
    try:
        with torch.device("meta"):
            return model_class._from_config(model_class.config_class.from_dict(config), dtype=dtype).eval()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"transformers refuses the config.json of this {model_type} model: {reason}") from error
