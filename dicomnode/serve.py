"""The whole node in the foreground: a supervisor with the receiver and the worker as child processes.

Where web.enabled is set the status page is a third. Nothing waits for it: whether it comes up or not, the node is ready
without it and goes on without it; it too is started again.

Prints exactly one line, `ready`, on standard output, when the receiver accepts associations and the worker runs. A
child that ends is started again after a moment, a longer one when it never was ready. Each says again and again that
all its threads get on (process.Pulse); one that does not say so any more is ended and started again. Where systemd
watches, it is told the same (WATCHDOG=1). SIGTERM ends both cleanly, SIGHUP is passed on to them (reload.py); when the
supervisor itself is killed the kernel kills them, so that a new one finds port and data directory free.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dicomnode.config import Config, load
from dicomnode.errors import NodeError
from dicomnode.logs import configure, get_logger
from dicomnode.process import (
    PARENT_VARIABLE,
    Pulse,
    end,
    notify,
    on_hangup,
    stop_on_signals,
    tie_to_parent,
    watchdog_interval_s,
)
from dicomnode.reload import Reloader

__all__ = ["PARTS", "Part", "foreground", "run"]

PARTS = ("receive", "work")
EXTRA = "web"  # where web.enabled is set
READY = "ready"
ALIVE = "alive"
ALIVE_VARIABLE = "DICOMNODE_ALIVE_S"  # for the children: how often they are to print `alive`
ALIVE_S = 5.0
#: A part that does not say for so long that it is alive is ended. The first time may take longer: libraries are loaded.
SILENT_S, FIRST_SILENT_S = 60.0, 300.0
PAUSE_S = 5.0  # between two looks of the supervisor: it stood still itself
POLL_S = 0.2
# Before a part that ended is started again. Long waits would keep scanners waiting; these keep a part that fails at
# once from taking the processor.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0
EXTRA_WAIT_S = 60.0
FIRST_STARTS = 3  # before the node was ever ready: then something is wrong for good, such as a port in use
CHILD_GRACE_S = 20.0  # enough for the worker to put its jobs back and end what is on its way to peers

log = get_logger(__name__)


class Part(Protocol):
    """receive.run or work.run: works until `stop` is set, calls `ready` once."""

    def __call__(self, config: Config, *, stop: threading.Event, ready: Callable[[], None], pulse: Pulse,
                 reloader: Reloader) -> None: ...


def foreground(name: str, part: Part, config_path: Path) -> None:
    """Run one part in this process until SIGTERM or SIGINT; prints `ready` and tells the service manager.

    Must be called in the main thread. Raises ConfigError, and what the part raises.
    """
    tie_to_parent()
    stop, pulse = stop_on_signals(), Pulse()
    config = load(config_path)
    reloader = Reloader(config_path, config, part=name)
    on_hangup(reloader.ask)
    configure(config.node)
    with _Watchdog(pulse, alive_s=float(os.environ.get(ALIVE_VARIABLE, "0"))):
        part(config, stop=stop, ready=_say_ready, pulse=pulse, reloader=reloader)
        notify("STOPPING=1")


def run(config_path: Path, config: Config) -> None:
    """Run the whole node until SIGTERM or SIGINT. Raises NodeError where a part cannot be started at all."""
    tie_to_parent()
    stop, pulse = stop_on_signals(), Pulse()
    configure(config.node)
    children = [_Child(name, config_path) for name in PARTS]
    if config.web.enabled:
        children.append(_Child(EXTRA, config_path, vital=False))
    supervisor = _Supervisor(children, pulse)
    on_hangup(supervisor.reload)
    with _Watchdog(pulse):
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
    """One part: its process, and when it may start (again). `vital`: the node is not ready without it."""

    name: str
    config_path: Path
    vital: bool = True
    process: subprocess.Popen | None = None
    ready: bool = False
    starts: int = 0
    wait_s: float = FIRST_WAIT_S
    start_at: float = 0.0
    silent_at: float = 0.0  # when it has been silent for too long
    reload: bool = False  # SIGHUP is to be passed on
    ender: threading.Thread | None = None
    _line: bytes = field(default=b"")

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dicomnode", self.name, "--config", str(self.config_path)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, PARENT_VARIABLE: str(os.getpid()), ALIVE_VARIABLE: str(ALIVE_S), "NOTIFY_SOCKET": ""},
        )
        self.silent_at, self.ender, self.reload = time.monotonic() + FIRST_SILENT_S, None, False
        self.ready, self._line, self.starts = False, b"", self.starts + 1
        log.info(f"{self.name} started", action="child_started", part=self.name, process=self.process.pid)

    def hear(self) -> None:
        """Read what it printed; the line `ready` is meant for us, everything else goes to standard error."""
        assert self.process is not None and self.process.stdout is not None
        chunk = os.read(self.process.stdout.fileno(), 4096)
        *lines, self._line = (self._line + chunk).split(b"\n")
        for line in lines:
            word = line.decode(errors="replace").strip()
            if word == READY:
                self.ready = True
            if word in (READY, ALIVE):
                self.silent_at = time.monotonic() + SILENT_S
            else:
                sys.stderr.buffer.write(line + b"\n")

    def look(self, now: float) -> None:
        """End it where it was silent for too long; pass SIGHUP on once it can take it (before, it would end of it)."""
        assert self.process is not None
        if now > self.silent_at and self.ender is None:
            log.error(f"{self.name} hangs: it is ended and started again", action="child_hangs", part=self.name,
                      process=self.process.pid)
            self.ender = threading.Thread(target=end, args=(self.process,), kwargs={"grace_s": CHILD_GRACE_S})
            self.ender.start()
        if self.reload and self.ready:
            self.reload = False
            self.process.send_signal(signal.SIGHUP)

    def reap(self, now: float) -> None:
        """Note the end of the process and when the next one may start."""
        assert self.process is not None
        code = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        longest_s = LONGEST_WAIT_S if self.vital else EXTRA_WAIT_S
        self.wait_s = FIRST_WAIT_S if self.ready else min(longest_s, self.wait_s * 2)
        self.start_at = now + self.wait_s
        log.error(f"{self.name} ended, status {code}; started again in {self.wait_s:g} s", action="child_ended",
                  part=self.name, status=code)


class _Supervisor:
    def __init__(self, children: list[_Child], pulse: Pulse) -> None:
        self._children, self._pulse = children, pulse
        self._was_ready = False

    def reload(self) -> None:
        """Have the children read the configuration again."""
        for child in self._children:
            child.reload = True

    def watch(self, stop: threading.Event) -> None:
        """Keep the children running until `stop` is set."""
        self._pulse.expect("supervisor", SILENT_S)
        before = time.monotonic()
        while not stop.is_set():
            self._pulse.beat("supervisor")
            now = time.monotonic()
            if now - before > PAUSE_S:  # we stood still, perhaps the whole machine: the children may not have spoken
                for child in self._children:
                    child.silent_at += now - before
            before = now
            for child in self._children:
                if child.process is not None and child.process.poll() is not None:
                    child.reap(now)
                if child.process is None and now >= child.start_at:
                    self._start(child)
                if child.process is not None:
                    child.look(now)
            self._listen()
            if not self._was_ready and all(child.ready for child in self._children if child.vital):
                self._was_ready = True
                _say_ready()

    def _start(self, child: _Child) -> None:
        if child.vital and not self._was_ready and child.starts >= FIRST_STARTS:
            raise NodeError(f"{child.name} ended {child.starts} times before the node was ready; its messages above "
                            "say why. Remedy: `dicomnode check`.")
        try:
            child.start()
        except OSError as error:
            if child.vital:
                raise
            child.start_at = time.monotonic() + EXTRA_WAIT_S
            log.error(f"{child.name} cannot be started: {error}", action="child_not_started", part=child.name)

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
    """Tells whoever watches us that we live, as long as all threads get on: systemd where WatchdogSec= asks for it, and
    the supervisor by a line on standard output every `alive_s` seconds; 0: there is none."""

    def __init__(self, pulse: Pulse, *, alive_s: float = 0.0) -> None:
        self._pulse, self._alive_s = pulse, alive_s
        self._over = threading.Event()
        self._silent: frozenset[str] = frozenset()

    def __enter__(self) -> None:
        waits = [wait for wait in (watchdog_interval_s(), self._alive_s) if wait]
        if waits:
            threading.Thread(target=self._watch, args=(min(waits),), name="watchdog", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self, interval_s: float) -> None:
        while True:
            self._tell()
            if self._over.wait(interval_s):
                return

    def _tell(self) -> None:
        late = self._pulse.late()
        for name in late.keys() - self._silent:
            log.error(f"{name} does not get on: this process asks to be started again", action="thread_hangs",
                      thread=name, silent_s=round(late[name]))
        self._silent = frozenset(late)
        if late:
            return
        notify("WATCHDOG=1")
        if self._alive_s:
            with contextlib.suppress(OSError):  # the supervisor is gone, and the kernel is about to end us
                os.write(1, f"{ALIVE}\n".encode())
