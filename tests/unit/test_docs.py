"""The documents: their links and anchors, on GitHub and on the site; and the site itself, where MkDocs is installed."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import site_hooks
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("experiments/*.md")),
    *sorted(ROOT.glob("notebooks/*.md")),
    *sorted(ROOT.glob("benchmarks/results/*.md")),
]
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})


def parsed(text: str) -> list[Token]:
    return MARKDOWN.parse(text)


def anchors(text: str) -> set[str]:
    """The anchors of headings as GitHub makes them."""
    tokens, found = parsed(text), set()
    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            words = "".join(part.content for part in tokens[number + 1].children or ())
            found.add(re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-"))
    return found


def targets(text: str) -> Iterator[str]:
    for token in parsed(text):
        for part in token.children or ():
            for key in ("href", "src"):
                if key in part.attrs:
                    yield str(part.attrs[key])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere(document: Path) -> None:
    text, wrong = document.read_text(encoding="utf-8"), []
    for target in targets(text):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = document.parent / path if path else document
        if not file.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            wrong.append(f"{target}: no such heading")
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lists_and_tables_stand_apart(document: Path) -> None:
    """GitHub shows a list right below a paragraph as one; the site's Markdown shows it as text."""
    text = document.read_text(encoding="utf-8")
    lines, wrong = ["", *text.splitlines()], []
    for token in parsed(text):
        if token.type in ("bullet_list_open", "ordered_list_open", "table_open") and token.level == 0 and token.map:
            above = lines[token.map[0]].strip()  # the lines are counted from 1 here, the tokens' from 0
            if above and not above.startswith("#"):
                wrong.append(token.map[0] + 1)
    assert wrong == [], f"an empty line is missing before these lines of {document}"


def test_the_site_has_every_page_and_its_own_links_lead_somewhere() -> None:
    made = site_hooks.made_pages()
    in_docs = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*") if path.is_file()}
    nav = yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {name for name in in_docs | set(made) if name.endswith(".md")}
    assert set(re.findall(r"[\w/]+\.md", nav)) == {
        name for name in pages if "/" not in name or name.startswith("notebooks/")
    }
    for name, text in made.items():
        for target in targets(text):
            if not target.startswith(("http", "data:", "#")):
                file = (Path(name).parent / target.partition("#")[0]).as_posix()
                assert re.sub(r"[^/]+/\.\./", "", file) in in_docs | set(made), f"{name}: {target}"


def test_the_gallery_is_made_of_the_cards() -> None:
    gallery = site_hooks.gallery()
    for card in site_hooks.cards():
        assert f"## {card.stem}\n" in gallery and f"(experiments/{card.name})" in gallery
        question = site_hooks.part(card.read_text(encoding="utf-8"), "Question")
        assert len(question) > 10, f"{card} begins with its question"
    assert gallery.count("![") >= 5  # their figures


def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="the site: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=[\"']?(https?:)?//", html)
        loaded += re.findall(r"<link[^>]+rel=[\"']?(?:stylesheet|pre\w+|icon)[^>]+href=[\"']?https?://", html)
        assert loaded == [], page
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    for name in ("load", "trace", "steer", "patch"):
        assert f'id="vlmscope.api.{name}"' in reference
