"""Pictures that others drew: icons of 363 concepts, split by artist, and facts about them (`assets/eyes_pictures`).

The pictures are shipped as one Parquet file a split, with columns `image` (a 64 x 64 WebP with transparent ground, as
`datasets` stores it), `label` (the concept), `kind`, `artist` (the icon set), `icon` and `licence`, which
`data.sources.NAME.kind=hf_image_label` reads too. `concepts.yaml` beside them says which icon of which set is used.
To render them again, `npm pack` the packages it names, unpack each into FOLDER/<its name without @, / as ->, and run

    pip install resvg-py && python -m vlmscope.data.icons FOLDER
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from vlmscope.core.artifacts import read_yaml, shipped
from vlmscope.core.errors import check_choice
from vlmscope.core.records import generator
from vlmscope.data.orrery.rendering import planet_scene
from vlmscope.data.orrery.scenes import PLANETS, SPLITS

SIDE = 64
PICTURE = "<start_of_image>"  # Gemma 3's placeholder: prompts of relations are written for its text model
PLANET_POSES = {"train": 12, "val": 3, "test": 6}  # of each planet: there are textures of one artist only
NOT_KINDS = ("sets", "called", "ambiguous", "spelt")  # of the keys of concepts.yaml
COLUMNS = ["image", "label", "kind", "artist", "icon", "licence"]


class IconPair(NamedTuple):
    """Two concepts and a picture of each."""

    original: str
    counterfactual: str
    picture: Image.Image
    other_picture: Image.Image


def pictures_folder() -> Path:
    """The folder of the shipped pictures."""
    return shipped("assets/eyes_pictures")


def read_icons(split: str, kinds: Sequence[str] | None = None) -> pd.DataFrame:
    """The pictures of a split, one a row, `image` as an RGBA picture; `kinds` restricts them."""
    check_choice("split", split, SPLITS)
    table = pd.read_parquet(pictures_folder() / f"{split}.parquet")
    if kinds is not None:
        for kind in kinds:
            check_choice("kinds", kind, sorted(set(table.kind)))
        table = table[table.kind.isin(kinds)].reset_index(drop=True)
    images = [Image.open(io.BytesIO(image["bytes"])).convert("RGBA") for image in table.image]
    return table.assign(image=images)


def on_ground(picture: Image.Image, ground: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A picture with transparency, on ground of one colour."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*ground, 255)), picture).convert("RGB")


@dataclass(frozen=True)
class Relation:
    """A fact of things, which a text model may know: the question, `{}` being the thing, and the answers by concept."""

    prompt: str
    answers: dict[str, str]  # with the space before the word
    unknown: frozenset[str] = frozenset()  # concepts of which the text model gives another answer

    @property
    def known(self) -> set[str]:
        """The concepts whose answer the text model gives."""
        return set(self.answers) - self.unknown

    def asked(self, concept: str | None = None) -> str:
        """The question of a written name; without one, of a picture."""
        return self.prompt.replace("{}", PICTURE if concept is None else concept)


def read_relations(names: Sequence[str] = ()) -> dict[str, Relation]:
    """The relations of `relations.yaml` by name; all without `names`."""
    stored = read_yaml(pictures_folder() / "relations.yaml")
    for name in names:
        check_choice("relations", name, list(stored))
    found = {}
    for name in names or stored:
        answers = {concept: f" {word}" for concept, word in stored[name]["answers"].items()}
        found[name] = Relation(stored[name]["prompt"], answers, frozenset(stored[name].get("unknown", ())))
    return found


def icon_pairs(relations: Mapping[str, Relation], split: str, count: int, seed: int = 0) -> Iterator[IconPair]:
    """At most `count` pairs of different concepts of which the text model knows the first relation.

    Their pictures are of the split. Training and test share no pair of concepts, nor an artist.
    """
    table, first = read_icons(split), next(iter(relations.values()))
    concepts = sorted(set(table.label) & first.known)
    both = list(combinations(concepts, 2))
    order = generator(seed, "icon pairs").permutation(len(both))
    half = len(both) // 2
    rng = generator(seed, "icon pairs", split)
    rows = dict(iter(table.groupby("label")))
    for number in (order[:half] if split == "train" else order[half:])[:count]:
        pair = [both[number][side] for side in rng.permutation(2)]
        drawn = [rows[concept].iloc[int(rng.integers(len(rows[concept])))] for concept in pair]
        yield IconPair(*pair, *(on_ground(row.image) for row in drawn))


def render(concepts: dict[str, Any], packages: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of all splits, with `split`; an icon that a set lacks is left out."""
    from resvg_py import svg_to_bytes

    kinds = {kind: names for kind, names in concepts.items() if kind not in NOT_KINDS}
    for artist, config in concepts["sets"].items():
        drawings = _drawings(packages, config)
        for kind, names in kinds.items():
            for label, icons in names.items():
                for name in _names(concepts, artist, config, kind, label, icons):
                    if name not in drawings:
                        continue
                    icon, svg = drawings[name]
                    picture = Image.open(io.BytesIO(svg_to_bytes(svg_string=svg, width=4 * SIDE)))
                    picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
                    row = (_webp(picture), label, kind, artist, icon, config["licence"])
                    yield {"split": config["split"], **dict(zip(COLUMNS, row, strict=True))}
    for split, poses in PLANET_POSES.items():
        for name in PLANETS:
            for pose in range(poses):
                scene = planet_scene(generator(0, "icons", split, name, pose), name)
                assert scene.image is not None
                label = name if name == "moon" else name.capitalize()
                row = (
                    _webp(Image.fromarray(scene.image)),
                    label,
                    "planet",
                    "textures",
                    f"{name}-{pose}",
                    "CREDITS.md",
                )
                yield {"split": split, **dict(zip(COLUMNS, row, strict=True))}


def _names(
    concepts: dict[str, Any], artist: str, config: dict[str, Any], kind: str, label: str, icons: str | None
) -> list[str]:
    """The plain names of a set's icons that may show a concept."""
    if kind == "country":
        wanted = [flag.format(name=label, code=icons) for flag in config.get("flag", [])]
    elif forms := config.get("forms"):
        words = [label, *(icons or "").split(), *concepts["called"].get(label, "").split()]
        wanted = [] if label in concepts["ambiguous"] else [form.format(name=w) for form in forms for w in words]
    else:
        wanted = [] if config.get("flags_only") else icons.split() if icons else [label]
    spelt = concepts["spelt"].get(artist, {})
    return list(dict.fromkeys(_plain(spelt.get(name, name) or "") for name in wanted))


def _plain(name: str) -> str:
    """The letters and digits of an icon's name, which sets join in different ways."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _drawings(packages: Path, config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Plain name -> name and SVG of every icon of a set: an Iconify collection, or a folder `svg` of files."""
    folder = packages / re.sub(r"(?<=.)@[^@]*$", "", config["package"]).lstrip("@").replace("/", "-") / "package"
    if "svg" in config:
        return {_plain(path.stem): (path.stem, path.read_text()) for path in (folder / config["svg"]).glob("*.svg")}
    collection = json.loads((folder / "icons.json").read_text())
    shape = {"left": 0, "top": 0, "width": 16, "height": 16}
    shape |= {key: collection[key] for key in shape if key in collection}
    named = collection["icons"] | {
        name: collection["icons"].get(alias["parent"])
        for name, alias in collection.get("aliases", {}).items()
        if alias.keys() == {"parent"}  # the others turn or flip their parent
    }
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    drawings = {}
    for name, icon in named.items():
        if icon is not None:
            left, top, width, height = ((shape | icon)[key] for key in shape)
            size = f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}"'
            drawings[_plain(name)] = name, f"<svg {space} {size}>{icon['body']}</svg>"
    return drawings


def _webp(picture: Image.Image) -> dict[str, Any]:
    """The picture in the middle of a transparent square, as `datasets` stores it."""
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, "WEBP", lossless=True, method=6)
    return {"bytes": buffer.getvalue(), "path": None}


def main(packages: str) -> None:
    """Write the splits' files from unpacked icon packages."""
    table: Any = pd.DataFrame(render(read_yaml(pictures_folder() / "concepts.yaml"), Path(packages)))
    for split, rows in table.groupby("split"):
        rows = rows[~rows.image.map(lambda image: image["bytes"]).duplicated()]  # sets repeat a drawing under two names
        rows[COLUMNS].to_parquet(pictures_folder() / f"{split}.parquet", index=False, compression="zstd")


if __name__ == "__main__":
    main(*sys.argv[1:])
