"""Messages to people by apprise: mail, Teams, Slack, webhooks ... Each is handed over by a process of its own.

A service that hangs is killed with its process and blocks nobody. The addresses hold secrets: they are read from
alerts.urls_file at each use and named by their line only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicomnode.errors import ConfigError
from dicomnode.secretfiles import read_secret

__all__ = ["Outcome", "Sender", "main", "read_urls"]

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """What became of a message: lines of urls_file that took it, that did not, and why none could be tried."""

    sent: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether anybody was told."""
        return bool(self.sent)

    @property
    def text(self) -> str:
        if self.error:
            return self.error
        told = f"{len(self.sent)} of {len(self.sent) + len(self.failed)} addresses took the message"
        return told + (f"; not those in line {', '.join(map(str, self.failed))} of alerts.urls_file" if self.failed
                       else "")


def read_urls(path: Path) -> dict[int, str]:
    """Line number -> apprise URL; empty lines and those that begin with # are left out.

    Raises ConfigError where the file cannot be read, is empty, or may be read by others: the URLs hold passwords.
    """
    lines = read_secret(path, what="alerts.urls_file").splitlines()
    found = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
    if not found:
        raise ConfigError(f"alerts.urls_file {path} holds no URL. Remedy: one apprise URL a line, e.g. mailto://...")
    return found


class Sender:
    """Hands messages over one at a time; never waits. `clock` is monotonic, seconds."""

    def __init__(self, urls_file: Path, *, timeout_s: float = TIMEOUT_S,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._urls_file, self._timeout_s, self._clock = urls_file, timeout_s, clock
        self._child: subprocess.Popen[str] | None = None
        self._until = 0.0

    def start(self, title: str, body: str) -> None:
        """Begin to hand over a message; `poll` tells what became of it. Raises RuntimeError while one is under way."""
        if self._child is not None:
            raise RuntimeError("a message is under way")
        self._child = subprocess.Popen([sys.executable, "-m", "dicomnode.notify"], text=True, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        self._until = self._clock() + self._timeout_s
        assert self._child.stdin is not None
        try:
            # At most 20 short lines: less than a pipe holds, so that this never waits for the reader.
            self._child.stdin.write(json.dumps({"title": title, "body": body, "urls_file": str(self._urls_file)}))
            self._child.stdin.close()
        except BrokenPipeError:
            pass  # it ended already; poll says so

    def poll(self) -> Outcome | None:
        """What became of the message; None while it is under way. Kills what takes longer than `timeout_s`."""
        if self._child is None:
            return Outcome(error="no message was handed over")
        if self._child.poll() is None and self._clock() < self._until:
            return None
        hung = self._child.poll() is None
        said = self._end()
        if hung:
            return Outcome(error=f"no answer within {self._timeout_s:g} s; given up. Remedy: dicomnode alert --test")
        try:
            answer = json.loads(said)
            return Outcome(tuple(answer["sent"]), tuple(answer["failed"]), answer["error"])
        except (ValueError, KeyError, TypeError):
            return Outcome(error="the notifying process ended without an answer. Remedy: dicomnode alert --test")

    def wait(self, title: str, body: str) -> Outcome:
        """Hand a message over and wait for what becomes of it, at most `timeout_s`."""
        self.start(title, body)
        while (outcome := self.poll()) is None:
            time.sleep(0.05)
        return outcome

    def close(self) -> None:
        """Give up what is under way."""
        self._end()

    def _end(self) -> str:
        if self._child is None:
            return ""
        child, self._child = self._child, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what it started: that would keep our end of the pipe open
        assert child.stdout is not None
        with child.stdout:
            said = child.stdout.read()
        child.wait()
        return said


def main() -> None:
    """The process of one message: JSON in by standard input, JSON out."""
    message = json.load(sys.stdin)
    try:
        answer = _notify(message["title"], message["body"], read_urls(Path(message["urls_file"])))
    except ConfigError as error:
        answer = {"sent": [], "failed": [], "error": str(error)}
    json.dump(answer, sys.stdout)


def _notify(title: str, body: str, urls: dict[int, str]) -> dict[str, Any]:
    """Each address by itself, so that one that fails is known by its line and takes no other with it."""
    import apprise

    answer: dict[str, Any] = {"sent": [], "failed": [], "error": ""}
    for line, url in urls.items():
        service = apprise.Apprise()
        told = service.add(url) and service.notify(title=title, body=body, body_format=apprise.NotifyFormat.TEXT)
        answer["sent" if told else "failed"].append(line)
    return answer


if __name__ == "__main__":
    main()
