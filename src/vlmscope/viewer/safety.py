"""What keeps the workbench to its user: paths inside the root, the request's host and origin, sizes, and headers.

A page of another site can send requests to a server on this computer, and after its name was pointed at 127.0.0.1 (DNS
rebinding) can read the answers. Therefore every request must name this server as its host, everything but reading must
come from its own pages, and no header allows other origins. A server that listens on other interfaces also asks for a
random token. All of it is checked before any route sees the request.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from socket import gethostname
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.responses import JSONResponse

from vlmscope.core.errors import UserError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MOST_BODY = 32 << 20  # bytes of a request
COOKIE = "vlmscope_token"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

# Styles set by scripts one property at a time are no inline styles. Pictures are embedded as data, workers as blobs.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; worker-src 'self' blob:; frame-src 'self'; frame-ancestors 'self'; base-uri 'none'; "
    "form-action 'none'"
)
# A page of a run folder runs its own scripts, but in an origin of its own that can reach nothing of the workbench.
FILE_POLICY = (
    "sandbox allow-scripts allow-popups allow-downloads; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src 'self' data: blob:; font-src data:; worker-src blob:; base-uri 'none'; "
    "form-action 'none'"
)
_HEADERS = {
    b"content-security-policy": PAGE_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-cache",
}


class Refused(UserError):
    """A request that is answered with `status` and one line."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def inside(root: Path, name: str) -> Path:
    """The file or folder `name` below `root`; links may point anywhere within `root`, not out of it.

    Raises:
        Refused: 404, it is missing, hidden or elsewhere; the message does not tell which.
    """
    missing = Refused(f"nothing called {name[:200]!r} here", 404)
    parts = name.split("/")
    if "\0" in name or "\\" in name or any(not part or part.startswith(".") for part in parts):
        raise missing
    try:
        path, base = (root / name).resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise missing from error
    if not path.is_relative_to(base):
        raise missing
    return path


def host_of(value: str) -> str:
    """The host of a `Host` header without its port and brackets, in lower case; "" for one that is malformed."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?", value)
    return "" if found is None else found[1].strip("[]").lower()


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this computer alone."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


class Guard:
    """Wraps the application: checks a request's host, origin, token and size, and adds headers to every answer."""

    def __init__(self, app: App, host: str, token: str | None) -> None:
        """`host` is the address that the server listens on; `token` is asked for where that is not loopback."""
        self.app, self.token = app, token
        # A wider server is also known by its computer's name.
        self.names = set(_LOOPBACK) if token is None else {*_LOOPBACK, host.lower(), gethostname().lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # there are no web sockets, and the lifespan is the application's
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        cookie = b""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                more = [(name, value) for name, value in _HEADERS.items() if name not in present]
                message["headers"] = [*message["headers"], *more, *([(b"set-cookie", cookie)] if cookie else [])]
            await send(message)

        try:
            self._check_source(scope["method"], headers)
            if self.token is not None and self._has_token(scope, headers):
                cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/".encode()
            bounded = _Bounded(receive, headers.get(b"content-length", "0"))
            await self.app(scope, bounded, with_headers)
        except Refused as error:
            await JSONResponse({"error": str(error)}, error.status)(scope, receive, with_headers)

    def _check_source(self, method: str, headers: dict[bytes, str]) -> None:
        """Refuse a request that names another host, or that a page of another origin sends."""
        host = headers.get(b"host", "")
        name = host_of(host)
        if name not in self.names and (self.token is None or _address(name) is None):
            raise Refused(f"this is not {host[:100]!r}; open the address that task=serve printed", 421)
        if method not in ("GET", "HEAD"):
            origin = headers.get(b"origin", "")
            if urlsplit(origin).netloc != host or headers.get(b"sec-fetch-site", "same-origin") != "same-origin":
                raise Refused("only the workbench's own pages may change anything", 403)

    def _has_token(self, scope: Message, headers: dict[bytes, str]) -> bool:
        """Refuse a request without the token; True where the address has it, so that a cookie takes its place."""
        assert self.token is not None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if hmac.compare_digest(given.encode(), self.token.encode()):
            return True
        try:
            kept = SimpleCookie(headers.get(b"cookie", "")).get(COOKIE)
        except CookieError:
            kept = None
        if kept is None or not hmac.compare_digest(kept.value.encode(), self.token.encode()):
            raise Refused("no token: open the whole address that task=serve printed", 401)
        return False


class _Bounded:
    """A request's body, refused once it is larger than `MOST_BODY`."""

    def __init__(self, receive: Receive, stated: str) -> None:
        if not stated.isdigit() or int(stated) > MOST_BODY:
            raise Refused(f"the request is larger than {MOST_BODY >> 20} MB", 413)
        self.receive, self.size = receive, 0

    async def __call__(self) -> Message:
        message = await self.receive()
        self.size += len(message.get("body", b""))
        if self.size > MOST_BODY:
            raise Refused(f"the request is larger than {MOST_BODY >> 20} MB", 413)
        return message


def _address(host: str) -> IPv4Address | IPv6Address | None:
    """A bare IP address, which no name server can redirect; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None
