"""Pages that the site has besides docs/: README, CONTRIBUTING, cards, notebooks, a gallery, a reference.

MkDocs calls the two functions `on_*` (mkdocs.yml). Links are written for GitHub; here they point to the site's pages,
and a link to a file that is no page, such as source code, is shown as its text. No page is copied by hand.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
PAGES |= {"benchmarks/README.md": "benchmarks.md", "notebooks/README.md": "notebooks/index.md"}
PAGES |= {f"benchmarks/results/{path.name}": f"benchmarks/{path.name}" for path in ROOT.glob("benchmarks/results/*.md")}
_LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def cards() -> list[Path]:
    """The cards of all experiments, by name."""
    return sorted(path for path in (ROOT / "experiments").glob("*.md") if path.name != "README.md")


def site_path(source: str) -> str | None:
    """The page or picture of the site for a file of the repository; None if the site has none."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith("notebooks/") and source.endswith(".ipynb"):
        return source.replace(".ipynb", ".md")
    if source.startswith("docs/") and (ROOT / source).is_file() and not source.endswith(".py"):
        return source.removeprefix("docs/")
    return source if ROOT / source in cards() else None


def linked(text: str, source: str, page: str) -> str:
    """The text of the repository's file `source` with its links as the site's page `page` needs them."""
    here = posixpath.dirname(page) or "."

    def link(match: re.Match[str]) -> str:
        path, mark, anchor = match["target"].partition("#")
        if not path or ":" in path:
            return match[0]
        target = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if target is None:
            return match["text"]
        return f"{match['mark']}[{match['text']}]({posixpath.relpath(target, here)}{mark}{anchor})"

    return _LINK.sub(link, text)


def part(card: str, *names: str) -> str:
    """The first of the named parts of a card, such as `**Question.** ...`, up to the next part or an empty line."""
    for name in names:
        found = re.search(rf"^\*\*{name}\.\*\* *(.+?)(?=\n\n|\n\*\*|\Z)", card, re.DOTALL | re.MULTILINE)
        if found:
            return found[1].strip()
    return ""


def gallery() -> str:
    """The page of all experiments: question, finding and figure of each card, and its command."""
    parts = ["# Gallery of experiments", "Each is a YAML file and a card; [how to make one](../docs/experiments.md)."]
    for path in cards():
        card = path.read_text(encoding="utf-8")
        picture = re.search(r"!\[[^\]]*\]\([^)]+\)", card)
        shown = picture[0] if picture else ""
        command = f"`python run.py experiment={path.stem}` · [numbers, controls and limits]({path.name})"
        body = [
            part(card, "Question"),
            part(card, "What this shows", "Reading"),
            shown,
            command,
        ]
        parts += [f"## {path.stem}", *filter(None, body)]
    return linked("\n\n".join(parts), "experiments/README.md", "gallery.md")


def reference() -> str:
    """The page of the Python API: every public function, then every result, from their docstrings."""
    tree = ast.parse((ROOT / "src/vlmscope/api.py").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = {kind: [x.name for x in tree.body if isinstance(x, kind) and not x.name.startswith("_")] for kind in kinds}
    intro = (
        "`import vlmscope`; each function takes the scope that `load` returns. Settings are those of the command line."
    )
    public = [f"api.{name}" for kind in kinds for name in names[kind]]
    public += [f"analyses.edits.{name}" for name in ("EditResult", "Said", "Control")]  # what steer and patch return
    parts = ["# Python reference", intro, *(f"::: vlmscope.{name}" for name in public)]
    return "\n\n".join(parts)


def notebook(path: Path) -> str:
    """A notebook with its outputs: words as they are, code and text as blocks, pictures and tables in place."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            kind = next(kind for kind in ("image/png", "text/html", "text/plain") if kind in data)
            text = "".join(data[kind])
            if kind == "image/png":
                parts.append(f"![output](data:image/png;base64,{text.strip()})")
            elif kind == "text/html":  # on one line: an empty line would end the block of HTML
                parts.append(" ".join(re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL).split()))
            else:
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


def made_pages() -> dict[str, str]:
    """Text by name of every page that lies outside docs/."""
    sources = {**PAGES, **{f"experiments/{path.name}": f"experiments/{path.name}" for path in cards()}}
    pages = {
        page: linked((ROOT / source).read_text(encoding="utf-8"), source, page) for source, page in sources.items()
    }
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        page = f"notebooks/{path.stem}.md"
        pages[page] = linked(notebook(path), f"notebooks/{path.name}", page)
    return pages | {"gallery.md": gallery(), "reference.md": reference()}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]  # the extra docs

    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point the links of a page in docs/ to the site."""
    name = page.file.src_uri
    return linked(markdown, f"docs/{name}", name) if (ROOT / "docs" / name).is_file() else markdown
