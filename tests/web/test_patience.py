"""Clients that keep us waiting: they are ended, and nobody else notices."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import pytest

from dicomnode.process import Pulse
from dicomnode.web import run
from dicomnode.web.patience import Patience
from tests.peers import wait_until

LARGE = 50_000_000


class Transport:
    """What is known of a connection's other side."""

    def __init__(self) -> None:
        self.waiting, self.aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.aborted = True


class Connection:
    """As uvicorn has it."""

    def __init__(self) -> None:
        self.conn, self.transport = h11.Connection(h11.SERVER), Transport()
        self.cycle: Any = None

    def receive(self, data: bytes) -> None:
        self.conn.receive_data(data)
        while (event := self.conn.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            self.cycle = object() if isinstance(event, h11.Request) else self.cycle


def test_a_request_may_take_a_while_and_no_longer() -> None:
    """Head and body each; a letter now and then does not help."""
    now = [0.0]
    patience = Patience(request_s=20, answer_s=120, monotonic=lambda: now[0])
    silent, dripping, body, asked = (Connection() for _ in range(4))
    asked.receive(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    for second in range(0, 45, 5):
        now[0] = second
        dripping.receive(b"GET / HTTP/1.1"[second // 5:second // 5 + 1])
        if second == 15:
            body.receive(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n")
        if second > 15:
            body.receive(b"x")
        patience.look([one for one in (silent, dripping, body, asked) if not one.transport.aborted])
        assert (silent.transport.aborted, dripping.transport.aborted, body.transport.aborted) == (
            second > 20, second > 20, second > 35), second
    assert not asked.transport.aborted, "its answer is being made: that is our time"


def test_an_answer_that_nobody_takes_does_not_lie_there_for_ever() -> None:
    """It is given up."""
    now = [0.0]
    patience = Patience(request_s=20, answer_s=120, monotonic=lambda: now[0])
    one = Connection()
    one.receive(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    one.transport.waiting = 1000
    for now[0], ended in ((0, 0), (119, 0), (121, 1)):
        assert patience.look([one]) == ended


async def _large(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(LARGE if scope["path"] == "/large" else 2)})


@contextmanager
def served(patience: Patience) -> Iterator[int]:
    """The server of the process, over an application that says nothing, or much; the port."""
    server = run._Server(_large, None, Pulse())  # type: ignore[arg-type]
    server._patience = patience
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until("the server", lambda: server.started)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def _ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
        one.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return one.recv(12)


def test_whoever_holds_all_connections_keeps_nobody_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent, halfway through a head, or not reading: all of them are ended, and the next one gets an answer."""
    monkeypatch.setattr(run, "CONNECTIONS", 20)
    with served(Patience(request_s=1, answer_s=1)) as port:
        held = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(40)]
        for n, one in enumerate(held):
            one.sendall((b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nHost: lo", b"")[n % 3])
        assert _ask(port) == b"HTTP/1.1 503"
        wait_until("room", lambda: _ask(port) == b"HTTP/1.1 200", timeout_s=20)
        for one in held:
            one.close()
