"""Transcoder sets on the Hugging Face hub: download of a repository at one commit, and the card.

A set is searched for as a folder, then in the hub's local cache without a network, then it is downloaded into that
cache. Only safetensors, YAML, JSON and Markdown are transferred, never a pickle and never code.

The card is `README.md` with YAML front matter, for people, the hub and the next conversion. It has the facts twice: as
tables to read, and under the key `vlmscope` of the front matter, from which `carried_over` reads them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from vlmscope.core.artifacts import built_from, parse_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.hub import FilePatterns, cached_folder, fetch, is_commit, is_hub_id
from vlmscope.transcoders.formats import ANY, Choice, load_set, open_set
from vlmscope.transcoders.transcoder import TranscoderSet

CARD = "README.md"
_TAGS = ["transcoder", "mechanistic-interpretability", "sparse-features"]
_FIGURES = {
    "fvu": "FVU",
    "fvu_text": "FVU, text",
    "fvu_token_text": "FVU, text, each token about its own mean",
    "fvu_image": "FVU, image",
    "fvu_special": "FVU, special",
    "fvu_last": "FVU, last",
    "l0": "L0",
    "dead_frac": "dead",
}
_MARK = "---\n"
_QUOTED = "## The card of the source"
ALLOWED = ("*.safetensors", "*.yaml", "*.json", "*.csv", "*.md")


@dataclass(frozen=True)
class CardFacts:
    """Content of a card. An unknown fact is None or empty and is not printed.

    `license` is an identifier of the hub, such as apache-2.0. `widths` holds the number of features of each layer,
    `figures` each layer's values on validation data ("fvu", "l0", "dead_frac", ...), `ce` the cross-entropy on answer
    tokens in nats, `ce_delta` its rise with all layers spliced in, `data` the training tokens of each source. `note` is
    Markdown that follows, such as the card of the set that this one was converted from.
    """

    base_model: str
    base_revision: str | None = None
    license: str = "unknown"
    activation: str = "topk"
    k: int = 1
    input_hook: str = "mlp_in"
    output_hook: str = "mlp_out"
    skip: bool = False
    cross_layer: bool = False
    format: str = "vlmscope"
    widths: dict[int, int] = field(default_factory=dict)
    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    ce: float | None = None
    ce_delta: float | None = None
    data: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def facts_of_set(transcoders: TranscoderSet, format: str = "vlmscope") -> CardFacts:
    """The facts that the set itself contains."""
    first = transcoders[transcoders.layers[0]].config
    return CardFacts(
        base_model=transcoders.config.model_name,
        activation=first.activation,
        k=first.k,
        input_hook=first.input_hook,
        output_hook=first.output_hook,
        skip=first.skip,
        cross_layer=transcoders.cross_layer,
        format=format,
        widths=transcoders.widths,
    )


def with_metrics(facts: CardFacts, metrics: Mapping[str, float]) -> CardFacts:
    """Add the figures of a training run, from its metrics: `layers/<name>/layer_07`, `val/ce`, `val/ce_delta`."""
    figures: dict[int, dict[str, float]] = {}
    for name in _FIGURES:
        for layer in facts.widths:
            value = metrics.get(f"layers/{name}/layer_{layer:02d}")
            if value is not None:
                figures.setdefault(layer, {})[name] = float(value)
    return replace(facts, figures=figures, ce=metrics.get("val/ce"), ce_delta=metrics.get("val/ce_delta"))


def render(facts: CardFacts) -> str:
    """The card as Markdown with front matter."""
    head: dict[str, Any] = {"library_name": "vlmscope"}
    if facts.base_model:
        head["base_model"] = facts.base_model
    known = {name: value for name, value in asdict(facts).items() if name != "note" and value not in (None, {}, "")}
    head |= {"license": facts.license, "tags": _TAGS, "vlmscope": known}
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120)
    parts = [_title(facts), *figures_of(facts)]
    total = sum(facts.data.values())
    if total:
        rows = [[_plain(name), f"{n:,}", f"{100 * n / total:.0f} %"] for name, n in facts.data.items()]
        parts += ["## Training data", _table(["source", "tokens", "share"], rows)]
    if facts.settings:
        rows = [[_plain(name), _code(value)] for name, value in facts.settings.items()]
        parts += ["## Training", _table(["setting", "value"], rows)]
    return f"{_MARK}{front}{_MARK}\n" + "\n\n".join(part for part in (*parts, facts.note.strip()) if part) + "\n"


def _title(facts: CardFacts) -> str:
    model = _plain(facts.base_model or "an unnamed model")
    revision = f" at revision {_code(facts.base_revision)}" if facts.base_revision else ""
    widths = sorted(set(facts.widths.values()))
    width = " to ".join(f"{n:,}" for n in dict.fromkeys((widths[0], widths[-1]))) if widths else "an unknown number"
    aim = f"k = {facts.k}" if facts.activation in ("topk", "batchtopk") else f"L0 aimed at {facts.k}"
    more = ", with a skip path" if facts.skip else ""
    if facts.cross_layer:
        more += ", writing to its own layer and later ones"
    return (
        f"# Transcoders of {model}\n\n"
        f"One {facts.activation} transcoder ({aim}, {width} features{more}) for the MLP of each of {len(facts.widths)} "
        f"layers of {model}{revision}: from {_code(facts.input_hook)} to {_code(facts.output_hook)}. Format: "
        f"{facts.format}. Licence: {_plain(facts.license)}."
    )


def figures_of(facts: CardFacts) -> list[str]:
    """The part of a card with the figures by layer, in paragraphs."""
    names = [name for name in _FIGURES if any(name in figures for figures in facts.figures.values())]

    def cells(values: Mapping[str, float]) -> list[str]:
        return [_shown(name, values[name]) if name in values else "" for name in names]

    rows = [[str(n), f"{width:,}", *cells(facts.figures.get(n, {}))] for n, width in facts.widths.items()]
    if names:
        by_name = {name: [f[name] for f in facts.figures.values() if name in f] for name in names}
        rows.append(["mean", "", *cells({name: sum(values) / len(values) for name, values in by_name.items()})])
    parts = ["## Figures", _table(["layer", "features", *(_FIGURES[name] for name in names)], rows)]
    if not names:
        parts.append("No figures are known for this set.")
    if facts.ce_delta is not None:
        before = "" if facts.ce is None else f"Cross-entropy on answer tokens: {facts.ce:.3f} nats; "
        parts.append(f"{before}{'w' if before else 'W'}ith all layers spliced in: {facts.ce_delta:+.3f} nats.")
    return parts


def _shown(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name == "dead_frac" else f"{value:.1f}" if name == "l0" else f"{value:.3f}"


def _plain(value: object) -> str:
    """Text from elsewhere, escaped to show as one line of Markdown: no HTML, link, code or end of a table's cell."""
    return re.sub(r"([\\`|\[\]])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def _code(value: object) -> str:
    """The same text as code, unless a character in it could end the code or the cell."""
    text = " ".join(str(value).split())
    return _plain(text) if re.search(r"[`\\|<]", text) else f"`{text}`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def parts_of(text: str) -> tuple[dict[str, Any], str]:
    """Front matter (empty if there is none) and body of a Markdown file."""
    if not text.startswith(_MARK) or f"\n{_MARK}" not in text[len(_MARK) - 1 :]:
        return {}, text
    front, _, body = text[len(_MARK) :].partition(f"\n{_MARK}")
    head = parse_yaml(front, "the front matter of the set's README.md")
    return (head if isinstance(head, dict) else {}), body


def carried_over(own: CardFacts, text: str | None) -> CardFacts:
    """The card of a converted set: the facts of the source's card `text`, with the architecture and format of `own`.

    A card from elsewhere is quoted whole, with its headings two levels lower and its HTML shown as text.
    """
    if text is None:
        return own
    head, body = parts_of(text)
    known = head.get("vlmscope")
    if isinstance(known, dict):
        names = {item.name for item in fields(CardFacts)} - {"note"}
        source = CardFacts(**{"base_model": "", **{name: value for name, value in known.items() if name in names}})
        kept = ("base_revision", "license", "figures", "ce", "ce_delta", "data", "settings")
        facts = replace(own, **{name: getattr(source, name) for name in kept})
        note = "".join(body.partition(_QUOTED)[1:])
        facts = replace(facts, base_model=own.base_model or source.base_model, note=note)
        with built_from("the front matter of the set's README.md", "card", "correct what stands under vlmscope"):
            render(facts)
        return facts
    base = head.get("base_model")
    name = own.base_model or (base if isinstance(base, str) else "")
    shown = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", body.strip()).splitlines()
    quoted = "\n".join(f"##{line}" if line.startswith("#") else line for line in shown)
    license = str(head.get("license", own.license))
    return replace(own, base_model=name, license=license, note=f"{_QUOTED}\n\n{quoted}")


def set_folder(path: str | Path, revision: str | None = None, format: str = "auto", choice: Choice = ANY) -> Path:
    """The local folder of a set, downloaded into the hub's cache if necessary.

    `path` is a folder, or a hub id, which needs the commit `revision` (40 hexadecimal digits). `format` is that of
    `load_set`; `choice` selects one of Gemma Scope's many sets.
    """
    repo = str(path)
    if Path(path).is_dir() or not is_hub_id(repo):
        return Path(path)
    if revision is None or not is_commit(revision):
        problem = "has no pinned revision here" if revision is None else f"is set to {revision!r}, which may change"
        raise UserError(
            f"no folder {repo}, and the hub repository {repo} {problem}: add transcoder.revision=<commit, 40 hex "
            "digits> (its page lists them under Files, History), or give the folder of a set"
        )

    def refusal(why: str) -> UserError:
        return UserError(
            f"no folder {repo}, and {why}: run `hf download {repo} --revision {revision} --local-dir FOLDER` and give "
            "transcoder.path=FOLDER"
        )

    cached = cached_folder(repo, revision)
    readable = _is_readable(cached, format, choice)
    if readable and (cached / "config.yaml").is_file():
        return cached  # complete: its config lists its files, and all of them are there
    patterns = ALLOWED
    if choice != ANY:  # a repository of Gemma Scope has many sets
        end = {True: "_affine", False: "", None: "*"}[choice.affine]
        layers = f"*layer_*_width_{choice.width or '*'}_l0_{choice.l0 or '*'}{end}/"
        patterns = (f"{layers}params.safetensors", f"{layers}config.json")
    try:
        return fetch(repo, revision, FilePatterns(patterns), refusal)
    except UserError:
        # In other layouts a partial download looks like a set of few layers, so the cache comes second.
        if readable:
            return cached
        raise


def _is_readable(folder: Path, format: str, choice: Choice) -> bool:
    try:
        return folder.is_dir() and bool(open_set(folder, format, choice).layers)
    except UserError:
        return False


def from_pretrained(
    path: str | Path,
    revision: str | None = None,
    n_layers: int | None = None,
    d_model: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    format: str = "auto",
    choice: Choice = ANY,
) -> TranscoderSet:
    """Load a set from a folder or from the hub: `set_folder`, then `load_set` with the remaining arguments."""
    return load_set(set_folder(path, revision, format, choice), n_layers, d_model, dtype, device, format, choice)
