"""The workbench's web application: routes over run folders, and the server that runs it."""

from __future__ import annotations

import hashlib
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Header
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from vlmscope.core.artifacts import atomic_path, parse_json, shipped
from vlmscope.core.errors import UserError
from vlmscope.data.images import decode_image
from vlmscope.viewer import graphs
from vlmscope.viewer.jobs import PASSED_ON, Jobs, shipped_pictures
from vlmscope.viewer.runs import Runs
from vlmscope.viewer.safety import FILE_POLICY, Guard, Refused, inside, is_loopback

if TYPE_CHECKING:
    from vlmscope.viewer.studies import Studies

UPLOADS = "workbench/uploads"
STATIC = shipped("assets/viewer")
_NOT_BUILT = """<!doctype html><html lang="en"><meta charset="utf-8"><title>vlmscope workbench</title>
<h1>The workbench's page is not built</h1>
<p>Its server runs. Build the page once with <code>make viewer</code> (needs Node.js 20 or later and npm), then reload.
An installed wheel has it built.</p></html>"""


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that a request sends."""
    value = parse_json((await request.body()).decode("utf-8", "replace"))
    if not isinstance(value, dict):
        raise Refused("the request must be a JSON object", 422)
    return value


Body = Annotated[dict[str, Any], Depends(_body)]


@dataclass(frozen=True)
class Query:
    """Which features are wanted; None and "" leave a filter out. Shares are of the study's inputs."""

    layer: int | None = None
    modality: str = ""  # text, image or answer: most firings are at such positions
    density_min: float | None = None
    density_max: float | None = None
    label: str = ""  # "yes" or "no"
    score_min: float | None = None
    words: str = ""  # each must be in the label, the feature's name or the tokens that it promotes
    sort: str = "score"
    offset: int = 0
    limit: int = 60
    only: str = ""  # these features, separated by commas and in this order, whatever the filters


def create_app(root: Path, host: str = "127.0.0.1", token: str | None = None, jobs: Jobs | None = None) -> Any:
    """The application over the run folders in `root`, as an ASGI callable."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    runs, jobs = Runs(root), jobs or Jobs(root)

    @app.exception_handler(UserError)
    async def refuse(request: Request, error: UserError) -> Response:
        more = {"current": error.current} if isinstance(error, graphs.Stale) else {}
        return JSONResponse({"error": str(error), **more}, error.status if isinstance(error, Refused) else 400)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    # Routes are plain functions, which run in threads: they read files.
    @app.get("/api/runs")
    def listed() -> Response:
        return JSONResponse({"root": str(root), "runs": runs.listed()})

    @app.get("/api/fvu")
    def fvu() -> Response:
        return JSONResponse({"runs": runs.fvu()})

    @app.get("/api/runs/{name:path}/file")
    def run_file(name: str, path: str) -> Response:
        return _file(runs.file(name, path))

    @app.get("/api/runs/{name:path}/trials")
    def trials(name: str) -> Response:
        from vlmscope.viewer.trials import trials_body  # pandas takes a second, which the first page need not wait for

        return JSONResponse(trials_body(inside(root, runs.get(name).id), name))

    @app.get("/api/runs/{name:path}")
    def run(name: str) -> Response:
        return JSONResponse(runs.details(name))

    @cache
    def studies() -> Studies:
        from vlmscope.viewer.studies import Studies

        return Studies(runs)

    @app.get("/api/studies")
    def study_list() -> Response:
        return JSONResponse({"studies": studies().listed()})

    @app.get("/api/studies/{name:path}/features")
    def features(name: str, asked: Annotated[Query, Depends()]) -> Response:
        return JSONResponse(studies().features(name, asked))

    @app.get("/api/studies/{name:path}/features/{layer}/{index}")
    def feature(name: str, layer: str, index: str) -> Response:
        return JSONResponse(studies().feature(name, f"{layer}/{index}"))

    @app.get("/api/pictures")
    def picture_list() -> Response:
        return JSONResponse({"pictures": shipped_pictures()})

    @app.get("/api/pictures/{name}")
    def shipped_picture(name: str) -> Response:
        return FileResponse(inside(shipped("assets/pictures"), name))

    @app.get("/files/{path:path}")
    def file_below(path: str) -> Response:
        return _file(runs.file_below(path))

    @app.get("/api/example")
    def example() -> Response:
        return FileResponse(graphs.graph_file(runs, graphs.EXAMPLE), media_type="application/json")

    @app.get("/api/graphs/{name:path}/annotations")
    def annotations(name: str) -> Response:
        return JSONResponse(graphs.read_annotations(runs, name))

    @app.put("/api/graphs/{name:path}/annotations")
    def annotate(name: str, body: Body, if_match: Annotated[str, Header()] = "") -> Response:
        return JSONResponse(graphs.save_annotations(runs, name, if_match, body))

    @app.post("/api/graphs/{name:path}/score")
    def score(name: str, body: Body) -> Response:
        return JSONResponse(graphs.score(runs, name, body.get("pinned")))

    @app.get("/api/graphs/{name:path}")
    def graph(name: str) -> Response:
        return FileResponse(graphs.graph_file(runs, name), media_type="application/json")

    @app.get("/api/uploads/{name}")
    def uploaded(name: str) -> Response:
        return FileResponse(inside(root, f"{UPLOADS}/{name}"), media_type="image/png")

    @app.post("/api/uploads")
    async def upload(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(store_picture, root, await request.body()))

    @app.post("/api/jobs")
    def start_job(body: Body) -> Response:
        return JSONResponse(jobs.start(body))

    @app.get("/api/jobs/{number}")
    def job(number: str) -> Response:
        return JSONResponse(jobs.get(number))

    @app.delete("/api/jobs/{number}")
    def cancel_job(number: str) -> Response:
        return JSONResponse(jobs.cancel(number))

    if (STATIC / "index.html").is_file():
        app.mount("/", StaticFiles(directory=STATIC, html=True))
    else:

        @app.get("/")
        def not_built() -> Response:
            return HTMLResponse(_NOT_BUILT)

    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=4)
    return Guard(app, host, token)


def _file(path: Path) -> Response:
    """A file of a run. Pages may run their own scripts, in an origin of their own."""
    return FileResponse(path, headers={"content-security-policy": FILE_POLICY})


def store_picture(root: Path, data: bytes) -> dict[str, str]:
    """Keep a picture that a page sent, as PNG named by its content; what is none, or too large, is refused."""
    picture = decode_image(data, "the picture")
    name = f"{UPLOADS}/{hashlib.sha256(data).hexdigest()[:32]}.png"
    path = root / name
    if not path.is_file():
        with atomic_path(path) as temporary:
            picture.save(temporary, "PNG")
    return {"picture": name, "url": f"api/uploads/{path.name}"}


def serve(root: Path, host: str, port: int, asked: bool, overrides: Sequence[str] = ()) -> None:
    """Serve until Ctrl-C. Port 0, or a port in use that the user did not ask for, becomes a free one.

    Jobs get those of the `overrides` that name a model or where to log.

    Raises:
        UserError: the address cannot be used.
    """
    import uvicorn

    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    listener = _listen(host, port, asked)
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    place = f"[{name}]" if ":" in name else name
    address = f"http://{place}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
    print(f"workbench on {root}: {address} (Ctrl-C ends it)", flush=True)
    jobs = Jobs(root, [one for one in overrides if one.lstrip("+").startswith(PASSED_ON)])
    app = create_app(root, host, token, jobs)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
    try:
        with listener:
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        jobs.close()


def _listen(host: str, port: int, asked: bool) -> socket.socket:
    """A listening socket, made here so that a port in use is one clear line."""
    family, reason = socket.AF_INET6 if ":" in host else socket.AF_INET, ""
    for candidate in dict.fromkeys([port] if asked else [port, 0]):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(128)
        except OSError as error:
            listener.close()
            reason = error.strerror or str(error)
            continue
        return listener
    raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another task.port or task.host")
