"""The built page of the workbench is of the sources in viewer/, and loads nothing from elsewhere."""

import hashlib
import re
from pathlib import Path

from vlmscope.viewer.server import STATIC

VIEWER = Path(__file__).resolve().parents[3] / "viewer"
SOURCES = ("index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.js", "src")


def test_the_page_was_built_from_these_sources() -> None:
    roots = [VIEWER / name for name in SOURCES]
    files = [file for root in roots for file in ([root] if root.is_file() else root.rglob("*")) if file.is_file()]
    total = hashlib.sha256()
    for name, file in sorted((file.relative_to(VIEWER).as_posix(), file) for file in files):
        total.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    assert (STATIC / "SOURCES.sha256").read_text().strip() == total.hexdigest(), "run `make viewer`"


def test_the_page_has_no_inline_code_and_no_address_of_another_host() -> None:
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    assert all(not address.startswith(("http", "//")) for address in re.findall(r'(?:src|href)="([^"]*)"', page))
    licences = (STATIC / "LICENSES.txt").read_text()
    assert all(name in licences for name in ("preact", "sigma", "graphology", "elkjs"))
