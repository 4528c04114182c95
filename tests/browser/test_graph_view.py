"""The workbench's graph view: what a user clicks and types, what is saved, what leaves the page, and hostile files."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import uvicorn
import yaml
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect
from tests.browser.conftest import SLOW

from vlmscope.core.artifacts import shipped
from vlmscope.viewer import graphs as export
from vlmscope.viewer.server import _listen, create_app

pytestmark = pytest.mark.browser
EXAMPLE = json.loads((shipped("assets/example_graph") / "graph.json").read_text())
EXAMPLE["qParams"] = {"pinnedIds": [], "supernodes": []}
ANSWER, FIRST, SECOND = "9_56_28", "5_586_28", "4_823_28"
HOSTILE = "</script><img src=http://127.0.0.1:9/x.png onerror='window.hacked=1'><script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name in ("mars", "groups", "tabs", "exported"):
        (root / name).mkdir()
        (root / name / "config.yaml").write_text("task:\n  name: trace\n")
        (root / name / "graph.json").write_text(json.dumps(EXAMPLE))
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    listener = _listen("127.0.0.1", 0, True)
    server = uvicorn.Server(uvicorn.Config(create_app(root), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.set_default_timeout(SLOW)
    yield context
    context.close()


@pytest.fixture
def opened(context: BrowserContext, address: str) -> Callable[[str], Page]:
    def graph(name: str) -> Page:
        page = context.new_page()
        page.goto(f"{address}#/graph/{name}")
        expect(page.locator(".stage .canvas canvas.sigma-nodes")).to_be_visible()
        return page

    return graph


def click(page: Page, node: str, **options: Any) -> None:
    """Click a node where it is drawn."""
    x, y = page.evaluate(
        """id => { const box = document.querySelector('.stage .canvas'), at = box.scene.whereIs(id);
                   const { left, top } = box.getBoundingClientRect(); return [left + at.x, top + at.y]; }""",
        node,
    )
    if options.pop("shift", False):
        page.keyboard.down("Shift")
        page.mouse.click(x, y, **options)
        page.keyboard.up("Shift")
    else:
        page.mouse.click(x, y, **options)


def saved(root: Path, name: str, page: Page, expected: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until the annotations of a graph are what is expected: a page saves a moment after a change."""
    file, end = root / name / "annotations.json", time.monotonic() + SLOW / 1000
    while not file.is_file() or not expected(json.loads(file.read_text())):
        assert time.monotonic() < end, file.read_text() if file.is_file() else f"no {file}"
        page.wait_for_timeout(50)


def test_a_clicked_node_shows_its_edges_and_search_and_keys_lead_on(opened: Callable[[str], Page]) -> None:
    page = opened("mars")
    click(page, FIRST)
    side = page.get_by_label("Details", exact=True)
    expect(side.locator(".node")).to_contain_text("L5/586")
    incoming = [link for link in EXAMPLE["links"] if link["target"] == FIRST]
    expect(side.get_by_role("button", name=f"Inputs {len(incoming)}")).to_be_visible()
    strongest = max(abs(link["weight"]) for link in incoming)
    assert f"{strongest:.3g}"[:4] in side.locator(".edges li").first.inner_text()
    page.keyboard.press("/")
    page.keyboard.type("L4/823")
    page.keyboard.press("Enter")
    expect(side.locator(".node")).to_contain_text("L4/823")
    expect(page).to_have_url(re.compile(f"sel={SECOND}"))
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowUp")  # begins at the answer
    expect(page).to_have_url(re.compile(f"sel={ANSWER}"))
    page.keyboard.press("ArrowDown")
    expect(page).not_to_have_url(re.compile(f"sel={ANSWER}"))


def test_patches_of_the_picture_lead_to_their_soft_tokens(opened: Callable[[str], Page]) -> None:
    page = opened("mars")
    page.locator(".picture rect").nth(5).click()
    expect(page.locator(".picture rect.lit")).to_have_count(1)
    expect(page.locator(".side .node h2")).to_contain_text("patch 5")


def test_a_link_that_is_followed_at_once_leads_on(opened: Callable[[str], Page]) -> None:
    page = opened("mars")
    click(page, FIRST)
    # The page keeps its address up to date a moment later: here between the link and its event.
    page.evaluate(
        "() => { const end = performance.now() + 400; while (performance.now() < end); location = '#/runs'; }"
    )
    expect(page.locator(".stage")).to_have_count(0)
    expect(page).to_have_url(re.compile("#/runs"))


def test_groups_names_undo_and_reload(opened: Callable[[str], Page], root: Path) -> None:
    page = opened("groups")
    click(page, FIRST, shift=True)
    click(page, SECOND, shift=True)  # at once: no double click, which would pin
    expect(page.get_by_role("toolbar", name="Marked nodes")).to_contain_text("2 nodes marked")
    page.keyboard.press("g")
    page.get_by_role("button", name="Pinned 2").click()
    page.locator(".subgraph g.item").first.dblclick()
    page.get_by_label("Name of the group").fill("says mars")
    page.keyboard.press("Enter")
    expect(page.locator(".subgraph g.item")).to_contain_text("says mars")

    def named(found: dict[str, Any]) -> bool:
        return [(one["name"], set(one["members"])) for one in found["supernodes"]] == [("says mars", {FIRST, SECOND})]

    saved(root, "groups", page, named)
    page.keyboard.press("z")
    expect(page.locator(".subgraph g.item")).not_to_contain_text("says mars")
    page.keyboard.press("Shift+Z")
    expect(page.locator(".subgraph g.item")).to_contain_text("says mars")
    saved(root, "groups", page, named)
    page.reload()
    expect(page.locator(".subgraph g.item")).to_contain_text("says mars")


def test_two_tabs_keep_what_both_did(opened: Callable[[str], Page], root: Path) -> None:
    first, second = opened("tabs"), opened("tabs")
    for page, node in ((first, FIRST), (second, SECOND)):
        page.bring_to_front()
        click(page, node)
        page.keyboard.press("p")
        saved(root, "tabs", page, lambda found, node=node: node in found["pinned"])
    saved(root, "tabs", second, lambda found: set(found["pinned"]) == {FIRST, SECOND})
    first.bring_to_front()
    first.evaluate("dispatchEvent(new Event('focus'))")
    expect(first.get_by_role("button", name="Pinned 2")).to_be_visible()


def test_what_is_pinned_leaves_as_svg_png_yaml_and_graph(context: BrowserContext, address: str) -> None:
    page = context.new_page()
    page.goto(f"{address}#/graph/exported?view=subgraph&pins={ANSWER},{FIRST},{SECOND}")
    expect(page.locator(".subgraph g.item")).to_have_count(3)

    def download(button: str) -> bytes:
        with page.expect_download() as found:
            page.get_by_role("button", name=button).click()
        return Path(found.value.path()).read_bytes()

    svg = ElementTree.fromstring(download("SVG"))
    assert "L5/586" in "".join(svg.itertext())
    with Image.open(BytesIO(download("PNG"))) as picture:
        assert picture.width > 200
    circuit = yaml.safe_load(download("Circuit YAML"))
    assert sorted(node["ids"] for node in circuit["supernodes"].values()) == [["L4/823"], ["L5/586"]]
    graph = json.loads(download("Save the graph file"))
    assert graph["qParams"]["pinnedIds"] == [ANSWER, FIRST, SECOND] and graph["links"] == EXAMPLE["links"]
    expect(page.locator(".scores")).to_contain_text("Replacement")


def peer_graph() -> dict[str, Any]:
    """What circuit-tracer writes: no key of ours, layers of a CLT, an error node, a label that would like to run."""
    node = {"run_idx": 0, "reverse_ctx_idx": 0, "is_target_logit": False, "influence": 0.5, "activation": 1.0}
    nodes = [
        {"node_id": "E_26865_1", "feature": 1, "layer": "E", "ctx_idx": 1, "feature_type": "embedding", "clerp": "x"},
        {"node_id": "0_2_1", "feature": 5, "layer": "0", "ctx_idx": 1, "feature_type": "cross layer transcoder"},
        {"node_id": "0_x_1", "feature": -1, "layer": "0", "ctx_idx": 1, "feature_type": "mlp reconstruction error"},
        {"node_id": "27_22605_1", "feature": 22605, "layer": "27", "ctx_idx": 1, "feature_type": "logit"},
    ]
    nodes = [{**node, "jsNodeId": one["node_id"], "clerp": "", **one} for one in nodes]
    nodes[1]["clerp"] = HOSTILE
    nodes[3] |= {"is_target_logit": True, "influence": None, "token_prob": 0.4, "clerp": 'Output " Austin" (p=0.400)'}
    links = [("E_26865_1", "0_2_1", 2.0), ("0_2_1", "27_22605_1", 1.0), ("0_x_1", "27_22605_1", -0.5)]
    return {
        "metadata": {"slug": "dallas", "scan": "gemma-2-2b", "prompt_tokens": ["<bos>", HOSTILE], "prompt": HOSTILE},
        "qParams": {"pinnedIds": ["0_2_1"], "supernodes": []},
        "nodes": nodes,
        "links": [{"source": a, "target": b, "weight": weight} for a, b, weight in links],
    }


def give(page: Page, name: str, content: str) -> None:
    file = {"name": name, "mimeType": "application/json", "buffer": content.encode()}
    page.get_by_label("Graph file", exact=True).set_input_files(file)


def drop(page: Page, name: str, content: str) -> None:
    """Drop a file onto the page, as a file manager does."""
    page.evaluate(
        """([name, content]) => {
            const data = new DataTransfer();
            data.items.add(new File([content], name, { type: "application/json" }));
            const how = { dataTransfer: data, bubbles: true, cancelable: true };
            for (const type of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(type, how));
        }""",
        [name, content],
    )


@pytest.mark.parametrize("open_file", [give, drop])
def test_a_peers_file_opens(open_file: Callable[[Page, str, str], None], opened: Callable[[str], Page]) -> None:
    page = opened("mars")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    for word in ("Paris", "Austin"):  # two files of one name
        open_file(page, "dallas.json", json.dumps(peer_graph()).replace("Austin", word))
        expect(page.locator(".toolbar .answer")).to_contain_text(word)
    page.get_by_role("button", name="Pinned 1").click()
    page.locator(".subgraph g.item").click()
    expect(page.locator(".side .node h2")).to_contain_text("<img")
    expect(page).to_have_url(re.compile("sel=0_2_1"))
    assert page.evaluate("window.hacked") is None
    assert not [url for url in requests if "127.0.0.1:9/" in url]


def test_an_older_peers_file_with_attention_features_opens(opened: Callable[[str], Page]) -> None:
    """Errors had ids of features; attention features name pairs of nodes, of which some were pruned."""
    graph = peer_graph()
    token, feature, error, _ = graph["nodes"]
    pruned = {**feature, "node_id": "1_00042_0", "layer": 1, "clerp": "a pruned key", "ctx_idx": 0}
    pairs = [[token["node_id"], "1_00042_0", -0.75], [token["node_id"], "unknown", 0.5]]
    marginals = {"top_q_marginal_contributors": [[token, 0.25]], "top_k_marginal_contributors": []}
    feature |= {"feature_type": "lorsa", "qk_tracing_results": {"pair_wise_contributors": pairs, **marginals}}
    error["node_id"] = feature["node_id"]
    page = opened("mars")
    give(page, "attention.json", json.dumps(graph | {"qk_only_nodes": {"1_00042_0": pruned}}))
    expect(page.locator(".toasts")).to_contain_text("the id of another node: 1")
    expect(page.locator(".toolbar .answer")).to_contain_text("Austin")  # the page of the file, not the one before
    page.keyboard.press("/")
    page.keyboard.type("L0/2")
    page.keyboard.press("Enter")
    why = page.locator(".panel", has_text="Why it attends")
    expect(why.locator(".row").first).to_contain_text("a pruned key")
    expect(why.locator(".row").first).to_contain_text("L1/42")
    expect(why.locator(".row").first).to_contain_text("−0.750")
    expect(why.locator(".row")).to_have_count(2)
    why.get_by_role("button", name="Query alone").click()
    expect(why.locator(".row")).to_contain_text("+0.250")


def test_heads_lead_to_their_edges_and_to_why_they_attend(opened: Callable[[str], Page]) -> None:
    score = EXAMPLE["vlmscope"]["attention"]["scores"][0]
    head = [score["layer"], score["head"]]
    name = "L{}H{}".format(*head)
    shares = [(link["weight"], share) for link in EXAMPLE["links"] for *one, share in link["heads"] if one == head]
    page = opened("mars")
    side = page.get_by_label("Details", exact=True)
    side.get_by_role("button", name=name).click()
    edges = side.locator(".panel", has_text="Edges it carries").locator("li")
    strongest = max(abs(weight * share) for weight, share in shares)
    expect(edges.first).to_contain_text(f"{strongest:.3g}"[:4])
    why = side.locator(".panel", has_text=f"Why {name} attends").first
    expect(why).to_contain_text(f"{100 * score['probability']:.0f} % of its attention")
    nodes = {node["node_id"] for node in EXAMPLE["nodes"]}
    queries = [query for query, _, _ in score["pair_wise_contributors"]]
    known = next(query for query in queries if query in nodes)
    why.locator(".row").nth(queries.index(known)).get_by_role("button").first.click()
    expect(page).to_have_url(re.compile(f"sel={known}"))
    expect(side.locator(".node")).to_be_visible()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "no JSON"),
        ("[]", "not a JSON object"),
        ('{"nodes": [], "links": []}', "no nodes"),
        ('{"a": 1}', "no lists of nodes and links"),
        ('{"nodes": [{"node_id": "a"}], "links": []}', "has no layer"),
        (
            json.dumps({**peer_graph(), "links": [{"source": "0_2_1", "target": "E_26865_1", "weight": "1"}]}),
            "no weight",
        ),
        (
            json.dumps({**peer_graph(), "links": [{"source": "q", "target": "r", "weight": 1}]}),
            "names two of its nodes",
        ),
    ],
)
def test_a_malformed_file_is_one_clear_message(content: str, says: str, opened: Callable[[str], Page]) -> None:
    page = opened("mars")
    give(page, "bad.json", content)
    expect(page.get_by_role("alert")).to_contain_text(says)
    expect(page.locator(".toolbar .answer")).to_contain_text("mars")  # the graph that was open stays


def test_a_single_file_opens_from_disk_and_asks_for_nothing(
    context: BrowserContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "graph.json").write_text(json.dumps(peer_graph()))
    monkeypatch.setattr(export, "feature_panels", lambda *given: ({}, []))
    path, _ = export.export_graph(tmp_path)
    page = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    expect(page.locator(".toolbar .answer")).to_contain_text("Austin")
    page.get_by_role("button", name="Both").click()
    expect(page.locator(".scores")).to_contain_text("Replacement")
    assert page.evaluate("window.hacked") is None and errors == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
