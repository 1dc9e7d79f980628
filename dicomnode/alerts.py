"""Who is told, when, and how often: what is wrong is said once, again after repeat_h, and once that it is over.

Everything goes to the log too. Messages are bundled: at most MESSAGES_AN_HOUR, however much breaks at once. The table
`alert` holds one row for each thing that is wrong until it is over and that was said; `memo` what a restart must not
forget.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol
from zoneinfo import ZoneInfo

from dicomnode import digest, machine
from dicomnode.config import Config
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.memo import memo, set_memo
from dicomnode.notify import Outcome, Sender
from dicomnode.spool import Spool
from dicomnode.troubles import Machine, Trouble, find

__all__ = ["ALERT_S", "Alerter", "Notifier", "compose", "starts"]

ALERT_S = 20.0  # how often a worker ticks it
MESSAGES_AN_HOUR = 6
BURST, BURST_S = 3, 600.0  # not all of them at once: something is left for what comes later in the hour
LINES = 20
FIRST_RETRY_S, LONGEST_RETRY_S = 60.0, 3600.0
TOUCH_S = 600.0  # last_at of a row that is otherwise unchanged: not a write at every tick
AHEAD_S = 60.0   # a time further ahead than this was stamped by a clock that was wrong
STARTS = "node.starts"
RUNNING = "node.running"
SENT = "alerts.sent"
DIGEST = "alerts.digest"

log = get_logger(__name__)


class Notifier(Protocol):
    """notify.Sender, or a test's stand-in."""

    def start(self, title: str, body: str) -> None: ...

    def poll(self) -> Outcome | None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Message:
    """What is under way: the rows it speaks of, or a digest of that day."""

    rows: tuple[Mapping[str, Any], ...] = ()
    digest_of: str = ""


class Alerter:
    """Made once by the worker, ticked by its scheduler.

    `notifier` None: made from alerts.urls_file where that is set; otherwise the log is the only one told.
    """

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, *, clock: Callable[[], float] = time.time,
                 notifier: Notifier | None = None) -> None:
        self._config, self._ledger, self._spool, self._clock = config, ledger, spool, clock
        urls_file = config.alerts.urls_file
        self._notifier: Notifier | None = notifier or (Sender(urls_file) if urls_file is not None else None)
        self._under_way: _Message | None = None
        self._retry_s, self._not_before = 0.0, float("-inf")
        self._cried_at = float("-inf")
        self._logged: dict[str, float | None] = {}
        self._failing: dict[str, float] = {}
        self._lock, self._ticking = threading.Lock(), threading.Lock()
        self._last_tick = _newest_event(ledger)  # a clock set back while the node was off is noticed, too
        self._starts, self._died = self._started(clock())

    def tick(self) -> None:
        """Look, write down, say what is due. Never waits for anybody.

        Raises sqlite3.Error where the ledger fails, as on a full disk; that is said all the same.
        """
        with self._ticking:
            self._guarded_tick(self._clock())

    def _guarded_tick(self, now: float) -> None:
        try:
            self._tick(now)
        except sqlite3.Error as error:
            self._hear(now)
            self._cry(f"PROBLEM: the ledger fails: {error}. Remedy: look at disk and file system; dicomnode check", now)
            raise

    def _tick(self, now: float) -> None:
        troubles = {trouble.key: trouble for trouble in find(self._ledger, self._config, self._machine(now), now=now)}
        self._write_down(troubles, now)
        self._hear(now)
        if self._under_way is None and not self._pausing(now):
            self._say(troubles, now)

    def _pausing(self, now: float) -> bool:
        return now < self._not_before <= now + LONGEST_RETRY_S

    @contextmanager
    def watching(self, name: str) -> Iterator[None]:
        """Around a tick of the worker: one that fails at every turn for minutes is worth a message."""
        try:
            yield
        except Exception:
            with self._lock:
                self._failing.setdefault(name, self._clock())
            raise
        with self._lock:
            self._failing.pop(name, None)

    def reconfigure(self, config: Config) -> None:
        """Go on under another configuration; what was said stays said. Call between ticks or beside them."""
        with self._ticking:
            if config.alerts.urls_file != self._config.alerts.urls_file:
                if self._notifier is not None:
                    self._notifier.close()
                self._under_way = None
                self._notifier = Sender(config.alerts.urls_file) if config.alerts.urls_file is not None else None
            self._config = config

    def close(self, *, clean: bool = True) -> None:
        """A message under way is given up, and said again after the next start.

        clean   the worker ends because it was told to: the next one does not report that it died.
        """
        with self._ticking:
            if self._notifier is not None:
                self._notifier.close()
            if clean:
                try:
                    set_memo(self._ledger, RUNNING, "")
                except sqlite3.Error as error:  # the next start will then report a worker that died: no harm
                    log.warning("the end of the worker could not be written down", action="end_unwritten",
                                error=str(error))

    # --- what is there

    def _started(self, now: float) -> tuple[tuple[float, ...], bool]:
        """The last starts, this one among them, and whether the worker before died."""
        try:
            return self._write_start(now)
        except sqlite3.Error as error:  # a full disk must not keep the one from working who would tell of it
            log.warning("the start of the worker could not be written down", action="start_unwritten", error=str(error))
            return (now,), False

    def _write_start(self, now: float) -> tuple[tuple[float, ...], bool]:
        with self._ledger.transaction():
            died = memo(self._ledger, RUNNING) == "yes"
            times = (*(at for at in starts(self._ledger)[-19:] if at <= now + AHEAD_S), now)
            set_memo(self._ledger, STARTS, json.dumps(times))
            set_memo(self._ledger, RUNNING, "yes")
            self._ledger.event("node", now=now, code="started",
                               reason="after an end that nobody asked for" if died else "")
        return times, died

    def _machine(self, now: float) -> Machine:
        back_s = 0.0 if self._last_tick is None else self._last_tick - now
        died, self._died, self._last_tick = self._died, False, now
        with self._lock:
            failing = dict(self._failing)
        return replace(machine.look(self._config, self._spool, now=now), failing=failing, clock_back_s=back_s,
                       starts=self._starts, died=died)

    # --- the table

    def _write_down(self, troubles: Mapping[str, Trouble], now: float) -> None:
        """Bring the table to what is wrong now; a transaction only where something changed."""
        rows = {row["key"]: row for row in self._ledger.query("SELECT * FROM alert")}
        fresh = [trouble for key, trouble in troubles.items() if key not in rows]
        changed = [(trouble, rows[key]) for key, trouble in troubles.items() if key in rows and (
            rows[key]["resolved_at"] is not None or rows[key]["level"] != trouble.level
            or abs(now - rows[key]["last_at"]) > TOUCH_S)]
        over = [row for key, row in rows.items()
                if key not in troubles and row["resolved_at"] is None and not key.startswith("once:")]
        if not (fresh or changed or over):
            return
        with self._ledger.transaction() as db:
            for trouble in fresh:
                db.execute("INSERT INTO alert (key, level, text, first_at, last_at) VALUES (?, ?, ?, ?, ?)",
                           (trouble.key, trouble.level, trouble.text, now, now))
            for trouble, row in changed:
                # Back before anybody was told that it was over, or worse than it was: the row goes on.
                sent_at = None if (row["level"], trouble.level) == ("warning", "problem") else row["sent_at"]
                db.execute("UPDATE alert SET level = ?, text = ?, last_at = ?, sent_at = ?, resolved_at = NULL "
                           "WHERE key = ?", (trouble.level, trouble.text, now, sent_at, trouble.key))
            for row in over:
                if row["sent_at"] is None:
                    db.execute("DELETE FROM alert WHERE key = ?", (row["key"],))
                else:
                    db.execute("UPDATE alert SET resolved_at = ? WHERE key = ?", (now, row["key"]))

    def _due(self, troubles: Mapping[str, Trouble], now: float) -> list[Mapping[str, Any]]:
        """Rows to speak of now: new and lasting, unchanged for repeat_h, or over."""
        found: list[Mapping[str, Any]] = []
        for row in map(dict, self._ledger.query("SELECT * FROM alert ORDER BY level, first_at, key")):
            trouble = troubles.get(row["key"])
            lasted = now - row["first_at"]
            if row["resolved_at"] is not None:
                found.append(row)
            elif row["sent_at"] is None:
                if trouble is None or lasted >= trouble.grace_s or lasted < -AHEAD_S:
                    found.append(row)
            elif now - row["sent_at"] >= self._config.alerts.repeat_h * 3600 or row["sent_at"] > now + AHEAD_S:
                found.append(row)
        return found

    # --- saying

    def _cry(self, text: str, now: float) -> None:
        """Say what cannot be written down, kept in mind in this process alone."""
        if self._notifier is not None and self._under_way is None and not self._pausing(now) and (
                not 0 <= now - self._cried_at < self._config.alerts.repeat_h * 3600):
            self._cried_at = now
            self._begin(_Message(), f"dicomnode {self._config.node.ae_title}: the ledger fails", text, now)

    def _say(self, troubles: Mapping[str, Trouble], now: float) -> None:
        due = self._due(troubles, now)
        for row in due:
            self._log(row)
        if due and self._may_send(now):
            self._send(_Message(rows=tuple(due)), *compose(self._config.node.ae_title, due), now=now)
        elif self._config.alerts.digest:
            self._digest(now)

    def _log(self, row: Mapping[str, Any]) -> None:
        """Once for each time it is due, whether or not the message can be handed over."""
        if row["key"] in self._logged and self._logged[row["key"]] == row["sent_at"] and row["resolved_at"] is None:
            return
        if row["resolved_at"] is not None:
            self._logged.pop(row["key"], None)
            return
        self._logged[row["key"]] = row["sent_at"]
        (log.error if row["level"] == "problem" else log.warning)(row["text"], action="alert", key=row["key"])

    def _digest(self, now: float) -> None:
        zone = ZoneInfo(self._config.schedule.timezone)
        day = digest.due(memo(self._ledger, DIGEST), now=now, at=self._config.alerts.digest_at, zone=zone)
        if day is None:
            return
        if not memo(self._ledger, DIGEST):  # the first start: there is no day to look back on
            set_memo(self._ledger, DIGEST, day)
            return
        text = digest.text(self._ledger, self._config, now=now, free_bytes=self._spool.free_bytes(), day=day)
        until = datetime.fromtimestamp(now, zone).strftime("%Y-%m-%d %H:%M")
        title = f"dicomnode {self._config.node.ae_title}: the day until {until}"
        self._send(_Message(digest_of=day), title, text, now=now)

    def _may_send(self, now: float) -> bool:
        times = self._sent_lately(now)
        burst = [at for at in times if at > now - BURST_S]
        return self._notifier is None or (len(times) < MESSAGES_AN_HOUR and len(burst) < BURST)

    def _sent_lately(self, now: float) -> list[float]:
        """When messages were begun within the last hour; the digest does not count."""
        return [at for at in json.loads(memo(self._ledger, SENT) or "[]") if now - 3600 < at <= now + AHEAD_S]

    def _send(self, message: _Message, title: str, body: str, *, now: float) -> None:
        if message.digest_of:
            log.info(body, action="digest", title=title)
        if self._notifier is None:
            self._told(message, now)
            return
        if message.rows:
            set_memo(self._ledger, SENT, json.dumps([*self._sent_lately(now), now]))
        self._begin(message, title, body, now)

    def _begin(self, message: _Message, title: str, body: str, now: float) -> None:
        assert self._notifier is not None
        self._under_way = message
        try:
            self._notifier.start(title, body)
        except OSError as error:
            self._failed(f"the notifying process cannot be started: {error}", now)

    def _hear(self, now: float) -> None:
        if self._under_way is None or self._notifier is None:
            return
        outcome = self._notifier.poll()
        if outcome is None:
            return
        if not outcome.ok:
            self._failed(outcome.text, now)
            return
        if outcome.failed:
            log.warning(f"an alert did not reach everybody: {outcome.text}", action="alert_partly")
        self._told(self._under_way, now)

    def _failed(self, why: str, now: float) -> None:
        self._under_way = None
        self._retry_s = min(max(FIRST_RETRY_S, 2 * self._retry_s), LONGEST_RETRY_S)
        self._not_before = now + self._retry_s
        log.error(f"nobody could be told: {why}; tried again in {self._retry_s:.0f} s", action="alert_failed")

    def _told(self, message: _Message, now: float) -> None:
        """Somebody knows: rows that are over go, the others wait for their repetition."""
        self._under_way, self._retry_s, self._not_before = None, 0.0, float("-inf")
        if not (message.rows or message.digest_of):
            return
        with self._ledger.transaction() as db:
            if message.digest_of:
                set_memo(self._ledger, DIGEST, message.digest_of)
                self._ledger.event("node", now=now, code="digest", reason=message.digest_of)
            for row in message.rows:
                over = row["resolved_at"] is not None
                if over or row["key"].startswith("once:"):
                    # What came back while it was being said stays, and is said anew.
                    db.execute("DELETE FROM alert WHERE key = ? AND (resolved_at IS NOT NULL OR ?)",
                               (row["key"], not over))
                    db.execute("UPDATE alert SET sent_at = NULL WHERE key = ?", (row["key"],))
                else:
                    db.execute("UPDATE alert SET sent_at = ? WHERE key = ?", (now, row["key"]))
                self._ledger.event("node", now=now, code="alert-resolved" if over else "alert", reason=row["text"])


def compose(ae_title: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Title and text of one message on those rows of the table; at most LINES of them are spelled out."""
    over = [row for row in rows if row["resolved_at"] is not None]
    wrong = [row for row in rows if row["resolved_at"] is None]
    wrong.sort(key=lambda row: row["level"] != "problem")
    counted = [f"{len(some)} {what}{'s' if len(some) > 1 and what != 'resolved' else ''}" for what, some in (
        ("problem", [row for row in wrong if row["level"] == "problem"]),
        ("warning", [row for row in wrong if row["level"] == "warning"]), ("resolved", over)) if some]
    lines = [f"{'STILL ' if row['sent_at'] is not None else ''}{row['level'].upper()}: {row['text']}" for row in wrong]
    lines += [f"RESOLVED: {row['text'].partition('. Remedy')[0]}" for row in over]
    if len(lines) > LINES:
        lines = [*lines[:LINES], f"... and {len(lines) - LINES} more: dicomnode alert"]
    return f"dicomnode {ae_title}: {', '.join(counted)}", "\n".join(lines)


def starts(ledger: Ledger) -> tuple[float, ...]:
    """When the worker started, the last times, seconds since 1970."""
    return tuple(json.loads(memo(ledger, STARTS) or "[]"))


def _newest_event(ledger: Ledger) -> float | None:
    """When the newest event was written, by the clock of then."""
    rows = ledger.query("SELECT at FROM event ORDER BY id DESC LIMIT 1")
    return float(rows[0]["at"]) if rows else None
