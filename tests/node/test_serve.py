"""The whole node as one process tree: it says `ready` once, heals itself, ends cleanly, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dicomnode import process, serve
from tests.peers import REPOSITORY, echoscu, free_port, wait_until

IMPATIENT = """
import pathlib, sys
from dicomnode import serve
from dicomnode.config import load
serve.ALIVE_S, serve.SILENT_S, serve.CHILD_GRACE_S = 0.2, 6.0, 0.5
serve.run(pathlib.Path(sys.argv[1]), load(pathlib.Path(sys.argv[1])))
"""


class Node:
    """`dicomnode serve` on a fresh data directory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.config = folder / "node.toml"
        self.config.write_text(
            f'[node]\nport = {self.port}\ndata_dir = "{folder / "data"}"\n[reception]\nlow_disk_mb = 1\n'
            '[[peer]]\nname = "SCANNER"\nae_title = "SCANNER"\nhost = "127.0.0.1"\n')
        self.process: subprocess.Popen[str] | None = None

    def start(self, *, command: tuple[str, ...] = ("-m", "dicomnode", "serve", "--config"),
              **environment: str) -> subprocess.Popen[str]:
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, str(self.config)], cwd=REPOSITORY, text=True,
                stdout=subprocess.PIPE, stderr=log, env={**os.environ, **environment})
        return self.process

    def text(self) -> str:
        return (self.folder / "log").read_text()

    def children(self) -> dict[str, int]:
        """Part name -> process id, from /proc."""
        assert self.process is not None
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except (OSError, IndexError):
                continue
            if parent == self.process.pid and "dicomnode" in words:
                found[words[words.index("dicomnode") + 1]] = int(entry.name)
        return found

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.communicate(timeout=30)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.end()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A running node for the tests that leave it running, with a supervisor that waits seconds, not a minute."""
    node = Node(tmp_path_factory.mktemp("node"))
    try:
        started(node, command=("-c", IMPATIENT))
        yield node
    finally:
        node.end()


def started(node: Node, **options: Any) -> subprocess.Popen[str]:
    """The node, running; its first line was `ready`."""
    running = node.start(**options)
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n", (node.folder / "log").read_text()[-3000:]
    return running


def echo(node: Node) -> bool:
    return echoscu(node.port).returncode == 0


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_it_says_ready_once_and_ends_cleanly_on_sigterm_and_the_service_manager_is_told(node: Node) -> None:
    """`ready` means a C-ECHO succeeds now. SIGTERM: status 0, no child left, no other line. Type=notify: READY=1 once
    ready, WATCHDOG=1 again and again, STOPPING=1 at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(node.folder / "notify"))
        manager.settimeout(60)
        running = started(node, NOTIFY_SOCKET=str(node.folder / "notify"), WATCHDOG_USEC="400000")
        assert echo(node)
        children = node.children()
        assert set(children) == {"receive", "work"}
        heard: list[str] = []
        while "READY=1" not in heard or heard.count("WATCHDOG=1") < 3:
            heard.append(manager.recv(100).decode())
        begun = time.monotonic()
        running.send_signal(signal.SIGTERM)
        while "STOPPING=1" not in heard:
            heard.append(manager.recv(100).decode())
        rest, _ = running.communicate(timeout=30)
        assert time.monotonic() - begun < serve.CHILD_GRACE_S, "nobody had to be killed"
    assert running.returncode == 0 and rest == ""
    assert heard.count("READY=1") == 1
    assert all(gone(pid) for pid in children.values())


def test_a_killed_supervisor_takes_its_children_along_and_a_new_one_starts_at_once(node: Node) -> None:
    """kill -9 of serve: the children die with it, port and data directory are free."""
    running = started(node)
    children = node.children()
    running.kill()
    running.communicate()
    wait_until("the children to die", lambda: all(gone(pid) for pid in children.values()), timeout_s=60)
    started(node)
    assert echo(node)


def test_sighup_lets_a_new_peer_in_and_a_file_with_errors_keeps_the_old_one(lasting: Node) -> None:
    """Both parts read again, no process is started anew; each wrong key is said; a new port waits for a restart."""
    node = lasting
    assert node.process is not None
    running, before, text = node.process, node.children(), node.config.read_text()

    def hup(new: str, said: str) -> None:
        node.config.write_text(new)
        times = lines(said)
        running.send_signal(signal.SIGHUP)
        wait_until(said, lambda: lines(said) >= times + 2, timeout_s=60)

    def lines(holding: str) -> int:
        return sum(holding in line for line in node.text().splitlines())

    assert echoscu(node.port, calling="NEWCOMER").returncode != 0
    hup(text.replace('ae_title = "SCANNER"', 'ae_title = "NEWCOMER"'), "peer SCANNER")
    assert echoscu(node.port, calling="NEWCOMER").returncode == 0 and not echo(node)
    hup(text + "[work]\nretry_s = -1\nnonsense = 1\n", "work.nonsense: unknown key")
    assert "work.retry_s: Input should be greater than or equal to 0" in node.text()
    assert echoscu(node.port, calling="NEWCOMER").returncode == 0, "the old one stays in force"
    hup(text.replace(f"port = {node.port}", f"port = {free_port()}"), "not before a restart: node.port")
    assert echo(node) and echoscu(node.port, calling="NEWCOMER").returncode != 0
    assert node.children() == before
    node.config.write_text(text)


@pytest.mark.parametrize("part", ["receive", "work"])
@pytest.mark.parametrize("ill", [signal.SIGKILL, signal.SIGSTOP])
def test_a_part_that_was_killed_or_hangs_is_started_again(lasting: Node, part: str, ill: signal.Signals) -> None:
    """kill -9; or SIGSTOP, where it neither works nor ends: noticed by its silence. The other part lives on."""
    before = lasting.children()
    hung = lasting.text().count(f"{part} hangs: it is ended and started again")
    os.kill(before[part], ill)
    wait_until("a new process", lambda: lasting.children().get(part, before[part]) != before[part], timeout_s=60)
    other = "work" if part == "receive" else "receive"
    assert lasting.children()[other] == before[other]
    told = lasting.text().count(f"{part} hangs: it is ended and started again")
    assert told - hung == (1 if ill == signal.SIGSTOP else 0)
    wait_until("C-ECHO", lambda: echo(lasting), timeout_s=60)


def test_a_machine_that_stood_still_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine that was paused for an hour: no part could speak, none is ended for it."""
    now, ended = [1000.0], []
    monkeypatch.setattr(serve.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(serve, "end", lambda process, **_: ended.append(process))
    part = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)
    child = serve._Child("work", Path("unused"), process=part, starts=1, silent_at=1060.0)
    stop, passing = threading.Event(), [3600.0, 1.0, 4.0]

    def listen(_: object) -> None:
        now[0] += passing.pop(0)
        if not passing:
            stop.set()

    monkeypatch.setattr(serve._Supervisor, "_listen", listen)
    try:
        serve._Supervisor([child], process.Pulse()).watch(stop)
        assert ended == [] and child.silent_at == 1060.0 + 3600.0
        now[0] = child.silent_at + 1.0
        child.look(now[0])
        assert child.ender is not None
        child.ender.join()
        assert ended == [part]
    finally:
        part.kill()
        part.communicate()


def test_a_port_in_use_ends_the_node_with_the_reason(node: Node) -> None:
    """Never ready: after a few starts it gives up, says why on standard error, and fails."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", node.port))
        taken.listen()
        running = node.start()
        out, _ = running.communicate(timeout=180)
    assert out == "" and running.returncode != 0
    log = (node.folder / "log").read_text()
    assert "receive ended 3 times before the node was ready" in log and "Address already in use" in log


def test_a_thread_that_hangs_keeps_the_process_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """WATCHDOG=1 goes out while every thread gets on, and again once the late one does."""
    told: list[str] = []
    monkeypatch.setattr(serve, "notify", told.append)
    now = [0.0]
    pulse = process.Pulse(lambda: now[0])
    pulse.expect("matcher", 900.0)
    watchdog = serve._Watchdog(pulse)
    watchdog._tell()
    now[0] = 901.0
    watchdog._tell()
    assert told == ["WATCHDOG=1"]
    pulse.beat("matcher")
    watchdog._tell()
    assert told == ["WATCHDOG=1"] * 2


def test_without_a_service_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """NOTIFY_SOCKET unset, or gone."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert process.notify("READY=1") is False
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    assert process.notify("READY=1") is False


@pytest.mark.parametrize(("environment", "interval_s"), [
    ({}, None), ({"WATCHDOG_USEC": "30000000"}, 15.0), ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
    ({"WATCHDOG_USEC": "soon"}, None),
])
def test_the_watchdog_is_fed_twice_as_often_as_it_asks(
        monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], interval_s: float | None) -> None:
    """Half of WATCHDOG_USEC, and only if it is meant for this process."""
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert process.watchdog_interval_s() == interval_s


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    """The grace is short, then SIGKILL."""
    stubborn = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
         "print('here', flush=True); time.sleep(60)"], stdout=subprocess.PIPE, start_new_session=True)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    started_at = time.monotonic()
    assert process.end(stubborn, grace_s=0.3) == -signal.SIGKILL
    stubborn.stdout.close()
    assert time.monotonic() - started_at < 5
