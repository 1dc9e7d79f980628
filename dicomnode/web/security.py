"""What every request passes, whatever it asks for, and what every answer carries.

    Host        the name by which we are called must be ours, or an address: a page elsewhere whose name is turned to
                our address (DNS rebinding) gets no answer
    HEAD        is answered as GET is, without the body
    root_path   a reverse proxy may leave its prefix on the path or take it off
    size        no body is larger than LARGEST_BODY: forms are short
    headers     of the answer: browsers run nothing that is not ours, and keep nothing
    errors      what nobody caught becomes status 500 without a traceback; the log has it
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dicomnode.config import Config
from dicomnode.logs import get_logger
from dicomnode.web.problems import answer

__all__ = ["HEADERS", "LARGEST_BODY", "Gate"]

LARGEST_BODY = 64 * 1024  # bytes
TOO_LARGE = f"a request may hold {LARGEST_BODY} bytes"
CSP = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
       "form-action 'self'; frame-ancestors 'none'; base-uri 'none'")
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d*)?", re.ASCII)  # RFC 9110 7.2
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

log = get_logger(__name__)


class Gate:
    """Middleware (ASGI). `monotonic`: seconds, for the time that an answer took."""

    def __init__(self, app: ASGIApp, config: Config, *, monotonic: Callable[[], float] = time.perf_counter) -> None:
        self._app, self._root, self._monotonic = app, config.web.root_path, monotonic
        self._names = LOOPBACK | {config.web.host.lower(), *(name.lower() for name in config.web.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if self._root and (path == self._root or path.startswith(f"{self._root}/")):
            path = path[len(self._root):] or "/"
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        finished = _Finished(scope, send, self._monotonic)
        await self._answer({**scope, "method": method, "path": path, "raw_path": path.encode()}, receive, finished)

    async def _answer(self, scope: Scope, receive: Receive, send: _Finished) -> None:
        headers, request = Headers(scope=scope), Request(scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            text = (f"this node is not called {host[:100]!r}. Remedy: use its own name, or add that one to web.hosts "
                    "in the configuration")
            await answer(request, 400, text)(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            await answer(request, 413, TOO_LARGE)(scope, receive, send)
            return
        try:
            await self._app(scope, _bounded(receive), send)
        except Exception:
            log.exception("a request failed", action="web_failed", method=scope["method"], path=scope["path"])
            if send.begun:
                raise
            await answer(request, 500, "something went wrong here, and the log says what. Remedy: try again; if it "
                                       "stays so, report what the log shows")(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        found = HOST.fullmatch(host)
        name = found["name"].strip("[]").lower() if found else ""
        return name in self._names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _bounded(receive: Receive) -> Receive:
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > LARGEST_BODY:
            raise HTTPException(413, TOO_LARGE)  # FastAPI lets these through as they are
        return message

    return bounded


class _Finished:
    """`send` that adds the headers, and writes a line of log: the path, never what stands behind a question mark."""

    def __init__(self, scope: Scope, send: Send, monotonic: Callable[[], float]) -> None:
        self._scope, self._send, self._monotonic = scope, send, monotonic
        self._since = monotonic()
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            # What says nothing else holds data of patients: no cache keeps it.
            headers.setdefault("Cache-Control", "no-store")
            log.debug("answered", action="web_request", method=self._scope["method"], path=self._scope["path"],
                      status=message["status"], ms=round(1000 * (self._monotonic() - self._since), 1))
        elif self._scope["method"] == "HEAD":
            message = {**message, "body": b""}
        await self._send(message)
