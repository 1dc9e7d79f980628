"""A lane for each peer: what is due to one peer is done in a thread of its own, so that no peer waits for another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from pynetdicom.association import Association

from dicomnode.logs import get_logger

__all__ = ["Lanes"]

log = get_logger(__name__)
Row = dict[str, Any]


class Lanes:
    """Calls `work(row)` for one row of a peer after the other; a peer that is still busy gets no second thread.

    What `work` raises is handed to `failed(row, error)`: one row must not end the lane for the others.
    """

    def __init__(self, name: str, work: Callable[[Row], None], failed: Callable[[Row, Exception], None]) -> None:
        self._name, self._work, self._failed = name, work, failed
        self.stop = threading.Event()
        self.threads: dict[str, threading.Thread] = {}
        self.open: dict[str, Association] = {}

    def start(self, rows: Iterable[Row]) -> None:
        """Start a thread for every peer (column `peer`) with rows and none running. Returns at once."""
        due: dict[str, list[Row]] = {}
        for row in rows:
            due.setdefault(row["peer"], []).append(row)
        for peer, its in due.items():
            running = self.threads.get(peer)
            if not self.stop.is_set() and (running is None or not running.is_alive()):
                self.threads[peer] = threading.Thread(target=self._run, args=(its,), name=f"{self._name}-{peer}",
                                                      daemon=True)
                self.threads[peer].start()

    def close(self, timeout_s: float) -> None:
        """Stop after what is on its way; a peer that does not answer in time is aborted."""
        self.stop.set()
        until = time.monotonic() + timeout_s
        for peer, thread in self.threads.items():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive() and peer in self.open:
                self.open[peer].abort()

    def _run(self, rows: list[Row]) -> None:
        for row in rows:
            if self.stop.is_set():
                return
            try:
                self._work(row)
            except Exception as error:
                if self.stop.is_set():
                    return  # the ledger is being closed; what was not recorded is done again
                log.exception(f"{self._name} failed unexpectedly", action=f"{self._name}_error", delivery=row["id"])
                self._failed(row, error)
