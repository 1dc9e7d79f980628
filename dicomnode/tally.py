"""What the history adds up to: counts and durations since the ledger began, for counters that never fall.

Both tallies read the ledger once, in portions, and from then on only what is new. They are kept in table memo, so that
the process that counts may be started again without reading the history of years anew. Since they are sums over rows
that nobody removes, they are the same whoever counts and however often it was started. A ledger that was rebuilt is
counted anew: a counter that falls is read as a restart by Prometheus.

Labels come from states, codes and the configuration, never from an object: modality is cut down to those that are
known, callers to those that are configured, and of anything else at most LABELS different ones are told apart.
"""

from __future__ import annotations

import bisect
import json
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.memo import memo, set_memo

__all__ = ["BUCKETS_S", "History", "NODE_EVENTS", "OTHER", "Received", "Reception", "Spread", "Tally"]

VERSION = 1
EVENTS_MEMO, RECEPTION_MEMO = "measures.events", "measures.reception"
PORTION = 20_000       # events or instances read under one lock of the ledger
PATIENCE_S = 2.0       # one look lasts no longer; the next goes on
SAVED_EVENTS = 2000    # so many new events are worth a write
SETTLED_S = 300.0      # an object that came so long ago has been committed
SAVED_S = 3600.0
LABELS = 100
OTHER = "other"
#: Upper ends of the histograms' buckets, seconds; the last is open.
BUCKETS_S = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0, 86400.0)
MODALITIES = frozenset({"PT", "CT", "NM", "MR", "SR", "SC", "SEG", "REG", "RTSTRUCT", "OT", "PR", "KO"})

NODE_EVENTS = ("started", "worker-started", "worker-gone", "repaired")

Labels = tuple[str, ...]
Counts = dict[str, dict[Labels, float]]

log = get_logger(__name__)


@dataclass
class Spread:
    """A histogram: how many values fell into each bucket of BUCKETS_S (and above the last), and their sum, seconds."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    sum: float = 0.0

    def add(self, seconds: float) -> None:
        self.buckets[bisect.bisect_left(BUCKETS_S, seconds)] += 1
        self.sum += seconds


@dataclass
class History:
    """What the events up to `mark` add up to.

    counts     name -> labels -> how often (what the labels are: see COUNTS).
    last       peer -> when a delivery to it last succeeded, seconds since 1970.
    durations  (method, preset, device) -> seconds from the start of a job's last run to its result.
    waits      (route,) -> seconds from queued to the first start.
    """

    mark: int = 0
    counts: Counts = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    durations: dict[Labels, Spread] = field(default_factory=dict)
    waits: dict[Labels, Spread] = field(default_factory=dict)

    def count(self, name: str) -> dict[Labels, float]:
        return self.counts.setdefault(name, {})


#: name -> rows of (labels ..., how often) among the events after :mark up to :top.
COUNTS = {
    "job_changes": """SELECT job.route, e.to_state, count(*) FROM event e JOIN job ON job.id = e.job_id
        WHERE e.id > :mark AND e.id <= :top AND e.kind = 'job' AND e.from_state != e.to_state
        GROUP BY job.route, e.to_state""",
    "failures": """SELECT e.code, count(*) FROM event e WHERE e.id > :mark AND e.id <= :top
        AND e.kind = 'job' AND e.to_state = 'failed' GROUP BY e.code""",
    "holds": """SELECT e.kind, e.code, count(*) FROM event e WHERE e.id > :mark AND e.id <= :top
        AND e.kind IN ('job', 'series') AND e.to_state = 'held' AND e.from_state != 'held' GROUP BY e.kind, e.code""",
    "series": """SELECT coalesce(series.modality, ''), count(*) FROM event e LEFT JOIN series USING (series_uid)
        WHERE e.id > :mark AND e.id <= :top AND e.kind = 'series' AND e.from_state = '' AND e.to_state = 'receiving'
        GROUP BY 1""",
    "deliveries": """SELECT e.code, e.to_state, count(*) FROM event e WHERE e.id > :mark AND e.id <= :top
        AND e.kind = 'delivery' AND e.from_state != e.to_state AND e.to_state IN ('delivered', 'committed', 'dead')
        GROUP BY e.code, e.to_state""",
    "sent": """SELECT e.code, sum(coalesce(job.derived_instances, 0)) FROM event e JOIN job ON job.id = e.job_id
        WHERE e.id > :mark AND e.id <= :top AND e.kind = 'delivery' AND e.from_state = 'waiting'
        AND e.to_state = 'delivered' GROUP BY e.code""",
    "purges": """SELECT e.kind, count(*) FROM event e WHERE e.id > :mark AND e.id <= :top
        AND e.kind IN ('series', 'job') AND e.code = 'purged' GROUP BY e.kind""",
    "node": f"""SELECT e.code, count(*) FROM event e WHERE e.id > :mark AND e.id <= :top
        AND e.kind = 'node' AND e.code IN {NODE_EVENTS} GROUP BY e.code""",
}
_REFUSED = """SELECT e.kind, e.code, e.reason FROM event e
 WHERE e.id > :mark AND e.id <= :top AND e.kind IN ('reception', 'security')"""
#: The security log writes one line for many of a kind and says with the next how many it left out (gate.SecurityLog).
_LEFT_OUT = re.compile(r"\((\d+) more of these since the last note\)$")
_LAST = """SELECT e.code, max(e.at) AS at FROM event e WHERE e.id > :mark AND e.id <= :top AND e.kind = 'delivery'
   AND e.from_state != e.to_state AND e.to_state IN ('delivered', 'committed') GROUP BY e.code"""
_DURATIONS = """SELECT job.method, job.preset,
       coalesce(CASE WHEN json_valid(job.report) THEN json_extract(job.report, '$.device') END, job.device, '')
       AS device,
       e.at - (SELECT max(r.at) FROM event r WHERE r.job_id = e.job_id AND r.to_state = 'running' AND r.id < e.id)
       AS seconds
  FROM event e JOIN job ON job.id = e.job_id
 WHERE e.id > :mark AND e.id <= :top AND e.kind = 'job' AND e.from_state = 'running' AND e.to_state = 'built'"""
_WAITS = """SELECT job.route, e.at - (SELECT min(q.at) FROM event q WHERE q.job_id = e.job_id
       AND q.to_state = 'queued' AND q.from_state = '') AS seconds
  FROM event e JOIN job ON job.id = e.job_id
 WHERE e.id > :mark AND e.id <= :top AND e.kind = 'job' AND e.from_state = 'queued' AND e.to_state = 'running'
   AND NOT EXISTS (SELECT 1 FROM event r WHERE r.job_id = e.job_id AND r.to_state = 'running' AND r.id < e.id)"""


class Tally:
    """Adds up the events of a ledger. Threads may share it."""

    def __init__(self, *, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._lock = threading.Lock()
        self._history: History | None = None
        self._saved_mark = 0

    def look(self, ledger: Ledger) -> History | None:
        """The history up to now; None while there is more to read than one look may take. Raises sqlite3.Error."""
        with self._lock:
            history = self._history or _load(memo(ledger, EVENTS_MEMO))
            top = int(ledger.query("SELECT coalesce(max(id), 0) AS id FROM event")[0]["id"])
            if history.mark > top:  # another ledger than the one that was counted
                history = History()
            until = self._timer() + PATIENCE_S
            while history.mark < top:
                _add(ledger, history, min(top, history.mark + PORTION))
                if self._timer() > until:
                    break
            self._history = history
            if abs(history.mark - self._saved_mark) >= SAVED_EVENTS:
                self._saved_mark = history.mark
                _save(ledger, EVENTS_MEMO, _dump(history))
            return history if history.mark == top else None


def _add(ledger: Ledger, history: History, top: int) -> None:
    """Count the events after history.mark up to `top`."""
    span = {"mark": history.mark, "top": top}
    for name, sql in COUNTS.items():
        counted = history.count(name)
        for row in ledger.query(sql, span):
            labels = tuple(str(value) for value in row[:-1])
            _increase(counted, (_modality(labels[0]),) if name == "series" else labels, row[-1])
    for row in ledger.query(_REFUSED, span):
        more = _LEFT_OUT.search(row["reason"])
        _increase(history.count("refusals"), (row["kind"], row["code"]), 1 + (int(more[1]) if more else 0))
    for row in ledger.query(_LAST, span):
        if row["code"] in history.last or len(history.last) < LABELS:
            history.last[row["code"]] = max(row["at"], history.last.get(row["code"], 0.0))
    for row in ledger.query(_DURATIONS, span):
        if row["seconds"] is not None:
            device = str(row["device"]).partition(":")[0]
            _spread(history.durations, (row["method"], row["preset"], device)).add(max(0.0, row["seconds"]))
    for row in ledger.query(_WAITS, span):
        if row["seconds"] is not None:
            _spread(history.waits, (row["route"],)).add(max(0.0, row["seconds"]))
    history.mark = top


def _bounded(known: Collection[Labels], labels: Labels) -> Labels:
    return labels if labels in known or len(known) < LABELS else (OTHER,) * len(labels)


def _increase(counted: dict[Labels, float], labels: Labels, by: float) -> None:
    labels = _bounded(counted, labels)
    counted[labels] = counted.get(labels, 0) + by


def _spread(spreads: dict[Labels, Spread], labels: Labels) -> Spread:
    return spreads.setdefault(_bounded(spreads, labels), Spread())


def _modality(text: str) -> str:
    return text if text in MODALITIES else OTHER


# --- what is kept in memo


def _save(ledger: Ledger, key: str, text: str) -> None:
    try:
        set_memo(ledger, key, text)
    except sqlite3.Error as error:  # a full disk or a locked ledger: nothing is lost but time at the next start
        log.warning("the tally could not be kept; it is counted again at the next start", action="tally_unkept",
                    error=str(error))


def _dump(history: History) -> str:
    def spreads(some: dict[Labels, Spread]) -> list[Any]:
        return [[labels, one.buckets, one.sum] for labels, one in some.items()]

    return json.dumps({
        "version": VERSION, "buckets": BUCKETS_S, "mark": history.mark, "last": history.last,
        "counts": {name: list(counted.items()) for name, counted in history.counts.items()},
        "durations": spreads(history.durations), "waits": spreads(history.waits)})


def _load(text: str) -> History:
    """What _dump wrote; an empty history where there is none, or other software wrote it."""
    kept = json.loads(text) if text else {}
    if kept.get("version") != VERSION or tuple(kept["buckets"]) != BUCKETS_S:
        return History()

    def spreads(some: list[Any]) -> dict[Labels, Spread]:
        return {tuple(labels): Spread(buckets, total) for labels, buckets, total in some}

    return History(
        mark=kept["mark"], last=kept["last"],
        counts={name: {tuple(labels): value for labels, value in counted}
                for name, counted in kept["counts"].items()},
        durations=spreads(kept["durations"]), waits=spreads(kept["waits"]))


# --- reception


@dataclass
class Received:
    """From one caller: how many instances, how many bytes, and when the last came (seconds since 1970)."""

    instances: int = 0
    bytes: int = 0
    last_at: float = 0.0

    def add(self, instances: int, size: int, last_at: float) -> None:
        self.instances += instances
        self.bytes += size
        self.last_at = max(self.last_at, last_at)


_PORTION = """SELECT sop_instance_uid AS uid, calling_ae, bytes, received_at FROM instance
 WHERE sop_instance_uid > :after ORDER BY sop_instance_uid LIMIT :limit"""
#: An instance is never newer than its series' last_at; by state the index series_state finds those few.
_NEW = """SELECT i.calling_ae, count(*) AS n, sum(i.bytes) AS size, max(i.received_at) AS last_at
  FROM series s JOIN instance i ON i.series_uid = s.series_uid
 WHERE s.state IN ('receiving', 'waiting', 'complete', 'matched', 'held', 'ignored')
   AND s.last_at >= :begin AND i.received_at >= :begin AND i.received_at < :end GROUP BY i.calling_ae"""


class Reception:
    """Adds up the instances received, by calling AE title. Threads may share it.

    What came before a mark is counted once, what came after it at every look. An object that is stamped earlier than
    the mark and committed later (the clock was set back by more than five minutes) is left out.
    """

    def __init__(self, *, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._lock = threading.Lock()
        self._settled: dict[str, Received] = {}
        self._mark: float | None = None
        self._reading: tuple[float, str] | None = None  # the first count: the mark to be, and how far it got
        self._saved_at = 0.0

    def look(self, ledger: Ledger, *, now: float) -> dict[str, Received] | None:
        """Calling AE title -> what came from it; None while there is more to read than one look may take.

        Raises sqlite3.Error.
        """
        with self._lock:
            if self._mark is None and not self._begin(ledger, now):
                return None
            assert self._mark is not None
            if now - SETTLED_S - self._mark > SETTLED_S:
                _merge(self._settled, ledger, self._mark, now - SETTLED_S)
                self._mark = now - SETTLED_S
            if abs(now - self._saved_at) > SAVED_S:
                self._saved_at = now
                _save(ledger, RECEPTION_MEMO, json.dumps({"version": VERSION, "mark": self._mark, "settled": {
                    caller: vars(one) for caller, one in self._settled.items()}}))
            found = {caller: Received(**vars(one)) for caller, one in self._settled.items()}
            _merge(found, ledger, self._mark, float("inf"))
            return found

    def _begin(self, ledger: Ledger, now: float) -> bool:
        """Take up what was kept, or count all instances once; whether that is done."""
        text = memo(ledger, RECEPTION_MEMO) if self._reading is None else ""
        kept = json.loads(text) if text else {}
        if kept.get("version") == VERSION:
            self._settled = {caller: Received(**one) for caller, one in kept["settled"].items()}
            self._mark, self._saved_at = kept["mark"], now
            return True
        mark, after = self._reading or (now - SETTLED_S, "")
        until = self._timer() + PATIENCE_S
        for rows in _portions(ledger, after):
            for row in rows:
                if row["received_at"] < mark:
                    self._settled.setdefault(row["calling_ae"], Received()).add(1, row["bytes"], row["received_at"])
            after = rows[-1]["uid"]
            if self._timer() > until:
                self._reading = mark, after
                return False
        self._reading, self._mark = None, mark
        return True


def _portions(ledger: Ledger, after: str) -> Iterator[list[sqlite3.Row]]:
    while rows := ledger.query(_PORTION, {"after": after, "limit": PORTION}):
        yield rows
        after = rows[-1]["uid"]


def _merge(received: dict[str, Received], ledger: Ledger, begin: float, end: float) -> None:
    for row in ledger.query(_NEW, {"begin": begin, "end": end}):
        received.setdefault(row["calling_ae"], Received()).add(row["n"], row["size"], row["last_at"])
