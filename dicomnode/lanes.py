"""A lane for each peer: what is due to one peer is done in a thread of its own, so that no peer waits for another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from pynetdicom.association import Association

from dicomnode.errors import NodeError
from dicomnode.logs import get_logger

__all__ = ["STUCK_S", "Lanes"]

STUCK_S = 900.0  # a lane that did not get on for so long; far beyond what a slow peer or disk takes
log = get_logger(__name__)
Row = dict[str, Any]


class Lanes:
    """Calls `work(row)` for one row of a peer after the other; a peer that is still busy gets no second thread.

    What `work` raises is handed to `failed(row, error)`: one row must not end the lane for the others.
    """

    def __init__(self, name: str, work: Callable[[Row], None], failed: Callable[[Row, Exception], None], *,
                 monotonic: Callable[[], float] = time.monotonic) -> None:
        self._name, self._work, self._failed, self._monotonic = name, work, failed, monotonic
        self._moved: dict[str, float] = {}
        self.stop = threading.Event()
        self.threads: dict[str, threading.Thread] = {}
        self.open: dict[str, Association] = {}

    def start(self, rows: Iterable[Row]) -> None:
        """Start a thread for every peer (column `peer`) with rows and none running. Returns at once.

        Raises NodeError, once all are started, where a lane hangs: whoever ticks tells of it.
        """
        due: dict[str, list[Row]] = {}
        for row in rows:
            due.setdefault(row["peer"], []).append(row)
        for peer, its in due.items():
            running = self.threads.get(peer)
            if not self.stop.is_set() and (running is None or not running.is_alive()):
                self.moves(peer)
                self.threads[peer] = threading.Thread(target=self._run, args=(its,), name=f"{self._name}-{peer}",
                                                      daemon=True)
                self.threads[peer].start()
        stuck = [peer for peer, thread in self.threads.items()
                 if thread.is_alive() and self._monotonic() - self._moved[peer] > STUCK_S]
        if stuck:
            raise NodeError(f"{self._name} of {', '.join(stuck)} did not get on for {STUCK_S / 60:.0f} minutes. "
                            "Remedy: look at disk and peer, then restart dicomnode-work")

    def moves(self, peer: str) -> None:
        """The lane of that peer gets on."""
        self._moved[peer] = self._monotonic()

    def close(self, timeout_s: float) -> None:
        """Stop after what is on its way; a peer that does not answer in time is aborted."""
        self.stop.set()
        self.join(timeout_s)
        for peer, thread in self.threads.items():
            if thread.is_alive() and peer in self.open:
                self.open[peer].abort()

    def join(self, timeout_s: float) -> None:
        """Wait for what was started."""
        until = time.monotonic() + timeout_s
        for thread in self.threads.values():
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self, rows: list[Row]) -> None:
        for row in rows:
            if self.stop.is_set():
                return
            self.moves(row["peer"])
            try:
                self._work(row)
            except Exception as error:
                if self.stop.is_set():
                    return  # the ledger is being closed; what was not recorded is done again
                log.exception(f"{self._name} failed unexpectedly", action=f"{self._name}_error", row=row["id"],
                              peer=row["peer"])
                self._failed(row, error)
