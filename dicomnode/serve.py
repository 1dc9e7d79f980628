"""The whole node in the foreground: a supervisor with the receiver and the worker as child processes.

Prints exactly one line, `ready`, on standard output, when the receiver accepts associations and the worker runs. A
child that ends is started again after a moment, a longer one when it never was ready. SIGTERM ends both cleanly; when
the supervisor itself is killed the kernel kills them, so that a new one finds port and data directory free.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dicomnode.config import Config
from dicomnode.errors import NodeError
from dicomnode.logs import configure, get_logger
from dicomnode.process import PARENT_VARIABLE, end, notify, stop_on_signals, tie_to_parent, watchdog_interval_s

__all__ = ["PARTS", "Part", "foreground", "run"]

PARTS = ("receive", "work")
READY = "ready"
POLL_S = 0.2
# Before a part that ended is started again. Long waits would keep scanners waiting; these keep a part that fails at
# once from taking the processor.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0
FIRST_STARTS = 3  # before the node was ever ready: then something is wrong for good, such as a port in use
CHILD_GRACE_S = 9.0

log = get_logger(__name__)


class Part(Protocol):
    """receive.run or work.run: works until `stop` is set, calls `ready` once."""

    def __call__(self, config: Config, *, stop: threading.Event, ready: Callable[[], None]) -> None: ...


def foreground(part: Part, config: Config) -> None:
    """Run one part in this process until SIGTERM or SIGINT; prints `ready` and tells the service manager.

    Must be called in the main thread. Raises what the part raises.
    """
    tie_to_parent()
    stop = stop_on_signals()
    configure(config.node)
    with _Watchdog():
        part(config, stop=stop, ready=_say_ready)
        notify("STOPPING=1")


def run(config_path: Path, config: Config) -> None:
    """Run the whole node until SIGTERM or SIGINT. Raises NodeError where a part cannot be started at all."""
    tie_to_parent()
    stop = stop_on_signals()
    configure(config.node)
    supervisor = _Supervisor([_Child(name, config_path) for name in PARTS])
    with _Watchdog():
        try:
            supervisor.watch(stop)
        finally:
            notify("STOPPING=1")
            supervisor.end()


def _say_ready() -> None:
    print(READY, flush=True)  # noqa: T201 - the one line that scripts wait for
    notify("READY=1")


@dataclass
class _Child:
    """One part: its process, and when it may start (again)."""

    name: str
    config_path: Path
    process: subprocess.Popen | None = None
    ready: bool = False
    starts: int = 0
    wait_s: float = FIRST_WAIT_S
    start_at: float = 0.0
    _line: bytes = field(default=b"")

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dicomnode", self.name, "--config", str(self.config_path)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid()), "NOTIFY_SOCKET": ""},
        )
        self.ready, self._line, self.starts = False, b"", self.starts + 1
        log.info(f"{self.name} started", action="child_started", part=self.name, process=self.process.pid)

    def hear(self) -> None:
        """Read what it printed; the line `ready` is meant for us, everything else goes to standard error."""
        assert self.process is not None and self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 4096)
        *lines, self._line = (self._line + chunk).split(b"\n")
        for line in lines:
            if line.decode(errors="replace").strip() == READY:
                self.ready = True
            else:
                sys.stderr.buffer.write(line + b"\n")

    def reap(self, now: float) -> None:
        """Note the end of the process and when the next one may start."""
        assert self.process is not None
        code = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        self.wait_s = FIRST_WAIT_S if self.ready else min(LONGEST_WAIT_S, self.wait_s * 2)
        self.start_at = now + self.wait_s
        log.error(f"{self.name} ended, status {code}; started again in {self.wait_s:g} s", action="child_ended",
                  part=self.name, status=code)


class _Supervisor:
    def __init__(self, children: list[_Child]) -> None:
        self._children = children
        self._was_ready = False

    def watch(self, stop: threading.Event) -> None:
        """Keep the children running until `stop` is set."""
        while not stop.is_set():
            now = time.monotonic()
            for child in self._children:
                if child.process is not None and child.process.poll() is not None:
                    child.reap(now)
                if child.process is None and now >= child.start_at:
                    self._start(child)
            self._listen()
            if not self._was_ready and all(child.ready for child in self._children):
                self._was_ready = True
                _say_ready()

    def _start(self, child: _Child) -> None:
        if not self._was_ready and child.starts >= FIRST_STARTS:
            raise NodeError(f"{child.name} ended {child.starts} times before the node was ready; its messages above "
                            "say why. Remedy: `dicomnode check`.")
        child.start()

    def _listen(self) -> None:
        running = [child for child in self._children if child.process is not None]
        with selectors.DefaultSelector() as selector:
            for child in running:
                assert child.process is not None and child.process.stdout is not None
                selector.register(child.process.stdout, selectors.EVENT_READ, child)
            for key, _ in selector.select(POLL_S):
                key.data.hear()

    def end(self) -> None:
        """SIGTERM to all at once, then SIGKILL to what is left; the worker may take a few seconds to stop its job."""
        enders = [threading.Thread(target=end, args=(child.process,), kwargs={"grace_s": CHILD_GRACE_S})
                  for child in self._children if child.process is not None]
        for thread in enders:
            thread.start()
        for thread in enders:
            thread.join()


class _Watchdog:
    """Tells systemd that we live, where it asks to be told (WatchdogSec=)."""

    def __init__(self) -> None:
        self._over = threading.Event()

    def __enter__(self) -> None:
        interval_s = watchdog_interval_s()
        if interval_s is not None:
            threading.Thread(target=self._tell, args=(interval_s,), name="watchdog", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _tell(self, interval_s: float) -> None:
        while not self._over.wait(interval_s):
            notify("WATCHDOG=1")
