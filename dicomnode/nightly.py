"""The node asks its sources: once a day what they hold of the last days, and at any time for what is missing here.

At schedule.retrieve_at every peer with query = true is asked by C-FIND for the PET series of the last days. What a
route would want and did not come is fetched by C-MOVE or C-GET with the CT series of its study, tried again with
growing pauses, and given up until the next night. Each peer has a thread while it has work: one that is down delays no
other, and one bad series delays none of its peer's. The states are in `dicomnode/sources.py`.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from pydicom.dataset import Dataset
from pynetdicom.association import Association

from dicomnode import digest, query, reconcile
from dicomnode.config import Config, Peer
from dicomnode.errors import NodeError, PeerRefused, PeerUnreachable
from dicomnode.fetching import Fetch, fetch
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.memo import memo, set_memo
from dicomnode.query import Asking, SeriesFound, StudyFound, Times, date_range
from dicomnode.sources import Sources, SourceSeries
from dicomnode.spool import Spool
from dicomnode.wanted import Verdict, judge, return_keys
from sop.pet import is_own_output

__all__ = ["NIGHTLY_S", "Nightly"]

NIGHTLY_S = 30.0  # how often tick is to be called
AWAIT_S = 120.0  # after a retrieval the last instances may still be on their way
RETRY_S, RETRY_MAX_S = 60.0, 3600.0
ATTEMPTS = 6  # retrievals of a series in one night: about an hour
FULL_ATTEMPTS = 5  # queries in one night that some studies spoil
DROPPED = 3  # studies in a row at which the peer leaves: it is the peer then, not the studies
MOST_DAYS = 31

log = get_logger(__name__)


class Nightly:
    """`tick` is called every NIGHTLY_S seconds and returns at once; `serve` is what a peer's thread does."""

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, *, clock: Callable[[], float] = time.time) -> None:
        self._config, self._ledger, self._spool, self._clock = config, ledger, spool, clock
        self._sources, self._times = Sources(ledger), Times.of(config)
        self._zone = ZoneInfo(config.schedule.timezone)
        self._stop = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self._open: dict[str, Association] = {}
        self._not_before: dict[str, tuple[float, int]] = {}  # peer -> when it is tried again, failures so far
        self._spoilt: dict[str, tuple[float, int]] = {}  # peer -> when the whole query is asked again, times so far

    def tick(self) -> None:
        """Start a thread for every peer that has something due and none running; write the report when it is time."""
        for peer in self._config.peer:
            running = self._threads.get(peer.name)
            if not self._stop.is_set() and (running is None or not running.is_alive()) and self._due(peer):
                self._threads[peer.name] = threading.Thread(target=self._serve, args=(peer,), daemon=True,
                                                            name=f"source-{peer.name}")
                self._threads[peer.name].start()
        self._report()

    def close(self, timeout_s: float) -> None:
        """Stop after what is on its way; a peer that goes on for longer is aborted."""
        self._stop.set()
        until = time.monotonic() + timeout_s
        for name, thread in self._threads.items():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive() and name in self._open:
                self._open[name].abort()
                thread.join(2.0)

    def serve(self, peer: Peer) -> None:
        """Ask the peer if that is due, then fetch what is due of it."""
        day = self._day(peer)
        if day is not None:
            self._ask(peer, date.fromisoformat(day))
        if self._ready(peer):
            self._fetch(peer)

    def _serve(self, peer: Peer) -> None:
        try:
            self.serve(peer)
        except Exception as error:
            if not self._stop.is_set():  # else the ledger is being closed; what was not recorded is done again
                log.exception("a source could not be served", action="source_error", peer=peer.name)
                self._failed(peer, f"internal error, see the log: {type(error).__name__}: {error}")

    # --- when

    def _due(self, peer: Peer) -> bool:
        return peer.query and self._ready(peer) and (
            self._day(peer) is not None or bool(self._sources.due(peer.name, now=self._clock())))

    def _ready(self, peer: Peer) -> bool:
        """Whether the pause after a failure is over; a clock that was set back does not prolong it."""
        return self._over(self._not_before.get(peer.name))

    def _over(self, pause: tuple[float, int] | None) -> bool:
        return pause is None or not self._clock() < pause[0] <= self._clock() + RETRY_MAX_S

    def _day(self, peer: Peer) -> str | None:
        """The day whose query is due; also when the node was off at its time."""
        if self._config.schedule.retrieve_at is None or not self._over(self._spoilt.get(peer.name)):
            return None
        return digest.due(memo(self._ledger, _day_key(peer)), now=self._clock(), zone=self._zone,
                          at=self._config.schedule.retrieve_at)

    def _failed(self, peer: Peer, problem: str) -> None:
        """The peer is left alone for a while, longer each time."""
        failures = self._not_before.get(peer.name, (0.0, 0))[1] + 1
        self._not_before[peer.name] = (self._clock() + _pause(failures), failures)
        self._say(peer, problem)

    def _say(self, peer: Peer, problem: str) -> None:
        if memo(self._ledger, reconcile.problem_key(peer.name)) != problem:
            self._note(peer, "failed", problem)
            log.warning("a source cannot be asked now", action="source_failed", peer=peer.name, reason=problem)

    def _note(self, peer: Peer, state: str, problem: str) -> None:
        with self._ledger.transaction():
            set_memo(self._ledger, reconcile.problem_key(peer.name), problem)
            self._ledger.event("source", now=self._clock(), code=peer.name, to_state=state, reason=problem)

    # --- ask

    def _ask(self, peer: Peer, day: date) -> None:
        """The nightly query of one peer; `day` is done when it was answered."""
        before = memo(self._ledger, _day_key(peer))
        last = datetime.fromtimestamp(self._clock(), self._zone).date()
        first = day - timedelta(days=self._config.schedule.retrieve_days)
        first = min(first, date.fromisoformat(before)) if before else first
        first = max(min(first, last), last - timedelta(days=MOST_DAYS))
        try:
            spoilt, asked = self._ask_studies(peer, first, last)
        except NodeError as error:
            if not self._stop.is_set():
                self._failed(peer, str(error))
            return
        problem = f"{len(spoilt)} of {asked} studies could not be asked for: {spoilt[0]}" if spoilt else ""
        times = self._spoilt.pop(peer.name, (0.0, 0))[1] + 1
        if problem and times < FULL_ATTEMPTS:  # what could be asked for is fetched meanwhile
            self._spoilt[peer.name] = (self._clock() + _pause(times), times)
            self._say(peer, problem)
            return
        self._not_before.pop(peer.name, None)
        with self._ledger.transaction():
            set_memo(self._ledger, _day_key(peer), day.isoformat())
            set_memo(self._ledger, reconcile.asked_key(peer.name), str(self._clock()))
            self._note(peer, "asked", problem)
        log.info("source asked", action="source_asked", peer=peer.name, studies=asked, since=first.isoformat())

    def _ask_studies(self, peer: Peer, first: date, last: date) -> tuple[list[str], int]:
        """(what went wrong, study by study; number of studies). Raises NodeError where nothing can be asked."""
        spoilt: list[str] = []
        in_a_row = 0
        with Asking(peer, self._times, stopped=self._stop.is_set) as asking:
            studies = asking.studies(study_date=date_range(first, last), modality="PT")
            for study in studies:
                try:
                    self._ask_study(asking, study)
                    in_a_row = 0
                except (PeerRefused, PeerUnreachable) as error:
                    in_a_row += 1
                    if self._stop.is_set() or in_a_row >= DROPPED:
                        raise
                    spoilt.append(f"{study.accession_number or study.study_uid}: {error}")
                except sqlite3.Error:
                    raise
                except Exception as error:  # an answer that trips a bug must not cost the other studies
                    log.exception("a study of a source cannot be judged", action="source_study_error", peer=peer.name,
                                  study=study.study_uid)
                    spoilt.append(f"{study.accession_number or study.study_uid}: {type(error).__name__}: {error}")
        return spoilt, len(studies)

    def _ask_study(self, asking: Asking, study: StudyFound) -> None:
        peer = asking.peer
        found = asking.series(study.study_uid, also=return_keys(self._config.route))
        if not any(series.modality in ("PT", "") for series in found):
            return
        verdicts = {series.series_uid: self._judge(peer, series) for series in found if series.modality in ("PT", "")}
        guided = False
        for series in found:
            verdict = verdicts.get(series.series_uid)
            if verdict is not None:
                state = self._saw(asking, study, series, verdict)
                guided |= verdict.wanted and verdict.guided and (state != "arrived" or self._unjudged(series))
        for series in found:
            if series.modality == "CT":
                self._saw(asking, study, series, Verdict(guided, "CT of the study of a PET that is fetched" if guided
                                                         else "no PET of its study is to be fetched"))

    def _judge(self, peer: Peer, series: SeriesFound) -> Verdict:
        named = Dataset()  # the UID alone: the answer may hold anything
        named.SeriesInstanceUID = series.series_uid
        job = self._ledger.job_of_derived(series.series_uid)
        if job is not None or is_own_output(named, self._config.node.uid_root):
            return Verdict(False, "own derived series")
        verdict = judge(series.header, self._config.route, calling_ae=peer.ae_title)
        here = self._series(series.series_uid)
        if verdict.wanted and here is not None and here["state"] == "ignored":
            return Verdict(False, str(here["reason"]))
        return verdict

    def _saw(self, asking: Asking, study: StudyFound, series: SeriesFound, verdict: Verdict) -> str:
        count = series.instances
        if count is None and verdict.wanted:
            count = len(asking.instances(study.study_uid, series.series_uid))
        here, now = self._series(series.series_uid), self._clock()
        quiet_at = now if here is None else min(here["last_at"], now) + self._config.completeness.quiet_s
        return self._sources.saw(
            SourceSeries(asking.peer.name, study.study_uid, series.series_uid, study.study_date,
                         series.modality or "PT", study.accession_number, count, verdict.wanted, verdict.reason),
            now=now, next_at=max(now, quiet_at) if verdict.wanted else None)

    def _series(self, series_uid: str) -> dict[str, Any] | None:
        rows = self._ledger.query("SELECT * FROM series WHERE series_uid = ?", (series_uid,))
        return dict(rows[0]) if rows else None

    def _unjudged(self, series: SeriesFound) -> bool:
        here = self._series(series.series_uid)
        return here is not None and here["state"] in ("receiving", "waiting")

    # --- fetch

    def _fetch(self, peer: Peer) -> None:
        """Everything due of a peer, one series after the other, until the peer cannot be reached."""
        for row in self._sources.due(peer.name, now=self._clock()):
            if self._stop.is_set():
                return
            try:
                spoken = self._fetch_one(peer, row)
            except PeerUnreachable as error:
                self._failed(peer, str(error))
                return
            if spoken and self._not_before.pop(peer.name, None) is not None:
                self._note(peer, "reached", "")

    def _fetch_one(self, peer: Peer, row: dict[str, Any]) -> bool:
        """One attempt at one series; whether the peer was spoken to. Raises PeerUnreachable where it cannot be."""
        uid, wanted = row["series_uid"], max(1, row["instances"] or 1)
        if self._arrived(row, "as many instances are here as the source says"):
            return False
        if row["state"] == "retrieving":
            here = self._sources.here(uid)
            self._again(row, f"{row['reason']}; {here} of {wanted} instances are here. Remedy: does {row['source']} "
                        f"send to our AE title {self._config.node.ae_title} at this node's address and port?")
            return False
        attempts, opened = row["attempts"] + 1, False

        def on_open(association: Association) -> None:
            nonlocal opened
            opened = True
            self._open[peer.name] = association
            self._sources.set(peer.name, uid, "retrieving", now=self._clock(), attempts=attempts,
                              next_at=self._clock() + query.RETRIEVE_TIMEOUT_S, reason=f"asked for by {peer.retrieve}")

        try:
            done = fetch(self._config, self._ledger, self._spool, Fetch(peer, row["study_uid"], uid), on_open=on_open,
                         clock=self._clock)
        except PeerUnreachable as error:
            if not opened:
                raise
            self._again({**row, "attempts": attempts}, str(error))
        except NodeError as error:
            self._again({**row, "attempts": attempts}, str(error))
        else:
            if not self._arrived(row, f"fetched by {peer.retrieve}"):
                self._sources.set(peer.name, uid, "retrieving", now=self._clock(), next_at=self._clock() + AWAIT_S,
                                  reason=done.said(peer.retrieve))
        finally:
            self._open.pop(peer.name, None)
        return True

    def _arrived(self, row: dict[str, Any], reason: str) -> bool:
        whole = self._sources.here(row["series_uid"]) >= max(1, row["instances"] or 1)
        if whole:
            self._sources.set(row["source"], row["series_uid"], "arrived", now=self._clock(), reason=reason)
        return whole

    def _again(self, row: dict[str, Any], reason: str) -> None:
        """Another attempt later, or given up until the source lists the series again."""
        attempts, now = row["attempts"], self._clock()
        if attempts >= ATTEMPTS:
            log.error("a series cannot be fetched", action="fetch_failed", source=row["source"],
                      series=row["series_uid"], reason=reason)
            self._sources.set(row["source"], row["series_uid"], "failed", now=now,
                              reason=f"{reason} (given up after {attempts} attempts)")
            return
        log.warning("a series will be fetched again", action="fetch_retry", source=row["source"],
                    series=row["series_uid"], reason=reason)
        self._sources.set(row["source"], row["series_uid"], "seen", now=now, reason=reason, attempts=attempts,
                          next_at=now + _pause(attempts))

    # --- report

    def _report(self) -> None:
        """Once a day at report_at, or an hour before the digest; the first start has no day to look back on."""
        day = digest.due(memo(self._ledger, "reconcile.day"), now=self._clock(), zone=self._zone,
                         at=self._config.schedule.report_at or _hour_before(self._config.alerts.digest_at))
        if day is None:
            return
        if memo(self._ledger, "reconcile.day"):
            found = reconcile.report(self._ledger, self._config, day=date.fromisoformat(day), now=self._clock())
            path = reconcile.write(found, self._spool.data_dir)
            log.info("reconciliation written", action="reconciled", path=str(path), complete=found.complete,
                     **found.totals())
        set_memo(self._ledger, "reconcile.day", day)


def _day_key(peer: Peer) -> str:
    return f"source.day:{peer.name}"


def _pause(failures: int) -> float:
    """Seconds: doubling from RETRY_S to RETRY_MAX_S.

    >>> _pause(1), _pause(3), _pause(50)
    (60.0, 240.0, 3600.0)
    """
    return min(RETRY_MAX_S, RETRY_S * 2.0 ** min(failures - 1, 20))


def _hour_before(at: str) -> str:
    """
    >>> _hour_before("07:00"), _hour_before("00:30")
    ('06:00', '23:30')
    """
    return f"{(int(at[:2]) - 1) % 24:02d}{at[2:]}"
