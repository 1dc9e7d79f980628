"""What the working process does by the clock: match, deliver, tidy. Its ticks never overlap."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from dicomnode.errors import NotFound
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.spool import Spool

__all__ = ["DELIVER_S", "MATCH_S", "TIDY_S", "build", "mend", "mend_times", "sweep_work"]

MATCH_S = 1.0
DELIVER_S = 1.0
TIDY_S = 3600.0
REPEAT_S = 60.0
SLACK = timedelta(seconds=1)

log = get_logger(__name__)


def build(ticks: Mapping[str, tuple[Callable[[], object], float]], *,
          once: Callable[[], object]) -> BackgroundScheduler:
    """A scheduler, not started yet. `ticks`: name -> (what is called, every so many seconds); `once` runs at its start.

    Each has a thread when it needs one: a tick that lasts long (a retrieval) holds up no other, and never overlaps
    with itself. One that is late runs once, not once for every tick missed (clock jumps).
    """
    # A match that loads a method for the first time outlasts a few ticks; that is no news.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    scheduler = BackgroundScheduler(
        timezone=UTC, executors={"default": ThreadPoolExecutor(len(ticks) + 1)},
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
    )
    for name, (call, seconds) in ticks.items():
        scheduler.add_job(_Steady(name, call), "interval", seconds=seconds, id=name, next_run_time=datetime.now(UTC))
    scheduler.add_job(once, id="prepare")
    return scheduler


def mend(scheduler: BackgroundScheduler) -> int:
    """After the clock was set back: ticks that would be waited for longer than their interval come now; how many."""
    now = datetime.now(UTC)
    late = [job for job in scheduler.get_jobs() if isinstance(job.trigger, IntervalTrigger)
            and job.next_run_time > now + job.trigger.interval + SLACK]
    for job in late:
        job.modify(next_run_time=now)
    return len(late)


def mend_times(ledger: Ledger, *, now: float, longest_wait_s: float) -> int:
    """After the clock was set back: what lies ahead of any wait there is becomes `now`, or it would be waited for.

    Instances cannot have come in the future (a minute is granted), nothing is due later than `longest_wait_s`
    from now. How many times were mended.
    """
    ahead, far = now + 60.0, now + longest_wait_s
    late = "SELECT series_uid FROM series WHERE state IN ('receiving', 'waiting') AND last_at > ?"
    mended = 0
    with ledger.transaction() as db:
        for update, values in (
            (f"UPDATE instance SET received_at = ? WHERE received_at > ? AND series_uid IN ({late})",
             (now, ahead, ahead)),
            ("UPDATE series SET last_at = ? WHERE state IN ('receiving', 'waiting') AND last_at > ?", (now, ahead)),
            ("UPDATE series SET until = ? WHERE state = 'waiting' AND until > ?", (now, far)),
            ("UPDATE job SET run_after = ? WHERE state IN ('queued', 'failed') AND run_after > ?", (now, far)),
            ("UPDATE delivery SET next_at = ? WHERE state = 'waiting' AND next_at > ?", (now, far)),
            ("UPDATE delivery SET prove_at = ? WHERE state = 'delivered' AND prove_at > ?", (now, far)),
            ("UPDATE commitment SET due_at = ? WHERE state = 'asked' AND due_at > ?", (now, far)),
        ):
            mended += db.execute(update, values).rowcount
    return mended


class _Steady:
    """A tick that may fail again and again, as while the disk is full: said once a minute, not at every tick."""

    def __init__(self, name: str, call: Callable[[], object], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._call, self._clock = name, call, clock
        self._said: dict[str, float] = {}

    def __call__(self) -> None:
        try:
            self._call()
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            if self._clock() - self._said.get(what, float("-inf")) >= REPEAT_S:
                self._said = {what: self._clock()}
                log.error(f"{self._name} failed and is tried again at its next turn", action="tick_failed",
                          tick=self._name, error=what, exc_info=not isinstance(error, sqlite3.Error))


def sweep_work(ledger: Ledger, spool: Spool) -> int:
    """Remove the work folders that no running job owns, and checkpoints that no job will go on from; how many.

    What else may go, and when: retention.
    """
    folders = list((spool.data_dir / "work").iterdir())
    running = {str(job["id"]) for job in ledger.running_jobs()}  # asked after the listing: a new job's folder is safe
    orphans = [folder for folder in folders if folder.is_dir() and folder.name.partition(".")[0] not in running]
    orphans += [folder for folder in (spool.data_dir / "checkpoints").iterdir() if not _goes_on(ledger, folder.name)]
    for folder in orphans:
        shutil.rmtree(folder, ignore_errors=True)
    if orphans:
        log.info("orphaned work folders removed", action="sweep_work", folders=len(orphans))
    return len(orphans)


def _goes_on(ledger: Ledger, name: str) -> bool:
    """Whether the job may run again without being asked for anew: held ones may be retried by a person."""
    try:
        return ledger.job(int(name))["state"] in ("queued", "running", "failed", "held")
    except (ValueError, NotFound):
        return False
