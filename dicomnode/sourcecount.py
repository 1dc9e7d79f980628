"""How many instances of a series its source holds, asked for beside the matching: a source that is down delays no one.

`look` answers at once with what is known; questions are put by a thread per source. The answers lie in the ledger
(table source_series), so a restart asks nothing twice, and what the source has and we lack is fetched by the node's
rounds like anything else (dicomnode/nightly.py).
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from dicomnode.config import Config, Peer
from dicomnode.errors import NodeError, PeerRefused
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.query import Asking, Times
from dicomnode.sources import Sources, SourceSeries

__all__ = ["Look", "SourceCounts"]

ASKED_AGAIN_S = 60.0  # a count that does not agree is asked for again after so long, later less often
GIVEN_UP_S = 3600.0  # what could not be fetched is tried again after so long
PAUSE_S, PAUSE_MAX_S = 30.0, 600.0  # after a source did not answer

log = get_logger(__name__)


@dataclass(frozen=True)
class Look:
    """What is known now: `count`, or None with the `reason` why not; `again_at`: when to look again, unix seconds."""

    count: int | None
    reason: str
    again_at: float


@dataclass(frozen=True)
class _Question:
    study_uid: str
    series_uid: str
    modality: str
    accession_number: str
    route: str


class SourceCounts:
    """One for a matcher. poll_s: how soon an answer that is on its way is looked for."""

    def __init__(self, config: Config, ledger: Ledger, *, clock: Callable[[], float] = time.time,
                 poll_s: float = 2.0) -> None:
        self._ledger, self._clock, self._poll_s = ledger, clock, poll_s
        self._peers = {peer.name: peer for peer in config.peer}
        self._sources, self._times = Sources(ledger), Times.of(config)
        self._quiet_s = config.completeness.quiet_s
        self._lock = threading.Lock()
        self._waiting: dict[str, dict[str, _Question]] = {}  # source -> series UID -> question
        self._asking: set[str] = set()
        self._problems: dict[str, tuple[str, float, int]] = {}  # source -> reason, asked again at, failures
        self._refused: dict[tuple[str, str], tuple[str, float]] = {}  # source, series UID -> reason, asked again at

    def look(self, source: str, row: dict[str, object], *, route: str) -> Look:
        """The count of the series `row` (of table series) at `source`; a question is put where it is not known."""
        now, uid, last_at = self._clock(), str(row["series_uid"]), float(str(row["last_at"]))
        known = self._sources.row(source, uid)
        reason, pause = self._refused.get((source, uid)) or self._problems.get(source, ("", 0.0, 0))[:2]
        paused = bool(reason) and now < pause <= now + PAUSE_MAX_S
        if known and known["instances"] is not None and last_at + self._quiet_s <= known["last_seen_at"] <= now:
            count, here = int(known["instances"]), self._sources.here(uid)
            again = known["last_seen_at"] + max(ASKED_AGAIN_S, (now - last_at) / 10)
            if count != here and again <= now and paused:
                again = pause
            elif count != here and again <= now:
                self._ask(source, row, route)
            return Look(count, f"{source} holds {count}: {known['reason']}", max(again, now + self._poll_s))
        if paused:
            return Look(None, reason, pause)
        self._ask(source, row, route)
        return Look(None, reason or f"{source} is being asked how many instances it holds", now + self._poll_s)

    def _ask(self, source: str, row: dict[str, object], route: str) -> None:
        question = _Question(str(row["study_uid"]), str(row["series_uid"]), str(row["modality"]),
                             str(row["accession_number"]), route)
        with self._lock:
            self._waiting.setdefault(source, {})[question.series_uid] = question
            if source in self._asking:
                return
            self._asking.add(source)
        threading.Thread(target=self._run, args=(self._peers[source],), name=f"count-{source}", daemon=True).start()

    def _run(self, peer: Peer) -> None:
        """Answer questions until none is left, or the source fails: then those left are asked again when looked at."""
        try:
            with Asking(peer, self._times) as asking:
                while question := self._next(peer.name):
                    try:
                        self._answer(asking, question)
                    except PeerRefused as error:  # of this series alone
                        with self._lock:
                            again = self._clock() + PAUSE_MAX_S
                            self._refused[peer.name, question.series_uid] = (str(error), again)
        except sqlite3.ProgrammingError:
            return  # the ledger was closed: the node is ending
        except Exception as error:
            if not isinstance(error, NodeError):
                log.exception("a source cannot be asked for counts", action="count_error", peer=peer.name)
            with self._lock:
                failures = self._problems.get(peer.name, ("", 0.0, 0))[2] + 1
                pause = min(PAUSE_MAX_S, PAUSE_S * 2.0 ** min(failures - 1, 10))
                self._problems[peer.name] = (str(error), self._clock() + pause, failures)
                self._waiting.pop(peer.name, None)
                self._asking.discard(peer.name)

    def _next(self, source: str) -> _Question | None:
        with self._lock:
            waiting = self._waiting.get(source)
            if not waiting:
                self._asking.discard(source)
                return None
            return waiting.pop(next(iter(waiting)))

    def _answer(self, asking: Asking, question: _Question) -> None:
        """One question. Raises PeerUnreachable and PeerRefused."""
        source = asking.peer.name
        count, now = asking.count(question.study_uid, question.series_uid), self._clock()
        here, old = self._sources.here(question.series_uid), self._sources.row(source, question.series_uid)
        given_up = old is not None and old["state"] == "failed"
        self._sources.saw(
            SourceSeries(source, question.study_uid, question.series_uid, "", question.modality,
                         question.accession_number, count, True, f"route {question.route} goes by its count"),
            now=now, next_at=None if count <= here else now + GIVEN_UP_S if given_up else now)
        with self._lock:
            self._problems.pop(source, None)
            self._refused.pop((source, question.series_uid), None)
