"""One HTML file of a graph: its data comes back as it was, and no word in it becomes markup."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vlmscope.core.errors import UserError
from vlmscope.report.page import ReportPage
from vlmscope.viewer import graphs as export

HOSTILE = "</script><script>alert(1)</script><!--\u2028"


class Scripts(HTMLParser):
    """The text of each script element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.inside = tag == "script"
        if self.inside:
            self.found.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    template = tmp_path / "single.html"
    template.write_text(f"<body>{export._PLACE}<script>page()</script></body>")
    monkeypatch.setattr(export, "TEMPLATE", template)
    folder = tmp_path / "run"
    folder.mkdir()
    graph = {"metadata": {"scan": "another", "slug": HOSTILE}, "nodes": [{"node_id": HOSTILE}], "links": []}
    (folder / "graph.json").write_text(json.dumps(graph))
    return folder


def test_data_comes_back_and_ends_no_element(run: Path) -> None:
    (run / "annotations.json").write_text(json.dumps({"version": 2, "pinned": [HOSTILE], "notes": HOSTILE}))
    path, panels = export.export_graph(run)
    data, page = Scripts(path.read_text()).found
    assert page == "page()" and panels == 0
    found = json.loads(data)
    assert found["graph"] == json.loads((run / "graph.json").read_text())
    assert found["annotations"]["pinned"] == [HOSTILE] and found["features"] == {}


def test_a_report_links_the_page_where_there_is_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export.export_with_report(run)
    assert (run / "graph.html").is_file()
    assert 'href="graph.html"' in ReportPage("t", "q", "s", graph="graph.html").render()
    monkeypatch.setattr(export, "TEMPLATE", run / "nothing")
    (run / "graph.html").unlink()
    export.export_with_report(run)
    assert not (run / "graph.html").exists() and "graph.html" not in ReportPage("t", "q", "s").render()


def test_refusals(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no graph.json"):
        export.export_graph(run.parent)
    with pytest.raises(UserError, match="is not a graph"):
        (run / "graph.json").write_text("[]")
        export.export_graph(run)
    (run / "graph.json").write_text('{"nodes": []}')
    with pytest.raises(UserError):
        export.export_graph(run, [run.parent / "no study"])
    monkeypatch.setattr(export, "TEMPLATE", run / "nothing")
    with pytest.raises(UserError, match="make viewer"):
        export.export_graph(run)
