"""Pages with a script: it is in the page, and the page's content security policy names its hash, so no other runs."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from vlmscope.core.study import KINDS, Place
from vlmscope.report import feature_words
from vlmscope.report.heat import Geometries
from vlmscope.report.html import TEMPLATES, environment

KIND_NAMES = {"image": "picture", "text": "prompt", "answer": "answer"}
_STORIES = {
    "image": "soft tokens of pictures",
    "text": "the user's words and the template",
    "answer": "what is answered, and plain text",
}


def render_scripted(template: str, geometries: Geometries, **values: Any) -> str:
    """A page with the one script of feature pages; its policy lets nothing else run.

    Args:
        template: its name.
        geometries: arrangements of patches, filled while the page's body is rendered.
        values: what the template asks for; `tables`, if given, is more for the script to read.
    """
    script = (TEMPLATES / "features.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    more = values.pop("tables", {})
    return (
        _environment()
        .get_template(template)
        .render(
            script=Markup(script),
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
            tables=lambda: inert_json({"geometries": geometries.table(), **more}),
            **values,
        )
    )


def _kind_of(place: Place) -> str:
    return KINDS[place.kind]


@cache
def _environment() -> Environment:
    made = environment().overlay()
    filters: dict[str, Any] = {
        "kind_name": KIND_NAMES.__getitem__,
        "kind_story": _STORIES.__getitem__,
        "kind_of": _kind_of,
        "shown": feature_words.shown_token,
        "chance": feature_words.chance,
        "special": feature_words.special,
    }
    made.filters = {**environment().filters, **filters}
    return made


def inert_json(value: Any) -> Markup:
    """JSON for a script element that holds data: nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
