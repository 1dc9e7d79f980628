"""The process: answers until told to stop. It is small, never loads torch, and nothing waits for it.

Where the ledger cannot be opened it answers all the same, status 503 with the reason, and tries again: whoever looks at
the status page then is the one who needs to know.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from dicomnode.config import Config
from dicomnode.errors import ConfigError, NodeError
from dicomnode.logs import configure, get_logger
from dicomnode.process import Pulse
from dicomnode.reload import Reloader
from dicomnode.secretfiles import require_private
from dicomnode.spool import Spool
from dicomnode.web.access import operator_token, viewer_token
from dicomnode.web.app import create
from dicomnode.web.patience import Patience
from dicomnode.web.security import HEADERS

__all__ = ["run"]

POLL_S = 0.5
GRACE_S = 2.0    # for answers that are under way when it ends
LEAVE_S = 4.0    # then it ends whatever still runs
AGAIN_S = 10.0   # between attempts to open the ledger
BEAT_S, SILENT_S = 5.0, 120.0  # a handler that reads a large ledger from a slow disk is no hang
CONNECTIONS = 200
BACKLOG = 128
TICKS = 10  # of uvicorn, 0.1 s each, between two looks at the connections
LARGEST_HEAD = 16 * 1024  # bytes of request line and headers

log = get_logger("web")


def run(config: Config, *, stop: threading.Event, ready: Callable[[], None], pulse: Pulse | None = None,
        reloader: Reloader | None = None) -> None:
    """Answer until `stop` is set; `ready` is called once connections are accepted.

    Raises ConfigError where tokens or certificate cannot be used, NodeError where the port is in use, OSError.
    """
    configure(config.node)
    Spool(config.node.data_dir)  # makes it, as every part does that starts first
    operator_token(config)
    viewer_token(config)
    context = _context(config)
    house = _House(config)
    with _listen(config) as listener:
        server = _Server(house, context, pulse or Pulse())
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="web", daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            _say(config)
            ready()
            while not stop.wait(POLL_S):
                if not thread.is_alive():
                    raise NodeError("the web server ended. Remedy: the log says why; it is to be started again.")
                house.look_after(reloader)
        finally:
            server.should_exit = True
            thread.join(LEAVE_S)
            house.close()
            log.info("The web server has stopped.", action="web_stopped")


def _say(config: Config) -> None:
    web = config.web
    log.info(f"{config.node.ae_title} shows itself on {web.host} port {web.port}"
             f"{' by https' if web.certificate else ''}.", action="web_started", port=web.port)


def _listen(config: Config) -> socket.socket:
    web = config.web
    try:
        family = socket.AF_INET6 if ":" in web.host else socket.AF_INET
        listener = socket.create_server((web.host, web.port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise NodeError(f"port {web.port} of {web.host} is in use. Remedy: end what uses it, or set another "
                            "web.port.") from error
        raise NodeError(f"cannot listen on {web.host} port {web.port}: {error.strerror or error}. Remedy: web.host "
                        "must be an address of this machine.") from error
    # What it accepts inherits this. Without it, head and body of an answer go 40 ms apart (Nagle, delayed ACK): asyncio
    # sets it only on sockets that it made itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _context(config: Config) -> ssl.SSLContext | None:
    """For https (RFC 9325): TLS 1.2 or newer. Raises ConfigError."""
    web = config.web
    if web.certificate is None or web.key is None:
        return None
    require_private(web.key, what="web.key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(web.certificate, web.key, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "reason", None) or error.strerror or "it needs a password"
        raise ConfigError(f"web.certificate {web.certificate} and web.key {web.key} cannot be used: "
                          f"{reason.replace('_', ' ').lower()}. Remedy: PEM files, and the key of this very "
                          "certificate, without a password.") from error
    return context


class _House:
    """The application, once the ledger can be opened; until then what says why not. Safe for threads."""

    def __init__(self, config: Config) -> None:
        self._config, self._problem, self._tried_at = config, "", 0.0
        self._app: FastAPI | None = None
        self._try()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is not None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            alive = scope["path"] == "/healthz"
            headers = HEADERS | {"Cache-Control": "no-store"}
            answer = JSONResponse({"status": "alive"}, headers=headers) if alive else PlainTextResponse(
                f"dicomnode: {self._problem}\n", 503, headers | {"Retry-After": "10"})
            await answer(scope, receive, send)

    def look_after(self, reloader: Reloader | None) -> None:
        """Try again to open the ledger; take over a configuration that was read again."""
        if self._app is None:
            if time.monotonic() - self._tried_at > AGAIN_S:
                self._try()
        elif reloader is not None:
            reloader.take(self._app.state.site.ledger, self._reconfigure, now=time.time())

    def close(self) -> None:
        if self._app is not None:
            self._app.state.site.ledger.close()

    def _try(self) -> None:
        self._tried_at = time.monotonic()
        try:
            self._app = create(self._config)
        except ConfigError:
            raise
        except NodeError as error:
            self._problem = str(error)
            log.error(self._problem, action="web_no_ledger")

    def _reconfigure(self, config: Config) -> None:
        assert self._app is not None
        self._app.state.site = replace(self._app.state.site, config=config)
        configure(config.node)


class _Server(uvicorn.Server):
    """Shows that the loop and the threads of the handlers get on: a beat goes through both. Slow clients are ended."""

    def __init__(self, house: _House, context: ssl.SSLContext | None, pulse: Pulse) -> None:
        super().__init__(uvicorn.Config(
            house, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            proxy_headers=False, limit_concurrency=CONNECTIONS, timeout_keep_alive=15,
            timeout_graceful_shutdown=GRACE_S,  # type: ignore[arg-type]
            h11_max_incomplete_event_size=LARGEST_HEAD,
            ssl_context_factory=None if context is None else lambda _config, _default: context))
        self._pulse, self._beat_at = pulse, 0.0
        self._patience = Patience()
        self._beat: asyncio.Task[None] | None = None
        pulse.expect("web", SILENT_S)

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if now - self._beat_at > BEAT_S and (self._beat is None or self._beat.done()):
            self._beat_at = now
            self._beat = asyncio.create_task(run_in_threadpool(self._pulse.beat, "web"))
        if counter % TICKS == 0 and (ended := self._patience.look(self.server_state.connections)):
            log.warning("connections were ended: their clients asked nothing, or too slowly", action="web_slow",
                        connections=ended)
        return await super().on_tick(counter)
