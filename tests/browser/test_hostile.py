"""Pages made of hostile words: nothing of them runs, and nothing is fetched, with the page's policy and without it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import Browser
from tests.unit.report.conftest import MARS, make_page, png

from vlmscope.app import main
from vlmscope.core.results import Number, Rate, Reproduced, html_table
from vlmscope.models.tiny import tiny_image
from vlmscope.tasks.reproduce import write_page
from vlmscope.transcoders.hub import CardFacts, carried_over, parts_of, render

pytestmark = pytest.mark.browser
RUN = "window.hacked=1"
FETCH = "http://127.0.0.1:9/fetched"
HOSTILE = " ".join(
    (
        f"<script>{RUN}</script>",
        f'"><img src=x onerror="{RUN}"><img src={FETCH}.png>',
        f"' onmouseover='{RUN}' '><svg onload={RUN}>",
        f"</script></style></title></textarea></template><script>{RUN}</script>",
        f"--><script src={FETCH}.js></script><!--",
        f"<link rel=stylesheet href={FETCH}.css><base href={FETCH}><meta http-equiv=refresh content='0;url={FETCH}'>",
        f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe><a href='javascript:{RUN}'>x</a>",
        f"[x](javascript:{RUN}) ![x](javascript:{RUN}) `<script>{RUN}</script> | \\ <script>{RUN}</script>`",
        "{{ 7 * 7 }} {% raw %} $\\frac{$ url(javascript:alert(1)) \u2028\u2029 \u202e",
    )
)
# What a file's name and a key on the command line can hold.
NAME = f'"><img src=x onerror="{RUN}">'
LINK = f"javascript:{RUN}"


def reproduced(folder: Path) -> Path:
    number = Number(HOSTILE, HOSTILE, 0.5, 0.1, 0.9, True, True, Rate(0.5, 0.4, 0.6, 10, 0.1))
    one = Reproduced(HOSTILE, HOSTILE, HOSTILE, HOSTILE, (number,), 1.0, "", f"{LINK}/report.html", png(MARS))
    failed = replace(one, problem=HOSTILE, numbers=())
    return write_page(folder, [f"task={HOSTILE}"], [one, failed])


def cards(folder: Path) -> Iterator[Path]:
    own = CardFacts(HOSTILE, HOSTILE, HOSTILE, input_hook=HOSTILE, data={HOSTILE: 3}, settings={HOSTILE: HOSTILE})
    theirs = f"---\nlicense: {json.dumps(HOSTILE)}\n---\n# {HOSTILE}\n\n<div>\n{HOSTILE}\n"
    for name, facts in {"own": own, "quoted": carried_over(CardFacts(""), theirs)}.items():
        _, body = parts_of(render(facts))
        # A reader that leaves HTML as it stands; those of the hub and of GitHub take more away.
        (folder / f"{name}.html").write_text(MarkdownIt("commonmark").enable("table").render(body))
        yield folder / f"{name}.html"


def circuit(folder: Path) -> Path:
    """A real run: picture and run folder have hostile names (a supernode's is refused)."""
    picture, run = folder / f"{NAME}.png", folder / NAME
    tiny_image(0).save(picture)
    spec = {"name": "own", "supernodes": {"own": {"ids": ["L1/3", "L2/5"]}}}
    (folder / "own.yaml").write_text(json.dumps(spec))
    quoted = [f"{key}='{value}'" for key, value in {"image": picture, "hydra.run.dir": run}.items()]
    asked = ["task=circuit", "model=tiny", "transcoder=random", "tracking=none", "circuit_spec=file"]
    assert main([*asked, f"circuit_spec.path={folder / 'own.yaml'}", "prompt=what is this ?", *quoted]) == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hostile")
    table = folder / "table.html"
    table.write_text(html_table([[HOSTILE, HOSTILE], [HOSTILE, HOSTILE]], HOSTILE))
    found = [make_page(HOSTILE).write(folder / "report.html"), reproduced(folder), *cards(folder)]
    return {path.name: path for path in [*found, table]} | {"circuit": circuit(folder)}


@pytest.mark.parametrize("policy", ["with the page's policy", "without it"])
def test_nothing_runs_and_nothing_is_fetched(policy: str, pages: dict[str, Path], chromium: Browser) -> None:
    context = chromium.new_context(bypass_csp=policy == "without it")
    try:
        for name, path in pages.items():
            page = context.new_page()
            requests: list[str] = []
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            page.on("dialog", lambda dialog, seen=requests: seen.append(f"dialog {dialog.message}"))
            page.goto(path.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
            page.mouse.move(200, 200)
            page.mouse.wheel(0, 4000)
            page.wait_for_timeout(100)
            assert page.evaluate("window.hacked") is None, f"{name}: a script ran"
            fetched = [url[:100] for url in requests if url != path.as_uri() and not url.startswith("data:")]
            assert fetched == [], name
            links = page.evaluate("[...document.querySelectorAll('[href],[src],[action]')].map(e => e.href || e.src)")
            strange = [link for link in links if not str(link).startswith(("file:", "data:"))]
            assert strange == [], name
            tags = "script:not([type]), iframe, object, embed, base, link, form[action], meta[http-equiv=refresh]"
            made = page.evaluate("tags => [...document.querySelectorAll(tags)].map(e => e.outerHTML)", tags)
            assert [text[:60] for text in made] == [], name
            assert "window.hacked" in page.evaluate("document.body.innerText"), f"{name}: the words are not shown"
            page.close()
    finally:
        context.close()
