"""The web server as a process: starts and ends cleanly, stays small, and never stands in the way of the node."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from dicomnode import serve
from dicomnode.config import parse
from dicomnode.ledger import Ledger
from dicomnode.process import Pulse
from dicomnode.web import run
from dicomnode.web.security import HEADERS
from tests.certificates import Authority
from tests.peers import REPOSITORY, free_port, wait_until


class Site:
    """A configuration, and what is started with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.dicom = folder, free_port(), free_port()
        self.config = folder / "node.toml"
        self.write()
        self.processes: list[subprocess.Popen[str]] = []

    def write(self, web: str = "") -> None:
        self.config.write_text(
            f'[node]\nport = {self.dicom}\ndata_dir = "{self.folder / "data"}"\nlog_level = "debug"\n[reception]\n'
            f'low_disk_mb = 1\n[web]\nenabled = true\nport = {self.port}\n{web}\n')

    def start(self, command: str = "web", **environment: str) -> subprocess.Popen[str]:
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen([sys.executable, "-m", "dicomnode", command, "--config", str(self.config)],
                                       cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=log,
                                       env={**os.environ, **environment})
        self.processes.append(process)
        return process

    def started(self, command: str = "web") -> subprocess.Popen[str]:
        process = self.start(command)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", self.log()
        return process

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def get(self, path: str, *, scheme: str = "http", context: ssl.SSLContext | None = None) -> tuple[int, str]:
        request = urllib.request.Request(f"{scheme}://127.0.0.1:{self.port}{path}")
        try:
            with urllib.request.urlopen(request, timeout=20, context=context) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    for process in site.processes:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def test_it_starts_stays_small_and_ends_cleanly_while_connections_are_open(site: Site) -> None:
    """`ready` means that it answers. Memory under 150 MB, neither torch nor pynetdicom nor matplotlib loaded. SIGTERM:
    status 0 within 5 s, though one client is idle and another in the middle of a request. The log holds no query."""
    process = site.started()
    assert site.get("/healthz") == (200, '{"status":"alive"}')
    assert site.get("/login?ticket=secret-words")[0] == 401
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert int(re.search(r"VmRSS:\s+(\d+)", status)[1]) < 150_000  # type: ignore[index]
    mapped = Path(f"/proc/{process.pid}/maps").read_text()
    assert not any(f"/{name}/" in mapped for name in ("torch", "matplotlib", "scipy"))
    with socket.create_connection(("127.0.0.1", site.port)) as idle, \
            socket.create_connection(("127.0.0.1", site.port)) as halfway:
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in idle.recv(200)
        halfway.sendall(b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\ntok")
        time.sleep(0.2)
        since = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and time.monotonic() - since < 5
    assert "secret-words" not in site.log() and "web_stopped" in site.log() and "/login" in site.log()


def test_an_answer_leaves_in_one_piece(site: Site) -> None:
    """On a connection that stays open no answer waits for the receipt of its own head: that would be 40 ms each."""
    site.started()
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
    took = []
    for _ in range(20):
        since = time.perf_counter()
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        took.append(time.perf_counter() - since)
    assert min(took) < 0.03


def test_a_port_in_use_is_said_with_the_remedy(site: Site) -> None:
    """Exit code 1, one sentence, no traceback."""
    with socket.create_server(("127.0.0.1", site.port)):
        assert site.start().wait(60) == 1
    assert f"port {site.port} of 127.0.0.1 is in use. Remedy:" in site.log() and "Traceback" not in site.log()


def test_a_token_file_that_others_may_read_is_said_with_the_remedy(site: Site) -> None:
    """It does not start."""
    token = site.folder / "token"
    token.write_text("a-token-that-is-long-enough")
    token.chmod(0o644)
    site.write(f'token_file = "{token}"')
    assert site.start().wait(60) == 2 and "chmod 600" in site.log()


def test_a_link_from_the_command_line_lets_a_browser_in(site: Site) -> None:
    """Once; made while the server runs, from the token of the data directory, which nobody else may read."""
    site.started()
    done = subprocess.run([sys.executable, "-m", "dicomnode", "web", "--link", "--config", str(site.config)],
                          cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    address = done.stdout.strip()
    assert address.startswith(f"http://127.0.0.1:{site.port}/login?ticket=")
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(address, timeout=20) as answer:
        assert answer.url == f"http://127.0.0.1:{site.port}/" and "Log out" in answer.read().decode()
    assert site.get(address.partition(str(site.port))[2])[0] == 401
    assert (site.folder / "data" / "web.token").stat().st_mode & 0o777 == 0o600


def test_it_answers_by_https(site: Site) -> None:
    """With the certificate of the configuration; plain http on that port gets nothing."""
    authority = Authority(site.folder)
    own = authority.issue("web")
    site.write(f'certificate = "{own.certificate}"\nkey = "{own.key}"')
    site.started()
    context = ssl.create_default_context(cafile=authority.path)
    assert site.get("/healthz", scheme="https", context=context)[0] == 200
    with pytest.raises(OSError):
        site.get("/healthz")


def test_a_damaged_ledger_is_said_where_people_look(site: Site) -> None:
    """The page answers 503 with the remedy, and is there again once the ledger is."""
    data = site.folder / "data"
    data.mkdir()
    (data / "ledger.sqlite3").write_bytes(b"no ledger at all" * 1000)
    site.started()
    status, text = site.get("/")
    assert status == 503 and "dicomnode repair" in text and site.get("/healthz")[0] == 200
    (data / "ledger.sqlite3").unlink()
    Ledger(data / "ledger.sqlite3").close()
    wait_until("the page", lambda: site.get("/login")[0] == 200, timeout_s=60)


def test_serve_runs_it_too_and_does_not_wait_for_it(site: Site) -> None:
    """Its port is in use: the node is ready all the same, and the page comes up once the port is free."""
    with socket.create_server(("127.0.0.1", site.port)):
        process = site.started("serve")
        wait_until("the first failure", lambda: "web ended, status 1" in site.log(), timeout_s=60)
        assert process.poll() is None
    wait_until("the page", lambda: _answers(site), timeout_s=90)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def _answers(site: Site) -> bool:
    try:
        return site.get("/healthz")[0] == 200
    except OSError:
        return False


def test_without_being_enabled_it_is_no_part_of_the_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And where it is, the node is ready without it, however often it ends."""
    seen: list[list[serve._Child]] = []
    monkeypatch.setattr(serve, "stop_on_signals", lambda: None)
    monkeypatch.setattr(serve, "on_hangup", lambda call: None)
    monkeypatch.setattr(serve._Supervisor, "watch", lambda self, stop: seen.append(self._children))
    monkeypatch.setattr(serve, "configure", lambda node: None)
    for text in ("", "[web]\nenabled = true"):
        serve.run(tmp_path / "x.toml", parse(f'[node]\ndata_dir = "{tmp_path}"\n{text}'))
    assert [[child.name for child in children] for children in seen] == [["receive", "work"],
                                                                       ["receive", "work", "web"]]
    supervisor = serve._Supervisor(seen[1], Pulse())
    started: list[str] = []
    monkeypatch.setattr(serve._Child, "start", lambda self: started.append(self.name))
    seen[1][2].starts = 100
    supervisor._start(seen[1][2])
    assert started == ["web"] and not seen[1][2].vital


def test_without_a_ledger_too_every_answer_is_protected(tmp_path: Path) -> None:
    """The same headers as any page; nothing of it stays in a cache."""
    (tmp_path / "ledger.sqlite3").write_bytes(b"no ledger at all" * 1000)
    client = TestClient(run._House(parse(f'[node]\ndata_dir = "{tmp_path}"\n')), base_url="http://127.0.0.1")
    for path, status in (("/", 503), ("/healthz", 200), ("/readyz", 503)):
        answer = client.get(path)
        assert answer.status_code == status
        assert dict(answer.headers).items() >= {name.lower(): value for name, value in HEADERS.items()}.items()
        assert answer.headers["Cache-Control"] == "no-store"
    assert client.get("/healthz").json() == {"status": "alive"}
