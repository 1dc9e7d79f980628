"""Who was refused, and how often: every refusal is a line of history; who guesses tokens has to wait.

The history is kept for ever, so an address that is refused again and again is written down RECORDED times in WINDOW_S
and not once for each request, and all addresses together IN_ALL times: who has many (IPv6) fills no disk either.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable

from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger

__all__ = ["ATTEMPTS", "IN_ALL", "RECORDED", "WINDOW_S", "Refusals"]

WINDOW_S = 600.0
ATTEMPTS = 10   # wrong tokens of one address within WINDOW_S; then none is looked at
RECORDED = 20   # refusals of one address within WINDOW_S that the history shows
IN_ALL = 1000   # refusals of all addresses within WINDOW_S that the history shows
ADDRESSES = 10_000  # remembered at once

log = get_logger(__name__)


class Refusals:
    """Counts by address. Safe for threads."""

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float]) -> None:
        self._ledger, self._clock = ledger, clock
        self._lock = threading.Lock()
        self._wrong: dict[str, list[float]] = {}
        self._recorded: dict[str, list[float]] = {}
        self._all: list[float] = []

    def wait_s(self, address: str) -> float:
        """Seconds until a token from there is looked at again; 0: now."""
        with self._lock:
            times = self._recent(self._wrong, address)
            return max(0.0, times[-ATTEMPTS] + WINDOW_S - self._clock()) if len(times) >= ATTEMPTS else 0.0

    def record(self, address: str, code: str, reason: str, *, wrong_token: bool = False) -> None:
        """Write a refusal into the history and the log; `wrong_token`: it counts against the address."""
        with self._lock:
            now = self._clock()
            if wrong_token:
                self._add(self._wrong, address)
            times = self._add(self._recorded, address)
            if len(times) > RECORDED:
                return
            if len(times) == RECORDED:
                reason += f"; no more refusals of {address} are written down for {WINDOW_S / 60:.0f} minutes"
            self._all = [*(at for at in self._all if at > now - WINDOW_S), now][-(IN_ALL + 1):]
            if len(self._all) > IN_ALL:
                return
            if len(self._all) == IN_ALL:
                reason += "; refusals of too many addresses: those that follow are not written down for a while"
        log.warning("a request was refused", action="web_refused", address=address, code=code, reason=reason)
        try:
            self._ledger.event("security", now=now, code=code, reason=reason, actor=address)
        except sqlite3.Error as error:  # a full disk must not turn a refusal into something else
            log.error("an event could not be written to the ledger", action="event_lost", error=str(error))

    def _recent(self, of: dict[str, list[float]], address: str) -> list[float]:
        since = self._clock() - WINDOW_S
        return [at for at in of.get(address, []) if at > since]

    def _add(self, to: dict[str, list[float]], address: str) -> list[float]:
        times = [*self._recent(to, address), self._clock()][-(RECORDED + 1):]
        to.pop(address, None)
        to[address] = times
        if len(to) > ADDRESSES:
            del to[next(iter(to))]  # the one that was quiet for longest
        return times
